"""Blend weights of the same network: two of them in a given ratio, or many chosen by validation."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.checkpoint_index import damage
from pipeline.cli import UserError, bar_options, run, say
from pipeline.files import file_sha256
from pipeline.run_folder import (
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    WEIGHTS_FILES,
    checkpoint_dir,
    checkpoint_steps,
    newest_stage,
)

if TYPE_CHECKING:
    from pipeline.models.weights import SavedNetwork

SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class Options:
    """Blend two weights files of the same network: every weight is (1 - alpha) A + alpha B.

    A network trained for PSNR is faithful but smooth; training it further with a discriminator
    makes it sharp, but it invents detail. Blended weights lie between the two at no extra cost,
    while blended images would keep the noise of one and the blur of the other (network
    interpolation: Wang et al., ESRGAN, 2018, section 3.4). B must have been trained from A, or both
    from the same weights; blends of unrelated networks are useless.

    alpha 0 is exactly A and alpha 1 exactly B. Compare several values by eye and by numbers:

    python tools/interpolate_weights.py psnr.pth gan.pth --alpha 0.2 0.5 0.8 --out blend.pth

    python evaluate.py --model blend_a0.80.pth --hr FOLDER

    With --search, the mean of several checkpoints of a run is searched for instead, by the run's
    own validation (greedy soup: Wortsman et al., Model soups, 2022): starting from the best one, a
    checkpoint joins the mean if that does not make it worse, the best ones first.

    python tools/interpolate_weights.py --search runs/vapsr_x2 --out soup.pth

    python tools/interpolate_weights.py --search a.pth b.pth c.pth --run runs/vapsr_x2 --out
    soup.pth
    """

    a: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="A", help_behavior_hint="(without --search)"),
    ] = None
    """Weights file for alpha 0, usually of the network trained for PSNR. Averaged (EMA) weights are
    preferred."""
    b: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="B", help_behavior_hint="(without --search)"),
    ] = None
    """Weights file for alpha 1, usually of the network trained with a discriminator."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = field(kw_only=True)
    """File to write, .pth or .safetensors. With several alphas, NAME.pth becomes NAME_a0.20.pth,
    NAME_a0.50.pth…"""
    alpha: tuple[float, ...] = (0.8,)
    """Share of B, 0 to 1; several values write several files."""
    force: bool = False
    """Replace existing files."""
    search: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN|FILE ...")] = ()
    """A run folder, for the averaged and the raw weights of all its checkpoints; or weights files,
    together with --run."""
    run: Path | None = None
    """With --search FILE ...: the run whose validation decides."""
    metric: str | None = None
    """With --search: judge by this metric (psnr, lpips, ssim_y, ...) instead of by the run's rule
    for the best step."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """With --search: the run's dataset; repeat it as for the run. Default: ~/dataset."""
    lr_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """With --search and data.degradation=paired: the folder of LR files, one per --dataset-dir.
    Default: beside HR."""


def main(options: Options) -> int:  # imports are local, so that --help does not load torch
    """Write one file per alpha, or the soup."""
    if options.search:
        return search(options)
    from pipeline.models.weights import read_network

    for name in ("run", "metric", "dataset_dir", "lr_dir"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} is for --search; omit it")
    if options.a is None or options.b is None:
        raise UserError("give two weights files, A and B, or --search RUN")
    files = _files(options)
    a, b = (read_network(path.expanduser()) for path in (options.a, options.b))
    for saved in (a, b):
        saved.build()
    difference = first_difference(a, b)
    if difference:
        raise UserError(
            f"{options.a} and {options.b} are not the same network: {difference}; only weights of "
            "the same network can be blended"
        )
    sources = {name: _source(path) for name, path in (("a", options.a), ("b", options.b))}
    for alpha, path in files.items():
        blend = replace(
            a,
            state_dict=interpolate(a.state_dict, b.state_dict, alpha),
            metadata={
                "made_by": "interpolate_weights: (1 - alpha) a + alpha b",
                "alpha": repr(alpha),
                **sources,
            },
        )
        _write(path, blend)
        print(
            f"{path}: {1 - alpha:g} of {options.a.name} + {alpha:g} of {options.b.name} "
            f"({a.name} x{a.scale}, {path.stat().st_size / 1e6:.2f} MB)"
        )
    degraded = " --lr DEGRADED" if a.scale == 1 else ""
    say(f"Measure it:  python evaluate.py --model {path} --hr FOLDER{degraded}")
    return 0


def _source(path: Path) -> str:
    return f"{path.name} (sha256 {file_sha256(path.expanduser())[:16]})"


def _write(path: Path, saved: SavedNetwork) -> None:
    from pipeline.models.weights import write_network

    try:
        write_network(path, saved)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; free disk space or choose another --out"
        ) from error


def search(options: Options) -> int:
    """Write the greedy soup of the weights that `--search` names."""
    from tqdm import tqdm

    from pipeline.models.weights import read_network
    from pipeline.training.judging import Judge, Row, table

    if options.a is not None or options.alpha != (0.8,):
        what = options.a or f"--alpha {' '.join(f'{alpha:g}' for alpha in options.alpha)}"
        raise UserError(f"{what} and --search: blend two files or search, not both")
    (out,) = _files(replace(options, alpha=(1.0,))).values()
    run_dir, files = _candidates(options)
    # All files are read before anything is measured; they stay on disk, because there may be many.
    first, title = None, ""
    for name, path in files.items():
        saved = read_network(path)
        saved.build()
        if first is None:
            first, title = saved, name
        elif difference := first_difference(first, saved):
            raise UserError(
                f"{title} and {name} are not the same network: {difference}; only weights of the "
                "same network can be averaged"
            )
    assert first is not None
    judge = Judge(run_dir, options.dataset_dir, options.lr_dir, options.metric)
    if first.scale != judge.recipe.scale:
        raise UserError(
            f"{title} upscales x{first.scale}, but the run {run_dir} has scale "
            f"{judge.recipe.scale}; give the run that they are of"
        )
    _check_writable(out)
    enlarged, rows = judge.enlarged_row(), {}
    total = (2 * len(files) - 1) * judge.images
    with tqdm(total=total, desc="measuring", unit="image", **bar_options()) as bar:
        for name, path in files.items():
            rows[name] = Row(name, judge.scores(read_network(path).build(), bar))
        ranked = sorted(
            rows.values(),
            key=functools.cmp_to_key(
                lambda one, other: (
                    judge.is_better(other.scores, one.scores)
                    - judge.is_better(one.scores, other.scores)
                )
            ),
        )
        members = [ranked[0].title]
        soup, scores = read_network(files[members[0]]), ranked[0].scores
        # In float32 until the end: half precision would be rounded with every ingredient.
        soup.state_dict = {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in soup.state_dict.items()
        }
        for row in ranked[1:]:
            share = 1 / (len(members) + 1)
            other = read_network(files[row.title]).state_dict
            mixed = replace(soup, state_dict=interpolate(soup.state_dict, other, share))
            found = judge.scores(mixed.build(), bar)
            is_in = not judge.is_better(scores, found)
            if is_in:
                members, soup, scores = [*members, row.title], mixed, found
            rows[row.title] = replace(row, note="in the soup" if is_in else "left out")
    rows[members[0]] = replace(rows[members[0]], note="in the soup")
    result = Row(f"soup of {len(members)}", scores)
    print(table([enlarged, *(rows[row.title] for row in ranked), result], result))
    metadata = {
        "made_by": "interpolate_weights: greedy soup, the mean of its ingredients",
        "ingredients": json.dumps([_source(files[name]) for name in members]),
        "ingredient_names": json.dumps(members),
        "chosen_by": f"{judge.rule()} on the run's {judge.images} validation images",
        "validation": json.dumps(scores, sort_keys=True),
        "measured": json.dumps({row.title: row.scores for row in rows.values()}, sort_keys=True),
    }
    kept = {key: soup.metadata[key] for key in ("recipe", "stage") if key in soup.metadata}
    _write(out, replace(soup, metadata={**kept, **metadata}))
    say(
        f"{out}: the mean of {', '.join(members)}, by the {judge.rule()} on {judge.images} "
        "validation images"
        if len(members) > 1
        else f"{out}: {members[0]} alone; no mean with another one was as good"
    )
    return 0


def _candidates(options: Options) -> tuple[Path, dict[str, Path]]:
    """Return the run that judges, and the weights files by name; raises `UserError`."""
    folders = [path for path in options.search if path.expanduser().is_dir()]
    if not folders:
        if options.run is None:
            raise UserError("--search FILE ...: name the run whose validation decides with --run")
        files = {str(path): path.expanduser() for path in options.search}
        if len(files) < 2 or len(files) < len(options.search):
            raise UserError("--search: give at least two different weights files, or a run folder")
        return options.run.expanduser(), files
    if len(options.search) > 1 or options.run is not None:
        raise UserError(
            f"--search {folders[0]}: give either one run folder, or weights files and --run"
        )
    run_dir = newest_stage(folders[0].expanduser())
    files = {}
    for step in checkpoint_steps(run_dir):
        folder = checkpoint_dir(run_dir, step)
        if fault := damage(folder, WEIGHTS_FILES):
            say(f"note: the checkpoint of step {step} is damaged ({fault}); it is left out")
            continue
        files |= {
            f"step {step}, averaged": folder / GENERATOR_EMA_FILE,
            f"step {step}, raw": folder / GENERATOR_FILE,
        }
    if not files:
        raise UserError(f"--search {folders[0]}: it has no intact checkpoint; choose another run")
    return run_dir, files


def _check_writable(out: Path) -> None:
    """Raise `UserError` unless a file can be made where `out` will be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror}; choose another folder, or change its permissions"
        ) from error


def interpolate(a: dict[str, Any], b: dict[str, Any], alpha: float) -> dict[str, Any]:
    """Blend two state dicts with the same names and shapes: (1 - alpha) a + alpha b.

    Computed in float32; dtypes are kept, or become float32 where `a` and `b` differ. Alpha 0 and 1
    give exactly `a` and `b`; values equal in both stay bit-identical; integer tensors are taken
    from the nearer one.
    """
    if alpha in (0, 1):
        return dict(b if alpha else a)
    blend = {}
    for key, tensor in a.items():
        other = b[key]
        if not tensor.is_floating_point():
            blend[key] = tensor if alpha < 0.5 else other
        elif tensor.dtype == other.dtype and tensor.equal(other):
            blend[key] = tensor
        else:
            mixed = tensor.float() * (1 - alpha) + other.float() * alpha
            blend[key] = mixed.to(tensor.dtype) if tensor.dtype == other.dtype else mixed
    return blend


def first_difference(a: SavedNetwork, b: SavedNetwork) -> str:
    """Reason why the two are not the same network; empty if they are."""
    if (a.name, a.scale) != (b.name, b.scale):
        return f"{a.name} x{a.scale} and {b.name} x{b.scale}"
    ours, theirs = _all_params(a), _all_params(b)
    for name in {**ours, **theirs}:
        # None lets the network choose; its tensors show the choice.
        if ours.get(name) != theirs.get(name) and None not in (ours.get(name), theirs.get(name)):
            return f"{name} is {ours[name]!r} and {theirs[name]!r}"
    for key in sorted(a.state_dict.keys() | b.state_dict.keys()):
        if key not in a.state_dict or key not in b.state_dict:
            return f"only one has the tensor {key!r}"
        if a.state_dict[key].shape != b.state_dict[key].shape:
            return (
                f"tensor {key!r} is {tuple(a.state_dict[key].shape)} and "
                f"{tuple(b.state_dict[key].shape)}"
            )
    return ""


def _all_params(saved: SavedNetwork) -> dict[str, Any]:
    """Arguments of a network's class, including defaults."""
    from pipeline.models import GENERATORS

    parameters = inspect.signature(GENERATORS[saved.name]).parameters.values()
    defaults = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name != "scale" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    if saved.name == "spandrel":
        from pipeline.models.spandrel import class_of, plain, usual_arguments

        arch = saved.params["arch"]
        own = usual_arguments(class_of(arch, saved.scale), arch, saved.scale)
        defaults |= {
            name: plain(value)
            for name, value in own.items()
            if value is not inspect.Parameter.empty
        }
    return {"colour_space": "rgb", **defaults, **saved.params}


def _files(options: Options) -> dict[float, Path]:
    """Map each alpha to its file; raises `UserError` for invalid options."""
    out = options.out.expanduser()
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {options.out}: the name must end in .pth or .safetensors")
    if not options.alpha:
        raise UserError("--alpha: give at least one number from 0 to 1, such as 0.8")
    for alpha in options.alpha:
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise UserError(f"--alpha {alpha:g}: must be from 0 (A alone) to 1 (B alone)")
        if options.alpha.count(alpha) > 1:
            raise UserError(f"--alpha {alpha:g} is given twice; omit one")
    files = {
        alpha: out
        if len(options.alpha) == 1
        else out.with_name(f"{out.stem}_a{_decimals(alpha)}{out.suffix}")
        for alpha in options.alpha
    }
    for path in files.values():
        if path.exists() and not options.force:
            raise UserError(
                f"{path} already exists; choose another --out, or replace it with --force"
            )
    return files


def _decimals(alpha: float) -> str:
    """At least two decimals, and as many as the number has."""
    short = f"{alpha:.2f}"
    return short if float(short) == alpha else repr(alpha)


if __name__ == "__main__":
    run(Options, main)
