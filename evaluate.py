"""Measure models against bicubic upscaling: PSNR, SSIM, LPIPS, DISTS, NIQE, pictures, a page."""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Measure models against bicubic upscaling, for example: python evaluate.py --hr Set5/x4"""

    hr: Annotated[Path | None, arg(help_behavior_hint="(default: none)")] = None
    """Folder of HR images: NAME_HR.png beside NAME_LR.png, or any images, from which LR images are
    made by bicubic downscaling."""
    lr: Annotated[Path | None, arg(help_behavior_hint="(default: in --hr, or made)")] = None
    """Folder of LR images: named as in --hr, optionally followed by _LR, xS or _xS (S: scale)."""
    benchmark: Annotated[
        tuple[Literal["set5", "set14", "b100", "urban100", "div2k", "pirm"], ...],
        arg(help_behavior_hint="(default: none)"),
    ] = ()
    """One or more standard benchmarks, which are folders in --benchmarks."""
    benchmarks: Path = Path("~/benchmark")
    """Folder that contains the benchmarks' folders, in any of the usual layouts."""
    model: Annotated[tuple[Path, ...], arg(help_behavior_hint="(default: newest run)")] = ()
    """Weights files (.safetensors, .pth, .pt), or run folders, whose best averaged weights are
    used. Several models are compared with each other."""
    self_ensemble: bool = False
    """Average over all eight rotations and reflections of the image ("+" in papers): eight times
    the work."""
    scale: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Expected scale; a model of another scale is an error."""
    json: Annotated[Path | None, arg(help_behavior_hint="(default: evaluation.json in --out)")] = (
        None
    )
    """File for the numbers. A .csv with one line per image and a .md with the table are written
    beside it."""
    out: Annotated[Path | None, arg(help_behavior_hint="(default: results/<model name>)")] = None
    """Folder for the pictures, one per image."""
    html: Annotated[Path | None, arg(help_behavior_hint="(default: none)")] = None
    """Folder for index.html, a single file with tables, a scatter plot, the best and worst crops
    and before/after sliders."""
    lpips: Literal["off", "alex", "squeeze", "vgg"] = "off"
    """Also measure LPIPS, with this trunk; papers report alex. Lower is better."""
    lpips_weights: Annotated[
        Path | None, arg(help_behavior_hint="(default: torchvision's cache)")
    ] = None
    """File of that trunk's weights."""
    dists: Literal["off", "vgg"] = "off"
    """Also measure DISTS, with this trunk, VGG16. Lower is better."""
    dists_weights: Annotated[
        Path | None, arg(help_behavior_hint="(default: torchvision's cache)")
    ] = None
    """File of that trunk's weights."""
    niqe: Annotated[Path | None, arg(help_behavior_hint="(default: not measured)")] = None
    """Also measure NIQE, which needs no HR: a file of the parameters of natural photographs, made
    by the tool that fits them, or BasicSR's. Lower is better."""
    device: str = "auto"
    """cpu, cuda, cuda:1…; auto uses the GPU if there is one."""
    procs: Annotated[int, arg(help_behavior_hint="(default: one per GPU)")] = 0
    """Processes that share the images. On CPUs the default is one, and several divide the cores
    among themselves."""


def main(options: Options) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no internal warnings from C++
    # Imported here, so that --help does not wait for torch.
    from pipeline.evaluation.command import run_evaluation

    return run_evaluation(options, [sys.executable, *sys.argv])


if __name__ == "__main__":
    # The deepspeed launcher may add --local_rank=N, which it also sets in the environment.
    cli.run(
        Options,
        main,
        [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")],
    )
