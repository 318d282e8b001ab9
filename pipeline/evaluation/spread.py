"""Measure sets of images, spread over the processes of a crew by image."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from pipeline.cli import UserError
from pipeline.evaluation.image_sets import ImageSet
from pipeline.evaluation.page import Gallery
from pipeline.evaluation.pictures import write_views
from pipeline.evaluation.processes import Alone, Crew
from pipeline.evaluation.scoring import MethodScores, evaluating, measure_image
from pipeline.evaluation.tables import Measured
from pipeline.inference.choosing import Model
from pipeline.metrics.lpips import LpipsMetric

SECONDS_TO_SEE_A_FILE = 10  # on a network's disk


@dataclass(frozen=True)
class Work:
    """What is measured, the same in every process but for the device."""

    sets: Sequence[ImageSet]
    networks: Mapping[str, nn.Module]
    scale: int
    device: torch.device
    lpips: LpipsMetric | None
    self_ensemble: bool
    pictures: Path
    """Folder of the side-by-side pictures, in a folder for each of several sets."""


def measure_sets(work: Work, crew: Alone | Crew, gallery: Gallery | None) -> list[Measured]:
    """Measure every image of every set in one of the processes, and write its picture.

    The first process gets all that was measured, in the order of the sets and their images, and the `gallery` of all;
    the others get an empty list. It is the same to the last bit whatever the number of processes, as long as the
    networks are: on CPUs some give other last bits with another number of threads.
    """
    tasks = [(data, index) for data in work.sets for index in range(len(data.pairs))]
    found: dict[int, MethodScores] = {}

    def measure(number: int) -> None:
        data, index = tasks[number]
        views = measure_image(work.networks, data.pairs[index], work.scale, work.device, work.lpips,
                              self_ensemble=work.self_ensemble)
        write_views(views, work.pictures if len(work.sets) == 1 else work.pictures / data.name)
        if gallery is not None:
            gallery.visit(data.name, index, views)
        found[number] = views.scores

    with evaluating(work.networks):
        crew.run(measure, _order(work.sets, crew), ", ".join(data.name for data in work.sets))
    if gallery is not None:
        gallery.united(crew)
    scores = {number: score for part in crew.gather(found) for number, score in part.items()}
    if not crew.is_first:
        return []
    ordered = iter([scores[number] for number in range(len(tasks))])
    return [Measured(data, [next(ordered) for _ in data.pairs]) for data in work.sets]


def _order(sets: Sequence[ImageSet], crew: Alone | Crew) -> list[int]:
    """The numbers of all images in the order in which they are measured: the largest first where processes share them.
    """
    files = [pair.hr for data in sets for pair in data.pairs]
    if crew.size == 1:
        return list(range(len(files)))
    sizes = crew.together(lambda: [_num_pixels(file) for file in files] if crew.is_first else [])
    return crew.agree(sorted(range(len(sizes)), key=lambda number: -sizes[number]))


def _num_pixels(file: Path) -> int:
    """By the file's header; a broken one counts as large, for the process that reads it says what is wrong with it."""
    try:
        with Image.open(file) as image:
            return image.width * image.height
    except Exception:  # decoders raise whatever they like
        return 1 << 62


def check_alike(models: Sequence[Model], sets: Sequence[ImageSet], folder: Path, crew: Alone | Crew) -> None:
    """`UserError` unless all processes see the same weights and images, and the same `folder` to write to."""
    if crew.size == 1:
        return
    names = [(data.name, data.lr_made_by, [pair.name for pair in data.pairs]) for data in sets]
    seen = hashlib.sha256(repr([*names, *(model.sha256 for model in models)]).encode(
        "utf-8", "surrogateescape")).hexdigest()
    mark = crew.agree(folder / f".{uuid.uuid4().hex}")
    crew.together(lambda: mark.touch() if crew.is_first else None)
    expected = crew.agree(seen)

    def compare() -> None:
        if seen != expected:
            raise UserError("the hosts do not see the same weights and images; give --model, --hr and --benchmarks "
                            "that are the same on all of them")
        deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
        while not mark.exists():
            if time.monotonic() > deadline:
                raise UserError(f"the hosts do not share the folder {str(folder)!r}; give an --out that all of them "
                                "see")
            time.sleep(0.2)

    try:
        crew.together(compare)
    finally:
        if crew.is_first:
            mark.unlink(missing_ok=True)
