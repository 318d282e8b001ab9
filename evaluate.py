"""Measure a model against bicubic upscaling on a folder of images: PSNR, SSIM, LPIPS and side-by-side pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Measure a model against bicubic upscaling, for example: python evaluate.py --hr Set5/x4"""
    hr: Path
    """Folder of HR images: NAME_HR.png beside NAME_LR.png, or any images, whose LR is made by bicubic downscaling."""
    lr: Annotated[Path | None, arg(help_behavior_hint="(default: in --hr, or made)")] = None
    """Folder of LR images: names as in --hr, or with _LR, xS or _xS behind (S the scale)."""
    model: Annotated[Path | None, arg(help_behavior_hint="(default: newest run)")] = None
    """Weights file (.safetensors, .pth, .pt), or run folder: its best averaged weights."""
    scale: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Expected scale: an error if the model's is another."""
    json: Annotated[Path | None, arg(help_behavior_hint="(default: evaluation.json in --out)")] = None
    """File for the numbers."""
    out: Annotated[Path | None, arg(help_behavior_hint="(default: results/<model name>)")] = None
    """Folder for the pictures, one per image."""
    lpips: Literal["off", "alex", "squeeze", "vgg"] = "off"
    """Measure LPIPS, too, with this trunk; papers report alex. Lower is better."""
    lpips_weights: Annotated[Path | None, arg(help_behavior_hint="(default: torchvision's cache)")] = None
    """File of that trunk's weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1…; auto is the GPU where there is one."""


def main(options: Options) -> int:  # imports here, so that --help need not wait for torch
    from pipeline.evaluation.command import run_evaluation
    return run_evaluation(**vars(options))


if __name__ == "__main__":
    cli.run(Options, main)
