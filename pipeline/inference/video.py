"""Videos: decode, upscale a few frames at a time, and encode; audio is copied unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from pipeline.cli import UserError
from pipeline.data.videos import SMOOTH, UNKNOWN_MATRIX, reformat
from pipeline.files import flush
from pipeline.inference.jobs import CONTAINERS
from pipeline.inference.sizes import TargetSize, upscale_images
from pipeline.inference.tiles import Advance, Upscaler

ENCODER = "libx264"
ENCODER_OPTIONS = {"crf": "16", "preset": "medium"}  # visually lossless
LARGEST_GROUP = 8
"""Maximum number of small frames that are upscaled together."""
_OPTIONS = {  # otherwise a "video" could be a playlist that refers to other files or servers
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,yuv4mpegpipe",
}
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
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


def video_size(path: Path) -> tuple[int, int, int]:
    """Return number of frames (0: the file does not say), height and width as stored."""
    with _opened(path) as (_, stream):
        frames = stream.frames
        if not frames and stream.average_rate and path.stat().st_size:
            seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            frames = round(seconds * float(stream.average_rate))
        return frames, stream.height, stream.width


def upscale_video(
    source: Path, result: Path, target: TargetSize, upscaler: Upscaler, advance: Advance
) -> None:
    """Upscale the video `source` to the size of `target` and write `result` atomically.

    Frames keep their timestamps and are turned upright, as players show them. Odd sides lose one
    row or column.

    Raises:
        UserError: the video cannot be read or written.
    """
    partial = result.with_name(f".{result.name}.{os.getpid()}.tmp")
    try:
        with _opened(source) as (container, stream):
            stream.thread_type = "AUTO"
            kind = CONTAINERS[result.suffix.lower()]
            # Without "file:", FFmpeg takes the part of a name before a colon for a protocol.
            with av.open(f"file:{partial}", "w", format=kind) as output:
                output.metadata.update(container.metadata)
                _transcode(container, stream, output, target, upscaler, advance)
        flush(partial)
        os.replace(partial, result)
        flush(result.parent)
    except av.FFmpegError as error:
        raise UserError(
            f"cannot be read or written as {result.suffix} ({error.strerror}); is it damaged, or "
            "does only .mkv support its audio codec?"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file; yield it and its largest video stream that is not cover art."""
    try:
        container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise UserError(
            f"not a video, or its header is damaged or cut off ({error.strerror})"
        ) from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & _PICTURES and stream.codec_context is not None
        ]
        if not streams:
            raise UserError("has no video stream")
        yield container, max(streams, key=lambda stream: stream.width * stream.height)


def _transcode(
    container: InputContainer,
    stream: VideoStream,
    output: OutputContainer,
    target: TargetSize,
    upscaler: Upscaler,
    advance: Advance,
) -> None:
    """Process all packets in file order: upscale the video, copy the audio."""
    sounds = {
        sound.index: _copy_of(sound, output)
        for sound in container.streams.audio
        if sound.codec_context is not None
    }
    writer = _Writer(stream, output, target, upscaler, advance)
    for packet in container.demux([stream, *(container.streams[index] for index in sounds)]):
        if packet.stream.index in sounds:
            if packet.dts is not None:  # the last packet of a stream is empty
                packet.stream = sounds[packet.stream.index]
                writer.mux_sound(packet)
            continue
        for frame in packet.decode():
            writer.add(frame)
    writer.close()


def _copy_of(sound: AudioStream, output: OutputContainer) -> AudioStream:
    try:
        return output.add_stream_from_template(sound)
    except ValueError as error:
        raise UserError(
            f"its audio codec is {sound.codec_context.name}, which {output.format.name} files do "
            "not support; choose -o NAME.mkv"
        ) from error


class _Writer:
    """Upscales, encodes and writes frames; the first frame determines the encoder."""

    def __init__(
        self,
        source: VideoStream,
        output: OutputContainer,
        target: TargetSize,
        upscaler: Upscaler,
        advance: Advance,
    ) -> None:
        self._source, self._output, self._target = source, output, target
        self._upscaler, self._advance = upscaler, advance
        self._waiting: list[VideoFrame] = []
        self._sounds: list[av.Packet] = []  # until the first frame, before the header is written
        self._encoder: VideoStream | None = None
        self._size = (0, 0)
        self._next_pts = 0

    def mux_sound(self, packet: av.Packet) -> None:
        """Write an audio packet, whose stream is already the output's."""
        if self._encoder is None:
            self._sounds.append(packet)
        else:
            self._output.mux(packet)

    def add(self, frame: VideoFrame) -> None:
        """Add the next frame in presentation order."""
        if self._waiting and (frame.width, frame.height) != (
            self._waiting[0].width,
            self._waiting[0].height,
        ):
            self._flush()
        self._waiting.append(frame)
        pixels = self._upscaler.max_pixels(self._upscaler.precision_for(is_deep=_is_deep(frame)))
        if len(self._waiting) >= max(1, min(LARGEST_GROUP, pixels // (frame.width * frame.height))):
            self._flush()

    def close(self) -> None:
        """Upscale and write the remaining frames; raise `UserError` if there was no frame."""
        self._flush()
        if self._encoder is None:
            raise UserError("none of its frames can be decoded")
        self._output.mux(self._encoder.encode(None))

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
        if self._encoder is None:
            self._encoder = self._add_encoder(frames[0], images[0])
            self._size = images.shape[1:3]
            for packet in self._sounds:
                self._output.mux(packet)
        if images.shape[1:3] != self._size:
            raise UserError("its frame size changes; split the video at each change")
        for frame, image in zip(frames, images, strict=True):
            self._output.mux(self._encoder.encode(self._encodable(frame, image)))

    def _add_encoder(self, frame: VideoFrame, image: np.ndarray) -> VideoStream:
        if min(image.shape[:2]) < 2:
            raise UserError("the result would be less than 2 pixels high or wide")
        rate = self._source.average_rate or Fraction(25)
        encoder = self._output.add_stream(ENCODER, rate=rate, options=ENCODER_OPTIONS)
        encoder.height, encoder.width = image.shape[:2]
        encoder.pix_fmt = "yuv420p10le" if _is_deep(frame) else "yuv420p"
        context = encoder.codec_context
        context.time_base = encoder.time_base = frame.time_base
        aspect = self._source.sample_aspect_ratio
        if aspect and aspect != 1:
            context.sample_aspect_ratio = 1 / aspect if frame.rotation % 180 else aspect
        context.color_range = ColorRange.MPEG
        context.colorspace = _matrix_tag(frame)
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
        encoder.metadata.update(self._source.metadata)
        return encoder

    def _encodable(self, frame: VideoFrame, image: np.ndarray) -> VideoFrame:
        deep = image.dtype == np.uint16
        matrix = _MATRICES.get(_matrix_tag(frame), Colorspace.ITU709)
        rgb = VideoFrame.from_ndarray(
            np.ascontiguousarray(image), format="rgb48le" if deep else "rgb24"
        )
        rgb.colorspace = _matrix_tag(frame)  # where PyAV 17 takes BT.2020 from
        made = reformat(
            rgb,
            format="yuv420p10le" if deep else "yuv420p",
            dst_colorspace=matrix,
            interpolation=SMOOTH,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
        )
        made.colorspace, made.color_range = _matrix_tag(frame), ColorRange.MPEG
        made.color_primaries, made.color_trc = frame.color_primaries, frame.color_trc
        rate = self._source.average_rate or Fraction(25)
        made.time_base, made.duration = (
            frame.time_base,
            frame.duration or round(1 / (rate * frame.time_base)),
        )
        made.pts = self._next_pts if frame.pts is None else frame.pts
        self._next_pts = made.pts + made.duration
        return made


def _is_deep(frame: VideoFrame) -> bool:
    return max(component.bits for component in frame.format.components) > 8


def _matrix_tag(frame: VideoFrame) -> int:
    """Return H.273's matrix number; if unspecified, or for RGB, the one that players assume."""
    if frame.colorspace not in (0, UNKNOWN_MATRIX):
        return frame.colorspace
    return 1 if frame.format.is_rgb or frame.width >= 1280 or frame.height > 576 else 6


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
    )
    if frame.rotation % 90:
        raise UserError(
            f"is rotated by {frame.rotation} degrees, which is not a multiple of 90; rotate it in "
            "a video editor"
        )
    return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90))
