"""What `evaluate.py` does: choose the model, measure it, print, write."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch

from pipeline.cli import UserError
from pipeline.evaluation import as_json, evaluate, find_pairs, format_table, write_picture
from pipeline.metrics.lpips import LpipsMetric
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import find_run, run_network_file

RESULTS_DIR = Path("results")


@dataclass(frozen=True)
class Model:
    """What is evaluated."""

    file: Path
    title: str
    saved: SavedNetwork

    def describe(self) -> dict[str, Any]:
        """What tells this model from every other, as JSON values."""
        return {"file": str(self.file), "sha256": hashlib.sha256(self.file.read_bytes()).hexdigest(),
                "name": self.saved.name, "params": self.saved.params, "metadata": self.saved.metadata}


def run_evaluation(hr: Path, lr: Path | None, model: Path | None, scale: int | None, json: Path | None,
                   out: Path | None, device: str, lpips: str = "off", lpips_weights: Path | None = None) -> int:
    """See `evaluate.py --help`. Returns the exit status."""
    chosen = choose_model(model)
    if scale is not None and scale != chosen.saved.scale:
        raise UserError(f"--scale {scale} contradicts the model, which is x{chosen.saved.scale}: {str(chosen.file)!r}; "
                        "leave --scale out or choose another --model")
    scale = chosen.saved.scale
    pairs = find_pairs(hr, lr, scale)
    place = choose_device(device)
    network = chosen.saved.build().to(place, memory_format=torch.channels_last)
    pictures = out or RESULTS_DIR / chosen.title
    numbers = json or pictures / "evaluation.json"
    for folder in (pictures, numbers.parent):  # before the work rather than after it
        _make_folder(folder)
    print(f"model: {chosen.file} ({chosen.saved.name} x{scale}) on {place}; {len(pairs)} images")
    metric = None
    if lpips != "off":
        metric = LpipsMetric(lpips, None if lpips_weights is None else str(lpips_weights), place)
    elif lpips_weights is not None:
        raise UserError(f"--lpips-weights {lpips_weights} without --lpips; say --lpips alex, squeeze or vgg")
    evaluation = evaluate(network, pairs, scale, place, metric,
                          visit=lambda compared: write_picture(compared, pictures, chosen.title))
    print(f"\n{format_table(evaluation)}\n")
    report = as_json(evaluation, chosen.describe())
    report["data"] = {"hr": str(hr), "lr": None if lr is None else str(lr),
                      "lr_made_by": "bicubic" if pairs[0].lr is None else None, "device": str(place)}
    numbers.write_text(dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"numbers:  {numbers}\npictures: {pictures}")
    return 0


def choose_model(model: Path | None) -> Model:
    """A weights file, or the best averaged weights of a run folder (`None`: of the newest run)."""
    if model is not None and not model.is_dir():
        return Model(model, model.stem, read_network(model))
    run_dir = model if model is not None else find_run()
    file = run_network_file(run_dir, "best", ema=True)
    return Model(file, run_dir.resolve().name, read_network(file))


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. `UserError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no device {device!r} here ({reason}); choose from auto, cpu, cuda") from error
    return place


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(folder)!r} ({error.strerror}); choose another") from error
