"""The pictures of an evaluation's page: which images it shows, cut out while they are in memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.evaluation.pictures import largest_square
from pipeline.evaluation.scoring import BASELINES, MethodScores, Views

STAGE = 384
"""Pixels a side of what a slider shows, at most."""
CROP = 64
"""Pixels a side of a magnified crop."""
ORIGINAL = "HR"


@dataclass(frozen=True)
class Shown:
    """An image of the page: a large part of it for the slider, and a small one that is magnified."""

    scores: MethodScores
    gain: float
    """PSNR-Y of the first model less bicubic's."""
    stage: dict[str, Tensor]
    crop: dict[str, Tensor]
    """By method, HR being the last, uint8 1 x 3 x H x W."""
    place: tuple[int, int]
    """Top and left of the crop in the image."""


class Gallery:
    """Keeps of every image set the images in which the first model gains most and least over bicubic."""

    def __init__(self, num_sets: int) -> None:
        self._num_shown = 3 if num_sets == 1 else 2 if num_sets <= 3 else 1
        self._best: dict[str, list[Shown]] = {}
        self._worst: dict[str, list[Shown]] = {}

    def visit(self, name: str, views: Views) -> None:
        """Look at an image of the set `name`, and keep what the page needs of it, if anything."""
        best, worst = self._best.setdefault(name, []), self._worst.setdefault(name, [])
        model = first_model(views.scores)
        gain = _gain(views.scores, model)
        errors = {method: (pixels.float() - views.hr.float()).square().mean(dim=1, keepdim=True)
                  for method, pixels in views.pixels.items() if method in (model, "bicubic")}
        if len(best) < self._num_shown or gain > best[-1].gain:
            best.append(_cut(views, gain, errors["bicubic"] - errors[model]))
            best.sort(key=lambda shown: -shown.gain)
            del best[self._num_shown :]
        if len(worst) < self._num_shown or gain < worst[-1].gain:
            worst.append(_cut(views, gain, errors[model]))
            worst.sort(key=lambda shown: shown.gain)
            del worst[self._num_shown :]

    def best(self, name: str) -> list[Shown]:
        """Those with the largest gain, falling; the crop is where bicubic's error is most above the model's."""
        return self._best[name]

    def worst(self, name: str) -> list[Shown]:
        """Those with the smallest gain, rising, not in `best`; the crop is where the model's error is largest."""
        best = {shown.scores.name for shown in self._best[name]}
        return [shown for shown in self._worst[name] if shown.scores.name not in best]


def first_model(scores: MethodScores) -> str:
    """The title of the first method that is a model."""
    return next(method for method in scores.methods if method not in BASELINES)


def data_uri(pixels: Tensor) -> str:
    """uint8 1 x 3 x H x W as a lossless WebP in a data URI."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())).save(file, "webp", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def layers(pixels: dict[str, Tensor], methods: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The methods' pictures for the template."""
    chosen: Iterable[str] = pixels if methods is None else methods
    return [{"method": method, "uri": data_uri(pixels[method])} for method in chosen]


def _gain(scores: MethodScores, model: str) -> float:
    first, second = scores.methods[model]["psnr_y"], scores.methods["bicubic"]["psnr_y"]
    return 0.0 if first == second else first - second


def _cut(views: Views, gain: float, where: Tensor) -> Shown:
    """The square of `CROP` where a map is largest, and about it the part of the image for the slider."""
    height, width = views.hr.shape[-2:]
    side = min(CROP, height, width)
    top, left = largest_square(where, side)
    first_row = min(max(0, top + side // 2 - STAGE // 2), max(0, height - STAGE))
    first_column = min(max(0, left + side // 2 - STAGE // 2), max(0, width - STAGE))
    pixels = {method: image for method, image in views.pixels.items() if method != "nearest"} | {ORIGINAL: views.hr}
    stage = {method: image[..., first_row : first_row + STAGE, first_column : first_column + STAGE].clone()
             for method, image in pixels.items()}
    crop = {method: image[..., top : top + side, left : left + side].clone() for method, image in pixels.items()}
    return Shown(views.scores, gain, stage, crop, (top, left))
