"""PNG files, written fast: rows are filtered by NumPy and compressed by libdeflate.

libpng at its usual level 6 takes ten times what `DEFAULT_LEVEL` does, for files 4 % smaller, and
works on one core while the network waits; `docs/benchmarks.md` has the numbers.
"""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

LEVELS = range(13)
"""libdeflate's."""
DEFAULT_LEVEL = 2
CAREFUL_LEVEL = 5
"""From which on all filters are tried for every row, rather than the two fastest."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}
"""Number of channels -> PNG's colour type: gray, gray and alpha, RGB, RGB and alpha."""
_BAND_BYTES = 1 << 18
"""Of rows that are filtered together, so that they stay in the processor's cache."""
_CHUNK_BYTES = 1 << 30


def encode_png(pixels: np.ndarray, level: int | None = None, chunks: bytes = b"") -> bytes:
    """The content of a PNG file of uint8 or uint16 `pixels` (height, width, 1 to 4 channels).

    `level` is one of `LEVELS`, or `None` for `DEFAULT_LEVEL`; `chunks` are whole ones that go
    before the pixels.
    """
    level = DEFAULT_LEVEL if level is None else level
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _KINDS[channels], 0, 0, 0)
    data = imagecodecs.deflate_encode(_filtered(pixels, is_careful=level >= CAREFUL_LEVEL), level)
    parts = [
        chunk(b"IDAT", data[start : start + _CHUNK_BYTES])
        for start in range(0, len(data), _CHUNK_BYTES)
    ]
    return b"".join([_SIGNATURE, chunk(b"IHDR", header), chunks, *parts, chunk(b"IEND", b"")])


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return b"".join(
        [
            struct.pack(">I", len(content)),
            kind,
            content,
            struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))),
        ]
    )


def _filtered(pixels: np.ndarray, *, is_careful: bool) -> np.ndarray:
    """The rows as they are compressed: (height, 1 + bytes of a row), the filter's number first.

    For every row the filter is taken whose bytes, as signed numbers, are the smallest: libpng's
    rule.
    """
    height, width, channels = pixels.shape
    step = channels * pixels.itemsize  # bytes to the same sample of the pixel at the left
    rows = np.empty((height, 1 + width * step), np.uint8)
    above = np.zeros((1, width * step), np.uint8)
    size = max(1, _BAND_BYTES // (width * step))
    for top in range(0, height, size):
        band = np.ascontiguousarray(pixels[top : top + size], dtype=f">u{pixels.itemsize}")
        band = band.view(np.uint8).reshape(len(band), -1)
        left, up = np.zeros_like(band), np.concatenate([above, band[:-1]])
        left[:, step:] = band[:, :-step]
        tried = {1: band - left, 3: band - ((left & up) + ((left ^ up) >> 1))}
        if is_careful:
            corner = np.zeros_like(band)
            corner[:, step:] = up[:, :-step]
            tried |= {2: band - up, 4: band - _paeth(left, up, corner)}
        numbers = np.array([*tried], np.uint8)
        costs = [
            np.abs(values.view(np.int8)).view(np.uint8).sum(1, dtype=np.uint64)
            for values in tried.values()
        ]
        chosen = numbers[np.argmin(costs, axis=0)]
        target = rows[top : top + size]
        target[:, 0] = chosen
        for number, values in tried.items():
            target[chosen == number, 1:] = values[chosen == number]
        above = band[-1:]
    return rows


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of three neighbours the one that is nearest to left + up - corner."""
    left_, up_, corner_ = (values.astype(np.int16) for values in (left, up, corner))
    to_left, to_up = np.abs(up_ - corner_), np.abs(left_ - corner_)
    to_corner = np.abs(left_ + up_ - 2 * corner_)
    return np.where(
        (to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner)
    )
