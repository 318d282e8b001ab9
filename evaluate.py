"""Measure models against bicubic upscaling on benchmarks or any images: PSNR, SSIM, LPIPS,
pictures, an HTML page."""

from __future__ import annotations

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
    """Folder of HR images: NAME_HR.png beside NAME_LR.png, or any images, whose LR is made by
    bicubic downscaling."""
    lr: Annotated[Path | None, arg(help_behavior_hint="(default: in --hr, or made)")] = None
    """Folder of LR images: names as in --hr, or with _LR, xS or _xS behind (S the scale)."""
    benchmark: Annotated[
        tuple[Literal["set5", "set14", "b100", "urban100", "div2k", "pirm"], ...],
        arg(help_behavior_hint="(default: none)"),
    ] = ()
    """Benchmarks of the literature, one or several, as folders in --benchmarks."""
    benchmarks: Path = Path("~/benchmark")
    """Folder of the benchmarks' folders, in any of the usual layouts."""
    model: Annotated[tuple[Path, ...], arg(help_behavior_hint="(default: newest run)")] = ()
    """Weights files (.safetensors, .pth, .pt), or run folders: their best averaged weights. Several
    are compared."""
    self_ensemble: bool = False
    """Mean over the image turned and mirrored in all eight ways ("+" in papers): eight times the
    work."""
    scale: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Expected scale: an error if a model's is another."""
    json: Annotated[Path | None, arg(help_behavior_hint="(default: evaluation.json in --out)")] = (
        None
    )
    """File for the numbers; a .csv with a line per image and a .md with the table are written
    beside it."""
    out: Annotated[Path | None, arg(help_behavior_hint="(default: results/<model name>)")] = None
    """Folder for the pictures, one per image."""
    html: Annotated[Path | None, arg(help_behavior_hint="(default: none)")] = None
    """Folder for index.html: tables, scatter, worst and best crops, sliders before/after, all in
    the one file."""
    lpips: Literal["off", "alex", "squeeze", "vgg"] = "off"
    """Measure LPIPS, too, with this trunk; papers report alex. Lower is better."""
    lpips_weights: Annotated[
        Path | None, arg(help_behavior_hint="(default: torchvision's cache)")
    ] = None
    """File of that trunk's weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1…; auto is the GPU where there is one."""
    procs: Annotated[int, arg(help_behavior_hint="(default: one per GPU)")] = 0
    """Processes that share the images. On a CPU one is the default, and each gets its part of the
    cores."""


def main(options: Options) -> int:  # imports here, so that --help need not wait for torch
    from pipeline.evaluation.command import run_evaluation

    return run_evaluation(options, [sys.executable, *sys.argv])


if __name__ == "__main__":
    # The deepspeed launcher may add --local_rank=N, which it also puts into the environment.
    cli.run(
        Options,
        main,
        [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")],
    )
