"""Which files are upscaled, and where the results go. Nothing is decoded here."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import UserError
from pipeline.inference import pictures, video
from pipeline.inference.picture_writing import WRITTEN


@dataclass(frozen=True)
class Job:
    """One file to upscale."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """By its name."""
        return self.source.suffix.lower() in video.SUFFIXES


def plan_jobs(inputs: Sequence[Path], out: Path, suffix: str) -> list[Job]:
    """What to do for files and folders (all images and videos below them, hidden ones left alone), in order.

    `out` is a folder, which keeps the structure of the input folders; or a file, by its suffix, for one input file.
    Pictures get `suffix`, unless `out` is a file. `UserError` for inputs that are not there, hold nothing, or whose
    results would be one file.
    """
    if not inputs:
        raise UserError("nothing to upscale; name images, videos or folders before -o")
    if _is_file_name(out):
        return [_single(inputs, out)]
    if out.exists() and not out.is_dir():
        raise UserError(f"-o {str(out)!r} is a file; give a folder")
    found = [pair for path in inputs for pair in _below(path, out)]
    names = defaultdict(list)
    for source, folder in found:
        names[folder / _result_name(source, suffix)].append(source)
    jobs: dict[Path, Job] = {}
    for source, folder in found:
        target = folder / _result_name(source, suffix)
        if len(names[target]) > 1:  # photo.jpg beside photo.png
            target = folder / f"{source.name}{target.suffix}"
        if target in jobs and jobs[target].source.resolve() != source.resolve():
            raise UserError(f"{str(jobs[target].source)!r} and {str(source)!r} would both become {str(target)!r}; "
                            "upscale them into different folders")
        jobs[target] = Job(source, target)
    return list(jobs.values())


def without_existing(jobs: Sequence[Job], *, force: bool, skip_existing: bool) -> list[Job]:
    """The jobs to do, given what is on the disk. `UserError` where something would be overwritten without `force`, or
    an input by its own result."""
    for job in jobs:
        if job.target.exists() and job.target.samefile(job.source):
            raise UserError(f"{str(job.source)!r} would be overwritten by its own result; choose another -o")
    existing = [job for job in jobs if job.target.exists()]
    for job in existing:
        if job.target.is_dir():
            raise UserError(f"{str(job.target)!r} is a folder, where a result must go; choose another -o")
    if existing and not (force or skip_existing):
        others = f" and {len(existing) - 1} more exist" if len(existing) > 1 else " exists"
        raise UserError(f"{str(existing[0].target)!r}{others} already; --force overwrites, "
                        "--skip-existing leaves them alone")
    return [job for job in jobs if job not in existing] if skip_existing else list(jobs)


def _is_file_name(out: Path) -> bool:
    known = pictures.SUFFIXES | video.SUFFIXES | video.WRITTEN
    return out.suffix.lower() in known and not out.is_dir()


def _single(inputs: Sequence[Path], out: Path) -> Job:
    if len(inputs) != 1 or inputs[0].is_dir():
        raise UserError(f"-o {str(out)!r} names a file, but there is more than one input; give a folder")
    job = Job(_checked(inputs[0]), out)
    kinds, choices = ("video", video.WRITTEN) if job.is_video else ("picture", WRITTEN)
    if out.suffix.lower() not in choices:
        raise UserError(f"cannot write a {kinds} as {out.suffix!r}; choose from {', '.join(sorted(choices))}")
    return job


def _checked(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"no file or folder {str(path)!r}")
    if path.suffix.lower() not in pictures.SUFFIXES | video.SUFFIXES:
        raise UserError(f"{str(path)!r} is no image or video by its name; known are "
                        f"{' '.join(sorted(pictures.SUFFIXES | video.SUFFIXES))}")
    return path


def _below(path: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """(File, folder of its result) for a file, or for all below a folder but what lies in `out`."""
    if not path.is_dir():
        yield _checked(path), out
        return
    results = out.resolve()
    is_empty = True
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and (Path(folder) / name).resolve() != results)
        for name in sorted(names):
            source = Path(folder) / name
            is_known = source.suffix.lower() in pictures.SUFFIXES | video.SUFFIXES
            if is_known and not name.startswith(".") and source.is_file():
                is_empty = False
                yield source, out / source.parent.relative_to(path)
    if is_empty:
        raise UserError(f"folder {str(path)!r} holds no images or videos")


def _result_name(source: Path, suffix: str) -> str:
    if source.suffix.lower() in video.SUFFIXES:
        return f"{source.stem}{video.result_suffix(source)}"
    return f"{source.stem}{suffix}"
