"""How sure a mean over few images is: bootstrap intervals, seeded, with all methods drawn on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from pipeline.evaluation.scoring import BASELINES, MethodScores

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
FEW_IMAGES = 10
LOWER_IS_BETTER = frozenset({"lpips"})


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval; the ends are NaN for a single image and where a PSNR is infinite."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """By how much `method` is above `against` in a metric, paired by image."""

    method: str
    against: str
    metric: str
    interval: Interval
    num_images: int

    @property
    def is_known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.interval.low)

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.is_known and not self.interval.low <= 0 <= self.interval.high

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if not self.is_known:
            return "no interval: one image" if self.num_images < 2 else "no interval: infinite PSNR"
        if not self.is_significant:
            return "difference not significant"
        is_better = (self.interval.mean > 0) != (self.metric in LOWER_IS_BETTER)
        few = f" (on {self.num_images} images only)" if self.num_images < FEW_IMAGES else ""
        return f"{'better' if is_better else 'worse'}{few}"


def interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The mean of `values` and its percentile bootstrap interval of `LEVEL`.

    The images that are drawn depend on their number and the seed alone, so that intervals of several methods or metrics
    on one benchmark are paired.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = sum(values) / len(values)
    if len(array) < 2 or not np.isfinite(array).all():
        return Interval(mean, math.nan, math.nan)
    means = np.einsum("ij,j->i", _draws(len(array), resamples, seed), array)  # BLAS would round by its threads
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


@lru_cache(maxsize=4)
def _draws(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """The weight of every image in every draw, as resamples x images; each row sums to 1."""
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(seed).multinomial(num_images, shares, size=resamples) / num_images


def difference(images: Sequence[MethodScores], method: str, against: str, metric: str) -> Difference:
    """`method` less `against`, image by image; equal values, infinite ones too, differ by 0."""
    pairs = [(image.methods[method][metric], image.methods[against][metric]) for image in images]
    values = [0.0 if first == second else first - second for first, second in pairs]
    return Difference(method, against, metric, interval(values), len(images))


def differences(images: Sequence[MethodScores]) -> list[Difference]:
    """Every model against bicubic and against the models after it, in PSNR-Y, SSIM-Y and, if measured, LPIPS."""
    methods = images[0].methods
    models = [name for name in methods if name not in BASELINES]
    metrics = [metric for metric in ("psnr_y", "ssim_y", "lpips") if metric in methods[models[0]]]
    pairs = [*((model, "bicubic") for model in models), *((second, first) for first, second in combinations(models, 2))]
    return [difference(images, method, against, metric) for method, against in pairs for metric in metrics]
