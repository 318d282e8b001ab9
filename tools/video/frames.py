"""Frames of a piece of a video, straight from the file, as upright RGB pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipeline.libraries import cv2
from tools.video.choice import FrameChooser, Sampling, thumbnail
from tools.video.probe import (
    BadVideoError,
    Segment,
    VideoInfo,
    open_video,
    read_packets,
    square_size,
)

# No video has more; a hostile file could hold millions of frames, a byte each
MAX_FRAMES_A_SECOND = 1000
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


class DamagedError(Exception):
    """Damage met by several decoder threads, whose order decides what is lost: decode again with
    one."""


class Frame(NamedTuple):
    """A frame of a video."""

    index: int  # its number within the segment
    time_s: float  # from the first frame of the video
    pixels: np.ndarray  # uint8 RGB (height, width, 3), upright, square pixels


@dataclass
class FrameCounts:
    """What happened to the frames of a segment."""

    decoded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # candidates, by reason
    errors: int = 0  # packets that could not be read or decoded
    lost: int = 0  # frames that were damaged, or may show the damage: up to the next key frame


def sample_frames(
    path: Path,
    info: VideoInfo,
    segment: Segment,
    sampling: Sampling,
    key: str,
    tally: FrameCounts | None = None,
    codec_threads: int = 1,
) -> Iterator[Frame]:
    """The frames of `segment` that are worth storing (see choice.py); `key` decides the random
    draws.

    The same file, segment, sampling and key give the same frames. Raises `BadVideoError` or
    `OSError` where the file cannot be read; damage within it is counted in `tally`, and
    `DamagedError` with several `codec_threads`.
    """
    tally = FrameCounts() if tally is None else tally
    chooser: FrameChooser[VideoFrame] = FrameChooser(sampling, key, segment.first is None)
    converter = _Converter(info)
    try:
        for frame in segment_frames(path, info, segment, tally, codec_threads):
            for index, chosen in chooser.add(frame, thumbnail(frame)):
                yield converter(chosen, index)
        for index, chosen in chooser.finish():
            yield converter(chosen, index)
    finally:
        tally.dropped += chooser.dropped


class _Converter:
    """Decoded frames to RGB."""

    def __init__(self, info: VideoInfo) -> None:
        self._info = info
        self._reformatter = VideoReformatter()  # its tables are made once

    def __call__(self, frame: VideoFrame, index: int) -> Frame:
        info = self._info
        planar = (
            self._reformatter.reformat(  # to planes: six times as fast as to rgb24, the same bytes
                frame,
                format="gbrp",
                interpolation=_SCALING,
                threads=1,
                src_colorspace=info.matrix,
                src_color_range=ColorRange.JPEG if info.is_full_range else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
        )
        green, blue, red = (_samples(plane) for plane in planar.planes)
        pixels = cv2.merge([red, green, blue])
        height, width = square_size(planar.height, planar.width, info.pixel_aspect)
        if (height, width) != pixels.shape[:2]:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        turn = info.orientation
        if turn.transpose:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1]
        return Frame(
            index, float((frame.pts - info.start) * info.time_base), np.ascontiguousarray(pixels)
        )


def _samples(plane: VideoPlane) -> np.ndarray:
    """uint8 (height, width), without copying."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        : plane.height, : plane.width
    ]


def segment_frames(
    path: Path, info: VideoInfo, segment: Segment, tally: FrameCounts, codec_threads: int = 1
) -> Iterator[VideoFrame]:
    """All good frames with segment.first <= pts < segment.end, deinterlaced where they need it, in
    their order.

    Decodes from the key frame before the segment. Where that one turns out to be shown later than
    the segment begins (files are sought by decoding times), from an earlier one.
    """
    second = int(1 / info.time_base) + 1
    back = second if info.is_interlaced else 0  # the deinterlacer wants to see the frame before
    while True:
        with open_video(path) as (container, stream):
            from_start = segment.first is None or segment.first - back <= info.start
            if not from_start and not _seek(container, stream, segment.first - back):
                back = info.end - info.start  # it cannot be sought in: read it from its beginning
                continue
            context = stream.codec_context
            context.thread_type = "FRAME" if codec_threads > 1 else "NONE"
            context.thread_count = codec_threads
            tally.errors = tally.lost = 0
            frames = _without_fields(
                _decoded(container, stream, segment, tally, from_start), info, tally
            )
            first = next(frames, None)
            if from_start or (first is not None and first.pts <= segment.first):
                yield from _within(first, frames, info, segment, tally)
                return
        back = max(2 * back, second)


def _seek(container: InputContainer, stream: VideoStream, time: int) -> bool:
    try:
        container.seek(time, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _within(
    first: VideoFrame | None,
    others: Iterator[VideoFrame],
    info: VideoInfo,
    segment: Segment,
    tally: FrameCounts,
) -> Iterator[VideoFrame]:
    """The frames that lie within the segment, counted."""
    length = float(((segment.end or info.end) - (segment.first or info.start)) * info.time_base)
    frame = first
    while frame is not None and (segment.end is None or frame.pts < segment.end):
        if segment.first is None or frame.pts >= segment.first:
            tally.decoded += 1
            if tally.decoded > MAX_FRAMES_A_SECOND * (length + 1):
                raise BadVideoError(f"more than {MAX_FRAMES_A_SECOND} frames a second")
            yield frame
        frame = next(others, None)


def _decoded(
    container: InputContainer,
    stream: VideoStream,
    segment: Segment,
    tally: FrameCounts,
    from_start: bool,
) -> Iterator[VideoFrame | None]:
    """Good frames from here on, a little beyond the end of the segment; `None` where some are
    missing.

    A decoder conceals what it could not read, and what refers to that shows it too, unmarked: after
    any damage, frames are lost until the next key frame.
    """
    context = stream.codec_context
    is_waiting = (
        not from_start
    )  # seeking may land between two key frames, where decoders show garbage
    is_broken, last = False, segment.first
    for packet in read_packets(container, stream):
        if packet is not None:
            last = last if packet.pts is None else packet.pts
            is_waiting = is_waiting and not packet.is_keyframe and packet.size > 0
            if is_waiting:
                continue
        frames = _decode(context, packet)
        if frames is None or (packet is not None and packet.is_corrupt):
            if context.thread_count > 1:
                raise DamagedError
            tally.errors += _lies_in(segment, last)
            is_broken = True
        for frame in frames or ():
            if frame.pts is None:
                frame.pts = frame.dts  # AVI and its like
            if frame.is_corrupt and context.thread_count > 1:
                raise DamagedError
            was_broken = is_broken
            is_broken = frame.pts is None or frame.is_corrupt or (is_broken and not frame.key_frame)
            if not is_broken:
                yield frame
                continue
            tally.lost += _lies_in(segment, frame.pts)
            if not was_broken:
                yield None
            if frame.pts is not None and segment.end is not None and frame.pts >= segment.end:
                return


def _decode(context: av.VideoCodecContext, packet: av.Packet | None) -> list[VideoFrame] | None:
    """The frames that come out for a packet; `None` where it is damaged, or could not even be
    read."""
    if packet is None:
        return None
    try:
        return context.decode(packet)
    except (av.FFmpegError, EOFError):
        return None


def _lies_in(segment: Segment, pts: int | None) -> bool:
    """Whether damage at this time is to be counted here, and not in a neighbouring segment."""
    if pts is None:
        return True
    return (segment.first is None or pts >= segment.first) and (
        segment.end is None or pts < segment.end
    )


def _without_fields(
    frames: Iterable[VideoFrame | None], info: VideoInfo, tally: FrameCounts
) -> Iterator[VideoFrame]:
    """Deinterlace, one frame for a frame; progressive frames come out as they are."""
    if not info.is_interlaced:
        for frame in frames:
            if (
                frame is not None and frame.interlaced_frame
            ):  # a stream that changes its kind on the way
                tally.dropped["interlaced"] += 1
            elif frame is not None:
                yield frame
        return
    graph: Graph | None = None
    kind = None
    for frame in frames:
        if graph is not None and (
            frame is None or kind != (frame.width, frame.height, frame.format.name)
        ):
            yield from _pull(graph, None, info)  # what comes next is no neighbour
            graph = None
        if frame is not None:
            if graph is None:
                kind = frame.width, frame.height, frame.format.name
                graph = _deinterlacer(frame, info)
            yield from _pull(graph, frame, info)
    if graph is not None:
        yield from _pull(graph, None, info)


def _deinterlacer(frame: VideoFrame, info: VideoInfo) -> Graph:
    """bwdif (Weston 3 field and yadif): the best of FFmpeg's own, at a few milliseconds a frame."""
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:"
        f"time_base={info.time_base}:colorspace={frame.colorspace}:range={frame.color_range}",
    )
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _pull(graph: Graph, frame: VideoFrame | None, info: VideoInfo) -> Iterator[VideoFrame]:
    """Push a frame (`None`: the end) into a graph, and take out what is ready."""
    graph.vpush(frame)
    while True:
        try:
            ready = graph.vpull()
        except (av.BlockingIOError, EOFError):
            return
        ready.pts = int(ready.pts * ready.time_base / info.time_base)
        ready.time_base = info.time_base
        yield ready
