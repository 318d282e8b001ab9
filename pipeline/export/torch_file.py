"""Export a run's generator to .pth and .safetensors files, and verify both by reading them back."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint_index import read_index
from pipeline.cli import UserError, say
from pipeline.files import check_utf8, file_sha256, parse_json
from pipeline.metrics import METRICS
from pipeline.models import GENERATORS
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    LOG_FILE,
    Step,
    checkpoint_dir,
    choose_step,
    find_run,
    newest_stage,
    read_state,
    run_network_file,
)

# The origin and the scores of a run's weights, for the metadata of exported files.

DATASET_KEYS = ("lists_sha256", "contents_sha256", "training_files", "validation_files")
"""Keys of the dataset's identity in a checkpoint's index; `contents_sha256` comes from the dataset
tools' manifests."""


def provenance(run_dir: Path, step: int, license_name: str, *, is_averaged: bool) -> dict[str, str]:
    """Return `license`, `dataset_…` and `validation` for the metadata, if they are known.

    `validation` is JSON with the scores of the run's validation at `step`. A run validates its
    averaged weights (EMA), so raw ones have none. The checkpoint must be intact.
    """
    dataset = read_index(checkpoint_dir(run_dir, step))["identity"].get("dataset", {})
    found = {"license": license_name} if license_name else {}
    found |= {
        f"dataset_{key}": str(dataset[key])
        for key in DATASET_KEYS
        if dataset.get(key) not in (None, "")
    }
    if is_averaged and (scores := _validated(run_dir, step, read_state(run_dir, step))):
        found["validation"] = json.dumps(scores, sort_keys=True)
    return found


def evaluation_of(report: Path, weights: Path) -> str:
    """Return the mean scores of `weights` in a report of evaluate.py, as JSON by benchmark.

    Each benchmark includes its number of images.

    Raises:
        UserError: the file is not such a report, or it is about other weights (by their SHA-256).
    """
    found = _read(report)
    try:
        digest = file_sha256(weights)
        title = next(
            (model["title"] for model in found["models"] if model["sha256"] == digest), None
        )
        if title is None:
            raise UserError(
                f"{str(report)!r} is about weights other than {str(weights)!r}; evaluate these "
                f"first: python evaluate.py --model {weights} --json {report}"
            )
        means = {
            entry["name"]: {"images": len(entry["images"]), **_numbers(entry["mean"][title])}
            for entry in found["benchmarks"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(report)!r} is not a report of evaluate.py ({type(error).__name__}: {error}); "
            "give its evaluation.json"
        ) from error
    return json.dumps(
        {"scale": found["scale"], "self_ensemble": found["self_ensemble"], "benchmarks": means},
        sort_keys=True,
    )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: round(value, 5) for key, value in values.items() if isinstance(value, (int, float))
    }


def _validated(run_dir: Path, step: int, state: dict[str, Any]) -> dict[str, float]:
    """Return the validation's scores by metric, from the checkpoint or else from the run's log."""
    if state.get("best_step") == step:
        scores = {name: state.get(f"best_{metric.key}") for name, metric in METRICS.items()}
        return {key: value for key, value in scores.items() if value is not None}
    log = run_dir / LOG_FILE
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        if '"validation"' in line:
            try:
                values = parse_json(line)
            except ValueError:  # truncated by a kill
                continue
            if values.get("event") == "validation" and values.get("step") == step:
                return {name: values[name] for name in METRICS if values.get(name) is not None}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UserError(f"cannot read {str(path)!r} ({reason})") from error
    if not isinstance(values, dict):
        raise UserError(f"cannot read {str(path)!r} (it is not a JSON object)")
    return values


# Writing and reading back.

EXPORT_DIR = "export"
FORMATS = (".pth", ".safetensors")


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    files: list[Path]
    """One per format of `FORMATS`."""
    saved: SavedNetwork
    """The content of the files."""


def run_export(
    run_dir: Path | None,
    step: Step,
    raw: bool,
    half: bool,
    license: str,
    evaluation: Path | None,
    output_dir: Path | None,
    average: SavedNetwork | None = None,
) -> int:
    """Export as `export_trained_model.py --help` describes; return the exit status.

    It is 1 if a file does not contain what was written.
    """
    run_dir = find_run() if run_dir is None else run_dir
    exported = export_run(
        run_dir,
        step,
        raw=raw,
        half=half,
        license_name=license,
        evaluation=evaluation,
        output_dir=output_dir,
        average=average,
    )
    faults = verify(exported)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return 1
    saved, file = exported.saved, exported.files[0]
    print(
        f"{saved.name} x{saved.scale} of run {run_dir}, step {saved.metadata['step']}, "
        f"{saved.metadata['weights']} weights in {saved.metadata['dtype']}, "
        f"{int(saved.metadata['parameters']):,} parameters:"
    )
    for path in exported.files:
        print(f"  {path}  ({path.stat().st_size / 1e6:.2f} MB)")
    if "license" not in saved.metadata:
        print(
            "note: the files name no licence; add yours with --license, such as --license CC-BY-4.0"
        )
    unseen = {
        name: value
        for name, value in getattr(GENERATORS[saved.name], "UNSEEN", {}).items()
        if saved.params.get(name, value) != value
    }
    if unseen:
        print(
            "note: other programs do not see "
            f"{_listed({name: saved.params[name] for name in unseen})} in the tensors; they would "
            f"compute other images, with {_listed(unseen)}"
        )
    print("Verified: both files were read back bit-identical, and the network runs.")
    degraded = " --lr DEGRADED" if exported.saved.scale == 1 else ""
    say(f"Measure it:  python evaluate.py --model {file} --hr FOLDER{degraded}")
    say(
        "In Python:   from pipeline.models.weights import read_network\n"
        f"             network = read_network({str(file)!r}).build()"
    )
    return 0


def _listed(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())


def export_run(
    run_dir: Path,
    step: Step = "best",
    *,
    raw: bool = False,
    half: bool = False,
    license_name: str = "",
    evaluation: Path | None = None,
    output_dir: Path | None = None,
    average: SavedNetwork | None = None,
) -> Exported:
    """Write the run's generator at `step` to `<recipe>_x<scale>[_raw][_ema0.07][_fp16]`, in both
    formats.

    The files' metadata contains the origin of the weights, see `provenance`. To check the files,
    call `verify`.

    Args:
        run_dir: a run folder, or one of its checkpoints, which then is the step.
        step: "best", "newest", or a number.
        raw: export the raw weights, not the averaged ones (EMA).
        half: store the parameters in float16; buffers are left unchanged.
        license_name: licence of the weights, for the metadata.
        evaluation: report of evaluate.py on these weights, whose means are added to the metadata.
        output_dir: folder for the files; `<run_dir>/export` by default.
        average: weights to export instead of the checkpoint's own: an average of another length
            that ends at `step`, with its origin in its metadata.

    Raises:
        UserError: the run has no such checkpoint, its weights are broken, or the folder cannot be
            written.
    """
    run_dir, step = checkpoint_apart(Path(run_dir), step)
    number = choose_step(run_dir, step)
    weights = run_network_file(run_dir, number, ema=not raw)
    saved = read_network(weights) if average is None else average
    # Fails for tensors that do not fit or are not finite, before anything is written.
    network = saved.build()
    parameters = dict(network.named_parameters())
    state_dict = saved.state_dict
    if half:
        state_dict = {
            key: tensor.half() if key in parameters else tensor
            for key, tensor in state_dict.items()
        }
    recipe = _recipe_name(saved, run_dir)
    saved = replace(
        saved,
        state_dict=state_dict,
        metadata={
            **saved.metadata,
            "recipe": recipe,
            "step": str(number),
            "dtype": "float16" if half else _dtype(state_dict),
            "parameters": str(sum(parameter.numel() for parameter in parameters.values())),
            **provenance(
                newest_stage(run_dir),
                number,
                license_name,
                is_averaged=not raw and average is None,
            ),
            **({"weights": "raw" if raw else "averaged (EMA)"} if average is None else {}),
            **({} if evaluation is None else {"evaluation": evaluation_of(evaluation, weights)}),
        },
    )
    folder = run_dir / EXPORT_DIR if output_dir is None else Path(output_dir)
    check_utf8(folder, "safetensors")  # before the first file is written
    named = recipe if recipe.endswith(f"_x{saved.scale}") else f"{recipe}_x{saved.scale}"
    width = saved.metadata.get("ema_sigma_rel", "")
    kind = "_raw" if raw else f"_ema{width}" if width else ""
    stem = f"{named}{kind}{'_fp16' if half else ''}"
    files = [folder / (stem + suffix) for suffix in FORMATS]
    try:
        for file in files:
            write_network(file, saved)
    except OSError as error:
        raise UserError(
            f"cannot write into {str(folder)!r} ({error.strerror}); choose another --output-dir"
        ) from error
    return Exported(files, saved)


def checkpoint_apart(path: Path, step: Step) -> tuple[Path, Step]:
    """Split `run/checkpoints/step-00000400` into the run folder and step 400."""
    named = re.fullmatch(r"step-(\d{8,})", path.name)
    if not named or path.parent.name != CHECKPOINTS_DIR:
        return path, step
    if step not in ("best", int(named[1])):
        raise UserError(
            f"{str(path)!r} is step {int(named[1])}, not --step {step}; omit one of them"
        )
    return path.parents[1], int(named[1])


def verify(exported: Exported) -> list[str]:
    """Read the files back; return a line for each one that differs or whose network fails.

    Tensors are compared bit for bit.
    """
    lr = (
        torch.arange(3 * 16 * 16, dtype=torch.int64)
        .remainder(256)
        .to(torch.uint8)
        .view(1, 3, 16, 16)
    )
    faults = []
    for file in exported.files:
        found = read_network(file)
        if not _equal_bits(found.state_dict, exported.saved.state_dict):
            faults.append(
                f"{str(file)!r} does not contain the tensors that were written; check the disk"
            )
        elif replace(found, state_dict={}) != replace(exported.saved, state_dict={}):
            faults.append(
                f"{str(file)!r} does not contain the metadata that was written; check the disk"
            )
        else:
            with torch.inference_mode():
                sr = found.build()(lr)
            side = 16 * found.scale
            if sr.shape != (1, 3, side, side) or not torch.isfinite(sr).all():
                faults.append(
                    f"the network in {str(file)!r} fails: it turns 16x16 pixels into "
                    f"{tuple(sr.shape)}, "
                    f"{'finite' if torch.isfinite(sr).all() else 'with NaN or infinity'}"
                )
    return faults


def _equal_bits(found: dict[str, Tensor], written: dict[str, Tensor]) -> bool:
    return found.keys() == written.keys() and all(
        found[key].dtype == tensor.dtype
        and found[key].shape == tensor.shape
        and torch.equal(
            found[key].contiguous().flatten().view(torch.uint8),
            tensor.contiguous().flatten().view(torch.uint8),
        )
        for key, tensor in written.items()
    )


def _dtype(state_dict: dict[str, Tensor]) -> str:
    """Return the dtype of the first floats; some networks start with tables of integers."""
    weights = next(tensor for tensor in state_dict.values() if tensor.is_floating_point())
    return str(weights.dtype).removeprefix("torch.")


def _recipe_name(saved: SavedNetwork, run_dir: Path) -> str:
    """Return the recipe's name from the weights' metadata, or else the name of the run folder."""
    name = saved.metadata.get("recipe", "")
    return name if re.fullmatch(r"[A-Za-z0-9._-]+", name) else run_dir.resolve().name
