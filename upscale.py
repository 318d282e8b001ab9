"""Upscale images, folders of images, and videos with a trained network."""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Upscale images and videos, for example: python upscale.py photo.jpg holiday/ -o large"""

    inputs: Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT...")]
    """Images, videos, and folders. All images and videos below a folder are upscaled, and its
    structure is kept."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """Folder for the results, or a file (.png .jpg .webp .tif .mp4 .mkv .mov) for a single input
    file."""
    model: Annotated[Path | None, arg(help_behavior_hint="(default: newest run)")] = None
    """Weights file (.safetensors, .pth, .pt), run folder (its best averaged weights), or network
    file (.onnx, .xml)."""
    scale: Annotated[float | None, arg(help_behavior_hint="(default: the network's)")] = None
    """Exact factor: apply the network as often as needed, then resize (antialiased cubic)."""
    size: Annotated[
        str | None, arg(metavar="WxH", help_behavior_hint="(default: set by --scale)")
    ] = None
    """Exact size of the results, such as 1920x1080."""
    pre_downsample: int = 1
    """Shrink the input by this factor first, to try a network on an HR image."""
    format: Literal["png", "jpg", "webp", "tif"] = "png"
    """Format of the pictures if -o is a folder."""
    png_level: Annotated[int | None, arg(help_behavior_hint="(default: fast)")] = None
    """Compression level of PNG files, 0 to 12; the default, 2, takes a third of the time of 6."""
    force: bool = False
    """Overwrite existing results."""
    skip_existing: bool = False
    """Skip inputs whose results already exist."""
    tile: int = 0
    """Side of a tile in LR pixels; 0 chooses it from the free memory."""
    exact: bool = False
    """Let tiles overlap by the network's whole receptive field. By default the overlap is smaller
    and changes the result by at most half a level."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: FP16 on a GPU, or FP32 for 16-bit pictures; FP32 on a CPU."""
    backend: Literal["auto", "torch", "openvino", "onnx"] = "auto"
    """Library that runs the network. auto: PyTorch on a GPU; on a CPU, the fastest installed
    one whose conversion pays off."""
    device: str = "auto"
    """cpu, cuda, cuda:1…; auto uses the GPU if there is one."""
    compile: bool = False
    """On a GPU, compile the network for frequent sizes; worthwhile for long videos."""


def main(options: Options) -> int:
    # Imported here, so that --help does not wait for it.
    from pipeline.inference.command import run_upscaling

    return run_upscaling(**vars(options))


if __name__ == "__main__":
    cli.run(Options, main)
