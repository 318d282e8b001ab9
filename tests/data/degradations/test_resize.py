"""The step `resize`: kernels against OpenCV, Pillow and float64 formulas, and what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations import host, kernels
from pipeline.data.degradations.chain import Chain, ChainSpec, run
from pipeline.data.degradations.steps.base import Canvas
from pipeline.data.degradations.steps.resize import KINDS, ResizeSpec
from steps import applied, check_kind, draws_of, shares, unclipped

SIZES = [(20, 23), (61, 70), (122, 31), (150, 201), (9, 8)]
IMAGE = photograph(3, 61, 77)


def keys(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0


def mitchell(x: float) -> float:
    x, b, c = abs(x), 1 / 3, 1 / 3
    if x < 1:
        return ((12 - 9 * b - 6 * c) * x**3 + (-18 + 12 * b + 6 * c) * x**2 + 6 - 2 * b) / 6
    if x < 2:
        return (
            (-b - 6 * c) * x**3 + (6 * b + 30 * c) * x**2 + (-12 * b - 48 * c) * x + 8 * b + 24 * c
        ) / 6
    return 0


def hermite(x: float) -> float:
    x = abs(x)
    return 2 * x**3 - 3 * x**2 + 1 if x < 1 else 0


def by_formula(
    image: np.ndarray, size: tuple[int, int], kernel: Callable[[float], float], *, mirrored: bool
) -> np.ndarray:
    """Sum over all pixels, row by row, in float64; a mirrored border repeats the last pixel."""
    image = image.astype(np.float64)
    for axis, new in enumerate(size):
        length = image.shape[axis]
        wide, margin = max(1.0, length / new), 3 * length if mirrored else 0
        pad = [(margin, margin) if side == axis else (0, 0) for side in range(3)]
        padded = np.pad(image, pad, "symmetric")
        matrix = np.array(
            [
                [
                    kernel(((i + 0.5) * length / new - 0.5 - (place - margin)) / wide)
                    for place in range(length + 2 * margin)
                ]
                for i in range(new)
            ]
        )
        matrix /= matrix.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(matrix, padded, (1, axis)), 0, axis)
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "kernel", "mirrored"),
    [
        ("cubic_antialiased", keys, True),  # MATLAB's imresize
        ("mitchell", mitchell, False),
        ("hermite", hermite, False),
    ],
)
def test_antialiased_kernels_are_their_formulas(
    kind: str, kernel: Callable[[float], float], mirrored: bool, size: tuple[int, int]
) -> None:
    for image in (IMAGE.astype(np.float32), unclipped(2, 61, 77)):
        got = applied("resize", image, {"kind": kind, "size": list(size)})
        assert np.abs(got - by_formula(image, size, kernel, mirrored=mirrored)).max() < 1e-3


@pytest.mark.parametrize("size", [*SIZES, (61, 30), (20, 77)])
def test_bytes_are_resized_as_matlab_does(size: tuple[int, int]) -> None:
    """It rounds after each direction, and the one that shrinks more comes first."""
    rows_first = size[0] / 61 <= size[1] / 77
    between = (size[0], 77) if rows_first else (61, size[1])
    expected = IMAGE.astype(np.float64)
    for side in (between, size):
        expected = np.floor(by_formula(expected, side, keys, mirrored=True) + 0.5).clip(0, 255)
    got = applied("resize", IMAGE, {"kind": "cubic_antialiased", "size": list(size)})
    assert got.dtype == np.uint8
    off = np.abs(got - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3  # sums that are nearly a half


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["lanczos", "nearest"])
def test_lanczos_and_nearest_are_pillows(kind: str, size: tuple[int, int]) -> None:
    how = {
        "lanczos": PIL.Image.Resampling.LANCZOS,
        "nearest": PIL.Image.Resampling.NEAREST,
    }[kind]
    for image in (IMAGE, unclipped(2, 61, 77)):
        got = applied("resize", image, {"kind": kind, "size": list(size)})
        planes = [
            np.asarray(PIL.Image.fromarray(plane).resize(size[::-1], how))
            for plane in np.moveaxis(image.astype(np.float32), 2, 0)
        ]
        assert np.abs(got - np.stack(planes, 2)).max() < (1e-3 if kind == "lanczos" else 1e-6)
    if kind == "nearest":
        assert applied("resize", IMAGE, {"kind": kind, "size": [30, 30]}).dtype == np.uint8


@pytest.mark.parametrize("size", SIZES)
def test_kernels_without_antialiasing_are_opencvs_and_the_hosts(size: tuple[int, int]) -> None:
    image, workspace = unclipped(2, 61, 77), host.Workspace()
    for kind, how in (("cubic_75", cv2.INTER_CUBIC), ("linear", cv2.INTER_LINEAR)):
        got = applied("resize", image, {"kind": kind, "size": list(size)})
        assert np.abs(got - cv2.resize(image, size[::-1], interpolation=how)).max() < 1e-3
    got = applied("resize", image, {"kind": "cubic", "size": list(size)})
    assert (got == host.resized(image, size, is_cubic=True, workspace=workspace)).all()
    # As in the Real-ESRGAN chain, the box is wide as the ratio of the heights.
    got = applied("resize", image, {"kind": "area", "size": list(size)})
    box = kernels.with_box(kernels.delta_kernel(), image.shape[0] / size[0])
    boxed = host.filtered(image, box, workspace)
    assert (got == host.resized(boxed, size, is_cubic=False, workspace=workspace)).all()


@pytest.mark.parametrize("ratio", [2, 3, 5])
def test_area_is_the_mean_of_the_pixels(ratio: int) -> None:
    image = photograph(4, 15 * ratio, 11 * ratio)
    got = applied("resize", image, {"kind": "area", "size": [15, 11]})
    mean = image.reshape(15, ratio, 11, ratio, 3).astype(np.float64).mean((1, 3))
    assert np.abs(got - mean).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(12, 17), (65, 66)])
def test_every_kind_holds_for_any_image(kind: str, size: tuple[int, int]) -> None:
    check_kind("resize", {"kind": kind, "size": list(size)})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves(kind: str) -> None:
    """A ramp stays in its place: the middle of the image keeps its level."""
    ramp = np.linspace(40, 200, 64, dtype=np.float32)
    image = np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (16, 64, 3)))
    for width in (24, 33, 48, 150):
        row = applied("resize", image, {"kind": kind, "size": [16, width]})[8, :, 0]
        places = (np.arange(width) + 0.5) * 64 / width - 0.5
        inner = slice(width // 6, -(width // 6))
        off = row[inner] - (40 + places[inner] * 160 / 63)
        assert abs(off.mean()) < 0.3
        assert np.abs(off).max() < (1.7 if kind == "nearest" else 0.5)


def test_large_images_are_resized_in_parts_to_the_same_bits() -> None:
    """More columns than one matrix product takes without threads."""
    image = unclipped(5, 40, 3000)
    got = applied("resize", image, {"kind": "lanczos", "size": [10, 3000]})
    part = applied(
        "resize", np.ascontiguousarray(image[:, 1000:1100]), {"kind": "lanczos", "size": [10, 100]}
    )
    assert np.abs(got[:, 1000:1100] - part).max() < 1e-3


def test_a_detour_is_two_resizes() -> None:
    drawn = {
        "kind": "area",
        "size": [15, 19],
        "through": [90, 100],
        "through_kind": "lanczos",
    }
    first = applied("resize", IMAGE, {"kind": "lanczos", "size": [90, 100]})
    second = applied("resize", first, {"kind": "area", "size": [15, 19]})
    assert (applied("resize", IMAGE, drawn) == second).all()


def test_draws_are_in_their_ranges() -> None:
    canvas = Canvas(size=(50, 61), hr=(96, 120), scale=4)
    section = {"factor": [0.2, 1.5], "direction": {"up": 2, "down": 7, "keep": 1}, "of": "hr"}
    heights = np.array([one["size"][0] for one in draws_of("resize", section, 2000, canvas)])
    assert abs((heights == 96).mean() - 0.1) < 0.03
    assert abs((heights > 96).mean() - 0.2) < 0.03
    assert (heights.min(), heights.max()) == (19, 143)
    for section, expected in (
        ({"to": "lr"}, [24, 30]),
        ({"to": "hr"}, [96, 120]),
        ({"factor": 0.5}, [25, 30]),
        ({"factor": 0.5, "of": "lr"}, [12, 15]),
        ({"factor": 0.1}, [8, 8]),
        ({"direction": "keep"}, [50, 61]),
    ):
        assert {str(one["size"]) for one in draws_of("resize", section, 20, canvas)} == {
            str(expected)
        }
    drawn = draws_of("resize", {"kind": {"lanczos": 3, "nearest": 1}}, 2000)
    assert shares(drawn).keys() == {"lanczos", "nearest"}
    assert abs(shares(drawn)["lanczos"] - 0.75) < 0.03


def test_detours_are_drawn_with_their_probabilities() -> None:
    detour = {"up": 0.2, "down": 0.1, "down_factor": [0.5, 0.9], "kind": "nearest"}
    drawn = draws_of("resize", {"to": "lr", "kind": "lanczos", "detour": detour}, 2000)
    ways = [one["through"][0] for one in drawn if "through" in one]
    assert {one["through_kind"] for one in drawn if "through" in one} == {"nearest"}
    assert abs(sum(height >= 96 for height in ways) / 2000 - 0.2) < 0.03
    assert abs(sum(height < 96 for height in ways) / 2000 - 0.1) < 0.03
    assert (min(ways), max(ways)) == (48, 191)
    assert all(one["size"] == [24, 30] for one in drawn)
    drawn = draws_of("resize", {"kind": "hermite", "detour": {"up": 1}}, 9)
    assert shares(drawn, "through_kind") == {"hermite": 1}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "lanczos3"}, "no kind named 'lanczos3'; did you mean 'lanczos'"),
        ({"to": "lr", "factor": 0.5}, "leaves nothing to `factor`"),
        ({"factor": [0.001, 1]}, "within 0.02..8"),
        ({"factor": [0.2, 0.5], "direction": ["up", "keep"]}, "direction `up` needs a factor"),
        ({"detour": {"up": 0.7, "down": 0.6}}, "up + down = 1.3"),
        ({"to": "sr"}, "'lr' or 'hr'"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ResizeSpec.model_validate(section)
    assert words in str(refused.value)


def test_the_chain_ends_at_the_size_of_lr() -> None:
    chain = Chain(ChainSpec.model_validate({"steps": [{"resize": {"factor": 0.7}}]}), 4)
    random = np.random.default_rng(1)
    drawn = chain.draw(iter(random.random(100).tolist()), 96, 120)
    assert drawn["steps"][-1] == {
        "step": "resize",
        "kind": "cubic_antialiased",
        "size": [24, 30],
    }
    lr = run(photograph(1, 96, 120), drawn["steps"], host.Workspace())
    assert lr.shape == (24, 30, 3)
    assert math.isclose(lr.mean(), photograph(1, 96, 120).mean(), abs_tol=2)
