"""The host's Real-ESRGAN chain: operators against float64 or DALI's, the chain against DALI's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from test_degradations import LIMITS, NUMBERS, blurred, cubic, photographs, psnr, resized, source
from test_noise import ran

from conftest import ROOT, photograph
from pipeline.checkpoint.progress import Progress, read_progress
from pipeline.data.degradations import build_degradation, host, kernels, noise
from pipeline.data.degradations.host import Workspace
from pipeline.data.degradations.realesrgan import RealEsrgan, RealEsrganSpec
from pipeline.data.reader import training_pipeline
from pipeline.data.source import CropSource
from pipeline.data.spec import DataSpec

KERNELS: Mapping[str, np.ndarray] = {
    "round": kernels.gaussian_kernel(21, 2.1, 2.1, 0),
    "narrow": kernels.gaussian_kernel(21, 0.2, 0.2, 0),
    "oval": kernels.gaussian_kernel(21, 3, 0.7, 0.6),
    "a line": kernels.gaussian_kernel(21, 3, 0.2, math.pi / 4),
    "generalized": kernels.generalized_kernel(17, 1.5, 2.5, 1, 3.5),
    "plateau": kernels.plateau_kernel(15, 2, 1, 2, 1.2),
    "sinc": kernels.sinc_kernel(21, 1.2),
    "small sinc": kernels.sinc_kernel(7, 2),
    "none": kernels.delta_kernel(),
    "area": kernels.with_box(kernels.gaussian_kernel(9, 1, 1, 0), 6.3),
    "even": kernels.offset_gaussian(1.6, 2),
}
WAYS = {
    "as it costs least": {},
    "as a square": {"NS_LINE": 1e9},
    "as lines": {"NS_LINE": 1e-9, "NS_ADD": 1e-9, "US_CALL": 0, "US_SVD": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_filter_is_the_sum_that_it_stands_for(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, value in WAYS[way].items():
        monkeypatch.setattr(host, constant, value)
    kernel, workspace = KERNELS[name], Workspace()
    for image in (photograph(3, 61, 70), photograph(4, 40, 33).astype(np.float32) * 1.3 - 30):
        got = host.filtered(image, kernel, workspace)
        assert got.dtype == np.float32
        # Trimming and separable terms may drop one or two thousandths; the surrounding pixels are
        # mostly equal.
        assert (
            np.abs(got - blurred(image.astype(np.float64), kernel)).max()
            < host.TAIL * np.ptp(image) + 0.01
        )


def test_a_filter_of_something_smaller_than_itself() -> None:
    image = photograph(0, 9, 12)
    for kernel in (kernels.gaussian_kernel(21, 3, 3, 0), kernels.sinc_kernel(21, 1.1)):
        radius = len(kernel) // 2
        padded = cv2.copyMakeBorder(image, *[radius] * 4, cv2.BORDER_REFLECT_101).astype(np.float64)
        expected = blurred(padded, kernel)[radius:-radius, radius:-radius]
        assert np.abs(host.filtered(image, kernel, Workspace()) - expected).max() < host.TAIL * 255


def test_what_is_trimmed_is_next_to_nothing() -> None:
    for kernel in KERNELS.values():
        short = host.trimmed(kernel)
        assert short.sum() == pytest.approx(1, abs=1e-5)
        down, across = (
            (long - side) // 2 for long, side in zip(kernel.shape, short.shape, strict=True)
        )
        rest = np.abs(kernel)
        assert rest.sum() - rest[
            down : down + short.shape[0], across : across + short.shape[1]
        ].sum() <= (host.TAIL * rest.sum() * (1 + 1e-6))
    assert host.trimmed(KERNELS["narrow"]).shape == (1, 1)
    assert host.trimmed(KERNELS["round"]).shape < (21, 21)
    for name in ("round", "area"):
        assert len(host.separable_terms(host.trimmed(KERNELS[name]), 480_000, 1000)) == 1
    assert not host.separable_terms(KERNELS["a line"], 480_000, 10_000)


@pytest.mark.parametrize("size", [(80, 100), (31, 47), (97, 41), (8, 8), (60, 70)])
def test_sampling_in_another_size(size: tuple[int, int]) -> None:
    image = photograph(1, 60, 70).astype(np.float32) * 1.2 - 20
    linear = host.resized(image, size, is_cubic=False, workspace=Workspace())
    assert np.abs(linear - resized(image.astype(np.float64), size, "linear")).max() < 2e-2
    got = host.resized(image, size, is_cubic=True, workspace=Workspace())
    assert np.abs(got - resized(image.astype(np.float64), size, "cubic")).max() < 2e-3
    matrix = np.zeros((size[0], 60))
    for at, first, weights in host.cubic_weights(60, size[0]):
        matrix[at : at + len(weights), first : first + weights.shape[1]] = weights
    np.testing.assert_allclose(matrix, cubic(60, size[0]), atol=1e-6)


def test_results_do_not_overwrite_what_they_are_made_of() -> None:
    """In any order of calls with one workspace."""
    image, kernel = photograph(2, 40, 48), KERNELS["round"]

    def chain(workspaces: Iterator[Workspace]) -> np.ndarray:
        once = host.filtered(image, kernel, next(workspaces))
        twice = host.filtered(once, kernel, next(workspaces))
        for size, is_cubic in (
            ((50, 60), False),
            ((44, 51), False),
            ((70, 30), True),
            ((30, 20), False),
        ):
            twice = host.resized(twice, size, is_cubic=is_cubic, workspace=next(workspaces))
        return host.through_jpeg(
            host.through_jpeg(twice, 80, next(workspaces)), 60, next(workspaces)
        )

    one = Workspace()
    np.testing.assert_array_equal(chain(iter([one] * 20)), chain(Workspace() for _ in range(20)))


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_dalis(channels: int) -> None:
    keys = noise.noise_keys((3, 5), 50, 61, channels)
    image = photograph(5, 50, 61).astype(np.float32) * 1.1 - 10
    (z,) = ran(noise.standard_normal, [keys.rows], [keys.columns])
    got = host.standard_normal(keys, Workspace())
    np.testing.assert_array_equal(got.reshape(z.shape), z)
    (expected,) = ran(noise.add_gaussian, [image], [z], [np.float32(7)], layouts=("HWC", "", ""))
    np.testing.assert_allclose(
        host.with_gaussian(image.copy(), keys, 7, Workspace()), expected, atol=1e-4
    )
    (expected,) = ran(
        lambda *nodes: noise.add_poisson(*nodes, gray=channels == 1),
        [image],
        [z],
        [np.float32(1.5)],
        layouts=("HWC", "", ""),
    )
    difference = np.abs(host.with_poisson(image.copy(), keys, 1.5, Workspace()) - expected)
    assert difference.max() <= 1.5 * 256 / 255 + 1e-3  # a count may differ where a sum is at a half
    assert (difference > 1e-2).mean() < 5e-3


@pytest.mark.parametrize("quality", [1, 30, 75, 95, 100])
def test_jpeg_is_opencvs(quality: int) -> None:
    levels = photograph(6, 51, 66).astype(np.float32) * 1.2 - 20
    pixels = np.rint(levels).clip(0, 255).astype(np.uint8)
    data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    np.testing.assert_array_equal(
        host.through_jpeg(levels, quality, Workspace()), cv2.imdecode(data, 1)[..., ::-1]
    )


# The chain.


def both(
    root: Path, names: list[str], *, micro_batch: int, **data: Any
) -> tuple[CropSource, list[np.ndarray], list[np.ndarray]]:
    """Return the source, and [HR, LR] of its first micro-batch by DALI and by the host."""
    found = []
    for on_host in (False, True):
        crops = source(root, names, micro_batch=micro_batch, degrades_on_host=on_host, **data)
        assert crops.degrades_on_host == on_host
        pipeline = training_pipeline(crops, 0, device_id=None, threads=2, prefetch=2)
        found.append([np.array(side.as_array()) for side in pipeline.run()])
    return crops, *found


@pytest.mark.parametrize("form", [".npy", ".png", "both"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_chain_makes_what_dali_makes(tmp_path: Path, form: str, scale: int) -> None:
    """With the same draws, brightness and all noise, the pixels agree up to rounding.

    If a sum is at a half, a JPEG coefficient or a photon count may differ, which changes a block by
    a few levels.
    """
    names = photographs(
        tmp_path, (130, 144), (210, 120), (300, 280), suffix=".npy" if form == "both" else form
    )
    if form == "both":
        assert cv2.imwrite(str(tmp_path / "1.png"), np.load(tmp_path / "1.npy")[..., ::-1])
        names[1] = "1.png"
    crops, by_dali, by_host = both(
        tmp_path,
        names,
        micro_batch=24,
        scale=scale,
        crop=72,
        degradation={"name": "realesrgan", "surroundings": 60},
        brightness={"probability": 0.4},
        lr_noise={"probability": 0.5},
    )
    np.testing.assert_array_equal(by_dali[0], by_host[0])
    assert by_host[1].dtype == np.uint8
    values = [psnr(one, other) for one, other in zip(by_dali[1], by_host[1], strict=True)]
    assert min(values) > 35
    assert np.median(values) > 45
    assert abs(by_dali[1].mean() - by_host[1].mean()) < 0.05
    drawn = [sample.degradation for sample in crops.samples(0, 24)]
    assert {one["first"]["noise"] for one in drawn} == {"gaussian", "poisson"}
    assert {one["final"]["sinc_first"] for one in drawn} == {True, False}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_chain_makes_what_dali_makes_at_the_limits_of_its_recipe(
    tmp_path: Path, limit: str
) -> None:
    names = photographs(tmp_path, (64, 64), (65, 200), (230, 96), (250, 251))
    degradation = {"name": "realesrgan", "first": LIMITS[limit], "second": LIMITS[limit]}
    for scale, surroundings in ((2, 1024), (8, 0)):
        _, by_dali, by_host = both(
            tmp_path,
            names,
            scale=scale,
            micro_batch=6,
            crop=64,
            degradation=degradation | {"surroundings": surroundings},
        )
        values = [psnr(one, other) for one, other in zip(by_dali[1], by_host[1], strict=True)]
        assert np.median(values) > (25 if limit == "worst JPEG" else 40), values


def test_a_sample_is_a_function_of_its_number(tmp_path: Path) -> None:
    names = photographs(tmp_path, (130, 144), (90, 200))

    def run(micro_batch: int, threads: int, first: int = 0) -> np.ndarray:
        crops = source(
            tmp_path,
            names,
            scale=4,
            micro_batch=micro_batch,
            degradation="realesrgan",
            lr_noise={"probability": 0.5},
            degrades_on_host=True,
        )
        pipeline = training_pipeline(
            crops, first // micro_batch, device_id=None, threads=threads, prefetch=2
        )
        return np.concatenate(
            [np.array(pipeline.run()[1].as_array()) for _ in range((24 - first) // micro_batch)]
        )

    expected = run(1, 1)
    for micro_batch, threads, first in ((8, 3, 0), (3, 2, 0), (4, 4, 12)):
        np.testing.assert_array_equal(run(micro_batch, threads, first), expected[first:])


def written_out(
    parameters: Mapping[str, Any], keys: list[int], region: np.ndarray, scale: int
) -> np.ndarray:
    """The whole LR of the published chain, straight from the operators, without a chain's steps."""
    low, final = (region.shape[0] // scale, region.shape[1] // scale), parameters["final"]
    shapes = {"generalized": kernels.generalized_kernel, "plateau": kernels.plateau_kernel}

    def one_round(drawn: Mapping[str, Any], image: np.ndarray, words: list[int]) -> np.ndarray:
        blur = drawn["blur"]
        if blur["shape"] == "none":
            kernel = kernels.delta_kernel()
        elif blur["shape"] == "sinc":
            kernel = kernels.sinc_kernel(blur["size"], blur["cutoff"])
        else:
            numbers = blur["size"], *blur["sigma"], blur.get("theta", 0.0)
            kernel = (
                shapes[blur["shape"].split("_")[0]](*numbers, blur["beta"])
                if "beta" in blur
                else kernels.gaussian_kernel(*numbers)
            )
        if drawn["mode"] == "area":
            kernel = kernels.with_box(kernel, drawn["ratio"])
        image = host.filtered(image, kernel, Workspace())
        image = host.resized(
            image, tuple(drawn["size"]), is_cubic=drawn["mode"] == "cubic", workspace=Workspace()
        )
        fields = noise.noise_keys(tuple(words), *image.shape[:2], 1 if drawn["gray"] else 3)
        add = host.with_poisson if drawn["noise"] == "poisson" else host.with_gaussian
        return add(image.copy(), fields, drawn["level"], Workspace())

    def resized_to_lr(image: np.ndarray) -> np.ndarray:
        if final["mode"] == "area":
            box = kernels.with_box(kernels.delta_kernel(), image.shape[0] / low[0])
            image = host.filtered(image, box, Workspace())
        image = host.resized(image, low, is_cubic=final["mode"] == "cubic", workspace=Workspace())
        return (
            host.filtered(image, kernels.sinc_kernel(*final["sinc"]), Workspace())
            if "sinc" in final
            else image
        )

    image = one_round(parameters["first"], region, keys[:2])
    image = host.through_jpeg(image, parameters["first"]["jpeg"], Workspace())
    image = one_round(parameters["second"], image, keys[2:4])
    quality = parameters["second"]["jpeg"]
    if final["sinc_first"]:
        return host.through_jpeg(resized_to_lr(image), quality, Workspace())
    return host.rounded(resized_to_lr(host.through_jpeg(image, quality, Workspace())), Workspace())


@pytest.mark.parametrize(("scale", "largest"), [(4, 1.2), (2, 3.0)])
def test_real_esrgans_chain_is_made_of_steps(scale: int, largest: float) -> None:
    """Byte for byte, with the draws that it always had."""
    spec = RealEsrganSpec.model_validate({"second": {"resize_range": (0.3, largest)}})
    degradation, region, modes = RealEsrgan(spec, scale), photograph(4, 96, 104), set()
    for i, row in enumerate(np.random.default_rng(7).random((60, NUMBERS)).tolist()):
        drawn, keys = degradation.draw(iter(row), 96, 104), [i * 8 + j for j in range(8)]
        lr = degradation.lr_on_host(drawn, keys, region, (0, 0), (96, 104), Workspace())
        np.testing.assert_array_equal(lr, written_out(drawn, keys, region, scale))
        modes.add((drawn["first"]["blur"]["shape"], drawn["final"]["mode"]))
    assert len(modes) > 12


@pytest.mark.parametrize("name", ["bicubic", "gaussian", "realesrgan"])
def test_lr_of_16_bits_is_not_rounded_to_8(name: str) -> None:
    degradation = build_degradation(DataSpec(degradation=name).degradation, 4)
    region = photograph(1, 96, 104).astype(np.float32) + np.float32(0.3)
    are_whole = []
    for i, row in enumerate(np.random.default_rng(3).random((20, NUMBERS)).tolist()):
        drawn, keys = degradation.draw(iter(row), 96, 104), [i * 8 + j for j in range(8)]
        arguments = drawn, keys, region.copy(), (0, 0), (96, 104), Workspace()
        lr = degradation.lr_on_host(*arguments).astype(np.float32)
        assert lr.shape == (24, 26, 3)
        are_whole.append(np.array_equal(lr, np.rint(lr)))
    # A JPEG at the end of Real-ESRGAN's chain leaves whole levels.
    assert 0 < sum(are_whole) < 20 if name == "realesrgan" else not any(are_whole)


def test_every_draw_can_be_made(tmp_path: Path) -> None:
    """The most unusual kernels of 1,000 draws give results within range and of the right shape."""
    degradation, workspace = RealEsrgan(RealEsrganSpec(), 4), Workspace()
    region = photograph(1, 96, 104)
    for i, row in enumerate(np.random.default_rng(3).random((150, NUMBERS)).tolist()):
        drawn = degradation.draw(iter(row), 96, 104)
        keys = [i * 8 + j for j in range(8)]
        lr = degradation.lr_on_host(drawn, keys, region, (0, 0), (96, 104), workspace).copy()
        assert lr.shape == (24, 26, 3)
        assert lr.dtype == np.uint8
        # For a part, only the pixels that it depends on are filtered.
        part = degradation.lr_on_host(drawn, keys, region, (20, 32), (64, 40), workspace)
        assert np.abs(part.astype(int) - lr[5:21, 8:18]).max() <= 1


def test_runs_that_do_not_say_it_go_on_with_dali() -> None:
    old = ROOT / "tests/fixtures/runs-before-the-house/gan"
    assert read_progress(old, 3).cpu_degradation == "dali"
    assert (
        Progress.from_state(Progress(cpu_degradation="host").as_state()).cpu_degradation == "host"
    )
