"""Checks of a plan against the disk, before an old run is moved aside and anything is timed."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_access import ImageFiles
from pipeline.data.image_files import BadFileError
from pipeline.files import short_path
from pipeline.training.options import TrainPlan

MOST_OPENED = 64  # training files whose sizes are looked at


def refuse_own_folder(plan: TrainPlan) -> None:
    """Raise `UserError` if the run starts from files that its --reset moves away."""
    starts = {"start": plan.recipe.start}
    if plan.recipe.adversarial:
        starts["adversarial.start"] = plan.recipe.adversarial.start
    for key, start in starts.items():
        if not plan.reset or start in (None, "previous"):
            continue
        if Path(str(start)).expanduser().resolve().is_relative_to(plan.home.resolve()):
            raise UserError(
                f"{key}: {start} is in {short_path(plan.home)}, which --reset moves away; give the "
                "new run another --output-dir"
            )


def refuse_small_files(plan: TrainPlan) -> None:
    """Raise `UserError` if no training file is as large as the crop.

    Looks at `MOST_OPENED` files, evenly spaced in the lists. Files that cannot be opened are left
    to training, which skips some and names them.
    """
    crop, scale = plan.recipe.data.crop, plan.recipe.scale
    files = ImageFiles("hr", plan.dataset.training_paths, None, plan.recipe.data.bits)
    total, sizes = len(files.paths), []
    for number in range(min(total, MOST_OPENED)):
        with contextlib.suppress(BadFileError):
            opened = files.open(number * total // min(total, MOST_OPENED))
            sizes.append((min(opened.height, opened.width), opened.height, opened.width))
    if not sizes or max(sizes)[0] >= crop:
        return
    side, height, width = max(sizes)
    looked_at = "" if len(sizes) == total else " that were looked at"
    raise UserError(
        f"all {len(sizes)} training files{looked_at} are smaller than data.crop {crop}: the "
        f"largest is {height}x{width} (height x width); set data.crop={side // scale * scale} or "
        "less, or use larger photographs"
    )
