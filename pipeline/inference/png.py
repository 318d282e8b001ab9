"""A fast PNG encoder: NumPy filters the rows and libdeflate compresses them.

libpng at its default level 6 takes ten times as long as `DEFAULT_LEVEL` for files that are 4 %
smaller, and runs on one core while the network waits; `docs/benchmarks.md` has the numbers.
"""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

LEVELS = range(13)
"""Compression levels of libdeflate."""
DEFAULT_LEVEL = 2
CAREFUL_LEVEL = 5
"""From this level on, all filters are tried for every row, and not only the two fastest."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}
"""Number of channels -> PNG's colour type: gray, gray and alpha, RGB, RGB and alpha."""
_BAND_BYTES = 1 << 18
"""Bytes of the rows that are filtered together; they fit into the processor's cache."""
_CHUNK_BYTES = 1 << 30


def encode_png(pixels: np.ndarray, level: int | None = None, chunks: bytes = b"") -> bytes:
    """Encode uint8 or uint16 `pixels` (height, width, 1 to 4 channels) as a PNG file.

    Args:
        pixels: gray, gray and alpha, RGB, or RGB and alpha.
        level: one of `LEVELS`; `None` is `DEFAULT_LEVEL`.
        chunks: complete chunks to write before the pixels.
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
    """Return a chunk of a PNG file: length, type, content and CRC."""
    return b"".join(
        [
            struct.pack(">I", len(content)),
            kind,
            content,
            struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))),
        ]
    )


def _filtered(pixels: np.ndarray, *, is_careful: bool) -> np.ndarray:
    """Return the filtered rows, (height, 1 + bytes per row), each with its filter's number first.

    Each row gets the filter with the smallest sum of absolute values, its bytes taken as signed
    numbers: libpng's heuristic.
    """
    height, width, channels = pixels.shape
    step = channels * pixels.itemsize  # bytes from a sample to that of the pixel to its left
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
    """Return the neighbour that is nearest to left + up - corner (PNG's Paeth predictor)."""
    left_, up_, corner_ = (values.astype(np.int16) for values in (left, up, corner))
    to_left, to_up = np.abs(up_ - corner_), np.abs(left_ - corner_)
    to_corner = np.abs(left_ + up_ - 2 * corner_)
    return np.where(
        (to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner)
    )
