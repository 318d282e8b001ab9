"""The upscaled parts of an unfinished film, kept on disk so that the same command continues there.

For the film `NAME`, they are in the folder `.NAME.segments` beside it: `000000.h264`, `000001.h264`
and so on, each encoded on its own, so that nothing refers to another segment. Beside each,
`000000.json` says which film, network and options it belongs to, where its packets begin, and what
its SHA-256 is. It is written after the packets are on disk, so a segment without it does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange

from pipeline.cli import UserError
from pipeline.files import flush, parse_json, write_atomically

FORMAT = 1
"""Version of the segments' format, of the encoder's options and of how frames are encoded."""
ENCODER = "libx264"
ENCODER_OPTIONS = {"crf": "16", "preset": "medium"}  # visually lossless
_OURS = re.compile(r"\.?\d{6}\.(h264|json)(\.(\d+\.)?tmp)?|film")
_LOCK, _DONE = "lock", "done"


@dataclass(frozen=True)
class PictureFormat:
    """What all frames of the result have in common.

    `time_base` in seconds, `rate` in frames per second and `aspect` of a pixel are fractions in
    text, `matrix`, `primaries` and `transfer` are H.273's numbers.
    """

    height: int
    width: int
    pixel_format: str
    time_base: str
    rate: str
    aspect: str
    matrix: int
    primaries: int
    transfer: int

    def apply(self, encoder: Any) -> None:
        """Set it on an encoder that is not open yet."""
        encoder.height, encoder.width, encoder.pix_fmt = self.height, self.width, self.pixel_format
        encoder.time_base = Fraction(self.time_base)
        encoder.framerate = Fraction(self.rate)
        encoder.sample_aspect_ratio = Fraction(self.aspect)
        encoder.color_range, encoder.colorspace = ColorRange.MPEG, self.matrix
        encoder.color_primaries, encoder.color_trc = self.primaries, self.transfer


class EncodedFrame(NamedTuple):
    """An encoded frame; times in ticks of the film's time base."""

    size: int  # in bytes
    pts: int
    duration: int
    is_key: bool


@dataclass(frozen=True)
class Segment:
    """A finished segment: its frames in the order in which they are decoded."""

    path: Path
    format: PictureFormat
    header: int
    """Bytes before the first frame: the encoder's parameter sets."""
    frames: list[EncodedFrame]
    is_last: bool
    damaged: int
    """Packets of the source, from its beginning, that could not be read or decoded."""

    def times(self) -> list[int]:
        """Return the frames' times in the order in which they are shown."""
        return sorted(frame.pts for frame in self.frames)

    def packets(self) -> Iterator[bytes]:
        """Yield the encoded frames."""
        with open(self.path, "rb") as file:
            file.seek(self.header)
            for frame in self.frames:
                yield file.read(frame.size)


class SegmentWriter:
    """Encodes one segment into a temporary file."""

    def __init__(self, path: Path, format: PictureFormat) -> None:
        self._path, self._format = path, format
        self._encoder: VideoCodecContext = av.CodecContext.create(ENCODER, "w")
        format.apply(self._encoder)
        self._encoder.options = dict(ENCODER_OPTIONS)
        self._encoder.flags |= Flags.global_header
        self._encoder.open()
        self._header = bytes(self._encoder.extradata)
        self._frames: list[EncodedFrame] = []
        self._file = open(path.with_name(f".{path.name}.tmp"), "wb")  # noqa: SIM115, closed below
        self._hash = hashlib.sha256()
        self._write(self._header)

    def add(self, frame: VideoFrame) -> None:
        """Encode the next frame."""
        self._encode(frame)

    def finish(self, film: Mapping[str, object], is_last: bool, damaged: int) -> Segment:
        """Write the rest and flush everything to disk."""
        self._encode(None)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)
        segment = Segment(
            self._path, self._format, len(self._header), self._frames, is_last, damaged
        )
        write_atomically(
            self._path.with_suffix(".json"),
            _index_entry(segment, film, self._hash.hexdigest()).encode(),
        )
        return segment

    def close(self) -> None:
        """Drop the segment, if it is not finished."""
        self._file.close()

    def _encode(self, frame: VideoFrame | None) -> None:
        for packet in self._encoder.encode(frame):
            self._frames.append(
                EncodedFrame(packet.size, packet.pts, packet.duration or 0, packet.is_keyframe)
            )
            self._write(bytes(packet))

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)


def _index_entry(segment: Segment, film: Mapping[str, object], content: str) -> str:
    entry = {
        "vastscale": "segment of a film",
        "film": dict(film),
        "format": asdict(segment.format),
        "header": segment.header,
        "frames": segment.frames,
        "is_last": segment.is_last,
        "damaged": segment.damaged,
        "sha256": content,
    }
    return json.dumps({**entry, "entry_sha256": _digest(entry)})


def _digest(entry: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


@dataclass
class FilmSegments:
    """The finished segments of a film, in order, and the place for the next ones."""

    folder: Path
    film: Mapping[str, object]
    """What the segments depend on: source, network, options, software."""
    finished: list[Segment] = field(default_factory=list)
    changed: str = ""
    """What differs from the film to which segments found here belong; they are deleted."""

    @property
    def is_complete(self) -> bool:
        """Whether all frames of the film are upscaled."""
        return bool(self.finished) and self.finished[-1].is_last

    @property
    def joined(self) -> Path:
        """The file in which the segments are joined."""
        return self.folder / "film"

    def start(self, format: PictureFormat) -> SegmentWriter:
        """Begin the next segment."""
        return SegmentWriter(self.folder / f"{len(self.finished):06d}.h264", format)

    def finish(self, writer: SegmentWriter, is_last: bool, damaged: int) -> None:
        """End a segment; afterwards it is kept."""
        self.finished.append(writer.finish(self.film, is_last, damaged))

    def clear(self) -> None:
        """Delete all segments."""
        for name in sorted(os.listdir(self.folder)):
            if _OURS.fullmatch(name):
                (self.folder / name).unlink()
        self.finished.clear()

    def become(self, result: Path) -> None:
        """Replace `result` by the joined film, and delete the segments."""
        flush(self.joined)
        (self.folder / _DONE).touch()
        flush(self.folder)
        os.replace(self.joined, result)
        flush(result.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the folder, unless it contains files of others."""
        self.clear()
        for name in (_DONE, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        flush(self.folder.parent)

    def find(self) -> None:
        """Find the segments of an earlier call; delete those of another film or other options."""
        if (self.folder / _DONE).exists():
            if not self.joined.exists():
                self.clear()
            (self.folder / _DONE).unlink()
        while (path := self.folder / f"{len(self.finished):06d}.h264").exists():
            entry = _read_entry(path)
            if entry is None:  # interrupted or damaged here
                return
            if entry["film"] != self.film:
                self.changed = ", ".join(
                    name for name in self.film if entry["film"].get(name) != self.film[name]
                )
                self.clear()
                return
            self.finished.append(
                Segment(
                    path,
                    PictureFormat(**entry["format"]),
                    entry["header"],
                    [EncodedFrame(*frame) for frame in entry["frames"]],
                    entry["is_last"],
                    entry["damaged"],
                )
            )


def _read_entry(path: Path) -> dict[str, Any] | None:
    """Read the index entry of a segment; `None` if it or the segment is damaged or missing."""
    try:
        entry = parse_json(path.with_suffix(".json").read_bytes())
        expected = entry.pop("entry_sha256")
        if _digest(entry) != expected:
            return None
        content = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                content.update(piece)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if content.hexdigest() == entry["sha256"] else None


@contextlib.contextmanager
def open_segments(result: Path, film: Mapping[str, object]) -> Iterator[FilmSegments]:
    """Reserve the folder of a film's segments and find those of an earlier call.

    Raises:
        UserError: another process is working on the same film, or the folder is not ours.
    """
    folder = _folder(result)
    if os.path.lexists(folder) and (
        folder.is_symlink()
        or not folder.is_dir()
        or (os.listdir(folder) and not (folder / _LOCK).is_file())
    ):
        raise UserError(f"{str(folder)!r} is in the way; move it away, or choose another -o")
    folder.mkdir(exist_ok=True)
    with open(folder / _LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is writing {str(result)!r}; wait for it, or choose another -o"
            ) from None
        segments = FilmSegments(folder, film)
        segments.find()
        yield segments


def discard_leftovers(result: Path) -> None:
    """Delete the segments of a film that was complete when its command was killed."""
    segments = FilmSegments(_folder(result), {})
    if not segments.folder.is_dir() or segments.folder.is_symlink():
        return
    is_done = (segments.folder / _DONE).is_file() and not segments.joined.exists()
    if is_done or set(os.listdir(segments.folder)) <= {_LOCK}:
        segments.remove()


def _folder(result: Path) -> Path:
    return result.with_name(f".{result.name}.segments")
