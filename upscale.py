"""Upscale images, folders of them, and videos with a trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Upscale images and videos, for example: python upscale.py photo.jpg holiday/ -o large"""

    inputs: Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT...")]
    """Images, videos, and folders: everything below them, structure kept."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """Folder for the results; or a file (.png .jpg .webp .tif .mp4 .mkv .mov) for one input
    file."""
    model: Annotated[Path | None, arg(help_behavior_hint="(default: newest run)")] = None
    """Weights file (.safetensors, .pth, .pt), run folder: its best averaged weights; or network
    file (.onnx, .xml)."""
    scale: Annotated[float | None, arg(help_behavior_hint="(default: the network's)")] = None
    """Exact factor: the network as often as needed, then antialiased cubic."""
    size: Annotated[str | None, arg(metavar="WxH", help_behavior_hint="(default: by --scale)")] = (
        None
    )
    """Exact size of the results, such as 1920x1080."""
    pre_downsample: int = 1
    """Shrink the input by this factor first: to try a network on an HR image."""
    format: Literal["png", "jpg", "webp", "tif"] = "png"
    """Of the pictures in a folder of results."""
    png_level: Annotated[int | None, arg(help_behavior_hint="(default: fast)")] = None
    """How hard PNG files are compressed, 0 to 12; the default, 2, takes a third of the time that 6
    takes."""
    force: bool = False
    """Overwrite what is there."""
    skip_existing: bool = False
    """Leave results alone that are there, and do the others."""
    tile: int = 0
    """LR pixels along a tile's side; 0: by the memory."""
    exact: bool = False
    """Let tiles overlap by all that the network sees, and not by what changes the result by half a
    level at most."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: FP16 on a GPU, but FP32 for 16-bit pictures; FP32 on a CPU."""
    backend: Literal["auto", "torch", "openvino", "onnx"] = "auto"
    """What computes. auto: PyTorch on a GPU, the fastest that is installed and worth its conversion
    on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1…; auto is the GPU where there is one."""
    compile: bool = False
    """On a GPU, compile the network for sizes that come often: for long videos."""


def main(options: Options) -> int:  # imports here, so that --help need not wait
    from pipeline.inference.command import run_upscaling

    return run_upscaling(**vars(options))


if __name__ == "__main__":
    cli.run(Options, main)
