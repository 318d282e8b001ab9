"""Metrics of the similarity of SR and HR.

To add a metric, add a file to this folder and a row to `METRICS`. Evaluation, validation and a
recipe's `best:` read names, titles, digits and direction from this table. A metric's function is
imported only when it first measures, so that recipes, options and tools can check names without
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.cli import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Trunk(NamedTuple):
    """The reference of a metric: a pretrained network, or NIQE's parameters of natural images."""

    network: str
    weights: str | None = None
    """File with its weights or parameters; `None` uses torch's cache."""


@dataclass(frozen=True)
class Metric:
    """One row of the table: a metric's names, format, and where its code is."""

    name: str
    """Name in JSON, CSV and log lines."""
    title: str
    """Display name."""
    code: str
    """`module:function` from (SR, HR), RGB 1 x 3 x H x W with borders cut off, to a float.

    Both are uint8 or both uint16.

    For a metric with `trunks`, it names a class instead, built with (network, weights, device),
    whose instances are such functions.
    """
    decimals: int
    unit: str = ""
    lower_is_better: bool = False
    convention: str = ""
    """Metrics with the same convention are reported on one line."""
    is_main: bool = True
    """Whether it is in the table that papers print and in the comparison of models."""
    smallest_side: int = 1
    """Smallest height and width in pixels without borders; a trunk may need more."""
    trunks: tuple[str, ...] = ()
    """The trunks it can use. A metric with trunks is measured only if one is chosen."""
    limit: float | None = None
    """Largest value of an image in a run's validation.

    It keeps an infinite value from making the mean infinite.
    """
    recipe_name: str = ""
    """Name in `best.metric` of recipes and in checkpoints, if it differs from `name`."""

    def text(self, value: float, sign: str = "") -> str:
        """Return the value with the metric's digits; `sign` "+" adds a plus to positive values."""
        return f"{value:{sign}.{self.decimals}f}"

    def is_better(self, value: float, other: float) -> bool:
        """Return whether `value` is better than `other`."""
        return value < other if self.lower_is_better else value > other

    def limited(self, value: float) -> float:
        """Return the value as a run's validation counts it."""
        return value if self.limit is None else min(value, self.limit)

    @property
    def key(self) -> str:
        """Name in `best.metric` of recipes and, after `best_`, in checkpoints."""
        return self.recipe_name or self.name


_PSNR_SSIM = "pipeline.metrics.psnr_ssim:"
_PAPERS, _BASICSR = "Y as in the papers", "Y not rounded, as in BasicSR"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "psnr_y",
            "PSNR-Y",
            f"{_PSNR_SSIM}psnr_y",
            3,
            "dB",
            convention=_PAPERS,
            limit=100.0,
            recipe_name="psnr",
        ),
        Metric("ssim_y", "SSIM-Y", f"{_PSNR_SSIM}ssim_y", 4, convention=_PAPERS, smallest_side=11),
        Metric(
            "psnr_y_float",
            "PSNR-Y float",
            f"{_PSNR_SSIM}psnr_y_float",
            3,
            "dB",
            convention=_BASICSR,
            is_main=False,
            limit=100.0,
        ),
        Metric(
            "ssim_y_float",
            "SSIM-Y float",
            f"{_PSNR_SSIM}ssim_y_float",
            4,
            convention=_BASICSR,
            is_main=False,
            smallest_side=11,
        ),
        Metric(
            "psnr_rgb",
            "PSNR-RGB",
            f"{_PSNR_SSIM}psnr_rgb",
            3,
            "dB",
            convention="RGB",
            is_main=False,
            limit=100.0,
        ),
        Metric(
            "ssim_rgb",
            "SSIM-RGB",
            f"{_PSNR_SSIM}ssim_rgb",
            4,
            convention="RGB",
            is_main=False,
            smallest_side=11,
        ),
        Metric(
            "lpips",
            "LPIPS",
            "pipeline.metrics.lpips:LpipsMetric",
            4,
            lower_is_better=True,
            trunks=("alex", "squeeze", "vgg"),
        ),
        Metric(
            "dists",
            "DISTS",
            "pipeline.metrics.dists:DistsMetric",
            4,
            lower_is_better=True,
            trunks=("vgg",),
        ),
        Metric(
            "niqe",
            "NIQE",
            "pipeline.metrics.niqe:NiqeMetric",
            3,
            lower_is_better=True,
            smallest_side=192,
            trunks=("natural",),
            limit=100.0,
        ),
    )
}


def metric_of(key: str) -> Metric:
    """Return the metric called `key` in recipes, or by its `name`, from which `_y` may be omitted.

    Raises `UserError` if it is not in the table.
    """
    keys = {metric.key: metric for metric in METRICS.values()}
    found = keys.get(key) or METRICS.get(key) or METRICS.get(f"{key}_y")
    if found is None:
        raise UserError(f"no metric {key!r}{nearest(key, keys)}")
    return found


class Measure(NamedTuple):
    """A metric with its loaded function."""

    metric: Metric
    function: Callable[[Tensor, Tensor], float]
    smallest_side: int


def load_measures(
    metrics: Iterable[Metric],
    trunks: Mapping[str, Trunk] | None = None,
    device: torch.device | str = "cpu",
) -> list[Measure]:
    """Load the code of `metrics`, in order; metrics with trunks only if `trunks` has one for them.

    `trunks` maps metric names to trunks, which are loaded onto `device`. Raises `UserError` if
    weights are missing or do not fit.
    """
    measures = []
    for metric in metrics:
        module, _, name = metric.code.partition(":")
        function: Any = None
        if not metric.trunks:
            function = getattr(import_module(module), name)
        elif trunks and metric.name in trunks:
            function = getattr(import_module(module), name)(*trunks[metric.name], device)
        if function is not None:
            smallest = max(metric.smallest_side, getattr(function, "smallest_side", 1))
            measures.append(Measure(metric, function, smallest))
    return measures


def measure(
    sr: Tensor, hr: Tensor, border: int, measures: Sequence[Measure] | None = None
) -> dict[str, float]:
    """Return metric name -> value for RGB (N, 3, H, W) `sr` against `hr`, both uint8 or uint16.

    `border` pixels are cut off on every side. The default `measures` are all metrics without
    trunks. Raises `ValueError` for images of another type or shape, or that are too small.
    """
    import torch

    if (
        sr.dtype not in (torch.uint8, torch.uint16)
        or hr.dtype != sr.dtype
        or sr.shape != hr.shape
        or sr.shape[1] != 3
    ):
        raise ValueError(
            f"SR {sr.dtype} {tuple(sr.shape)} and HR {hr.dtype} {tuple(hr.shape)} must both be "
            "uint8 or both uint16 RGB of the same shape"
        )
    measures = load_measures(METRICS.values()) if measures is None else measures
    height, width = hr.shape[-2] - 2 * border, hr.shape[-1] - 2 * border
    for one in measures:
        if min(height, width) < one.smallest_side:
            raise ValueError(
                f"an image of {hr.shape[-2]}x{hr.shape[-1]} (height x width) less {border} pixels "
                f"of border is smaller than the {one.smallest_side}x{one.smallest_side} pixels "
                f"that {one.metric.title} needs"
            )
    sr, hr = (images[..., border : border + height, border : border + width] for images in (sr, hr))
    return {one.metric.name: one.function(sr, hr) for one in measures}


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every value over images."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def text_of(
    scores: Mapping[str, float], reference: Mapping[str, float] | None = None, over: str = ""
) -> str:
    """Format scores, e.g. `PSNR-Y 28.123 dB, LPIPS 0.1234`.

    With the scores of a `reference`, each has its difference behind it, the first with `over`:
    `PSNR-Y 28.123 dB (+0.930 over bicubic), LPIPS 0.1234 (-0.0210)`, for " over bicubic".
    """
    parts = []
    for name, value in scores.items():
        row, before = METRICS[name], (reference or {}).get(name)
        gain = "" if before is None else f" ({row.text(value - before, '+')}{over})"
        over = over if before is None else ""
        parts.append(f"{row.title} {row.text(value)}{row.unit and ' ' + row.unit}{gain}")
    return ", ".join(parts)
