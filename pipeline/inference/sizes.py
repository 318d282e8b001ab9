"""Upscale pictures to the requested size: passes through the network, resizing, alpha and gray."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pipeline.cli import UserError
from pipeline.inference.backends import DEEP
from pipeline.inference.devices import free_bytes
from pipeline.inference.pictures import Picture
from pipeline.inference.tiles import Advance, Upscaler
from pipeline.libraries import cv2

LARGEST_SCALE = 64
LARGEST_SIDE = 1 << 20
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class TargetSize:
    """The requested size of a result.

    It is given as a factor `scale`, as `size` (height, width), or by default as the network's own
    scale. The input is first shrunk by the factor `pre_downsample`.
    """

    scale: float | None = None
    size: tuple[int, int] | None = None
    pre_downsample: int = 1

    @staticmethod
    def of(scale: float | None, size: str | None, pre_downsample: int) -> TargetSize:
        """Create it from the command line's values; raise `UserError` for impossible ones."""
        if scale is not None and size is not None:
            raise UserError("--scale and --size contradict each other; choose one")
        if scale is not None and not 0 < scale <= LARGEST_SCALE:
            raise UserError(f"--scale {scale:g} must be above 0 and at most {LARGEST_SCALE}")
        if not 1 <= pre_downsample <= LARGEST_SCALE:
            raise UserError(f"--pre-downsample {pre_downsample} must be from 1 to {LARGEST_SCALE}")
        if size is None:
            return TargetSize(scale, None, pre_downsample)
        found = re.fullmatch(r"(\d{1,7})[xX](\d{1,7})", size)
        width, height = (int(side) for side in found.groups()) if found else (0, 0)
        if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
            raise UserError(f"--size {size!r} must be WIDTHxHEIGHT in pixels, such as 1920x1080")
        return TargetSize(None, (height, width), pre_downsample)

    def start(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the network's first input; raise `UserError` if nothing is left."""
        height, width = height // self.pre_downsample, width // self.pre_downsample
        if not (height and width):
            raise UserError(
                f"has fewer than {self.pre_downsample} pixels along a side; omit --pre-downsample"
            )
        return height, width

    def end(self, height: int, width: int, network_scale: int) -> tuple[int, int]:
        """Return the size of the result for an input of this size, before any downsampling."""
        height, width = self.start(height, width)
        if self.size is not None:
            return self.size
        factor = network_scale if self.scale is None else self.scale
        return max(1, round(height * factor)), max(1, round(width * factor))

    def passes(self, height: int, width: int, network_scale: int) -> int:
        """Return how many times the network is applied to reach the size, at least once.

        A network of scale 1 is applied once; resizing does the rest.
        """
        if network_scale == 1:
            return 1
        start, end = self.start(height, width), self.end(height, width, network_scale)
        count = 1
        while any(
            side * network_scale**count < wanted for side, wanted in zip(start, end, strict=True)
        ):
            count += 1
            if network_scale**count > LARGEST_SCALE:
                return count - 1  # resizing does the rest
        return count

    def work(self, height: int, width: int, network_scale: int) -> float:
        """Return the total number of pixels that the network is shown."""
        height, width = self.start(height, width)
        passes = self.passes(
            height * self.pre_downsample, width * self.pre_downsample, network_scale
        )
        return height * width * sum(network_scale ** (2 * number) for number in range(passes))


def upscale_images(
    images: np.ndarray, target: TargetSize, upscaler: Upscaler, advance: Advance
) -> np.ndarray:
    """Upscale RGB images (N, height, width, 3), uint8 or uint16, to the size of `target`.

    The result has their type. Between two passes, and before resizing, the images have 16 bits.

    Raises:
        UserError: the result does not fit into the free memory.
    """
    own, (count, height, width, channels) = images.dtype, images.shape
    end = target.end(height, width, upscaler.scale)
    passes = target.passes(height, width, upscaler.scale)
    start = target.start(height, width)
    if target.pre_downsample > 1:
        factor = target.pre_downsample
        images = _resized(images[:, : start[0] * factor, : start[1] * factor], start, own)
    reached = tuple(side * upscaler.scale**passes for side in start)
    exact = reached == end
    needed = (
        count
        * channels
        * (math.prod(reached) * (own.itemsize if exact else 6) + math.prod(end) * own.itemsize)
    )
    if needed > free_bytes():
        raise UserError(
            f"{end[1]}x{end[0]} pixels, made from {reached[1]}x{reached[0]}, need "
            f"{needed / 2**30:.1f} GiB of memory, more than is free; split the image or choose a "
            "smaller size"
        )
    for number in range(1, passes + 1):
        kind = own if exact and number == passes else DEEP
        images = upscaler(images, kind, is_deep=own == DEEP, advance=advance)
    return images if exact else _resized(images, end, own)


def upscale_picture(
    picture: Picture, target: TargetSize, upscaler: Upscaler, advance: Advance
) -> Picture:
    """Upscale a picture to the size of `target`, keeping its mode, bit depth, profile and EXIF.

    Alpha goes through the network as a gray image of its own. Where it is constant in 3x3 pixels,
    its exact value is kept.
    """
    pixels = picture.pixels
    has_alpha = pixels.shape[2] in (2, 4)
    alpha = pixels[..., -1] if has_alpha else None
    colours = pixels[..., :-1] if has_alpha else pixels
    if alpha is not None:
        colours = _without_hidden_colours(colours, alpha)
    images = [_as_rgb(colours)]
    is_even = alpha is None or alpha.min() == alpha.max()
    if not is_even:
        images.append(_as_rgb(alpha[..., None]))
    large = upscale_images(np.stack(images), target, upscaler, advance)
    parts = [large[0] if colours.shape[2] == 3 else _as_gray(large[0])]
    if alpha is not None and is_even:
        parts.append(np.full((*large.shape[1:3], 1), alpha.flat[0], alpha.dtype))
    elif alpha is not None:
        start = target.start(*alpha.shape)
        if start != alpha.shape:
            factor = target.pre_downsample
            cut = _as_rgb(alpha[: start[0] * factor, : start[1] * factor, None])[None]
            alpha = np.ascontiguousarray(_resized(cut, start, alpha.dtype)[0, ..., 0])
        parts.append(_keep_constant_areas(_as_gray(large[1])[..., 0], alpha)[..., None])
    return replace(picture, pixels=np.concatenate(parts, axis=2))


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _as_gray(pixels: np.ndarray) -> np.ndarray:
    """Return BT.601 luma in the type of `pixels`, computed in bands of rows to save memory."""
    gray = np.empty((*pixels.shape[:2], 1), pixels.dtype)
    for top in range(0, len(pixels), 256):
        gray[top : top + 256, :, 0] = np.rint(pixels[top : top + 256].astype(np.float32) @ LUMA)
    return gray


def _resized(images: np.ndarray, size: tuple[int, int], kind: np.dtype) -> np.ndarray:
    """Resize by antialiased cubic interpolation and round to the levels of `kind`.

    It works plane by plane, because float images are large. Pillow's cubic filter on floats is the
    same as `images.cubic_resize` (Keys, a = -0.5), without torch.
    """
    levels, highest = np.iinfo(images.dtype).max, np.iinfo(kind).max
    result = np.empty((len(images), *size, images.shape[3]), kind)
    for index, image in enumerate(images):
        for channel in range(image.shape[2]):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            resized = np.array(plane.resize(size[::-1], Image.Resampling.BICUBIC))
            resized *= np.float32(highest / levels)
            result[index, ..., channel] = np.clip(
                np.rint(resized, out=resized), 0, highest, out=resized
            )
    return result


def _without_hidden_colours(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Give fully transparent pixels the colour of the nearest visible one.

    Otherwise their hidden colours would bleed into the visible edges.
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colours
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    palette = np.zeros((labels.max() + 1, colours.shape[2]), colours.dtype)
    palette[labels[~hidden]] = colours[~hidden]
    colours = colours.copy()
    colours[hidden] = palette[labels[hidden]]
    return colours


def _keep_constant_areas(large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Replace `large` with the exact value of `small` wherever that is constant in 3x3 pixels.

    Opaque areas must stay fully opaque.
    """
    square = np.ones((3, 3), np.uint8)
    even = (cv2.erode(small, square) == cv2.dilate(small, square)).astype(np.uint8)
    size = large.shape[::-1]
    is_even = cv2.resize(even, size, interpolation=cv2.INTER_NEAREST).astype(bool)
    return np.where(is_even, cv2.resize(small, size, interpolation=cv2.INTER_NEAREST), large)
