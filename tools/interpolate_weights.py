"""Blend the weights of a sharp and a faithful network of the same architecture."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import UserError, run, say

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
    """

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """Weights file for alpha 0, usually of the network trained for PSNR. Averaged (EMA) weights are
    preferred."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Weights file for alpha 1, usually of the network trained with a discriminator."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """File to write, .pth or .safetensors. With several alphas, NAME.pth becomes NAME_a0.20.pth,
    NAME_a0.50.pth…"""
    alpha: tuple[float, ...] = (0.8,)
    """Share of B, 0 to 1; several values write several files."""
    force: bool = False
    """Replace existing files."""


def main(options: Options) -> int:  # imports are local, so that --help does not load torch
    """Write one file per alpha."""
    from pipeline.models.weights import read_network, write_network

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
    sources = {
        name: (
            f"{path.name} (sha256 "
            f"{hashlib.sha256(path.expanduser().read_bytes()).hexdigest()[:16]})"
        )
        for name, path in (("a", options.a), ("b", options.b))
    }
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
        try:
            write_network(path, blend)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; free disk space or choose another "
                "--out"
            ) from error
        print(
            f"{path}: {1 - alpha:g} of {options.a.name} + {alpha:g} of {options.b.name} "
            f"({a.name} x{a.scale}, {path.stat().st_size / 1e6:.2f} MB)"
        )
    degraded = " --lr DEGRADED" if a.scale == 1 else ""
    say(f"Measure it:  python evaluate.py --model {path} --hr FOLDER{degraded}")
    return 0


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
