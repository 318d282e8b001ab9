"""Join the upscaled segments of a film and add its sound, without encoding the pictures again."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.stream import Stream
from av.video.stream import VideoStream

from pipeline.cli import UserError, counted
from pipeline.data.videos import read_packets
from pipeline.inference.film_segments import ENCODER, ENCODER_OPTIONS, PictureFormat, Segment

# For sound whose packets a container cannot hold. FLAC is lossless, but .mov cannot hold it, and
# few players find it in .mp4.
_SOUND_ENCODERS = {"matroska": ["flac"], "mp4": ["aac", "flac"], "mov": ["aac"]}
_TITLES = {"aac": "AAC", "flac": "FLAC"}
_AAC_BITS = 96_000
"""Bits per second and channel."""
_GAP_SECONDS = 0.04
"""Converted sound is continuous, unless the source has a larger gap than this."""
_OF_PACKETS = re.compile(
    r"(bps|duration|number_of_(frames|bytes)|_statistics_.*|encoder|alpha_mode)(-\w+)?",
    re.IGNORECASE,
)
"""Tags that describe the source's encoded packets."""
_FFMPEG_CODES = 4096
"""FFmpeg's own error codes, which say what is wrong with the data, are above the system's."""


def is_damage(error: av.FFmpegError) -> bool:
    """Whether FFmpeg refused a packet for its content, and not because of the system."""
    return error.errno == errno.EINVAL or error.errno > _FFMPEG_CODES


class _SoundTrack(Protocol):
    """An audio track of the result."""

    stream: AudioStream
    note: str
    """How it differs from the source's, for the user; empty if it does not."""

    def convert(self, packet: av.Packet) -> Iterator[av.Packet]:
        """Yield the packets to write for a packet of the source; the last one is empty.

        Raises:
            av.FFmpegError, ValueError: the packet is damaged, or its time is.
        """

    def finish(self) -> Iterator[av.Packet]:
        """Yield what remains at the end."""


class _CopiedTrack:
    """Packets are copied as they are."""

    note = ""

    def __init__(self, sound: AudioStream, output: OutputContainer, start: Fraction) -> None:
        self.stream = output.add_stream_from_template(sound)
        self._offset = int(start / sound.time_base)
        self._second = int(1 / sound.time_base) + 1
        self._last: int | None = None

    def convert(self, packet: av.Packet) -> Iterator[av.Packet]:
        if not packet.size:
            return
        time = packet.pts if packet.dts is None else packet.dts
        if time is None:
            raise ValueError("an audio packet without a time")
        time -= self._offset
        if self._last is not None and time <= self._last:
            if time < self._last - self._second:
                raise ValueError("an audio packet far before its predecessor")
            time = self._last + 1
        self._last = packet.dts = time
        packet.pts = time if packet.pts is None else max(packet.pts - self._offset, time)
        packet.stream = self.stream
        yield packet

    def finish(self) -> Iterator[av.Packet]:
        yield from ()


class _ConvertedTrack:
    """Sound is decoded and encoded again."""

    def __init__(self, sound: AudioStream, output: OutputContainer, start: Fraction) -> None:
        self._sound, self._start = sound, start
        found = _sound_encoder(sound, _SOUND_ENCODERS[output.format.name])
        if found is None:
            raise UserError(
                f"its audio track {_number(sound)} ({_codec_name(sound)}) can be neither copied "
                f"nor converted into {output.format.name}; choose -o NAME.mkv, or remove the track"
            )
        self.stream = output.add_stream(found.name, rate=found.sample_rate)
        context = self.stream.codec_context
        context.layout, context.format = found.layout.name, found.format.name
        context.bit_rate = found.bit_rate
        mixed = "" if found.layout.name == _layout(sound) else f" ({found.layout.name})"
        self.note = (
            f"audio track {_number(sound)} is converted from {_codec_name(sound)} to "
            f"{_TITLES[found.name]}{mixed}"
        )
        self._clock: int | None = None  # time of the next sample of the source, in samples
        self._has_gap = False

    def convert(self, packet: av.Packet) -> Iterator[av.Packet]:
        try:
            frames = packet.decode()
        except av.FFmpegError:
            self._has_gap = True
            raise
        for frame in frames:
            yield from self._encode(frame)

    def finish(self) -> Iterator[av.Packet]:
        yield from self.stream.encode(None)

    def _encode(self, frame: AudioFrame) -> Iterator[av.Packet]:
        rate = frame.sample_rate
        if frame.pts is not None:
            time = round((frame.pts * frame.time_base - self._start) * rate)
            gap = 0 if self._has_gap else _GAP_SECONDS * rate
            if self._clock is None or time > self._clock + gap:
                self._clock = time
        self._has_gap = False
        self._clock = self._clock or 0
        frame.pts, frame.time_base = self._clock, Fraction(1, rate)
        self._clock += frame.samples
        yield from self.stream.encode(frame)


def _sound_encoder(sound: AudioStream, names: Sequence[str]) -> av.AudioCodecContext | None:
    """Return the first encoder that accepts the sound, if need be as 48 kHz or stereo."""
    source = sound.codec_context
    is_deep = (
        source.format.bytes > 2 and source.format.name.startswith("s") and (not source.codec.lossy)
    )
    for layout in dict.fromkeys((_layout(sound), "stereo")):
        for rate in dict.fromkeys((source.sample_rate, 48000)):
            for name in names:
                encoder = av.CodecContext.create(name, "w")
                try:
                    encoder.layout, encoder.sample_rate = layout, rate
                    encoder.format = "fltp" if name == "aac" else "s32" if is_deep else "s16"
                    if name == "aac":
                        encoder.bit_rate = _AAC_BITS * encoder.layout.nb_channels
                    encoder.time_base = Fraction(1, rate)
                    encoder.open()
                except (av.FFmpegError, ValueError):
                    continue
                return encoder
    return None


def _layout(sound: AudioStream) -> str:
    layout = sound.codec_context.layout
    usual = {1: "mono", 2: "stereo"}  # where the file gives nothing but the number of channels
    return usual.get(layout.nb_channels, layout.name)


def _codec_name(sound: AudioStream) -> str:
    return sound.codec_context.codec.canonical_name


def _number(sound: Stream) -> int:
    """Return a track's number among those of its kind, from 1."""
    same = [stream for stream in sound.container.streams if stream.type == sound.type]
    return 1 + [stream.index for stream in same].index(sound.index)


def _sound_track(
    sound: AudioStream, output: OutputContainer, start: Fraction, copies: bool
) -> _SoundTrack:
    if copies and _can_copy(sound, output.format.name):
        return _CopiedTrack(sound, output, start)
    return _ConvertedTrack(sound, output, start)


def _can_copy(sound: AudioStream, kind: str) -> bool:
    """Whether files of this format can hold the packets of a track."""
    try:
        with av.open(io.BytesIO(), "w", format=kind) as scratch:
            scratch.add_stream_from_template(sound)
            scratch.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _sounds(container: InputContainer) -> list[AudioStream]:
    """Return the audio streams that can be copied or converted: those whose codec is known."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def check_sound(container: InputContainer, kind: str) -> None:
    """Raise `UserError` if a track can be neither copied into this format nor converted for it."""
    with av.open(io.BytesIO(), "w", format=kind) as scratch:
        for sound in _sounds(container):
            _sound_track(sound, scratch, Fraction(0), copies=True)


def write_film(
    container: InputContainer,
    video: VideoStream,
    segments: Sequence[Segment],
    file: Path,
    kind: str,
    *,
    copies_sound: bool = True,
) -> list[str]:
    """Write the film to `file`: the pictures of `segments`, the sound of `container`.

    Tracks keep their order, language, title and default flag. The film begins at 0 unless its
    clock begins earlier.

    Args:
        container: the source, at its beginning.
        video: its stream that was upscaled.
        segments: all of them, in order.
        file: where to write.
        kind: FFmpeg's name of the result's format.
        copies_sound: whether packets of sound are copied where the format can hold them.

    Returns:
        notes for the user: what was converted or dropped.

    Raises:
        av.FFmpegError: the file cannot be written; if `is_damage`, because of damaged sound.
        OSError: a segment cannot be read.
    """
    sounds = _sounds(container)
    start = _start([video, *sounds])
    tracks: dict[int, _SoundTrack] = {}
    damaged = {sound.index: 0 for sound in sounds}
    with av.open(f"file:{file}", "w", format=kind) as output:
        output.metadata.update(container.metadata)
        for stream in container.streams:
            if stream.index == video.index:
                made = pictures = _add_pictures(output, segments[0].format)
            elif stream in sounds:
                tracks[stream.index] = _sound_track(stream, output, start, copies_sound)
                made = tracks[stream.index].stream
            else:
                continue
            made.metadata.update(_description(stream, kind))
            made.disposition = stream.disposition
        frames = _timed(segments, pictures, start)
        frame = next(frames, None)
        for packet in read_packets(container, *sounds) if sounds else ():
            if packet is None:
                continue
            index = packet.stream.index
            try:
                converted = list(tracks[index].convert(packet))
            except (av.FFmpegError, ValueError) as error:  # PyAV: samples of another kind
                if isinstance(error, av.FFmpegError) and not is_damage(error):
                    raise
                damaged[index] += 1
                continue
            for sound in converted:
                while frame is not None and _seconds(frame) <= _seconds(sound):
                    damaged[index] += _mux(output, frame)
                    frame = next(frames, None)
                damaged[index] += _mux(output, sound)
        while frame is not None:
            _mux(output, frame)
            frame = next(frames, None)
        for track in tracks.values():
            for sound in track.finish():
                output.mux(sound)
    notes = [track.note for track in tracks.values() if track.note]
    for stream in container.streams.audio:
        name = f"audio track {_number(stream)}"
        if stream.index not in tracks:
            notes.append(f"{name} is dropped, because its codec is unknown")
        elif damaged[stream.index]:
            notes.append(f"{name} is damaged: dropped {counted(damaged[stream.index], 'packet')}")
    return notes


def _mux(output: OutputContainer, packet: av.Packet) -> bool:
    """Write a packet; return whether a packet of sound was dropped, because it is damaged.

    FFmpeg drops this one or, if it waits for other tracks, an earlier one. Pictures, which we
    encoded, are not damaged.
    """
    try:
        output.mux(packet)
    except av.FFmpegError as error:
        if not is_damage(error):
            raise
        return True
    return False


def _add_pictures(output: OutputContainer, format: PictureFormat) -> VideoStream:
    """Add the video track, with the parameter sets that the segments were encoded with."""
    stream = output.add_stream(ENCODER, rate=Fraction(format.rate), options=dict(ENCODER_OPTIONS))
    format.apply(stream.codec_context)
    stream.time_base = Fraction(format.time_base)
    return stream


def _start(streams: Sequence[Stream]) -> Fraction:
    """Return when the first stream begins, in seconds; 0 if before 0, or if unknown."""
    times = [
        stream.start_time * stream.time_base for stream in streams if stream.start_time is not None
    ]
    return max(Fraction(0), min(times, default=Fraction(0)))


def _seconds(packet: av.Packet) -> Fraction:
    return packet.dts * packet.time_base


def _timed(
    segments: Sequence[Segment], stream: VideoStream, start: Fraction
) -> Iterator[av.Packet]:
    """Yield the packets of all segments with their times, for `stream`.

    Every segment's encoder began its decoding times anew, so they could overlap. Here the packet i
    is decoded at the time at which the frame i - delay is shown. The delay is the largest number of
    places by which a frame is encoded after frames that are shown later.
    """
    base = stream.codec_context.time_base
    offset = int(start / base)
    times = [time - offset for segment in segments for time in segment.times()]
    ranks = {time: rank for rank, time in enumerate(times)}
    order = (frame.pts - offset for segment in segments for frame in segment.frames)
    delay = max(index - ranks[time] for index, time in enumerate(order))
    step = min((after - before for before, after in pairwise(times)), default=1)
    index = 0
    for segment in segments:
        for frame, data in zip(segment.frames, segment.packets(), strict=True):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, base
            packet.pts, packet.duration = frame.pts - offset, frame.duration
            packet.dts = (
                times[0] - (delay - index) * step if index < delay else times[index - delay]
            )
            packet.is_keyframe = frame.is_key
            yield packet
            index += 1


def _description(stream: Stream, kind: str) -> dict[str, str]:
    """Return a track's language, title and other tags, except those about its encoded packets."""
    tags = {name: text for name, text in stream.metadata.items() if not _OF_PACKETS.fullmatch(name)}
    if kind != "matroska" and "title" in tags:
        tags["handler_name"] = tags["title"]  # what players of .mp4 and .mov show
    return tags
