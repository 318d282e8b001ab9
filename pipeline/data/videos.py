"""Read videos for upscaling and datasets: packets, orientation, conversion. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

CONTAINER_OPTIONS = {  # a "video" could be a playlist that refers to other files or servers
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,yuv4mpegpipe",
}
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
"""Dispositions of video streams that are not films."""
MAX_READ_ERRORS = 100
"""Consecutive errors after which reading ends, so that a damaged file is not read forever."""
# swscale's flags, which PyAV names from version 18 on.
SMOOTH = 0x4 | 0x2000 | 0x40000
"""BICUBIC, FULL_CHR_H_INT and ACCURATE_RND: chroma is interpolated at full precision."""
BITEXACT = 0x80000
"""The same bytes on every processor."""
UNKNOWN_MATRIX = 2
"""H.273's code for an unspecified matrix; the same for primaries and transfer characteristics."""


def read_packets(container: InputContainer, *streams: Stream) -> Iterator[av.Packet | None]:
    """Yield packets to the end of the file, including the empty ones that flush decoders.

    `None` stands for a read error.

    Raises:
        OSError: the file cannot be read, for another reason than damage.
    """
    errors = 0
    while errors < MAX_READ_ERRORS:
        try:
            for packet in container.demux(*streams):
                errors = 0
                yield packet
            return
        # Raised by PyAV at the end of the file, when it flushes streams that appeared midway
        # (MPEG-TS).
        except IndexError:
            return
        except av.InvalidDataError:  # damaged here; what follows may be good
            errors += 1
            yield None
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


class Orientation(NamedTuple):
    """How to turn a stored frame upright: transpose it, then flip rows, then columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def orientation(frame: VideoFrame) -> Orientation | None:
    """Read the display matrix, which maps stored points (x right, y down) to displayed ones.

    `None` if it is not a multiple of a quarter turn, mirrored or not.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])  # (x, y) -> (a x + c y, b x + d y)
    if not (b or c) and a and d:
        return Orientation(False, d < 0, a < 0)
    if not (a or d) and b and c:
        return Orientation(True, b < 0, c < 0)
    return None


def reformat(
    frame: VideoFrame, reformatter: VideoReformatter | None = None, **options: Any
) -> VideoFrame:
    """Convert a frame as `VideoFrame.reformat` does, whatever its primaries and transfer say.

    PyAV 17 passes both tags on to swscale, which refuses reserved values; they are hidden here, and
    the result has none.
    """
    tags = frame.color_primaries, frame.color_trc
    frame.color_primaries, frame.color_trc = ColorPrimaries.UNSPECIFIED, ColorTrc.UNSPECIFIED
    try:
        return (reformatter or VideoReformatter()).reformat(frame, **options)
    finally:
        frame.color_primaries, frame.color_trc = tags
