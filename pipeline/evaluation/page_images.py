"""The pictures of an evaluation's page: which images it shows, cut out while they are in memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.evaluation.crew import Alone, Crew
from pipeline.evaluation.pictures import largest_square
from pipeline.evaluation.scoring import BASELINES, MethodScores, Views

STAGE = 384
"""Pixels a side of what a slider shows, at most."""
CROP = 64
"""Pixels a side of a magnified crop."""
KINDS = ("best", "worst")
ORIGINAL = "HR"


class Place(NamedTuple):
    """An image's place among the best or the worst of its set; the smallest comes first."""

    name: str
    """The set's."""
    kind: str
    """One of `KINDS`."""
    order: float
    index: int
    """In the set."""


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
    """Keeps of every image set the images in which the first model gains most and least over bicubic.

    Of equal gains the earlier image counts, in whatever order they are seen.
    """

    def __init__(self, num_sets: int) -> None:
        self._num_shown = 3 if num_sets == 1 else 2 if num_sets <= 3 else 1
        self._kept: dict[Place, Shown] = {}

    def visit(self, name: str, index: int, views: Views) -> None:
        """Look at the image of that index in the set `name`, and keep what the page needs of it, if anything."""
        model = first_model(views.scores)
        gain = _gain(views.scores, model)
        for kind in KINDS:
            place = Place(name, kind, -gain if kind == "best" else gain, index)
            if place in _foremost([*self._kept, place], self._num_shown):
                self._kept[place] = _cut(views, gain, _errors(views, model, kind))
        self.keep(_foremost(self._kept, self._num_shown))

    def keep(self, places: Iterable[Place]) -> None:
        """Let go of all others."""
        self._kept = {place: self._kept[place] for place in places if place in self._kept}

    def best(self, name: str) -> list[Shown]:
        """Those with the largest gain, falling; the crop is where bicubic's error is most above the model's."""
        return [self._kept[place] for place in self._of(name, "best")]

    def worst(self, name: str) -> list[Shown]:
        """Those with the smallest gain, rising, not in `best`; the crop is where the model's error is largest."""
        best = {place.index for place in self._of(name, "best")}
        return [self._kept[place] for place in self._of(name, "worst") if place.index not in best]

    def united(self, crew: Alone | Crew) -> None:
        """Have in the first process what all processes together would have kept; in the others, nothing of use."""
        everywhere = [place for places in crew.gather(list(self._kept)) for place in places]
        self.keep(crew.agree(_foremost(everywhere, self._num_shown)))  # few: they hold the pictures
        self._kept = {place: shown for kept in crew.gather(self._kept) for place, shown in kept.items()}

    def _of(self, name: str, kind: str) -> list[Place]:
        return sorted(place for place in self._kept if (place.name, place.kind) == (name, kind))


def _foremost(places: Iterable[Place], count: int) -> list[Place]:
    """The first `count` of every set and kind."""
    ordered = sorted(places)
    return [place for _, group in groupby(ordered, key=lambda place: (place.name, place.kind))
            for place in islice(group, count)]


def _errors(views: Views, model: str, kind: str) -> Tensor:
    """Where to look for a crop: 1 x 1 x H x W, large where bicubic errs more than the model, or where the model errs.
    """
    errors = {method: (views.pixels[method].float() - views.hr.float()).square().mean(dim=1, keepdim=True)
              for method in (model, "bicubic")}
    return errors["bicubic"] - errors[model] if kind == "best" else errors[model]


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
