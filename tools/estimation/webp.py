"""Quality of a lossy WebP file, from the quantisers in its header.

The frame header is that of VP8 (RFC 6386, sections 7, 9 and 19.2). libwebp uses a separate
quantiser for each of up to four segments; their mean, weighted by the size of the segments, gives
the quality.
"""

from __future__ import annotations

import math
import struct

_NUM_SEGMENTS = 4
_START_CODE = b"\x9d\x01\x2a"


class _Bits:
    """Decoder of bits with equal probabilities in a VP8 header (RFC 6386, section 7)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 2
        self._value = int.from_bytes(data[:2], "big")
        self._range, self._shifts = 255, 0

    def read(self, count: int = 1) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._bit()
        return value

    def signed(self, count: int) -> int:
        """Read an optional signed number; 0 if it is absent."""
        if not self.read():
            return 0
        value = self.read(count)
        return -value if self.read() else value

    def _bit(self) -> int:
        split = 1 + ((self._range - 1) * 128 >> 8)
        is_set = self._value >= split << 8
        if is_set:
            self._range -= split
            self._value -= split << 8
        else:
            self._range = split
        while self._range < 128:
            self._value <<= 1
            self._range <<= 1
            self._shifts += 1
            if self._shifts == 8:
                self._shifts = 0
                if self._at < len(self._data):
                    self._value |= self._data[self._at]
                self._at += 1
        return int(is_set)


def quality_of(data: bytes) -> int | None:
    """Return libwebp's quality, 0..100; `None` if the file has no lossy still image.

    It is within 1 of the quality that was set, unless the encoder was given a target size.
    """
    frame = _frame(data)
    if frame is None:
        return None
    quantisers = _quantisers(frame)
    # libwebp's index of a segment is 127 (1 - c^(1 - a)), where c depends only on the quality
    # and the mean of a over all blocks is 0.
    mean = sum(share * math.log(max(1 - (index + 0.5) / 127, 1e-3)) for index, share in quantisers)
    cube = math.exp(mean) ** 3
    quality = 1.5 * cube if cube < 0.5 else (cube + 1) / 2
    return min(100, max(0, round(100 * quality)))


def _frame(data: bytes) -> bytes | None:
    """Return the VP8 key frame of a WebP file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    at = 12
    while at + 8 <= len(data):
        name, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if name == b"VP8 ":
            frame = data[at + 8 : at + 8 + size]
            return frame if frame[3:6] == _START_CODE else None
        at += 8 + size + size % 2
    return None


def _quantisers(frame: bytes) -> list[tuple[int, float]]:
    """Return (quantiser index 0..127, share of the blocks) of each segment."""
    bits = _Bits(frame[10:])
    bits.read(2)  # colour space, clamping
    indices, shares, is_absolute = [0] * _NUM_SEGMENTS, [1.0, 0.0, 0.0, 0.0], False
    if bits.read():
        has_map, has_values = bits.read(), bits.read()
        if has_values:
            is_absolute = bool(bits.read())
            indices = [bits.signed(7) for _ in range(_NUM_SEGMENTS)]
            for _ in range(_NUM_SEGMENTS):
                bits.signed(6)  # loop filter
        if has_map:
            first, left, right = (
                (bits.read(8) if bits.read() else 255) / 255 for _ in range(_NUM_SEGMENTS - 1)
            )
            shares = [
                first * left,
                first * (1 - left),
                (1 - first) * right,
                (1 - first) * (1 - right),
            ]
    bits.read(1 + 6 + 3)  # loop filter: kind, level, sharpness
    if bits.read() and bits.read():
        for _ in range(8):
            bits.signed(6)
    bits.read(2)  # partitions
    base = bits.read(7)
    values = indices if is_absolute else [base + change for change in indices]
    return list(zip((min(127, max(0, value)) for value in values), shares, strict=True))
