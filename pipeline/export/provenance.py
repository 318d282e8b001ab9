"""Where a run's weights come from and what was measured of them, as an exported file tells it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.cli import UserError
from pipeline.run_folder import LOG_FILE, MANIFEST_FILE, STATE_FILE, checkpoint_dir

DATASET_KEYS = ("lists_sha256", "contents_sha256", "training_files", "validation_files")
"""Of the dataset's identity in a checkpoint's manifest; `contents_sha256` is of the dataset tools' manifests."""


def provenance(run_dir: Path, step: int, license_name: str, *, is_averaged: bool) -> dict[str, str]:
    """`license`, `dataset_…` and `validation` (JSON: what the run's validation at `step` gave), where they are known.

    A run validates its averaged weights (EMA), so raw ones have no `validation`. `UserError` for a manifest or state
    that cannot be read.
    """
    folder = checkpoint_dir(run_dir, step)
    dataset = _read(folder / MANIFEST_FILE).get("identity", {}).get("dataset", {})
    told = {"license": license_name} if license_name else {}
    told |= {f"dataset_{key}": str(dataset[key]) for key in DATASET_KEYS if dataset.get(key) not in (None, "")}
    if is_averaged and (scores := _validated(run_dir, step, _read(folder / STATE_FILE))):
        told["validation"] = json.dumps(scores, sort_keys=True)
    return told


def evaluation_of(report: Path, weights: Path) -> str:
    """The mean scores of `weights` in a report of evaluate.py, as JSON: by benchmark, with the number of images.

    `UserError` for a file that is no such report, or that is of other weights (told by their SHA-256).
    """
    found = _read(report)
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        title = next((model["title"] for model in found["models"] if model["sha256"] == digest), None)
        if title is None:
            raise UserError(f"{str(report)!r} is of other weights than {str(weights)!r}; evaluate these first: "
                            f"python evaluate.py --model {weights} --json {report}")
        means = {entry["name"]: {"images": len(entry["images"]), **_numbers(entry["mean"][title])}
                 for entry in found["benchmarks"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(report)!r} is no report of evaluate.py ({type(error).__name__}: {error}); "
                        "give its evaluation.json") from error
    return json.dumps({"scale": found["scale"], "self_ensemble": found["self_ensemble"], "benchmarks": means},
                      sort_keys=True)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: round(value, 5) for key, value in values.items() if isinstance(value, (int, float))}


def _validated(run_dir: Path, step: int, state: dict[str, Any]) -> dict[str, float]:
    """PSNR-Y in dB, and LPIPS where it was measured; from the checkpoint, or else from the log in the run folder."""
    if state.get("best_step") == step:
        scores = {"psnr_y": state.get("best_psnr"), "lpips": state.get("best_lpips")}
        return {key: value for key, value in scores.items() if value is not None}
    log = run_dir / LOG_FILE
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        if '"validation"' in line:
            try:
                values = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            if values.get("event") == "validation" and values.get("step") == step:
                return {key: values[key] for key in ("psnr_y", "lpips") if values.get(key) is not None}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UserError(f"cannot read {str(path)!r} ({reason})") from error
    if not isinstance(values, dict):
        raise UserError(f"cannot read {str(path)!r} (it holds no keys and values)")
    return values
