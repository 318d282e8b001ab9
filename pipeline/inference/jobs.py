"""The files that `upscale.py` upscales and the files it writes. Nothing is decoded here."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_headers import UPSCALED_SUFFIXES, unread_note
from pipeline.files import VIDEO_SUFFIXES
from pipeline.inference.pictures import WRITTEN

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Suffixes of the videos that can be written -> FFmpeg's names of their formats."""
VIDEO_WRITTEN = frozenset(CONTAINERS)


@dataclass(frozen=True)
class UpscalingJob:
    """One file to upscale."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """Whether the source is a video, judged by its suffix."""
        return self.source.suffix.lower() in VIDEO_SUFFIXES


def plan_jobs(inputs: Sequence[Path], out: Path, suffix: str) -> list[UpscalingJob]:
    """Return the jobs for files and folders, in order.

    Args:
        inputs: images, videos, and folders. A folder stands for all images and videos below it that
            are not hidden.
        out: folder for the results, which keeps the structure of the input folders. With the suffix
            of an image or video it is the result's file, for a single input file.
        suffix: suffix of result pictures, unless `out` is a file.

    Raises:
        UserError: an input does not exist or contains nothing to upscale, or two results would be
            the same file.
    """
    if not inputs:
        raise UserError("nothing to upscale; give images, videos or folders before -o")
    if _is_file_name(out):
        return [_single(inputs, out)]
    if out.exists() and not out.is_dir():
        raise UserError(f"-o {str(out)!r} is a file; give a folder")
    found = [pair for path in inputs for pair in _below(path, out)]
    names = defaultdict(list)
    for source, folder in found:
        names[folder / _result_name(source, suffix)].append(source)
    jobs: dict[Path, UpscalingJob] = {}
    for source, folder in found:
        target = folder / _result_name(source, suffix)
        if len(names[target]) > 1:  # photo.jpg and photo.png: keep the suffix in the name
            target = folder / f"{source.name}{target.suffix}"
        if target in jobs and jobs[target].source.resolve() != source.resolve():
            raise UserError(
                f"{str(jobs[target].source)!r} and {str(source)!r} would both become "
                f"{str(target)!r}; upscale them into different folders"
            )
        jobs[target] = UpscalingJob(source, target)
    return list(jobs.values())


def without_existing(
    jobs: Sequence[UpscalingJob], *, force: bool, skip_existing: bool
) -> list[UpscalingJob]:
    """Return the jobs to do, given the results that already exist.

    Raises:
        UserError: a file would be overwritten without `force`, or an input by its own result.
    """
    for job in jobs:
        if job.target.exists() and job.target.samefile(job.source):
            raise UserError(
                f"{str(job.source)!r} would be overwritten by its own result; choose another -o"
            )
    existing = [job for job in jobs if job.target.exists()]
    for job in existing:
        if job.target.is_dir():
            raise UserError(
                f"{str(job.target)!r} is a folder, but a result would be written there; choose "
                "another -o"
            )
    if existing and not (force or skip_existing):
        others = f" and {len(existing) - 1} more exist" if len(existing) > 1 else " exists"
        raise UserError(
            f"{str(existing[0].target)!r}{others} already; --force overwrites them, "
            "--skip-existing keeps them"
        )
    return [job for job in jobs if job not in existing] if skip_existing else list(jobs)


def _is_file_name(out: Path) -> bool:
    known = UPSCALED_SUFFIXES | VIDEO_SUFFIXES | VIDEO_WRITTEN
    return out.suffix.lower() in known and not out.is_dir()


def _single(inputs: Sequence[Path], out: Path) -> UpscalingJob:
    if len(inputs) != 1 or inputs[0].is_dir():
        raise UserError(
            f"-o {str(out)!r} names a file, but there is more than one input; give a folder"
        )
    job = UpscalingJob(_checked(inputs[0]), out)
    kinds, choices = ("video", VIDEO_WRITTEN) if job.is_video else ("picture", WRITTEN)
    if out.suffix.lower() not in choices:
        raise UserError(
            f"cannot write a {kinds} as {out.suffix!r}; choose from {', '.join(sorted(choices))}"
        )
    return job


def _checked(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist")
    if path.suffix.lower() not in UPSCALED_SUFFIXES | VIDEO_SUFFIXES:
        raise UserError(
            f"{str(path)!r}: unsupported file type; supported: "
            f"{' '.join(sorted(UPSCALED_SUFFIXES | VIDEO_SUFFIXES))}"
        )
    return path


def _below(path: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (file, folder of its result) for a file, or for all files below a folder.

    Files in `out` are skipped.
    """
    if not path.is_dir():
        yield _checked(path), out
        return
    results = out.resolve()
    is_empty = True
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (Path(folder) / name).resolve() != results
        )
        for name in sorted(names):
            source = Path(folder) / name
            is_known = source.suffix.lower() in UPSCALED_SUFFIXES | VIDEO_SUFFIXES
            if is_known and not name.startswith(".") and source.is_file():
                is_empty = False
                yield source, out / source.parent.relative_to(path)
    if is_empty:
        raise UserError(f"folder {str(path)!r} contains no images or videos")


def unread_files(inputs: Sequence[Path], out: Path) -> str:
    """Return a note about unsupported images in the folders among `inputs`; empty if none."""
    results = out.resolve()
    names = [
        os.path.relpath(os.path.join(folder, name), path)
        for path in inputs
        if path.is_dir()
        for folder, _, names in os.walk(path)
        if Path(folder).resolve() != results
        for name in sorted(names)
    ]
    return unread_note(names, but=UPSCALED_SUFFIXES)


def _result_name(source: Path, suffix: str) -> str:
    if source.suffix.lower() in VIDEO_SUFFIXES:
        return f"{source.stem}{_video_suffix(source)}"
    return f"{source.stem}{suffix}"


def _video_suffix(source: Path) -> str:
    """Return a result's suffix: that of the source if it can be written, else Matroska's."""
    return source.suffix.lower() if source.suffix.lower() in VIDEO_WRITTEN else ".mkv"
