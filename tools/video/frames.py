"""Decode the frames of a video segment straight from the file, as upright RGB pictures."""

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
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from pipeline.data.videos import BITEXACT, SMOOTH, read_packets, reformat
from pipeline.libraries import cv2
from tools.video.choice import FrameChooser, Sampling, thumbnail
from tools.video.probe import (
    BadVideoError,
    Segment,
    VideoInfo,
    open_video,
    square_size,
)

# No real video has more; a hostile file could hold millions of frames of one byte each.
MAX_FRAMES_A_SECOND = 1000


class DamagedError(Exception):
    """Damage occurred with several decoder threads.

    Their order decides which frames are lost, so decoding must be repeated with one thread.
    """


class Frame(NamedTuple):
    """A frame of a video."""

    index: int  # number within the segment
    time_s: float  # seconds from the first frame of the video
    pixels: np.ndarray  # uint8 RGB (height, width, 3), upright, square pixels


@dataclass
class FrameCounts:
    """Counts of the frames of a segment."""

    decoded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # omitted candidates, by reason
    errors: int = 0  # packets that could not be read or decoded
    lost: int = 0  # frames that are damaged or may show damage, until the next key frame


def sample_frames(
    path: Path,
    info: VideoInfo,
    segment: Segment,
    sampling: Sampling,
    key: str,
    tally: FrameCounts | None = None,
    codec_threads: int = 1,
) -> Iterator[Frame]:
    """Yield the frames of `segment` that are worth storing (see choice.py); `key` seeds the draws.

    The same file, segment, sampling and key give the same frames. Raises `BadVideoError` or
    `OSError` if the file cannot be read. Damage within it is counted in `tally`; with several
    `codec_threads`, `DamagedError` is raised instead.
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


def all_frames(path: Path, info: VideoInfo, tally: FrameCounts) -> Iterator[Frame]:
    """Yield every good frame of a video; damage is counted in `tally`.

    Raises `BadVideoError` or `OSError` if the file cannot be read.
    """
    converter = _Converter(info)
    for index, frame in enumerate(segment_frames(path, info, Segment(0, None, None), tally)):
        yield converter(frame, index)


class _Converter:
    """Converts decoded frames to RGB."""

    def __init__(self, info: VideoInfo) -> None:
        self._info = info
        self._reformatter = VideoReformatter()  # creates its tables only once

    def __call__(self, frame: VideoFrame, index: int) -> Frame:
        info = self._info
        planar = reformat(  # planes give the same bytes as rgb24, six times as fast
            frame,
            self._reformatter,
            format="gbrp",
            interpolation=SMOOTH | BITEXACT,
            threads=1,
            src_colorspace=info.matrix,
            src_color_range=ColorRange.JPEG if info.is_full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
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
    """View a plane as uint8 (height, width), without copying."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        : plane.height, : plane.width
    ]


def segment_frames(
    path: Path, info: VideoInfo, segment: Segment, tally: FrameCounts, codec_threads: int = 1
) -> Iterator[VideoFrame]:
    """Yield the good frames of a segment in order, deinterlaced if needed.

    These have segment.first <= pts < segment.end. Decoding starts at the key frame before the
    segment. Seeking goes by decoding time, so the key frame found may be displayed only after the
    segment begins; an earlier one is tried then.
    """
    second = int(1 / info.time_base) + 1
    back = second if info.is_interlaced else 0  # the deinterlacer needs the previous frame
    while True:
        with open_video(path) as (container, stream):
            from_start = segment.first is None or segment.first - back <= info.start
            if not from_start and not _seek(container, stream, segment.first - back):
                back = info.end - info.start  # not seekable; read it from the beginning
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
    """Yield and count the frames within the segment."""
    length = float(((segment.end or info.end) - (segment.first or info.start)) * info.time_base)
    frame = first
    while frame is not None and (segment.end is None or frame.pts < segment.end):
        if segment.first is None or frame.pts >= segment.first:
            tally.decoded += 1
            if tally.decoded > MAX_FRAMES_A_SECOND * (length + 1):
                raise BadVideoError(f"more than {MAX_FRAMES_A_SECOND} frames per second")
            yield frame
        frame = next(others, None)


def _decoded(
    container: InputContainer,
    stream: VideoStream,
    segment: Segment,
    tally: FrameCounts,
    from_start: bool,
) -> Iterator[VideoFrame | None]:
    """Yield good frames until shortly after the end of the segment; `None` where some are missing.

    Decoders conceal what they could not read, and frames that refer to it show the damage without
    being marked. So after any damage, frames are lost until the next key frame.
    """
    context = stream.codec_context
    # Seeking may end between two key frames, where decoders show garbage.
    is_waiting = not from_start
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
                frame.pts = frame.dts  # AVI and similar formats
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
    """Decode a packet into frames; `None` if it is damaged or could not be read."""
    if packet is None:
        return None
    try:
        return context.decode(packet)
    except (av.FFmpegError, EOFError):
        return None


def _lies_in(segment: Segment, pts: int | None) -> bool:
    """Whether damage at this time belongs to this segment and not to a neighbouring one."""
    if pts is None:
        return True
    return (segment.first is None or pts >= segment.first) and (
        segment.end is None or pts < segment.end
    )


def _without_fields(
    frames: Iterable[VideoFrame | None], info: VideoInfo, tally: FrameCounts
) -> Iterator[VideoFrame]:
    """Deinterlace frames one by one; progressive frames are left as they are."""
    if not info.is_interlaced:
        for frame in frames:
            if frame is not None and frame.interlaced_frame:  # the stream changes its kind midway
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
            yield from _pull(graph, None, info)  # the next frame does not follow the last one
            graph = None
        if frame is not None:
            if graph is None:
                kind = frame.width, frame.height, frame.format.name
                graph = _deinterlacer(frame, info)
            yield from _pull(graph, frame, info)
    if graph is not None:
        yield from _pull(graph, None, info)


def _deinterlacer(frame: VideoFrame, info: VideoInfo) -> Graph:
    """Build a graph with bwdif (Weston 3 field and yadif), FFmpeg's best deinterlacer.

    It takes a few milliseconds per frame.
    """
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
    """Push a frame (`None`: the end) into a graph and yield the frames that are ready."""
    graph.vpush(frame)
    while True:
        try:
            ready = graph.vpull()
        except (av.BlockingIOError, EOFError):
            return
        ready.pts = int(ready.pts * ready.time_base / info.time_base)
        ready.time_base = info.time_base
        yield ready
