"""Which frames of a film are worth storing: drawn at random, but no near-duplicates, blank frames
or cross-fades.

All judgements are made on thumbnails of the luma, 64x36 bytes, so that looking at every frame costs
a few percent of decoding it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from av.video.frame import VideoFrame

from pipeline.libraries import cv2

THUMBNAIL = (64, 36)  # width, height
# Mean absolute difference of two frames' thumbnails, in grey levels: neighbouring frames of one
# scene have 0 to 5, even of fast pans; PySceneDetect, too, sees a cut at some 10 % of the range.
CUT_DIFFERENCE = 20.0
# Standard deviation of a thumbnail, in grey levels: black, white and one-coloured frames, the ends
# of fades to them.
MIN_CONTRAST = 5.0
# A frame within a cross-fade (or a fade) is the mean of the frames some time before and after it.
# Motion is not: there the mean is a double image. What is left of the frame without that mean, in
# parts of the change from before to after, is 0 for still pictures, 0.17 for two pans that take 30
# frames to fade (change: 18 grey levels), 0.18 and more for pans over photographs (change: 2 to
# 13). So the more a scene changes, the more may be left. Pans over smooth surfaces come near 0,
# too, but keep their contrast (the mean squared step between neighbouring pixels: 0.99 to 1.01 of
# before and after), which a cross-fade loses (0.87 to 0.95). Slow fades between moving scenes go
# unseen.
BLEND_REACH = 5  # frames before and after
BLEND_RESIDUAL = 1 / 80  # of the change, for every grey level of it
MAX_BLEND_RESIDUAL = 0.2
MAX_BLEND_CONTRAST = 0.97
MIN_BLEND_CHANGE = 4.0  # grey levels; below that a blend does no harm
MAX_REMEMBERED = 512  # stored frames of a segment that a new one is compared with

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampling:
    """How frames are drawn."""

    frame_interval: int = 10  # average number of frames from one candidate to the next
    min_interval: int = 4
    max_interval: int = 15
    min_change: float = (
        4.0  # mean absolute difference of luma thumbnails to every stored frame, in grey levels
    )


class FrameCandidate(NamedTuple, Generic[Item]):
    """A frame that was drawn: its number within the segment, the frame, and its thumbnail."""

    index: int
    item: Item
    thumbnail: np.ndarray


def thumbnail(frame: VideoFrame) -> np.ndarray:
    """The luma of a frame as uint8 (36, 64), in the range it is stored in."""
    kind = frame.format
    luma = kind.components[0]
    plane = frame.planes[0]
    is_planar = kind.name.startswith(("yuv4", "yuvj4", "yuva4", "nv", "gray")) and luma.bits <= 16
    if not is_planar or kind.name.endswith("be") or plane.line_size <= 0:
        small = frame.reformat(*THUMBNAIL, format="gray", interpolation="AREA", threads=1)
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
    """Mean absolute difference of two thumbnails, in grey levels."""
    return cv2.norm(one, other, cv2.NORM_L1) / one.size


def _contrast(small: np.ndarray) -> float:
    """Mean squared step between neighbouring pixels of a thumbnail (int16)."""
    steps = np.diff(small, axis=0).astype(float), np.diff(small, axis=1).astype(float)
    return sum(float((step**2).mean()) for step in steps)


class FrameChooser(Generic[Item]):
    """Told of every frame of a segment in order, gives back those to store, `BLEND_REACH` frames
    late."""

    def __init__(self, sampling: Sampling, key: str, is_beginning: bool) -> None:
        """`key` decides the draws; at the beginning of a film the first frame is a candidate, as
        after a cut."""
        self._sampling = sampling
        self._draws = _draws(key)
        self._next = 0 if is_beginning else next(self._draws) % sampling.frame_interval
        self._index = 0
        self._recent: deque[np.ndarray] = deque(maxlen=2 * BLEND_REACH + 1)
        self._waiting: deque[FrameCandidate[Item]] = deque()
        self._stored = np.empty((0, *THUMBNAIL[::-1]), np.uint8)
        self.dropped: Counter[str] = Counter()  # why candidates were not chosen

    def add(self, item: Item, small: np.ndarray) -> Iterator[tuple[int, Item]]:
        """Take in the next frame and its thumbnail; yields (number, frame) of what is to be
        stored."""
        is_cut = bool(self._recent) and difference(self._recent[-1], small) >= CUT_DIFFERENCE
        self._recent.append(small)
        if is_cut or self._index == self._next:
            self._waiting.append(FrameCandidate(self._index, item, small))
            self._next = self._index + self._gap()
        self._index += 1
        if self._waiting and self._waiting[0].index + BLEND_REACH < self._index:
            yield from self._judge(self._waiting.popleft())

    def finish(self) -> Iterator[tuple[int, Item]]:
        """What is left at the end of the segment."""
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
        at = last - (self._index - 1 - candidate.index)  # its place in `recent`
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
        """Frames to the next candidate, between the least and the most, `frame_interval` on
        average.

        Uniform below the average or uniform above it, one of the two so often that the mean is
        right.
        """
        sampling, draw = self._sampling, next(self._draws)
        least, mean, most = sampling.min_interval, sampling.frame_interval, sampling.max_interval
        if most == least:
            return mean
        is_below = draw % (most - least) < most - mean
        low, high = (least, mean) if is_below else (mean, most)
        return low + (draw >> 32) % (high - low + 1)


def _draws(key: str) -> Iterator[int]:
    """Uniform 64-bit numbers from `key`, without end. SHAKE-256, as in crop_grid.py: it never
    changes."""
    block = 0
    while True:
        digest = hashlib.shake_256(f"{key}/{block}".encode("utf-8", "surrogateescape")).digest(
            8 * 512
        )
        yield from np.frombuffer(digest, "<u8").tolist()
        block += 1
