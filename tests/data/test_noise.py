"""Noise from keys: its distribution, its whiteness, and that it depends only on the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from conftest import photograph
from pipeline.data.degradations.noise import (
    NoiseKeys,
    add_gaussian,
    add_poisson,
    noise_keys,
    normal_table,
    standard_normal,
)

HEIGHT, WIDTH = 301, 260
WORDS = (2**64 - 59, 5)


def ran(
    nodes: Callable[..., Any], *batches: Sequence[np.ndarray], layouts: Sequence[str] = ()
) -> list[np.ndarray]:
    """Return the samples that a CPU graph of `nodes` makes from the batches, one per argument."""
    from nvidia.dali import fn, pipeline_def

    layouts = layouts or [""] * len(batches)
    dense = tuple(
        [np.ascontiguousarray(sample).reshape(sample.shape) for sample in batch]
        for batch in batches
    )

    @pipeline_def(
        batch_size=len(batches[0]),
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def graph() -> Any:
        return nodes(
            *fn.external_source(
                lambda: dense, num_outputs=len(batches), layout=list(layouts), batch=True
            )
        )

    (output,) = graph().run()
    assert output.layout() == layouts[0]
    return [np.array(output[i]) for i in range(len(output))]


def normals(keys: Sequence[NoiseKeys]) -> list[np.ndarray]:
    return ran(standard_normal, [key.rows for key in keys], [key.columns for key in keys])


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    """Return noise with three channels."""
    return normals([noise_keys(WORDS, HEIGHT, WIDTH, 3)])[0]


def test_keys_are_odd_and_each_pair_of_words_has_its_own() -> None:
    keys = noise_keys(WORDS, 600, 500, 3)
    assert keys.rows.shape == (600, 1, 1)
    assert keys.columns.shape == (1, 500, 3)
    every = np.concatenate(
        [
            part.ravel()
            for words in (WORDS, WORDS[::-1], (0, 0), (0, 1))
            for part in noise_keys(words, 600, 500, 3)
        ]
    )
    assert every.dtype == np.uint32
    assert (every % 2 == 1).all()
    assert len(np.unique(every)) > len(every) - 10  # out of 2^31: a few coincide by chance
    assert noise_keys(WORDS, 7, 4, 1).columns.shape == (1, 4, 1)


def test_the_table_is_a_standard_normal() -> None:
    table = np.array(normal_table())
    assert len(table) == 65536
    assert (np.diff(table) > 0).all()
    np.testing.assert_array_equal(table, -table[::-1])
    assert np.mean(table**2) == pytest.approx(1, abs=1e-9)
    assert np.mean(table**4) == pytest.approx(3, abs=2e-3)
    np.testing.assert_allclose(stats.norm.cdf(table), (np.arange(65536) + 0.5) / 65536, atol=2e-6)


def test_noise_is_normal(z: np.ndarray) -> None:
    assert z.shape == (HEIGHT, WIDTH, 3)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    values = z.astype(np.float64).ravel()
    count = len(values)
    # Four standard errors of each moment.
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(stats.skew(values)) < 4 * (6 / count) ** 0.5
    assert abs(stats.kurtosis(values)) < 4 * (24 / count) ** 0.5
    for channel in range(3):
        assert stats.kstest(z[..., channel].ravel(), "norm").pvalue > 0.01
    assert 4 < np.abs(values).max() < 4.5


def test_noise_is_white(z: np.ndarray) -> None:
    count = HEIGHT * WIDTH
    for channel in range(3):
        power = np.abs(np.fft.fft2(z[..., channel].astype(np.float64))) ** 2 / count
        power = power[1 : HEIGHT // 2]  # half the plane, without the symmetric half
        assert stats.kstest(power.ravel(), "expon").pvalue > 0.01
        assert power.max() < np.log(power.size) + 7  # one image in a thousand exceeds it
    bound = 4 / count**0.5
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)):
        assert abs((z * np.roll(z, (down, right), (0, 1))).mean(axis=(0, 1))).max() < bound
    across = np.corrcoef(z.reshape(-1, 3).T)
    assert np.abs(across - np.eye(3)).max() < bound


def test_no_two_rows_and_no_two_columns_are_alike(z: np.ndarray) -> None:
    for lines in (z.reshape(HEIGHT, -1), z.transpose(1, 2, 0).reshape(-1, HEIGHT)):
        correlations = np.corrcoef(lines)[np.triu_indices(len(lines), 1)]
        scaled = correlations * lines.shape[1] ** 0.5
        assert scaled.std() == pytest.approx(1, abs=0.02)
        assert np.abs(scaled).max() < 6.5
        assert (
            np.abs(np.corrcoef(np.abs(lines))[np.triu_indices(len(lines), 1)]).max()
            * lines.shape[1] ** 0.5
            < 6.5
        )


def test_different_words_give_unrelated_noise(z: np.ndarray) -> None:
    others = normals(
        [noise_keys(words, HEIGHT, WIDTH, 3) for words in ((WORDS[0], 6), (5, WORDS[0]), (1, 5))]
    )
    for i, one in enumerate(others):
        for other in (z, *others[:i]):
            assert abs((one * other).mean()) < 4 / one.size**0.5
            assert abs((np.abs(one) * np.abs(other)).mean() - 2 / np.pi) < 4 / one.size**0.5


def test_noise_depends_on_its_keys_alone(z: np.ndarray) -> None:
    keys = noise_keys(WORDS, HEIGHT, WIDTH, 3)
    others = [noise_keys((i, 1), 20 + i, 33, 1 + 2 * (i % 2)) for i in range(4)]
    batch = normals([*others[:3], keys, others[3], keys])
    for place in (3, 5):
        assert batch[place].tobytes() == z.tobytes()
    for place, key in ((0, others[0]), (1, others[1]), (4, others[3])):
        assert batch[place].tobytes() == normals([key])[0].tobytes()
    assert batch[0].shape == (20, 33, 1)


def test_gaussian_noise_is_scaled_and_not_clipped(z: np.ndarray) -> None:
    image = photograph(0, HEIGHT, WIDTH).astype(np.float32)
    sigma = np.float32(20)
    coloured, gray, none = ran(
        add_gaussian,
        [image] * 3,
        [z, z[..., :1], z],
        [sigma, sigma, np.float32(0)],
        layouts=("HWC", "", ""),
    )
    np.testing.assert_allclose(coloured, image + sigma * z, atol=1e-4)
    np.testing.assert_allclose(gray, image + sigma * z[..., :1], atol=1e-4)
    np.testing.assert_array_equal(none, image)
    assert coloured.min() < 0
    assert coloured.max() > 255


@pytest.mark.parametrize("level", [1, 2, 3, 10, 50, 200, 255])
def test_poisson_noise_is_that_of_poisson(level: int, z: np.ndarray) -> None:
    image = np.full(z.shape, level, np.float32)
    (noisy,) = ran(add_poisson, [image], [z], [np.float32(1)], layouts=("HWC", "", ""))
    rate = level * 256 / 255
    counts = noisy.astype(np.float64).ravel() * 256 / 255
    assert np.abs(counts - np.rint(counts)).max() < 1e-3
    counts = np.rint(counts)
    assert counts.min() >= 0
    numpys = np.random.default_rng(level).poisson(rate, counts.size)
    error = (rate / counts.size) ** 0.5  # of a mean; doubled for the difference of two
    assert abs(counts.mean() - numpys.mean()) < 0.01 + 4 * 2**0.5 * error
    assert (
        abs(counts.var() - numpys.var())
        < 0.04 + 4 * (2 * (2 * rate**2 + rate) / counts.size) ** 0.5
    )
    assert abs(stats.skew(counts) - stats.skew(numpys)) < 0.08
    # The distribution itself: no probability "at most n" differs by more than 1.6 %, plus the
    # sampling error.
    steps = np.arange(counts.max() + 1)
    ours = np.searchsorted(np.sort(counts), steps, "right") / counts.size
    assert np.abs(ours - stats.poisson.cdf(steps, rate)).max() < 0.016 + 2 / counts.size**0.5


def test_poisson_noise_of_a_photograph(z: np.ndarray) -> None:
    # not whole levels, and beyond 0 and 255
    image = photograph(4, HEIGHT, WIDTH).astype(np.float32) * 1.1 - 12.27
    scale = np.float32(2.5)
    noisy, still = ran(
        add_poisson, [image] * 2, [z] * 2, [scale, np.float32(0)], layouts=("HWC", "", "")
    )
    np.testing.assert_array_equal(still, image)
    counted = np.rint(image.clip(0, 255)).astype(np.float64) * 256 / 255
    added = (noisy - image) / scale * 256 / 255
    np.testing.assert_array_equal(noisy[counted == 0], image[counted == 0])  # no light, no noise
    assert (counted == 0).sum() > 1000
    bright = counted > 0
    standardised = added[bright] / counted[bright] ** 0.5
    assert abs(standardised.mean()) < 4 / standardised.size**0.5 + 0.005
    assert standardised.var() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(added + counted, np.rint(added + counted), atol=2e-3)


def test_gray_noise_is_the_same_in_all_channels_of_a_sample(z: np.ndarray) -> None:
    image = photograph(5, HEIGHT, WIDTH).astype(np.float32)
    scale = np.float32(1.5)

    def mixed(pixels: Any, noise: Any, strength: Any, gray: Any) -> Any:
        return add_poisson(pixels, noise, strength, gray=gray)

    gray, coloured = ran(
        mixed,
        [image] * 2,
        [z[..., :1], z],
        [scale] * 2,
        [np.bool_(True), np.bool_(False)],
        layouts=("HWC", "", "", ""),
    )
    added = gray - image
    np.testing.assert_allclose(added, added[..., :1].repeat(3, -1), atol=1e-4)
    counted = np.rint(image.astype(np.float64) @ [0.2989, 0.587, 0.114]) * 256 / 255
    counts = added[..., 0] / scale * 256 / 255 + counted
    # 1/255 where float32 rounds the level differently
    np.testing.assert_allclose(counts, np.rint(counts), atol=5e-3)
    assert ((counts - counted) / counted.clip(1) ** 0.5).var() == pytest.approx(1, abs=0.03)
    (alone,) = ran(add_poisson, [image], [z], [scale], layouts=("HWC", "", ""))
    assert coloured.tobytes() == alone.tobytes()
    (always,) = ran(
        lambda *nodes: add_poisson(*nodes, gray=True),
        [image],
        [z[..., :1]],
        [scale],
        layouts=("HWC", "", ""),
    )
    assert always.tobytes() == gray.tobytes()
