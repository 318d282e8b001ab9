"""The overlap that a network's tiles need, measured once for its weights and kept.

The receptive field says how far an output pixel can see: 172 LR pixels on every side for VapSR x4.
Distant pixels change the result by less than anybody can see, and tiles that overlap by the whole
receptive field do several times the work.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.inference.backends import Backend
from pipeline.inference.measurements import Measurements
from pipeline.inference.tiles import ALIGNMENT
from pipeline.libraries import cv2

ALLOWED = 0.5 / 255
"""The largest change in a result, with white as 1, that tiling may cause."""
MARGIN = 0.5
"""The share of `ALLOWED` to stay below on the measured images, because others may change more."""
STRIP = (64, 256)
"""Height and width (or width and height) of the images on which a network is measured."""
SHIFT = 2 * ALIGNMENT
NAME = "reach"


class Reach:
    """Finds by how many LR pixels tiles must overlap for results to change by at most `ALLOWED`.

    It is a `tiles.MeasuredHalo`.

    Args:
        backend: the network. The answer holds for its weights, whatever runs it.
        measured: what is known about the network; the answer is kept there.
    """

    def __init__(self, backend: Backend, measured: Measurements) -> None:
        self._backend, self._measured = backend, measured

    def __call__(self, image: np.ndarray | None) -> int | None:
        """Return the overlap, measured on `image`, RGB (height, width, 3), and synthetic images.

        Without an image, return the overlap only if it is known already, else `None`.
        """
        known = self._measured.get(NAME)
        if isinstance(known, int) and known > 0:
            return known
        if image is None:
            return None
        found = self._measure(image)
        self._measured.put(NAME, found)
        return found

    def _measure(self, image: np.ndarray) -> int:
        # The same image content is computed twice, from two pieces that are cut `shift` pixels
        # apart. Their results differ only by the influence of the pieces' edges.
        height, width = self._backend.window or STRIP
        stands = self._backend.window is None
        shift = math.lcm(shift_of(width), self._backend.grid if stands else 1)
        size = (height, width + shift)
        strips = [
            (natural(0, *size), False),
            (natural(1, *size), stands),
            (busiest(image, size), False),
        ]
        if stands:
            strips.append((busiest(image.transpose(1, 0, 2), size), True))
        changes = np.max(
            [
                self._changes(strip, width, shift, is_upright=is_upright)
                for strip, is_upright in strips
            ],
            axis=0,
        )
        allowed = max(MARGIN * ALLOWED, 1.01 * self._backend.step)
        return distance_within(changes, allowed) or self._backend.halo

    def _changes(
        self, strip: np.ndarray, width: int, shift: int, *, is_upright: bool
    ) -> np.ndarray:
        """Return the `edge_changes` of one strip (height, width + shift, 3).

        With `is_upright` the network is shown the transposed strip, which measures the vertical
        direction.
        """
        pieces = [strip[None, :, start : start + width] for start in (0, shift)]
        if is_upright:
            pieces = [piece.transpose(0, 2, 1, 3) for piece in pieces]
        left, right = (self._backend.floats(np.ascontiguousarray(piece)) for piece in pieces)
        if is_upright:
            left, right = left.transpose(0, 1, 3, 2), right.transpose(0, 1, 3, 2)
        return edge_changes(left, right, shift, self._backend.scale)


def shift_of(width: int) -> int:
    """Return by how many LR pixels two pieces of this width are shifted relative to each other.

    It is a multiple of `ALIGNMENT`, so that both have the same grid of attention windows.
    """
    return SHIFT if width >= 4 * SHIFT else ALIGNMENT


def edge_changes(left: np.ndarray, right: np.ndarray, shift: int, scale: int) -> np.ndarray:
    """Return the largest change that a piece's edge causes, by distance from the edge in LR pixels.

    `left` and `right` are the network's results for two pieces of one image, the second cut `shift`
    LR pixels further to the right; (N, 3, height, width) with white as 1. The distance is that to
    the nearer edge. The returned values never increase with the distance.
    """
    same = left.shape[-1] - shift * scale
    difference = np.abs(
        left[..., -same:].astype(np.float32) - right[..., :same].astype(np.float32)
    ).max((0, 1, 2))
    difference = difference.reshape(-1, scale).max(1)
    by_distance = np.maximum(difference, difference[::-1])[: (len(difference) + 1) // 2]
    return np.maximum.accumulate(by_distance[::-1])[::-1]


def distance_within(changes: np.ndarray, allowed: float) -> int | None:
    """Return the smallest multiple of `ALIGNMENT` at which changes are at most `allowed`.

    `None` if there is none within the measured distances.
    """
    places = range(ALIGNMENT, len(changes) - ALIGNMENT // 2, ALIGNMENT)
    return next((place for place in places if changes[place] <= allowed), None)


def busiest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the part (height, width) of an image with the strongest contrasts, as uint8.

    An image that is too small is extended by reflection.
    """
    pixels = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    below, right = (max(0, wanted - side) for wanted, side in zip(size, pixels.shape, strict=False))
    pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), "symmetric")
    gray = pixels[..., 1].astype(np.float32)
    contrast = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    sums = cv2.boxFilter(contrast, -1, (size[1] - 1, size[0] - 1), anchor=(0, 0), normalize=False)
    sums = sums[: len(pixels) - size[0] + 1, : pixels.shape[1] - size[1] + 1]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return pixels[top : top + size[0], left : left + size[1]]


def natural(seed: int, height: int, width: int) -> np.ndarray:
    """Return a synthetic uint8 RGB image with soft shades, hard edges, fine texture and noise."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for side in (64, 24, 8, 3):  # shades of several sizes, large ones stronger
        shape = (height // side + 2, width // side + 2, 3)
        shades = random.normal(0, 12 * side**0.35, shape).astype(np.float32)
        image += cv2.resize(shades, (width, height), interpolation=cv2.INTER_CUBIC)
    image += 128
    for _ in range(height * width // 1500):  # foreground polygons, light and dark
        centre = np.array([random.integers(0, width), random.integers(0, height)])
        corners = (centre + random.normal(0, 18, (random.integers(3, 7), 2))).astype(np.int32)
        cv2.fillPoly(image, [corners], random.uniform(0, 255, 3).tolist())
    rows, columns = np.mgrid[:height, :width]
    for _ in range(4):  # stripes, as on roofs, in fences and in text
        angle, period = random.uniform(0, np.pi), random.uniform(2.2, 7)
        stripes = np.sign(
            np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period)
        )
        top, left = random.integers(0, max(1, height - 32)), random.integers(0, max(1, width - 64))
        patch = (slice(top, top + 32), slice(left, left + 64))
        image[patch] += 60 * stripes[patch][..., None]
    image += random.normal(0, 4, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
