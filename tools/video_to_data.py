"""Cut the frames of videos into training crops, straight from the files."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import av
import tyro

from pipeline.cli import UserError, run
from pipeline.data.image_files import QUARANTINE
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import VIDEO_SUFFIXES
from tools.crops.cutting import (
    CropSettings,
    Reject,
    SourcePicture,
    Unit,
    cut_picture,
    first_reduction,
    make_folder,
    too_small,
)
from tools.crops.dataset import (
    Clock,
    CropDataset,
    Stamp,
    UnitResult,
    cut_all,
    open_dataset,
    refuse_nested,
)
from tools.crops.leakage import BenchmarkIndex
from tools.crops.options import CropOptions, open_benchmark
from tools.files import name_fault
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count
from tools.video.choice import Sampling
from tools.video.frames import DamagedError, FrameCounts, sample_frames
from tools.video.probe import BadVideoError, Segment, VideoInfo, probe, segments

MAX_CODEC_THREADS = 16  # more bring no gain


@dataclass(frozen=True, kw_only=True)
class Options(CropOptions):
    """Cut the frames of videos into training crops of one size.

    Videos (MP4, MOV, MKV, WebM, AVI, MPEG and others that FFmpeg reads) are decoded straight from
    their files, in segments on several threads; only crops are written:
    OUT/<video>/<second>/f<frame>_x<scale>_<row>_<column>.npy. Frames are drawn at random, plus one
    after each cut. Frames similar to another of the same segment, black or blank frames, and frames
    within a cross-fade are omitted. Frames come out upright, deinterlaced, with square pixels, as
    8-bit RGB. Videos are lossy, so their crops start at 1/2 unless --keep-lossy-size is given. HDR
    videos are rejected. Run the same command again to continue a run that was stopped or killed.

    Example: python tools/video_to_data.py ~/Films --out ~/dataset/Films
    """

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO...")]
    """Videos, and folders to search for them (recursively; links to folders are not followed)."""
    out: Path
    """Output folder of the crops, such as ~/dataset/Films."""
    segment_time: float = 120
    """Length in seconds of the segments, which are decoded in parallel and repeated as a whole
    after a kill."""
    frame_interval: int = 10
    """Average number of frames between candidates."""
    min_interval: int = 4
    """Minimum number of frames between candidates; may be less after a cut."""
    max_interval: int = 15
    """Maximum number of frames between candidates."""
    min_change: float = 4
    """Omit a frame whose mean difference from a stored frame of the same segment is below this many
    gray levels (of 64x36 thumbnails), so static scenes give one frame. 0 keeps all."""

    def sampling(self) -> Sampling:
        """How to draw frames. Raises `UserError` for values out of range."""
        if not 1 <= self.min_interval <= self.frame_interval <= self.max_interval:
            raise UserError(
                f"--min-interval {self.min_interval}, --frame-interval {self.frame_interval}, "
                f"--max-interval {self.max_interval}: must be at least 1 and in ascending order; "
                "give all three"
            )
        if not 1 <= self.segment_time <= 86400:
            raise UserError(
                f"--segment-time {self.segment_time:g}: must be 1 to 86400 seconds; 120 suits most "
                "videos"
            )
        if not 0 <= self.min_change <= 255:
            raise UserError(
                f"--min-change {self.min_change:g}: must be 0 to 255 gray levels; 0 keeps all "
                "frames"
            )
        return Sampling(self.frame_interval, self.min_interval, self.max_interval, self.min_change)


class Piece(NamedTuple):
    """A segment of a video to cut.

    An unusable video is a single piece, without segment but with a reject.
    """

    unit: Unit
    info: VideoInfo | None
    segment: Segment | None
    reject: Reject | None = None


def main(options: Options) -> int:
    """Make the crops.

    Returns 0 if done, 1 if done but some videos are damaged or unusable or no crop was made.
    """
    out = options.out.expanduser()
    settings, sampling, threads = (
        options.settings(),
        options.sampling(),
        thread_count(options.threads),
    )
    root, names = _videos(options, out)
    prepare_decoders()
    prober = Prober(root, settings, options.segment_time)
    cutter = PieceCutter(root, out, settings, sampling, open_benchmark(settings.against))
    clock = Clock()
    # Relative paths, so that videos and crops can be moved together.
    more = {
        "videos": os.path.relpath(root.resolve(), out.resolve()),
        "segment_time": options.segment_time,
    }
    with open_dataset(
        out, settings, prober.stamp, "video_to_data", **more, **asdict(sampling)
    ) as dataset:
        todo = list(_pieces(dataset, names, prober, threads))
        cutter.codec_threads = min(max(threads // max(len(todo), 1), 1), MAX_CODEC_THREADS)
        cut_all(dataset, todo, cutter, threads, len(todo), "segment")
        for name in {piece.unit.photo for piece in todo if piece.reject is None}:
            dataset.forget(name)  # it may be shorter than before
        is_empty = dataset.is_empty
    clock.report(dataset.totals, out, "segment")
    cutter.report()
    return 1 if dataset.totals.bad or is_empty else 0


def _videos(options: Options, out: Path) -> tuple[Path, list[str]]:
    """Return (common parent folder, names relative to it) of the videos."""
    if not options.videos:
        raise UserError("no video given; give videos, or folders of videos, before --out")
    folders, found = [], []
    for given in options.videos:
        source = given.expanduser().absolute()
        refuse_nested(source, out)
        if source.is_dir():
            below = list(_search(source))
            if not below:
                raise UserError(
                    f"{given}: no videos below this folder ({', '.join(sorted(VIDEO_SUFFIXES))}); "
                    "give "
                    "the folder of the videos, or the videos themselves"
                )
            folders.append(source)
            found += below
        elif source.is_file():
            folders.append(source.parent)
            found.append(source)
        else:
            raise UserError(f"{given}: no such file or folder; give videos, or folders of videos")
    root = Path(os.path.commonpath(folders))
    return root, sorted({path.relative_to(root).as_posix() for path in found})


def _search(root: Path) -> Iterator[Path]:
    """Yield the videos below a folder, by suffix, except hidden ones and quarantines."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); fix its "
            "permissions or move it away"
        ) from None

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != QUARANTINE]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield Path(folder, name)


def _pieces(
    dataset: CropDataset, names: list[str], prober: Prober, threads: int
) -> Iterator[Piece]:
    """Yield the unfinished segments, video by video, after probing every video for its segments."""
    unknown = [name for name in names if not dataset.is_finished(name)]
    dataset.totals.already += len(names) - len(unknown)
    with quiet_libraries(), progress(len(unknown), "video") as bar:
        for pieces in ordered_map(prober, unknown, threads):
            todo = [piece for piece in pieces if not dataset.is_finished(piece.unit.folder)]
            dataset.totals.already += len(pieces) - len(todo)
            yield from todo
            bar.update()


class Prober:
    """Probes videos and divides them into segments; thread-safe."""

    def __init__(self, root: Path, settings: CropSettings, segment_time: float) -> None:
        self._root, self._settings, self._segment_time = root, settings, segment_time

    def stamp(self, name: str) -> Stamp | None:
        """Size and modification time of a video; `None` if it is gone, but its crops stay valid."""
        try:
            status = (self._root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size, status.st_mtime_ns

    def __call__(self, name: str) -> list[Piece]:
        """Return the segments of a video, or a single one with the reason why it is unusable."""
        unit = Unit(name, name, 0, 0)
        if fault := name_fault(name):
            return [_refused(Unit(ascii(name), ascii(name), 0, 0), fault)]
        try:
            unit = Unit(name, name, *(self.stamp(name) or (0, 0)))
            info = probe(self._root / name)
        except BadVideoError as error:
            return [_refused(unit, str(error))]
        except OSError as error:
            return [_refused(unit, f"could not be read: {error.strerror or error}")]
        if info.refusals:
            return [_refused(unit, "; ".join(info.refusals))]
        first = first_reduction(info.is_lossy, self._settings)
        if min(info.height, info.width) // first < self._settings.size:
            return [
                Piece(
                    unit, None, None, too_small(info.height, info.width, first, self._settings.size)
                )
            ]
        return [
            Piece(unit._replace(folder=f"{name}/{piece.start_s:06d}"), info, piece)
            for piece in segments(info, self._segment_time)
        ]


def _refused(unit: Unit, reason: str) -> Piece:
    return Piece(unit, None, None, Reject("decode", reason))


class PieceCutter:
    """Decodes and cuts segments of videos; thread-safe."""

    def __init__(
        self,
        root: Path,
        out: Path,
        settings: CropSettings,
        sampling: Sampling,
        benchmark: BenchmarkIndex | None,
    ) -> None:
        self._root, self._out, self._settings, self._sampling = root, out, settings, sampling
        self._benchmark = benchmark
        self.codec_threads = 1
        self._lock = threading.Lock()
        self._total, self._stored = FrameCounts(), 0

    def __call__(self, piece: Piece) -> UnitResult:
        """Decode a segment and write its crops; a bad one gives a reject, not an exception."""
        if piece.reject is not None:
            return UnitResult(piece.unit, rejects=[piece.reject])
        try:
            return self._cut(piece, self.codec_threads)
        except DamagedError:
            return self._cut(piece, 1)

    def _cut(self, piece: Piece, codec_threads: int) -> UnitResult:
        unit, info, segment, settings = piece.unit, piece.info, piece.segment, self._settings
        make_folder(self._out, unit.folder)
        result, tally = UnitResult(unit), FrameCounts()
        key = f"{settings.seed}/{unit.photo}/{segment.start_s}"
        frames = sample_frames(
            self._root / unit.photo, info, segment, self._sampling, key, tally, codec_threads
        )
        try:
            for frame in frames:
                picture = SourcePicture(
                    frame.pixels,
                    info.is_lossy,
                    f"pyav {av.__version__}",
                    time=round(frame.time_s, 6),
                    prefix=f"f{frame.index:06d}_",
                )
                result.pictures.append(
                    cut_picture(picture, unit, self._out, settings, self._benchmark)
                )
        except BadVideoError as error:
            result.rejects.append(Reject("decode", str(error), time=segment.start_s))
        except OSError as error:
            reason = f"could not be read: {error.strerror or error}"
            result.rejects.append(Reject("decode", reason, time=segment.start_s))
        finally:
            frames.close()
        result.rejects += _complaints(piece, tally, bool(result.pictures or result.rejects))
        with self._lock:
            self._total.decoded += tally.decoded
            self._total.dropped += tally.dropped
            self._stored += sum(bool(cut.records) for cut in result.pictures)
        return result

    def report(self) -> None:
        """Print frame counts."""
        total = self._total
        if total.decoded:
            dropped = (
                ", ".join(f"{count} {reason}" for reason, count in sorted(total.dropped.items()))
                or "none"
            )
            print(
                f"{total.decoded} frames decoded, {self._stored} cut; drawn but omitted: {dropped}"
            )


def _complaints(piece: Piece, tally: FrameCounts, has_outcome: bool) -> list[Reject]:
    """Rejects for a segment as a whole."""
    start, complaints = piece.segment.start_s, []
    if tally.errors or tally.lost:
        complaints.append(
            Reject(
                "decode",
                f"damaged: {tally.errors} packets could not be decoded and {tally.lost} frames "
                "were lost until the next key frame; the rest was cut",
                time=start,
            )
        )
    if piece.segment.end is None and piece.info.truncated:
        end = math.floor(piece.info.duration_s * 1000) / 1000
        complaints.append(Reject("decode", f"{piece.info.truncated}; the rest was cut", time=end))
    if not has_outcome and not complaints:  # recorded, so that later runs skip it
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.dropped.items()))
        complaints.append(
            Reject(
                "flat",
                f"no frame worth storing among {tally.decoded} ({reasons or 'none drawn'})",
                time=start,
            )
        )
    return complaints


if __name__ == "__main__":
    run(Options, main)
