"""What `upscale.py` does: choose the network, go through the files, tell which did not work."""

from __future__ import annotations

import functools
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipeline.cli import RunError, bar_options
from pipeline.files import write_atomically
from pipeline.inference.choosing import choose_backend, choose_device
from pipeline.inference.jobs import Job, plan_jobs, without_existing
from pipeline.inference.picture_writing import encode_picture
from pipeline.inference.pictures import Picture, picture_size, read_picture
from pipeline.inference.sizes import Target, upscale_picture
from pipeline.inference.tiles import Upscaler
from pipeline.inference.video import upscale_video, video_size

THREADS = min(4, os.cpu_count() or 1)
"""That read and write pictures while the network is at work; also how many results wait to be written."""


def run_upscaling(inputs: Sequence[Path], out: Path, model: Path | None, scale: float | None, size: str | None,
                  pre_downsample: int, format: str, force: bool, skip_existing: bool, tile: int, precision: str,
                  backend: str, device: str) -> int:
    """See `upscale.py --help`. Returns the exit status: 1 where a file did not work."""
    Image.MAX_IMAGE_PIXELS = None  # `upscale_images` asks the memory instead
    target = Target.of(scale, size, pre_downsample)
    planned = plan_jobs(inputs, out, f".{format}")
    jobs = without_existing(planned, force=force, skip_existing=skip_existing)
    if len(jobs) < len(planned):
        print(f"left alone: {len(planned) - len(jobs)} results that exist already")
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


def _run_all(jobs: Sequence[Job], target: Target, upscaler: Upscaler,
             expected: Sequence[float]) -> list[tuple[Job, str]]:
    """Do the jobs; those that did not work, and why. The next picture is read and the last ones are written meanwhile.

    The bar counts the pixels that the network is shown, of which `expected` is known beforehand for each job.
    """
    reasons: dict[Job, str] = {}
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
    return tqdm(total=pixels / 1e6, unit="MP", desc="upscaling", **bar_options(), dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} MP "
                           "[{elapsed}<{remaining}, {rate_fmt}]")


def _read_ahead(jobs: Sequence[Job], pool: Executor) -> Iterator[tuple[Job, Future[Picture] | None]]:
    """Each job with its picture, or `None` for a video; the next one's is read while this one's is at work."""
    waiting: deque[tuple[Job, Future[Picture] | None]] = deque()
    for job in jobs:
        waiting.append((job, None if job.is_video else pool.submit(read_picture, job.source)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _first_of(job: Job, picture: Picture) -> Picture:
    if picture.num_frames > 1:
        tqdm.write(f"note: {job.source} holds {picture.num_frames} pictures; the first is upscaled", file=sys.stderr)
    return picture


def _write(picture: Picture, target: Path) -> None:
    write_atomically(target, encode_picture(picture, target.suffix))


def _finish(job: Job, written: Future[None], reasons: dict[Job, str]) -> None:
    with _noting(job, reasons):
        written.result()


@contextmanager
def _noting(job: Job, reasons: dict[Job, str]) -> Iterator[None]:
    """Within, what is wrong with a file, the disk or the memory is noted as the reason why `job` failed.

    `ValueError` and `RuntimeError` are those of encoders, and of networks that refuse an image of this size.
    """
    try:
        yield
    except (RunError, OSError, MemoryError, ValueError, RuntimeError) as error:
        reasons[job] = " ".join(str(error).split())[:500] or "not enough memory"


def _work(job: Job, target: Target, scale: int) -> float:
    """How many pixels the network will be shown; 0 for a file whose header does not tell."""
    try:
        if job.is_video:
            frames, height, width = video_size(job.source)
            return frames * target.work(height, width, scale)
        return target.work(*picture_size(job.source), scale)
    except Exception:  # decoders raise whatever they like; the job itself will say what is wrong
        return 0.0
