"""Helpers for the tests of degradation steps: draws, and what must hold for every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from conftest import photograph
from pipeline.data.degradations.host import Workspace
from pipeline.data.degradations.steps import STEPS
from pipeline.data.degradations.steps.base import NUMBERS, Canvas, Draws

# Where a workspace has the results of other steps.
RESULTS = [
    "bytes",
    "decoded",
    "detail",
    "filtered",
    "levels",
    "luma",
    "matlab",
    "median",
    "resized",
    "sharpened",
]
CANVAS = Canvas(size=(96, 120), hr=(96, 120), scale=4)


def draws_of(
    name: str, section: Mapping[str, Any], count: int, canvas: Canvas = CANVAS
) -> list[dict[str, Any]]:
    """Return what the step `name` with a recipe's `section` draws for `count` samples."""
    step = STEPS[name]
    spec = step.Spec.model_validate(section)
    random = np.random.default_rng(5)
    return [
        step.draw(spec, Draws(iter(row.tolist())), canvas)
        for row in random.random((count, NUMBERS))
    ]


def shares(drawn: list[dict[str, Any]], key: str = "kind") -> dict[str, float]:
    """Return the share of the samples that has each value of `key`."""
    values = [str(one.get(key)) for one in drawn]
    return {value: values.count(value) / len(values) for value in sorted(set(values))}


def applied(name: str, image: np.ndarray, drawn: Mapping[str, Any]) -> np.ndarray:
    """Return the step's result as an array of its own; `image` is not changed."""
    return STEPS[name].apply(image.copy(), dict(drawn), Workspace()).copy()


def unclipped(seed: int, height: int, width: int) -> np.ndarray:
    """Return a photograph whose float32 levels reach from about -20 to 280."""
    return photograph(seed, height, width).astype(np.float32) * (300 / 255) - 20


def moved(image: np.ndarray, offset: Sequence[float]) -> np.ndarray:
    """Move an image down and to the right by Keys' cubic (a = -0.5), borders repeated, in float64.

    Each pixel is the sum over the four pixels around the place that it comes from, per axis.
    """
    image = image.astype(np.float64)
    for axis, distance in enumerate(offset):
        line = np.moveaxis(image, axis, 0)
        places = np.arange(len(line)) - distance
        image = np.moveaxis(np.stack([_cubic(line, place) for place in places]), 0, axis)
    return image


def _cubic(line: np.ndarray, place: float) -> np.ndarray:
    total, first = np.zeros_like(line[0]), int(np.floor(place)) - 1
    for i in range(first, first + 4):
        d = abs(place - i)
        near = 1.5 * d**3 - 2.5 * d**2 + 1
        total += (near if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2) * line[
            min(max(i, 0), len(line) - 1)
        ]
    return total


def check_kind(name: str, drawn: Mapping[str, Any]) -> None:
    """Check what holds for every step at fixed parameters.

    Any size is accepted, bytes and levels beyond 0..255 are; the bytes given are not overwritten;
    the result has the size that was drawn, and is the same every time: with a used workspace, on
    an image in the workspace's own memory, and in four threads at once.
    """
    apply, images = (
        STEPS[name].apply,
        [photograph(1, 8, 9), photograph(2, 33, 46), unclipped(3, 41, 25)],
    )
    first = [applied(name, image, drawn) for image in images]
    for image, result in zip(images, first, strict=True):
        assert result.dtype in (np.uint8, np.float32)
        assert result.flags.c_contiguous
        assert list(result.shape) == [*drawn.get("size", image.shape[:2]), 3]
        assert np.isfinite(result).all()

    # A step's result, which may be in memory of the workspace, is what the next step gets.
    workspace = Workspace()
    chained, apart = unclipped(4, 34, 27), unclipped(4, 34, 27)
    for _ in range(3):
        chained, apart = apply(chained, dict(drawn), workspace), applied(name, apart, drawn)
        assert chained.tobytes() == apart.tobytes()
    for buffer in RESULTS:
        for image in (unclipped(4, 34, 27), photograph(4, 34, 27)):
            workspace = Workspace()
            kept = workspace.array(buffer, image.shape, image.dtype)
            kept[...] = image
            expected = applied(name, image, drawn)
            assert apply(kept, dict(drawn), workspace).tobytes() == expected.tobytes()

    def everything(_: int) -> list[bytes]:
        workspace, results = Workspace(), []
        for image in (*images, *images):
            before = image.copy()
            given = image if image.dtype == np.uint8 else image.copy()
            results.append(apply(given, dict(drawn), workspace).tobytes())
            if image.dtype == np.uint8:
                assert (image == before).all()
        return results

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(everything, range(4)):
            assert results == [result.tobytes() for result in (*first, *first)]
