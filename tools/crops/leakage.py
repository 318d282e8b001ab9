"""Find benchmark pictures in training pictures: whole, cropped, reduced, mirrored or recompressed.

`BenchmarkIndex.find` compares in two steps. Anchors, which are points that can be found again in
copies and crops of a picture, propose positions (`AnchorTable`). Where several anchors agree, the
pixels are compared.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST
from pipeline.data.image_headers import BadImageError, read_header
from pipeline.data.image_pixels import MAX_MEGAPIXELS, check_megapixels, decode_rgb
from pipeline.libraries import cv2
from tools.crops.duplicates import MAX_DISTANCE, has_structure, perceptual_hash
from tools.crops.grid import halved
from tools.files import walk
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

RADIUS = 16  # of the patch around an anchor, in pixels: 33 x 33
# The patch is reduced to 11x11 means of 3x3 pixels; its 8x8 lowest frequencies are used.
_CELLS, _FREQUENCIES = 11, 8
_MAX_BITS = 10  # in which the hashes of two matching patches may differ, of 63
_NUM_CHUNKS = 4  # chunks per hash, 16 bits each; matching patches share at least one
_MIN_STRENGTH = 1.0  # gray levels
_NEIGHBOURS = np.ones((13, 13), np.uint8)
MIN_PART = 64  # minimum overlap with a benchmark picture, in pixels per side
# Reductions by 1, 2 and 4 of both the benchmark and the query picture, so they match at 1/4 to 4
# times the size.
_NUM_REDUCTIONS = 3
_NUM_ANCHORS = 32  # of the query picture, at each reduction
_NUM_CHECKED = 12  # candidate positions whose pixels are compared, at each reduction
# (Window in pixels per side, minimum correlation) of each comparison at a position. Unrelated
# positions with a similar edge reach 0.68; parts that went through JPEG of quality 75 or a shift by
# half a pixel have at least 0.80.
_CHECKS = ((96, 0.6), (256, 0.76))
_MIN_DETAIL = 0.25  # root mean square of the structure; less is not significant


class Match(NamedTuple):
    """Possible position of the query picture in a benchmark picture.

    `top` and `left` are its top-left corner there; `row` and `column` are those of a supporting
    anchor.
    """

    picture: int
    is_mirrored: bool
    top: int
    left: int
    row: int  # of the anchor, in the query picture (mirrored if the match is)
    column: int


class BenchmarkIndex:
    """Finds benchmark pictures (Set5, Urban100, DIV2K validation...) in training pictures.

    It finds copies of whole pictures at any size, and parts: at the size of the benchmark picture,
    at 1/2 or 1/4 of it, and where the benchmark picture is 1/2 or 1/4 of the part. Copies and parts
    may be mirrored left to right, brightened and recompressed. A part must have texture and share
    64 pixels per side with the benchmark picture, at the size where both match (one part in ten is
    missed at that size, one in 500 if 128 are shared). Rotations, parts at other scales, strong
    colour changes and overlays are not found.

    Parts are found by anchors with similar surroundings; the pixels at the positions they suggest
    are then compared. `find` is thread-safe. The index needs about 0.4 bytes per benchmark pixel.
    """

    def __init__(self, folders: Sequence[Path], threads: int = 0) -> None:
        """Read all images below `folders`; `skipped` lists those that cannot be read.

        Raises `UserError` if no image can be read.
        """
        self.names: list[str] = []
        self.skipped: list[str] = []
        self._levels: list[_Reduction] = []
        self._image_of_level: list[int] = []
        hashes = []
        files = [(folder, name) for folder in folders for name in _images(folder)]
        with quiet_libraries(), progress(len(files), "benchmark image") as bar:
            for (folder, name), image in zip(
                files, ordered_map(_read, files, thread_count(threads)), strict=True
            ):
                bar.update()
                if isinstance(image, str):
                    self.skipped.append(f"{folder / name}: {image}")
                    continue
                hashes.append(image.hash)
                self._image_of_level += [len(self.names)] * len(image.levels)
                self._levels += image.levels
                self.names.append(f"{folder.name}/{name}")
        if not self.names:
            where = ", ".join(map(str, folders)) or "no folder"
            reason = f" ({self.skipped[0]})" if self.skipped else ""
            raise UserError(
                f"{where}: no readable image found{reason}; give the folders of the benchmarks"
            )
        self._hashes = np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)
        self._table = AnchorTable([level.anchors for level in self._levels])

    def __len__(self) -> int:
        """Number of benchmark pictures in the index."""
        return len(self.names)

    def find(self, pixels: np.ndarray) -> str | None:
        """Return the benchmark picture that `pixels` copies in whole or in part, or `None`.

        `pixels` is uint8 RGB (height, width, 3).
        """
        luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        image = self._find_whole(luma)
        if image is None:
            image = self._find_part(luma)
        return None if image is None else self.names[image]

    def _find_whole(self, luma: np.ndarray) -> int | None:
        while min(luma.shape) >= 128:  # as perceptual_hash does
            luma = halved(luma)
        for hash in (perceptual_hash(luma), perceptual_hash(cv2.flip(luma, 1))):
            if has_structure(hash):
                distances = np.bitwise_count(self._hashes ^ np.frombuffer(hash, np.uint64)).sum(
                    axis=1
                )
                if distances.min() <= MAX_DISTANCE:
                    return int(distances.argmin())
        return None

    def _find_part(self, luma: np.ndarray) -> int | None:
        for number in range(_NUM_REDUCTIONS):
            if number:
                luma = halved(luma)
            if min(luma.shape) < MIN_PART:
                return None
            anchors = find_anchors(luma, _NUM_ANCHORS)
            for match in self._table.matches(anchors, luma.shape[1])[:_NUM_CHECKED]:
                if all(
                    self._correlation(luma, match, window) >= least for window, least in _CHECKS
                ):
                    return self._image_of_level[match.picture]
        return None

    def _correlation(self, luma: np.ndarray, match: Match, window: int) -> float:
        """Normalised cross-correlation of the structure in a window around the anchor, -1 to 1.

        Both pictures are halved, which removes JPEG artefacts and most of the effect of a
        half-pixel shift.
        """
        level = self._levels[match.picture]
        if match.is_mirrored:
            luma = cv2.flip(luma, 1)
        rows = _common(match.row, match.top, luma.shape[0], level.height, window)
        columns = _common(match.column, match.left, luma.shape[1], level.width, window)
        if min(rows.stop - rows.start, columns.stop - columns.start) < MIN_PART - 4:
            return 0.0
        ours = _structure(halved(luma[rows, columns]))
        top, left = (rows.start + match.top) // 2, (columns.start + match.left) // 2
        theirs = _structure(level.half[top : top + ours.shape[0], left : left + ours.shape[1]])
        if min(cv2.norm(ours), cv2.norm(theirs)) < _MIN_DETAIL * ours.size**0.5:
            return 0.0
        inner = ours[1:-1, 1:-1]  # an anchor may be off by a pixel or two
        return float(cv2.matchTemplate(theirs, inner, cv2.TM_CCORR_NORMED).max())


class _Reduction(NamedTuple):
    """A benchmark picture at one reduction."""

    height: int
    width: int
    half: np.ndarray  # luma, halved once more
    anchors: Anchors


class _Image(NamedTuple):
    """Index data of one benchmark picture."""

    hash: bytes
    levels: list[_Reduction]


def _common(anchor: int, offset: int, size: int, level_size: int, window: int) -> slice:
    """Rows (or columns) around the anchor that both pictures have, in the query's coordinates.

    In the benchmark picture, both ends are even.
    """
    first = max(0, -offset, anchor - window // 2)
    last = min(size, level_size - offset, anchor + window // 2)
    first += (first + offset) % 2
    return slice(first, max(first, last - (last + offset) % 2))


def _structure(luma: np.ndarray) -> np.ndarray:
    """Normalise uint8 luma by local mean and contrast, so that no edge dominates: float32."""
    structure = luma.astype(np.float32)
    structure -= cv2.blur(structure, (9, 9))
    return structure / (cv2.sqrt(cv2.blur(structure * structure, (9, 9))) + 2)


def _images(folder: Path) -> list[str]:
    """Images below a folder of benchmark pictures."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the folder of a benchmark's images, such as Urban100"
        )
    return walk(folder, MANIFEST).encoded


def _read(file: tuple[Path, str]) -> _Image | str:
    """Index data of one benchmark picture, or the reason why it cannot be read."""
    folder, name = file
    try:
        data = (folder / name).read_bytes()
        header = read_header(io.BytesIO(data))
        check_megapixels(header, MAX_MEGAPIXELS)
        luma = cv2.cvtColor(decode_rgb(data, header), cv2.COLOR_RGB2GRAY)
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    hash, levels = perceptual_hash(luma), []
    while len(levels) < _NUM_REDUCTIONS and min(luma.shape) >= MIN_PART:
        levels.append(_Reduction(*luma.shape, halved(luma), find_anchors(luma)))
        luma = levels[-1].half
    return _Image(hash, levels)


# --- Anchors ---


class Anchors(NamedTuple):
    """Rows and columns, int32 (count,), and hashes of their surroundings, uint64 (count,)."""

    rows: np.ndarray
    columns: np.ndarray
    hashes: np.ndarray


NO_ANCHORS = Anchors(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint64))


def find_anchors(luma: np.ndarray, count: int | None = None) -> Anchors:
    """Find the `count` points of `luma` that differ most from their surroundings; `None`: all.

    `luma` is uint8 (height, width). The points depend on content alone, so a crop has the same
    anchors as the picture it was cut from, except near its borders.
    """
    height, width = luma.shape
    if min(height, width) <= 2 * RADIUS:
        return NO_ANCHORS
    spot, around = (
        cv2.boxFilter(luma, cv2.CV_32F, (5, 5)),
        cv2.boxFilter(luma, cv2.CV_32F, (13, 13)),
    )
    strength = cv2.absdiff(spot, around)
    is_peak = (strength == cv2.dilate(strength, _NEIGHBOURS)) & (strength > _MIN_STRENGTH)
    inner = is_peak[RADIUS : height - RADIUS, RADIUS : width - RADIUS]
    rows, columns = np.divmod(np.flatnonzero(inner), inner.shape[1])
    rows, columns = rows + RADIUS, columns + RADIUS
    if count is not None and len(rows) > count:
        strongest = np.argsort(-strength[rows, columns], kind="stable")[:count]
        rows, columns = rows[strongest], columns[strongest]
    return Anchors(
        rows.astype(np.int32), columns.astype(np.int32), _patch_hashes(luma, rows, columns)
    )


class AnchorTable:
    """Anchors of many pictures, looked up by hash. Read-only, so it is thread-safe."""

    def __init__(self, anchors: Sequence[Anchors]) -> None:
        """`anchors[i]` are the anchors of picture i."""
        self._picture = np.repeat(
            np.arange(len(anchors), dtype=np.int32), [len(found.rows) for found in anchors]
        )
        self._rows, self._columns, self._hashes = map(
            np.concatenate, zip(NO_ANCHORS, *anchors, strict=True)
        )
        chunks = np.ascontiguousarray(_chunks(self._hashes).T)
        self._places = [np.argsort(chunk, kind="stable").astype(np.int32) for chunk in chunks]
        self._bounds = [
            np.cumsum(np.bincount(chunk.astype(np.int32) + 1, minlength=65537)) for chunk in chunks
        ]

    def matches(self, anchors: Anchors, width: int) -> list[Match]:
        """Possible positions of a picture, those with the most agreeing anchors first."""
        ours, theirs, is_mirrored, bits = self._pairs(anchors.hashes)
        if not len(ours):
            return []
        rows = anchors.rows[ours]
        columns = np.where(is_mirrored, width - 1 - anchors.columns[ours], anchors.columns[ours])
        picture, top, left = (
            self._picture[theirs],
            self._rows[theirs] - rows,
            self._columns[theirs] - columns,
        )
        place = 2 * picture.astype(np.int64) + is_mirrored
        # Whole pixels within +-2^17, in steps of 4, because an anchor may be off a little.
        for shift in (top, left):
            place = (place << 16) + ((shift + (1 << 17)) >> 2)
        _, group, votes = np.unique(place, return_inverse=True, return_counts=True)
        order = np.lexsort((group, bits, -votes[group]))
        _, firsts = np.unique(group[order], return_index=True)
        best = order[np.sort(firsts)]
        columns_of_best = (
            values[best].tolist() for values in (picture, is_mirrored, top, left, rows, columns)
        )
        return [Match(*match) for match in zip(*columns_of_best, strict=True)]

    def _pairs(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return all similar pairs once: (our anchor, theirs, is mirrored, differing bits)."""
        hashes, count, total = (
            np.concatenate([hashes, hashes ^ _MIRROR]),
            len(hashes),
            len(self._hashes),
        )
        pairs = []
        for chunks, places, bounds in zip(
            _chunks(hashes).T.astype(np.int32), self._places, self._bounds, strict=True
        ):
            firsts, lasts = bounds[chunks], bounds[chunks + 1]
            ends = np.cumsum(lasts - firsts)  # end of each hash's share in the list of candidates
            found = np.arange(ends[-1] if count else 0) + np.repeat(lasts - ends, lasts - firsts)
            pairs.append(np.repeat(np.arange(2 * count) * total, lasts - firsts) + places[found])
        pairs = np.concatenate(pairs)
        ours, theirs = np.divmod(pairs, total)
        is_similar = np.bitwise_count(hashes[ours] ^ self._hashes[theirs]) <= _MAX_BITS
        ours, theirs = np.divmod(np.unique(pairs[is_similar]), total)
        return (
            ours % max(count, 1),
            theirs,
            ours >= count,
            np.bitwise_count(hashes[ours] ^ self._hashes[theirs]),
        )


def _patch_hashes(luma: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Signs of the 63 lowest DCT frequencies (without the mean) of each patch: uint64 (count,)."""
    patches = np.lib.stride_tricks.sliding_window_view(luma, (2 * RADIUS + 1, 2 * RADIUS + 1))
    bits = np.empty((len(rows), _FREQUENCIES**2), bool)
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        pixels = patches[rows[part] - RADIUS, columns[part] - RADIUS].astype(np.float32)
        bits[part] = (_BASIS @ pixels @ _BASIS.T).reshape(-1, _FREQUENCIES**2)[:, _ORDER] > 0
    bits[:, 0] = False  # exclude the mean
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def _chunks(hashes: np.ndarray) -> np.ndarray:
    """View uint64 (count,) as uint16 (count, 4)."""
    return hashes.view(np.uint16).reshape(-1, _NUM_CHUNKS)


def _basis() -> np.ndarray:
    """DCT-II basis for rows of 33 pixels, in which 3 pixels form one cell: float32 (8, 33)."""
    frequency, cell = np.arange(_FREQUENCIES)[:, None], np.arange(_CELLS).repeat(3)[None]
    return np.cos(np.pi * (2 * cell + 1) * frequency / (2 * _CELLS)).astype(np.float32)


def _order() -> np.ndarray:
    """Order of the coefficients, from lowest to highest frequency: int (64,)."""
    row, column = np.divmod(np.arange(_FREQUENCIES**2), _FREQUENCIES)
    return np.lexsort((row, np.maximum(row, column)))


_BASIS, _ORDER = _basis(), _order()

# A mirrored patch has the opposite sign at odd horizontal frequencies.
_MIRROR = np.packbits((np.arange(_FREQUENCIES**2) % 2)[_ORDER]).view(np.uint64)[0]
