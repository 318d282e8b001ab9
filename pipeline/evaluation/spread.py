"""Measure image sets with the images distributed over ranks.

`check_same_files` makes sure beforehand that all ranks see the same files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_pixels import read_size
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.image_sets import ImageSet
from pipeline.evaluation.models import Model
from pipeline.evaluation.page import Gallery
from pipeline.evaluation.pictures import write_views
from pipeline.evaluation.processes import TaskQueue
from pipeline.evaluation.scoring import ImageScores, measure_image
from pipeline.evaluation.tables import SetScores
from pipeline.inference.tiles import Upscaler
from pipeline.metrics import Measure

SECONDS_TO_SEE_A_FILE = 10  # network file systems show new files late


@dataclass(frozen=True)
class Work:
    """What to measure: the same in every process, except for the device."""

    sets: Sequence[ImageSet]
    upscalers: Mapping[str, Upscaler]
    """The networks by their titles, of one scale."""
    measures: Sequence[Measure]
    pictures: Path | None = None
    """Folder for the side-by-side pictures, with one subfolder per set if there are several sets;
    `None`: none are written."""

    @property
    def scale(self) -> int:
        """The networks' upscaling factor."""
        return next(iter(self.upscalers.values())).scale


def measure_sets(
    work: Work, queue: TaskQueue | None = None, gallery: Gallery | None = None
) -> list[SetScores]:
    """Measure every image of every set in one of the queue's processes, and write its picture.

    Without a `queue` this process measures everything. The first process returns all scores, in
    the order of the sets and their images, and its `gallery` holds the images of all processes; the
    others return an empty list. The result does not depend on the number of processes, except where
    a network's last bits depend on its number of CPU threads.
    """
    queue = queue or TaskQueue(Ranks())
    tasks = [(data, index) for data in work.sets for index in range(len(data.pairs))]
    found: dict[int, ImageScores] = {}

    def measure(number: int) -> None:
        data, index = tasks[number]
        views = measure_image(work.upscalers, data.pairs[index], work.scale, work.measures)
        if work.pictures is not None:
            write_views(views, work.pictures if len(work.sets) == 1 else work.pictures / data.name)
        if gallery is not None:
            gallery.visit(data.name, index, views)
        found[number] = views.scores

    queue.run(measure, _order(work.sets, queue.ranks), ", ".join(data.name for data in work.sets))
    if gallery is not None:
        gallery.merge(queue.ranks)
    scores = {number: score for part in queue.ranks.gather(found) for number, score in part.items()}
    if not queue.ranks.is_first:
        return []
    ordered = iter([scores[number] for number in range(len(tasks))])
    return [SetScores(data, [next(ordered) for _ in data.pairs]) for data in work.sets]


def _order(sets: Sequence[ImageSet], ranks: Ranks) -> list[int]:
    """Return the image numbers in measuring order; the largest first if ranks share them."""
    files = [pair.hr for data in sets for pair in data.pairs]
    if ranks.world_size == 1:
        return list(range(len(files)))
    sizes = ranks.on_all_ranks(
        lambda: [_num_pixels(file) for file in files] if ranks.is_first else []
    )
    return ranks.agree(sorted(range(len(sizes)), key=lambda number: -sizes[number]))


def _num_pixels(file: Path) -> int:
    """Read the number of pixels from the file's header.

    A broken file counts as huge, so that it comes first; reading it then reports what is wrong.
    """
    try:
        return math.prod(read_size(file))
    except UserError:
        return 1 << 62


def check_same_files(
    models: Sequence[Model], sets: Sequence[ImageSet], folder: Path, ranks: Ranks
) -> None:
    """Raise `UserError` unless all ranks see the same weights, images and output `folder`."""
    if ranks.world_size == 1:
        return
    names = [(data.name, data.lr_made_by, [pair.name for pair in data.pairs]) for data in sets]
    seen = hashlib.sha256(
        repr([*names, *(model.sha256 for model in models)]).encode("utf-8", "surrogateescape")
    ).hexdigest()
    expected = ranks.agree(seen)
    sees_folder = ranks.sees_folder(folder, SECONDS_TO_SEE_A_FILE)

    def compare() -> None:
        if seen != expected:
            raise UserError(
                "the hosts do not see the same weights and images; give --model, --hr and "
                "--benchmarks that are the same on all of them"
            )
        if not sees_folder:
            raise UserError(
                f"the hosts do not share the folder {str(folder)!r}; give an --out that all of "
                "them share"
            )

    ranks.on_all_ranks(compare)
