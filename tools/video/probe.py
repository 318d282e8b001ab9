"""Read the properties of a video: size, colours, time span, and reasons why it cannot be used.

`probe` reads them from the header and the first frames. Colour tags, display matrix and pixel
aspect define how stored samples become a picture.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from pipeline.data.videos import (
    CONTAINER_OPTIONS,
    PICTURES,
    UNKNOWN_MATRIX,
    Orientation,
    orientation,
    read_packets,
)

# AVColorSpace -> matrix for swscale; RGB (0) needs none.
_MATRICES = {
    0: Colorspace.DEFAULT,
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
}
_TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
_GAMUT_MAP = "zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"
# Per frame; 8K has 33, and a header that claims more would only fill the memory.
MAX_MEGAPIXELS = 64
MAX_HOURS = 7 * 24  # largest time span of a file; longer ones have broken timestamps
NUM_FIRST_FRAMES = 8  # examined for properties that the header lacks
_MAX_FIRST_PACKETS = 600
_INTERLACED_ORDERS = range(2, 6)  # AV_FIELD_TT, _BB, _TB, _BT
_MAX_ASPECT = 4  # of a pixel, in both directions; DVDs have up to 1.46, anamorphic lenses 2


class BadVideoError(ValueError):
    """A video that cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video known before its frames are read.

    `start` and `end` are in ticks of `time_base` seconds.
    """

    height: int  # of a frame from `sample_frames`: upright, with square pixels
    width: int
    coded_height: int  # as stored
    coded_width: int
    start: int  # presentation time of the first frame
    end: int  # end of the last frame
    time_base: Fraction
    frame_rate: float | None  # average according to the file
    codec: str
    pixel_format: str
    bits: int  # per sample
    transfer: str
    matrix: Colorspace
    is_full_range: bool
    is_interlaced: bool
    pixel_aspect: Fraction  # width of a stored pixel relative to its height
    orientation: Orientation
    is_lossy: bool  # because of its codec or subsampled colour
    refusals: tuple[str, ...]  # reasons why it must not be used; empty if it may
    truncated: str  # how much is missing at the end, or ""

    @property
    def duration_s(self) -> float:
        """Time from the first frame to the end of the last one, in seconds."""
        return float((self.end - self.start) * self.time_base)


class Segment(NamedTuple):
    """Part of a video: the frames with first <= pts < end, in ticks.

    `None` means open, so that no frame is lost.
    """

    start_s: int  # rounded down, from the first frame
    first: int | None
    end: int | None


def segments(info: VideoInfo, segment_time: float) -> list[Segment]:
    """Split the video into segments of `segment_time` seconds; each frame is in exactly one."""
    ticks = Fraction(segment_time) / info.time_base
    count = max(1, math.ceil((info.end - info.start) / ticks))
    borders = [None, *(info.start + math.ceil(index * ticks) for index in range(1, count)), None]
    return [
        Segment(int(index * segment_time), borders[index], borders[index + 1])
        for index in range(count)
    ]


def probe(path: Path) -> VideoInfo:
    """Read the properties of a video.

    Raises `BadVideoError` if it is not a readable video, `OSError` if the file cannot be read.
    """
    with open_video(path) as (container, stream):
        frames = _first_frames(container, stream)
        transfer, matrix, is_full_range, refusals = colours(
            frames[0], stream.codec_context.color_range
        )
        # PyAV has `field_order` from version 18 on; decoders mark most such frames themselves.
        field_order = getattr(stream.codec_context, "field_order", 0)
        is_interlaced = field_order in _INTERLACED_ORDERS or any(
            frame.interlaced_frame for frame in frames
        )
        turn = orientation(frames[0])
        aspect = _pixel_aspect(stream)
        time_base = stream.time_base
        codec, rate = stream.codec_context.codec, stream.average_rate
        kind = frames[0].format
        is_rgb = kind.is_rgb
        is_halved = (
            not is_rgb and len(kind.components) > 2 and kind.components[1].width < frames[0].width
        )
    with open_video(path) as (container, stream):
        start, end, missing_s = _span(container, stream)
    height, width = square_size(frames[0].height, frames[0].width, aspect)
    if turn and turn.transpose:
        height, width = width, height
    if is_interlaced and codec.canonical_name == "hevc":
        refusals += (
            "interlaced HEVC, which stores single fields; weave and deinterlace it first, e.g. "
            "with `ffmpeg -i IN -vf weave=first_field=top,bwdif=mode=send_frame -crf 12 OUT.mp4`",
        )
    if turn is None:
        refusals += (
            "its display matrix is not a multiple of a quarter turn; rotate it with an editor",
        )
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        refusals += (
            f"its pixels have an aspect ratio of {aspect}; correct it with `ffmpeg -i IN -c copy "
            "-aspect 16:9 OUT`",
        )
    if (end - start) * time_base > MAX_HOURS * 3600:
        refusals += (f"its timestamps span more than {MAX_HOURS} hours; rewrite it with ffmpeg",)
    return VideoInfo(
        height,
        width,
        frames[0].height,
        frames[0].width,
        start,
        end,
        time_base,
        float(rate) if rate else None,
        codec.canonical_name,
        kind.name,
        kind.components[0].bits,
        transfer,
        matrix,
        is_full_range,
        is_interlaced,
        aspect,
        turn or Orientation(),
        codec.lossy or not codec.lossless or is_halved,
        refusals,
        f"truncated: the last {missing_s:.1f} s are missing" if missing_s else "",
    )


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its largest video stream (cover art excluded).

    Raises `BadVideoError`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError("not a regular file")
    if not status.st_size:
        raise BadVideoError("empty file")
    try:
        container = av.open(f"file:{path}", options=CONTAINER_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise BadVideoError(
            f"not a video, or its header is damaged or truncated ({error.strerror})"
        ) from error
    with container:
        yield container, _main_stream(container)


def _main_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        pictures = " except cover art" if container.streams.video else ""
        raise BadVideoError(f"no video stream{pictures}")
    stream = max(streams, key=lambda stream: _area(stream) if stream.codec_context else -1)
    context = stream.codec_context
    if context is None or not context.is_decoder:
        raise BadVideoError("its codec is unknown or encrypted; there is no decoder for it")
    if _area(stream) > MAX_MEGAPIXELS * 1e6:
        raise BadVideoError(
            f"{stream.height}x{stream.width} exceeds {MAX_MEGAPIXELS} megapixels per frame"
        )
    if not stream.time_base:
        raise BadVideoError("its video stream has no time base")
    # the size may change within the stream
    context.options = {"max_pixels": str(int(MAX_MEGAPIXELS * 1e6))}
    return stream


def _area(stream: VideoStream) -> int:
    return (stream.width or 0) * (stream.height or 0)


def _pixel_aspect(stream: VideoStream) -> Fraction:
    aspect = stream.sample_aspect_ratio
    # Encoders round; no anamorphic format differs by only 1 %.
    if not aspect or abs(aspect - 1) < Fraction(1, 100):
        return Fraction(1)
    return aspect


def _first_frames(container: InputContainer, stream: VideoStream) -> list[VideoFrame]:
    frames: list[VideoFrame] = []
    for _, packet in zip(range(_MAX_FIRST_PACKETS), read_packets(container, stream), strict=False):
        if packet is None:
            continue
        try:
            frames += stream.codec_context.decode(packet)
        except av.FFmpegError:
            continue
        if len(frames) >= NUM_FIRST_FRAMES:
            break
    frames = [frame for frame in frames if frame.width and frame.height]
    if not frames:
        raise BadVideoError(
            f"none of its first frames can be decoded ({stream.codec_context.name})"
        )
    return frames


def _span(container: InputContainer, stream: VideoStream) -> tuple[int, int, float]:
    """Return (first presentation time, end, in ticks; seconds missing at the end).

    The values come from the packets, not from the header. Reads the packets after the last key
    frame, or all of them if the header's duration is missing or wrong.
    """
    claimed_s = container.duration / av.time_base if container.duration else 0.0
    origin_s = (container.start_time or 0) / av.time_base
    end = reached_s = None
    if claimed_s:
        try:
            container.seek(int((origin_s + claimed_s) * av.time_base))
            _, end, reached_s = _read_times(container, stream)
        except av.FFmpegError:
            pass  # not seekable
    start = stream.start_time
    if end is None or start is None:
        first, end, reached_s = _read_all_times(container, stream)
        start = first if start is None else start
    if start is None or end is None:
        raise BadVideoError(
            "its frames have no timestamps; rewrite it with `ffmpeg -i IN -c copy OUT.mkv`"
        )
    # Matroska counts from 0, wherever the first frame is.
    missing_s = claimed_s + min(origin_s, 0) - reached_s
    return start, max(end, start + 1), missing_s if missing_s > max(1.0, claimed_s / 50) else 0.0


def _read_all_times(
    container: InputContainer, stream: VideoStream
) -> tuple[int | None, int | None, float]:
    with av.open(container.name, options=CONTAINER_OPTIONS, metadata_errors="replace") as reopened:
        return _read_times(reopened, reopened.streams[stream.index])


def _read_times(
    container: InputContainer, stream: VideoStream
) -> tuple[int | None, int | None, float]:
    """Return (first time, end, latest second of any stream) from here to the end of the file.

    The first two are of the video's packets.
    """
    first = end = None
    reached_s = 0.0
    for packet in read_packets(container):
        if packet is None or packet.pts is None or not packet.size:
            continue
        reached_s = max(reached_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            first = packet.pts if first is None else min(first, packet.pts)
            end = max(end or packet.pts, packet.pts + (packet.duration or 1))
    return first, end, reached_s


# --- How stored samples become a picture ---


def square_size(height: int, width: int, aspect: Fraction) -> tuple[int, int]:
    """(height, width) with square pixels; shrinks only, because stretching invents pixels."""
    if aspect >= 1:
        return max(1, round(height / aspect)), width
    return height, max(1, round(width * aspect))


def colours(frame: VideoFrame, header_range: int) -> tuple[str, Colorspace, bool, tuple[str, ...]]:
    """Return (transfer characteristic, matrix, is full range, refusals) according to the tags.

    Untagged files are treated as players do.
    """
    transfer, primaries, matrix = frame.color_trc, frame.color_primaries, frame.colorspace
    name = _enum_name(ColorTrc, transfer)
    refusals: tuple[str, ...] = ()
    if transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        refusals = (
            f"HDR: its transfer characteristic is {name}, which must be tone-mapped to taste "
            f"first, e.g. with `ffmpeg -i IN -vf {_TONE_MAP} -crf 12 OUT.mp4`",
        )
    elif primaries == ColorPrimaries.BT2020 or matrix in (9, 10):
        refusals = (
            f"wide gamut: BT.2020 colours (transfer characteristic {name}); map them to BT.709 "
            f"first, e.g. with `ffmpeg -i IN -vf {_GAMUT_MAP} -crf 12 OUT.mp4`",
        )
    elif transfer == ColorTrc.UNSPECIFIED and any(
        data.type.name.startswith("DOVI") for data in frame.side_data
    ):
        refusals = (
            "Dolby Vision without an SDR-compatible base layer; tone-map it with an editor first",
        )
    elif matrix != UNKNOWN_MATRIX and matrix not in _MATRICES:
        refusals = (
            f"its colour matrix (number {matrix} of H.273) is not one of BT.601, BT.709, FCC, "
            "SMPTE 240M and "
            "RGB; convert it with ffmpeg",
        )
    elif frame.format.is_rgb is False and matrix == 0:
        matrix = UNKNOWN_MATRIX  # zeros in a header: RGB is impossible in this pixel format
    # The rule of mpv and others for untagged files.
    default = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    is_full = (
        frame.color_range or header_range
    ) == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return name, _MATRICES.get(matrix, default), is_full or frame.format.is_rgb, refusals


def _enum_name(kind: type[ColorTrc], value: int) -> str:
    names = {2: "unknown", 16: "SMPTE ST 2084 (PQ)", 18: "ARIB STD-B67 (HLG)"}
    return names.get(value) or (kind(value).name if value in {*kind} else str(value))
