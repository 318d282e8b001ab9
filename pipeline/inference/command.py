"""What `upscale.py` does: choose the network, go through the files, report which did not work.

`plan_jobs` finds the files and where their results go; `run_upscaling` reads, upscales and writes at the same time.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipeline.cli import RunError, UserError, bar_options
from pipeline.data.image_headers import UPSCALED_SUFFIXES, unread_note
from pipeline.files import write_atomically
from pipeline.inference import video
from pipeline.inference.choosing import choose_backend, choose_device
from pipeline.inference.pictures import WRITTEN, Picture, encode_picture, picture_size, read_picture
from pipeline.inference.sizes import TargetSize, upscale_picture
from pipeline.inference.tiles import Upscaler
from pipeline.inference.video import upscale_video, video_size

# Which files are upscaled, and where the results go. Nothing is decoded here.

@dataclass(frozen=True)
class UpscalingJob:
    """One file to upscale."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """By its name."""
        return self.source.suffix.lower() in video.SUFFIXES


def plan_jobs(inputs: Sequence[Path], out: Path, suffix: str) -> list[UpscalingJob]:
    """What to do for files and folders (all images and videos below them, without hidden ones), in order.

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
    jobs: dict[Path, UpscalingJob] = {}
    for source, folder in found:
        target = folder / _result_name(source, suffix)
        if len(names[target]) > 1:  # photo.jpg beside photo.png
            target = folder / f"{source.name}{target.suffix}"
        if target in jobs and jobs[target].source.resolve() != source.resolve():
            raise UserError(f"{str(jobs[target].source)!r} and {str(source)!r} would both become {str(target)!r}; "
                            "upscale them into different folders")
        jobs[target] = UpscalingJob(source, target)
    return list(jobs.values())


def without_existing(jobs: Sequence[UpscalingJob], *, force: bool, skip_existing: bool) -> list[UpscalingJob]:
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
    known = UPSCALED_SUFFIXES | video.SUFFIXES | video.WRITTEN
    return out.suffix.lower() in known and not out.is_dir()


def _single(inputs: Sequence[Path], out: Path) -> UpscalingJob:
    if len(inputs) != 1 or inputs[0].is_dir():
        raise UserError(f"-o {str(out)!r} names a file, but there is more than one input; give a folder")
    job = UpscalingJob(_checked(inputs[0]), out)
    kinds, choices = ("video", video.WRITTEN) if job.is_video else ("picture", WRITTEN)
    if out.suffix.lower() not in choices:
        raise UserError(f"cannot write a {kinds} as {out.suffix!r}; choose from {', '.join(sorted(choices))}")
    return job


def _checked(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"no file or folder {str(path)!r}")
    if path.suffix.lower() not in UPSCALED_SUFFIXES | video.SUFFIXES:
        raise UserError(f"{str(path)!r}: unsupported file type; supported: "
                        f"{' '.join(sorted(UPSCALED_SUFFIXES | video.SUFFIXES))}")
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
            is_known = source.suffix.lower() in UPSCALED_SUFFIXES | video.SUFFIXES
            if is_known and not name.startswith(".") and source.is_file():
                is_empty = False
                yield source, out / source.parent.relative_to(path)
    if is_empty:
        raise UserError(f"folder {str(path)!r} holds no images or videos")


def _unread(inputs: Sequence[Path], out: Path) -> str:
    """A line on images of other formats in the folders among `inputs`; empty where there are none."""
    results = out.resolve()
    names = [os.path.relpath(os.path.join(folder, name), path) for path in inputs if path.is_dir()
             for folder, _, names in os.walk(path) if Path(folder).resolve() != results for name in sorted(names)]
    return unread_note(names, but=UPSCALED_SUFFIXES)


def _result_name(source: Path, suffix: str) -> str:
    if source.suffix.lower() in video.SUFFIXES:
        return f"{source.stem}{video.result_suffix(source)}"
    return f"{source.stem}{suffix}"


# Upscaling them.

THREADS = min(4, os.cpu_count() or 1)
"""That read and write pictures while the network is at work; also how many results wait to be written."""


def run_upscaling(inputs: Sequence[Path], out: Path, model: Path | None, scale: float | None, size: str | None,
                  pre_downsample: int, format: str, force: bool, skip_existing: bool, tile: int, precision: str,
                  backend: str, device: str) -> int:
    """See `upscale.py --help`. Returns the exit status: 1 where a file did not work."""
    Image.MAX_IMAGE_PIXELS = None  # `upscale_images` asks the memory instead
    target = TargetSize.of(scale, size, pre_downsample)
    planned = plan_jobs(inputs, out, f".{format}")
    jobs = without_existing(planned, force=force, skip_existing=skip_existing)
    if unread := _unread(inputs, out):
        print(unread)
    if len(jobs) < len(planned):
        print(f"skipped: {len(planned) - len(jobs)} results that exist already")
    if not jobs:
        return 0

    @functools.cache
    def expected(scale: int) -> list[float]:
        return [_work(job, target, scale) for job in jobs]

    chosen = choose_backend(model, backend, choose_device(device), precision, lambda scale: sum(expected(scale)))
    upscaler = Upscaler(chosen.backend, tile)
    print(f"model: {chosen.file} ({chosen.network}) on {chosen.by}; {len(jobs)} "
          f"{'file' if len(jobs) == 1 else 'files'}", flush=True)
    failures = _run_all(jobs, target, upscaler, expected(upscaler.scale))
    print(f"upscaled: {len(jobs) - len(failures)} of {len(jobs)} into {out}", flush=True)
    for job, reason in failures:
        print(f"failed: {job.source}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _run_all(jobs: Sequence[UpscalingJob], target: TargetSize, upscaler: Upscaler,
             expected: Sequence[float]) -> list[tuple[UpscalingJob, str]]:
    """Do the jobs; those that did not work, and why. The next picture is read and the last ones are written meanwhile.

    The bar counts the pixels that the network is shown, of which `expected` is known beforehand for each job.
    """
    reasons: dict[UpscalingJob, str] = {}
    done, writing = 0.0, deque()
    with _bar(sum(expected)) as bar, ThreadPoolExecutor(THREADS) as pool:
        for (job, reading), work in zip(_read_ahead(jobs, pool), expected, strict=True):
            with _noting(job, reasons):
                job.target.parent.mkdir(parents=True, exist_ok=True)
                if reading is None:
                    upscale_video(job.source, job.target, target, upscaler, lambda pixels: bar.update(pixels / 1e6))
                else:
                    large = upscale_picture(_first_of(job, reading.result()), target, upscaler,
                                            lambda pixels: bar.update(pixels / 1e6))
                    writing.append((job, pool.submit(_write, large, job.target)))
                    del large
            while len(writing) > THREADS:
                _finish(*writing.popleft(), reasons)
            done += work / 1e6
            bar.update(done - bar.n)  # what a failure left undone
        while writing:
            _finish(*writing.popleft(), reasons)
    return [(job, reasons[job]) for job in jobs if job in reasons]


def _bar(pixels: float) -> tqdm:
    return tqdm(total=pixels / 1e6, unit="MP", desc="upscaling", **bar_options(),
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} MP "
                           "[{elapsed}<{remaining}, {rate_fmt}]")


def _read_ahead(jobs: Sequence[UpscalingJob], pool: Executor) -> Iterator[tuple[UpscalingJob, Future[Picture] | None]]:
    """Each job with its picture, or `None` for a video; the next one's is read while this one's is at work."""
    waiting: deque[tuple[UpscalingJob, Future[Picture] | None]] = deque()
    for job in jobs:
        waiting.append((job, None if job.is_video else pool.submit(read_picture, job.source)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _first_of(job: UpscalingJob, picture: Picture) -> Picture:
    if picture.num_frames > 1:
        tqdm.write(f"note: {job.source} holds {picture.num_frames} pictures; the first is upscaled", file=sys.stderr)
    return picture


def _write(picture: Picture, target: Path) -> None:
    write_atomically(target, encode_picture(picture, target.suffix))


def _finish(job: UpscalingJob, written: Future[None], reasons: dict[UpscalingJob, str]) -> None:
    with _noting(job, reasons):
        written.result()


@contextmanager
def _noting(job: UpscalingJob, reasons: dict[UpscalingJob, str]) -> Iterator[None]:
    """Within, what is wrong with a file, the disk or the memory is noted as the reason why `job` failed.

    `ValueError` and `RuntimeError` are those of encoders, and of networks that refuse an image of this size.
    """
    try:
        yield
    except (RunError, OSError, MemoryError, ValueError, RuntimeError) as error:
        reasons[job] = " ".join(str(error).split())[:500] or "not enough memory"


def _work(job: UpscalingJob, target: TargetSize, scale: int) -> float:
    """How many pixels the network will be shown; 0 for a file whose header does not tell."""
    try:
        if job.is_video:
            frames, height, width = video_size(job.source)
            return frames * target.work(height, width, scale)
        return target.work(*picture_size(job.source), scale)
    except Exception:  # decoders raise whatever they like; the job itself will say what is wrong
        return 0.0
