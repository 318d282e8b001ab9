"""How many bits the files of a dataset have, and in how many a run works.

Needs no torch. Only headers are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.cli import UserError
from pipeline.data.image_files import is_npy, npy_layout
from pipeline.data.image_headers import BadImageError, read_header

LOOKED_AT = 512  # files of each list whose headers are read, evenly spaced


def file_depth(path: str) -> int:
    """Return the bits per value, 8 or 16, that an image file's pixels keep when it is decoded.

    Raises `UserError`, `BadImageError` or `OSError` if its header cannot be read.
    """
    if is_npy(path):
        return npy_layout(path).depth
    with open(path, "rb") as file:
        return read_header(file).pixel_depth


@dataclass
class Depths:
    """The depths of the files of a dataset that were looked at."""

    counts: dict[int, int] = field(default_factory=lambda: {8: 0, 16: 0})  # depth -> files
    examples: dict[int, str] = field(default_factory=dict)  # depth -> the first such file
    is_whole: bool = True  # whether every file was looked at

    def look_at(self, paths: Sequence[str]) -> None:
        """Count the depths of `paths`, or of `LOOKED_AT` of them.

        Files whose header cannot be read do not count; they are reported where they are opened.
        """
        count = min(len(paths), LOOKED_AT)
        self.is_whole &= count == len(paths)
        self.add(paths[i * len(paths) // count] for i in range(count))

    def add(self, paths: Iterable[str]) -> None:
        """Count the depths of all `paths`."""
        for path in paths:
            try:
                depth = file_depth(path)
            except (UserError, BadImageError, OSError):
                continue
            self.counts[depth] += 1
            self.examples.setdefault(depth, path)

    def chosen(self, depth: Literal["auto", 8, 16]) -> Literal[8, 16]:
        """Return the depth of a run whose recipe says `depth`."""
        if depth == "auto":
            return 16 if self.counts[16] else 8
        return depth

    def line(self, depth: int) -> str:
        """Return a line for the start of a run that works in `depth` bits; "" for 8-bit files."""
        deep, plain = self.counts[16], self.counts[8]
        if not deep:
            if depth == 8:
                return ""
            return "data.depth: 16: batches have 16 bits, but all files have 8; they are scaled"
        looked_at = "" if self.is_whole else f" of the {deep + plain} files looked at"
        if not plain:
            done = "batches have 16 bits" if depth == 16 else "data.depth: 8 rounds them to 8"
            return f"files of 16 bits per value: all{looked_at}; {done}"
        done = (
            "batches have 16 bits, and the files of 8 are scaled to them (data.depth=8: round to 8)"
            if depth == 16
            else "data.depth: 8 rounds them to 8"
        )
        return (
            f"mixed depths: {deep} files have 16 bits per value ({self.examples[16]}) and {plain} "
            f"have 8 ({self.examples[8]}){looked_at}; {done}"
        )
