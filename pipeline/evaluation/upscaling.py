"""Run a network over one image: whole, in tiles where it does not fit, or as the mean over the eight symmetries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.images import to_bytes

# LR pixels that are upscaled in one piece; larger images go in tiles. VapSR then peaks at about 1.5 GB.
WHOLE_IMAGE_PIXELS = 1024 * 1024


@torch.inference_mode()
def upscale(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str,
            self_ensemble: bool = False) -> Tensor:
    """uint8 RGB 1 x 3 x H x W -> uint8 RGB 1 x 3 x scale*H x scale*W on the CPU, whatever the size.

    Above `WHOLE_IMAGE_PIXELS`, and where memory runs out, in tiles that see as much of their surroundings as the
    network ever looks at, so that the result is the same as in one piece. With `self_ensemble` it is the mean of the
    network's outputs for the image turned and mirrored in all eight ways, rounded once. `UserError` where not even the
    smallest tile fits.
    """
    pixels = WHOLE_IMAGE_PIXELS
    while True:
        sr = _upscale_within(network, lr, scale, device, self_ensemble, pixels)
        if sr is not None:
            return sr
        pixels = min(pixels, lr.shape[-2] * lr.shape[-1]) // 4
        if pixels < 9 * network.receptive_radius**2:  # such a tile would be no smaller than the last one
            raise UserError(f"no memory on {device} for an image of {lr.shape[-1]}x{lr.shape[-2]} LR pixels, in tiles "
                            "either; try --device cpu or end other programs")
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def symmetries(images: Tensor) -> Iterator[tuple[Tensor, tuple[bool, int]]]:
    """The image turned and mirrored in all eight ways, each with what `undo` wants; the first is the image itself."""
    for mirrored in (False, True):
        for turns in range(4):
            yield torch.rot90(images.flip(-1) if mirrored else images, turns, (-2, -1)), (mirrored, turns)


def undo(images: Tensor, symmetry: tuple[bool, int]) -> Tensor:
    """Turn and mirror an image back."""
    mirrored, turns = symmetry
    images = torch.rot90(images, -turns, (-2, -1))
    return images.flip(-1) if mirrored else images


def _upscale_within(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str, self_ensemble: bool,
                    pixels: int) -> Tensor | None:
    """`upscale` in pieces of about `pixels` LR pixels at the most; None where memory runs out."""
    try:
        if lr.shape[-2] * lr.shape[-1] <= pixels:
            return _upscale_piece(network, lr, device, self_ensemble)
        return _upscale_tiles(network, lr, scale, device, self_ensemble, pixels)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and the CPU's allocator has none of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    return None


def _upscale_tiles(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str, self_ensemble: bool,
                   pixels: int) -> Tensor:
    height, width = lr.shape[-2:]
    halo = network.receptive_radius
    tile = max(halo, int(pixels**0.5) - 2 * halo)
    sr = torch.empty((1, 3, height * scale, width * scale), dtype=torch.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(0, top - halo), max(0, left - halo)
            piece = _upscale_piece(network, lr[..., first_row : bottom + halo, first_column : right + halo], device,
                                   self_ensemble)
            sr[..., top * scale : bottom * scale, left * scale : right * scale] = piece[
                ..., (top - first_row) * scale : (bottom - first_row) * scale,
                (left - first_column) * scale : (right - first_column) * scale]
    return sr


def _upscale_piece(network: nn.Module, lr: Tensor, device: torch.device | str, self_ensemble: bool = False) -> Tensor:
    # TF32 would cost the digits that papers report; benchmark mode searches anew for every image size.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        lr = lr.to(device)
        if not self_ensemble:
            return to_bytes(network(lr.contiguous(memory_format=torch.channels_last))).cpu()
        outputs = (undo(network(turned.contiguous(memory_format=torch.channels_last)).float(), symmetry)
                   for turned, symmetry in symmetries(lr))
        return to_bytes(sum(outputs) / 8).cpu()
