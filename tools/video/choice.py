"""Choose the frames of a video to store: random ones, without duplicates, blanks or cross-fades.

All decisions are made on luma thumbnails of 64x36 bytes, so examining every frame costs only a few
percent of decoding it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from av.video.frame import VideoFrame

from pipeline.data.videos import reformat
from pipeline.libraries import cv2

THUMBNAIL = (64, 36)  # width, height
# Mean absolute difference of two frames' thumbnails, in gray levels. Adjacent frames of a scene
# have 0 to 5, even in fast pans; PySceneDetect also detects a cut at about 10 % of the range.
CUT_DIFFERENCE = 20.0
# Standard deviation of a thumbnail, in gray levels: excludes black, white and single-coloured
# frames, and the ends of fades to them.
MIN_CONTRAST = 5.0
# A frame within a cross-fade (or a fade) is the mean of the frames some time before and after it.
# During motion it is not, because that mean is a double image. The residual of the frame against
# the mean, relative to the change from before to after, is 0 for still pictures, 0.17 for two pans
# that cross-fade over 30 frames (change: 18 gray levels), and at least 0.18 for pans over
# photographs (change: 2 to 13). So the limit rises with the change of the scene. Pans over smooth
# surfaces also come near 0, but keep their contrast (mean squared step between adjacent pixels:
# 0.99 to 1.01 of before and after), which a cross-fade loses (0.87 to 0.95). Slow fades between
# moving scenes are not detected.
BLEND_REACH = 5  # frames before and after
BLEND_RESIDUAL = 1 / 80  # relative to the change, per gray level of change
MAX_BLEND_RESIDUAL = 0.2
MAX_BLEND_CONTRAST = 0.97
MIN_BLEND_CHANGE = 4.0  # gray levels; a blend below it does no harm
MAX_REMEMBERED = 512  # stored frames of a segment to compare a new one with

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampling:
    """How frames are drawn."""

    frame_interval: int = 10  # average number of frames between candidates
    min_interval: int = 4
    max_interval: int = 15
    min_change: float = 4.0  # minimum difference from every stored frame, see `difference`


@dataclass(frozen=True)
class FrameCandidate(Generic[Item]):
    """A candidate frame: its number within the segment, the frame, and its thumbnail."""

    index: int
    item: Item
    thumbnail: np.ndarray


def thumbnail(frame: VideoFrame) -> np.ndarray:
    """Luma of a frame as uint8 (36, 64), in the range in which it is stored."""
    kind = frame.format
    luma = kind.components[0]
    plane = frame.planes[0]
    is_planar = kind.name.startswith(("yuv4", "yuvj4", "yuva4", "nv", "gray")) and luma.bits <= 16
    if not is_planar or kind.name.endswith("be") or plane.line_size <= 0:
        small = reformat(
            frame,
            width=THUMBNAIL[0],
            height=THUMBNAIL[1],
            format="gray",
            interpolation="AREA",
            threads=1,
        )
        plane = small.planes[0]
        return (
            np.frombuffer(plane, np.uint8)
            .reshape(-1, plane.line_size)[: THUMBNAIL[1], : THUMBNAIL[0]]
            .copy()
        )
    samples = np.frombuffer(plane, np.uint8 if luma.bits == 8 else np.uint16)
    rows = samples.reshape(-1, plane.line_size // samples.itemsize)[: frame.height, : frame.width]
    small = cv2.resize(
        rows[:: max(1, frame.height // 180)], THUMBNAIL, interpolation=cv2.INTER_AREA
    )
    return small if luma.bits == 8 else (small >> (luma.bits - 8)).astype(np.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference between two thumbnails, in gray levels."""
    return cv2.norm(one, other, cv2.NORM_L1) / one.size


def _contrast(small: np.ndarray) -> float:
    """Mean squared step between adjacent pixels of a thumbnail (int16)."""
    steps = np.diff(small, axis=0).astype(float), np.diff(small, axis=1).astype(float)
    return sum(float((step**2).mean()) for step in steps)


class FrameChooser(Generic[Item]):
    """Takes the frames of a segment in order; yields those to store, `BLEND_REACH` frames later."""

    def __init__(self, sampling: Sampling, key: str, is_beginning: bool) -> None:
        """`key` seeds the draws; at the beginning of a video, the first frame is a candidate."""
        self._sampling = sampling
        self._draws = _draws(key)
        self._next = 0 if is_beginning else next(self._draws) % sampling.frame_interval
        self._index = 0
        self._recent: deque[np.ndarray] = deque(maxlen=2 * BLEND_REACH + 1)
        self._waiting: deque[FrameCandidate[Item]] = deque()
        self._stored = np.empty((0, *THUMBNAIL[::-1]), np.uint8)
        self.dropped: Counter[str] = Counter()  # reasons why candidates were not chosen

    def add(self, item: Item, small: np.ndarray) -> Iterator[tuple[int, Item]]:
        """Add the next frame and its thumbnail; yields (number, frame) of each frame to store."""
        is_cut = bool(self._recent) and difference(self._recent[-1], small) >= CUT_DIFFERENCE
        self._recent.append(small)
        if is_cut or self._index == self._next:
            self._waiting.append(FrameCandidate(self._index, item, small))
            self._next = self._index + self._gap()
        self._index += 1
        if self._waiting and self._waiting[0].index + BLEND_REACH < self._index:
            yield from self._judge(self._waiting.popleft())

    def finish(self) -> Iterator[tuple[int, Item]]:
        """Yield the remaining frames to store, at the end of the segment."""
        while self._waiting:
            yield from self._judge(self._waiting.popleft())

    def _judge(self, candidate: FrameCandidate[Item]) -> Iterator[tuple[int, Item]]:
        small = candidate.thumbnail
        if small.std() < MIN_CONTRAST:
            self.dropped["blank"] += 1
        elif self._is_blended(candidate):
            self.dropped["cross-fade"] += 1
        elif self._is_known(small):
            self.dropped["similar"] += 1
        else:
            self._stored = np.concatenate([self._stored[-MAX_REMEMBERED + 1 :], small[None]])
            yield candidate.index, candidate.item

    def _is_blended(self, candidate: FrameCandidate[Item]) -> bool:
        last = len(self._recent) - 1
        at = last - (self._index - 1 - candidate.index)  # its position in `_recent`
        reach = min(BLEND_REACH, at, last - at)
        if reach == 0:
            return False
        before, now, after = (
            self._recent[at + step].astype(np.int16) for step in (-reach, 0, reach)
        )
        change = float(np.abs(after - before).mean())
        residual = float(np.abs(2 * now - before - after).mean()) / 2
        limit = min(BLEND_RESIDUAL * change, MAX_BLEND_RESIDUAL) * change
        return (
            change >= MIN_BLEND_CHANGE
            and residual < limit
            and (_contrast(now) < MAX_BLEND_CONTRAST * (_contrast(before) + _contrast(after)) / 2)
        )

    def _is_known(self, small: np.ndarray) -> bool:
        if not len(self._stored):
            return False
        changes = np.abs(self._stored.astype(np.int16) - small).mean(axis=(1, 2))
        return bool(changes.min() < self._sampling.min_change)

    def _gap(self) -> int:
        """Frames to the next candidate: between minimum and maximum, `frame_interval` on average.

        Drawn uniformly either below the average or above it, with the odds that give the right
        mean.
        """
        sampling, draw = self._sampling, next(self._draws)
        least, mean, most = sampling.min_interval, sampling.frame_interval, sampling.max_interval
        if most == least:
            return mean
        is_below = draw % (most - least) < most - mean
        low, high = (least, mean) if is_below else (mean, most)
        return low + (draw >> 32) % (high - low + 1)


def _draws(key: str) -> Iterator[int]:
    """Yield an endless stream of uniform 64-bit numbers from `key`.

    SHAKE-256 is used because its output never changes, as in crops/grid.py.
    """
    block = 0
    while True:
        digest = hashlib.shake_256(f"{key}/{block}".encode("utf-8", "surrogateescape")).digest(
            8 * 512
        )
        yield from np.frombuffer(digest, "<u8").tolist()
        block += 1
