"""Upscale videos: decode, upscale a few frames at a time, encode in segments, join them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from tqdm import tqdm

from pipeline.cli import FULL_DISK, RunError, UserError, counted
from pipeline.data.videos import (
    CONTAINER_OPTIONS,
    PICTURES,
    SMOOTH,
    UNKNOWN_MATRIX,
    Orientation,
    orientation,
    read_packets,
    reformat,
)
from pipeline.inference.film_output import check_sound, is_damage, write_film
from pipeline.inference.film_segments import (
    FORMAT,
    FilmSegments,
    PictureFormat,
    SegmentWriter,
    open_segments,
)
from pipeline.inference.jobs import CONTAINERS
from pipeline.inference.sizes import TargetSize, upscale_images
from pipeline.inference.tiles import Advance, Upscaler

LARGEST_GROUP = 8
"""Maximum number of small frames that are upscaled together."""
SEGMENT_PIXELS = 48_000_000
"""LR pixels after which a segment ends: half a minute to a few minutes of work on a CPU."""
SEGMENT_FRAMES = (24, 250)
"""Minimum and maximum number of frames of a segment. libx264, too, begins anew after 250."""
# H.273's matrix -> swscale's. Others are treated as BT.709 in both decoding and encoding, so that
# colours are preserved.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: 9,  # BT.2020, which PyAV names from version 18 on
}


class _DamagedError(Exception):
    """A packet is damaged: several threads of a decoder may lose other frames with it."""


class _ChangedFramesError(Exception):
    """The source was decoded into other frames than those of its segments."""


def video_size(path: Path) -> tuple[int, int, int]:
    """Return number of frames (0: the file does not say), height and width as stored."""
    with _opened(path) as (_, stream):
        frames = stream.frames
        if not frames and stream.average_rate and path.stat().st_size:
            seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            frames = round(seconds * float(stream.average_rate))
        return frames, stream.height, stream.width


def upscale_video(
    source: Path,
    result: Path,
    target: TargetSize,
    upscaler: Upscaler,
    advance: Advance,
    settings: Mapping[str, object],
) -> None:
    """Upscale the video `source` to the size of `target` and write `result` atomically.

    Frames keep their timestamps and are turned upright, as players show them. Odd sides lose one
    row or column. Finished segments are kept beside the result until it is complete, so that the
    next call with the same source and `settings` continues there. Damaged packets, and what a
    result cannot hold, are reported on stderr.

    Args:
        source: the video.
        result: the file to write; its suffix determines the format.
        target: the size of the result.
        upscaler: runs the network.
        advance: called with the numbers of pixels that the network was shown.
        settings: everything else that determines the pixels, such as the network's digest, as
            values that JSON can hold.

    Raises:
        UserError: the video cannot be read, or not be written in this format.
        RunError: the result cannot be written.
    """
    kind = CONTAINERS[result.suffix.lower()]
    status = source.stat()
    film = {
        "source": [source.name, status.st_size, status.st_mtime_ns],
        "size": [target.scale, target.size and list(target.size), target.pre_downsample],
        **settings,
        "software": [FORMAT, av.__version__, str(sorted(av.library_versions.items()))],
    }
    with _opened(source) as (container, _):
        check_sound(container, kind)
    try:
        with open_segments(result, film) as segments:
            _report_found(source, segments)
            try:
                threads = "AUTO"
                while not segments.is_complete:
                    try:
                        _upscale_frames(source, segments, target, upscaler, advance, threads)
                    except _DamagedError:
                        threads = "NONE"
                    except _ChangedFramesError:
                        _note(source, "decoded differently than the last time; upscaling all of it")
                        segments.clear()
                _join(source, segments, kind)
            except BaseException as error:
                if isinstance(error, UserError) or not segments.finished:  # it would end here again
                    segments.remove()
                elif isinstance(error, KeyboardInterrupt):
                    count = sum(len(segment.frames) for segment in segments.finished)
                    _note(source, f"kept {counted(count, 'frame')}; the same command continues")
                raise
            segments.become(result)
    except (OSError, av.FFmpegError) as error:
        if error.errno in FULL_DISK:
            raise RunError(
                f"{os.strerror(error.errno)}; free some space and run the same command again, "
                "which continues where this one stopped"
            ) from error
        if isinstance(error, av.FFmpegError):
            raise RunError(
                f"cannot be read, or not be written as {result.suffix} ({error.strerror})"
            ) from error
        raise


def _note(source: Path, text: str) -> None:
    tqdm.write(f"note: {source}: {text}", file=sys.stderr)


def _report_found(source: Path, segments: FilmSegments) -> None:
    if segments.changed:
        _note(source, f"starting over, because these changed: {segments.changed}")
    elif segments.finished:
        count = sum(len(segment.frames) for segment in segments.finished)
        tqdm.write(f"continuing {source} after {counted(count, 'frame')}", file=sys.stdout)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file; yield it and its largest video stream that is not cover art."""
    try:
        container = av.open(f"file:{path}", options=CONTAINER_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise UserError(
            f"not a video, or its header is damaged or cut off ({error.strerror})"
        ) from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & PICTURES and stream.codec_context is not None
        ]
        if not streams:
            raise UserError("has no video stream")
        yield container, max(streams, key=lambda stream: stream.width * stream.height)


def _upscale_frames(
    source: Path,
    segments: FilmSegments,
    target: TargetSize,
    upscaler: Upscaler,
    advance: Advance,
    threads: str,
) -> None:
    """Upscale all frames that are in no segment yet.

    Raises:
        _DamagedError: a packet is damaged, and `threads` of the decoder are not "NONE".
    """
    with _opened(source) as (container, stream):
        stream.thread_type = threads
        frames = _FrameUpscaler(source, stream, segments, target, upscaler, advance)
        damaged = 0
        try:
            for packet in read_packets(container, stream):
                try:
                    decoded = [] if packet is None else packet.decode()
                except av.FFmpegError as error:
                    if not is_damage(error):
                        raise
                    packet, decoded = None, []
                damaged += packet is None
                if damaged and threads != "NONE":
                    raise _DamagedError
                for frame in decoded:
                    frames.add(frame)
            frames.finish(damaged)
        finally:
            frames.close()


def _join(source: Path, segments: FilmSegments, kind: str) -> None:
    """Write the finished film; if damaged sound prevents that, with sound that is converted."""
    for copies_sound in (True, False):
        with _opened(source) as (container, stream):
            try:
                notes = write_film(
                    container,
                    stream,
                    segments.finished,
                    segments.joined,
                    kind,
                    copies_sound=copies_sound,
                )
                break
            except av.FFmpegError as error:
                if not (copies_sound and is_damage(error)):
                    raise
    if damaged := segments.finished[-1].damaged:
        _note(
            source,
            f"{counted(damaged, 'video packet')} could not be read or decoded; the rest is "
            "upscaled",
        )
    for note in notes:
        _note(source, note)


class _FrameUpscaler:
    """Upscales and encodes frames; the first frame determines the format of the result."""

    def __init__(
        self,
        path: Path,
        source: VideoStream,
        segments: FilmSegments,
        target: TargetSize,
        upscaler: Upscaler,
        advance: Advance,
    ) -> None:
        self._path, self._source, self._segments, self._target = path, source, segments, target
        self._upscaler, self._advance = upscaler, advance
        self._known = [time for segment in segments.finished for time in segment.times()]
        self._num_known = 0
        self._has_alpha = source.metadata.get("alpha_mode") == "1"
        self._waiting: list[VideoFrame] = []
        self._format = segments.finished[0].format if segments.finished else None
        self._segment: SegmentWriter | None = None
        self._num_frames = 0  # in the segment
        self._last_pts: int | None = None
        self._next_pts = 0

    def add(self, frame: VideoFrame) -> None:
        """Add the next frame in presentation order, with its time repaired if needed."""
        rate = self._source.average_rate or Fraction(25)
        if frame.pts is None or (self._last_pts is not None and frame.pts <= self._last_pts):
            frame.pts = self._next_pts
        frame.duration = frame.duration or max(1, round(1 / (rate * frame.time_base)))
        self._last_pts, self._next_pts = frame.pts, frame.pts + frame.duration
        if self._num_known < len(self._known):
            self._skip(frame)
            return
        self._has_alpha |= any(part.is_alpha for part in frame.format.components)
        if self._waiting and (frame.width, frame.height) != (
            self._waiting[0].width,
            self._waiting[0].height,
        ):
            self._flush()
        if self._num_frames + len(self._waiting) >= _segment_frames(frame):
            self._end_segment(is_last=False)
        self._waiting.append(frame)
        pixels = self._upscaler.max_pixels(self._upscaler.precision_for(is_deep=_is_deep(frame)))
        if len(self._waiting) >= max(1, min(LARGEST_GROUP, pixels // (frame.width * frame.height))):
            self._flush()

    def finish(self, damaged: int) -> None:
        """Upscale and write the remaining frames; raise `UserError` if there was no frame."""
        if self._has_alpha:
            _note(self._path, "its alpha channel is dropped, which H.264 cannot hold")
        if self._num_known < len(self._known):
            raise _ChangedFramesError
        self._end_segment(is_last=True, damaged=damaged)

    def close(self) -> None:
        """Drop the segment that is not finished."""
        if self._segment is not None:
            self._segment.close()

    def _skip(self, frame: VideoFrame) -> None:
        """Pass over a frame of a finished segment."""
        if frame.pts != self._known[self._num_known]:
            raise _ChangedFramesError
        self._num_known += 1
        self._advance(self._target.work(frame.height, frame.width, self._upscaler.scale))

    def _end_segment(self, *, is_last: bool, damaged: int = 0) -> None:
        self._flush()
        if self._segment is None:
            if not self._segments.finished:
                raise UserError("none of its frames can be decoded")
            raise _ChangedFramesError  # it ended after another frame the last time
        self._segments.finish(self._segment, is_last, damaged)
        self._segment, self._num_frames = None, 0

    def _flush(self) -> None:
        frames, self._waiting = self._waiting, []
        if not frames:
            return
        images = upscale_images(
            np.stack([_pixels(frame) for frame in frames]),
            self._target,
            self._upscaler,
            lambda pixels: self._advance(pixels * len(frames)),
        )
        images = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
        if self._format is None:
            self._format = self._format_of(frames[0], images[0])
        if images.shape[1:3] != (self._format.height, self._format.width):
            raise UserError("its frame size changes; split the video at each change")
        if self._segment is None:
            self._segment = self._segments.start(self._format)
        for frame, image in zip(frames, images, strict=True):
            self._segment.add(_encodable(frame, image, self._format))
        self._num_frames += len(frames)

    def _format_of(self, frame: VideoFrame, image: np.ndarray) -> PictureFormat:
        if min(image.shape[:2]) < 2:
            raise UserError("the result would be less than 2 pixels high or wide")
        aspect = self._source.sample_aspect_ratio or Fraction(1)
        return PictureFormat(
            height=image.shape[0],
            width=image.shape[1],
            pixel_format="yuv420p10le" if _is_deep(frame) else "yuv420p",
            time_base=str(frame.time_base),
            rate=str(self._source.average_rate or Fraction(25)),
            aspect=str(1 / aspect if _orientation(frame).transpose else aspect),
            matrix=int(_matrix_tag(frame)),
            primaries=int(frame.color_primaries),
            transfer=int(frame.color_trc),
        )


def _segment_frames(frame: VideoFrame) -> int:
    least, most = SEGMENT_FRAMES
    return max(least, min(most, SEGMENT_PIXELS // (frame.width * frame.height)))


def _encodable(frame: VideoFrame, image: np.ndarray, format: PictureFormat) -> VideoFrame:
    """Return an upscaled image in the encoder's pixel format, with the time of its frame."""
    rgb = VideoFrame.from_ndarray(
        np.ascontiguousarray(image), format="rgb48le" if image.dtype == np.uint16 else "rgb24"
    )
    tag = _matrix_tag(frame)
    rgb.colorspace = tag  # where PyAV 17 takes BT.2020 from
    made = reformat(
        rgb,
        format=format.pixel_format,
        dst_colorspace=_MATRICES.get(tag, Colorspace.ITU709),
        interpolation=SMOOTH,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
    made.colorspace, made.color_range = tag, ColorRange.MPEG
    made.color_primaries, made.color_trc = frame.color_primaries, frame.color_trc
    made.time_base, made.pts, made.duration = frame.time_base, frame.pts, frame.duration
    return made


def _is_deep(frame: VideoFrame) -> bool:
    return max(component.bits for component in frame.format.components) > 8


def _matrix_tag(frame: VideoFrame) -> int:
    """Return H.273's matrix number; if unspecified, or for RGB, the one that players assume."""
    if frame.colorspace not in (0, UNKNOWN_MATRIX):
        return frame.colorspace
    return 1 if frame.format.is_rgb or frame.width >= 1280 or frame.height > 576 else 6


def _orientation(frame: VideoFrame) -> Orientation:
    turn = orientation(frame)
    if turn is None:
        raise UserError(
            "its display matrix is not a multiple of a quarter turn; rotate it in a video editor"
        )
    return turn


def _pixels(frame: VideoFrame) -> np.ndarray:
    """Return an upright RGB image (height, width, 3): uint8, or uint16 for videos above 8 bits."""
    is_full = (
        frame.color_range == ColorRange.JPEG
        or frame.format.name.startswith("yuvj")
        or frame.format.is_rgb
    )
    rgb = reformat(
        frame,
        format="rgb48le" if _is_deep(frame) else "rgb24",
        src_colorspace=_MATRICES.get(_matrix_tag(frame), Colorspace.ITU709),
        src_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=SMOOTH,
    ).to_ndarray()
    turn = _orientation(frame)
    if turn.transpose:
        rgb = rgb.transpose(1, 0, 2)
    rgb = rgb[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1]
    return np.ascontiguousarray(rgb)
