"""Remux Matroska files to MP4, for players, editors and uploads that do not accept .mkv."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import av
import tyro
from av.container import InputContainer, OutputContainer
from av.stream import Disposition, Stream

from pipeline.cli import UserError, counted, run
from tools.files import printable
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count
from tools.video.probe import BadVideoError, open_video, probe, read_packets


@dataclass(frozen=True)
class Options:
    """Write each .mkv file below FOLDER as an .mp4 file beside it.

    Video and audio are copied unchanged; nothing is re-encoded, so nothing is lost. A file whose
    codecs MP4 does not support is skipped, with the reason; subtitles and attachments are dropped.
    An existing .mp4 file is never overwritten, the .mkv files stay, and no half-written .mp4 file
    is left. (video_to_data.py reads .mkv files directly.)

    Example: python tools/mkv_to_mp4.py ~/Films
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the .mkv files (searched recursively; links to folders are not followed), or one
    .mkv file."""
    threads: int = 0
    """Number of files processed in parallel; 0 is one per core."""


@dataclass(frozen=True)
class Remuxed:
    """Result of remuxing one file."""

    path: Path
    problem: str = ""
    left_behind: str = ""  # streams that MP4 does not support


def main(options: Options) -> int:
    """Remux all files.

    Returns 0 if done, 1 if done but some files could not be remuxed.
    """
    sources = _sources(options.folder.expanduser())
    todo = [path for path in sources if not path.with_suffix(".mp4").exists()]
    outcomes = []
    with quiet_libraries(), progress(len(todo), "video") as bar:
        for outcome in ordered_map(_remux_one, todo, thread_count(options.threads)):
            outcomes.append(outcome)
            bar.update()
    failed = [outcome for outcome in outcomes if outcome.problem]
    print(
        f"{counted(len(todo) - len(failed), 'video')} written as .mp4; already there: "
        f"{len(sources) - len(todo)}; skipped: {len(failed)}"
    )
    for outcome in outcomes:
        if outcome.problem or outcome.left_behind:
            print(f"{printable(str(outcome.path))}: {outcome.problem or outcome.left_behind}")
    return 1 if failed else 0


def _sources(source: Path) -> list[Path]:
    """The .mkv files, sorted, without hidden files and folders."""
    if source.is_file():
        if source.suffix.lower() != ".mkv":
            raise UserError(f"{source}: not an .mkv file; give an .mkv file or a folder of them")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or file; give the folder of the .mkv files")
    found = []
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in files
            if name.lower().endswith(".mkv") and not name.startswith(".")
        ]
    if not found:
        raise UserError(
            f"{source}: no .mkv files below this folder; give the folder of the .mkv files"
        )
    return sorted(found)


def _remux_one(path: Path) -> Remuxed:
    """Remux a file; a bad one gives a result with a problem, not an exception."""
    target = path.with_suffix(".mp4")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        left_behind = _remux(path, temporary)
        _check(path, temporary)
        _put(temporary, target)
        return Remuxed(path, left_behind=left_behind)
    except BadVideoError as error:
        return Remuxed(path, str(error))
    except FileExistsError:
        return Remuxed(path, f"{target.name} was created meanwhile and is not overwritten")
    except OSError as error:  # includes most av.FFmpegErrors
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{target}: cannot be written: {error.strerror}; free disk space, then run the "
                "same command again; it continues where it stopped"
            ) from error
        return Remuxed(path, f"could not be read or written: {error.strerror or error}")
    except ValueError as error:
        return Remuxed(path, f"not supported by MP4: {error}")
    finally:
        temporary.unlink(missing_ok=True)


def _remux(path: Path, temporary: Path) -> str:
    """Copy the streams; returns a description of what was dropped."""
    with (
        open_video(path) as (source, video),
        av.open(
            f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}
        ) as result,
    ):
        copies, left_behind = _copies(source, video, result)
        result.metadata.update(source.metadata)
        for packet in read_packets(source, *copies):
            if packet is None:
                raise BadVideoError(
                    "damaged; `ffmpeg -i IN.mkv -c copy OUT.mp4` may copy the readable part"
                )
            if packet.size:
                packet.stream = copies[packet.stream]
                result.mux(packet)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    return left_behind


def _copies(
    source: InputContainer, video: Stream, result: OutputContainer
) -> tuple[dict[Stream, Stream], str]:
    """Return (input stream -> output stream, description of dropped streams).

    Raises `BadVideoError` if MP4 does not support a codec.
    """
    copies, others = {}, []
    for stream in source.streams:
        is_film = (
            stream.type in ("video", "audio") and not stream.disposition & Disposition.attached_pic
        )
        if not is_film:
            others.append(stream.type)
            continue
        codec = (
            stream.codec_context.codec.canonical_name
            if stream.codec_context
            else "an unknown codec"
        )
        if codec not in result.supported_codecs:
            raise BadVideoError(
                f"MP4 does not support its {stream.type} codec, {codec}; leave it as it is, or "
                "re-encode it: `ffmpeg -i IN.mkv -crf 16 OUT.mp4`"
            )
        copy = result.add_stream_from_template(stream, opaque=True)  # needs no encoder
        copy.metadata.update(
            {key: value for key, value in stream.metadata.items() if key in ("language", "title")}
        )
        if codec == "hevc":
            # Apple's players accept only this one of the two tags.
            copy.codec_context.codec_tag = "hvc1"
        copies[stream] = copy
    return copies, f"dropped: {', '.join(sorted({*others}))}" if others else ""


def _check(path: Path, temporary: Path) -> None:
    """Compare the copy with its original before it gets its name."""
    before, after = probe(path), probe(temporary)
    if before.truncated:
        raise BadVideoError(before.truncated)
    same = (
        before.coded_height,
        before.coded_width,
        before.codec,
        before.orientation,
        before.pixel_aspect,
    )
    if (
        same
        != (
            after.coded_height,
            after.coded_width,
            after.codec,
            after.orientation,
            after.pixel_aspect,
        )
        or abs(before.duration_s - after.duration_s) > 0.5
    ):
        raise BadVideoError(
            "its MP4 copy differs (size, rotation, pixel aspect or duration); re-encode it"
        )


def _put(temporary: Path, target: Path) -> None:
    """Give the finished file its name.

    Raises `FileExistsError` if the name is taken.
    """
    try:
        os.link(temporary, target)  # unlike a rename, never overwrites
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.rename(temporary, target)


if __name__ == "__main__":
    run(Options, main)
