"""The work of `upscale.py`: choose the network, process the files, report those that failed.

One thread reads pictures, the main thread runs the network, and a few others encode and write the
results, all at the same time. The queue between them is bounded in number and in memory.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipeline.cli import FULL_DISK, RunError, UserError, bar_options
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import reason, write_atomically
from pipeline.inference import png
from pipeline.inference.choosing import choose_backend
from pipeline.inference.devices import choose_device
from pipeline.inference.jobs import UpscalingJob, plan_jobs, unread_files, without_existing
from pipeline.inference.measurements import digest
from pipeline.inference.pictures import Picture, encode_picture, picture_size, read_picture
from pipeline.inference.reach import Reach
from pipeline.inference.sizes import TargetSize, upscale_picture
from pipeline.inference.tiles import Upscaler

WRITERS = min(4, os.cpu_count() or 1)
"""Threads that encode and write results while the network runs."""
WAITING_BYTES = 256 << 20
"""Maximum size of the results that wait to be written, unless there is only one."""


def run_upscaling(
    inputs: Sequence[Path],
    out: Path,
    model: Path | None,
    scale: float | None,
    size: str | None,
    pre_downsample: int,
    format: str,
    png_level: int | None,
    force: bool,
    skip_existing: bool,
    tile: int,
    exact: bool,
    precision: str,
    backend: str,
    device: str,
    compile: bool,
) -> int:
    """Upscale as `upscale.py --help` describes; return the exit status, 1 if a file failed."""
    Image.MAX_IMAGE_PIXELS = None  # `read_picture` and `upscale_images` check the memory instead
    if png_level is not None and png_level not in png.LEVELS:
        raise UserError(f"--png-level {png_level} must be from {png.LEVELS[0]} to {png.LEVELS[-1]}")
    target = TargetSize.of(scale, size, pre_downsample)
    planned = plan_jobs(inputs, out, f".{format}")
    for job in planned:
        if job.is_video and job.target.exists():
            from pipeline.inference.film_segments import discard_leftovers  # imports PyAV

            discard_leftovers(job.target)
    jobs = without_existing(planned, force=force, skip_existing=skip_existing)
    if unread := unread_files(inputs, out):
        print(unread)
    if len(jobs) < len(planned):
        print(f"skipped: {len(planned) - len(jobs)} results that already exist")
    if not jobs:
        return 0

    @functools.cache
    def expected(scale: int) -> list[float]:
        return [_work(job, target, scale) for job in jobs]

    chosen = choose_backend(
        model,
        backend,
        choose_device(device),
        precision,
        lambda scale: sum(expected(scale)),
        compiles=compile,
    )
    upscaler = Upscaler(
        chosen.backend, tile, halo=None if exact else Reach(chosen.backend, chosen.measured)
    )
    print(
        f"model: {chosen.file} ({chosen.network}) on {chosen.by}; {len(jobs)} "
        f"{'file' if len(jobs) == 1 else 'files'}",
        flush=True,
    )
    settings = {
        "network": _digest(chosen.file) if any(job.is_video for job in jobs) else "",
        "options": [tile, exact, precision, backend, device],
    }
    failures = _run_all(jobs, target, upscaler, expected(upscaler.scale), png_level, settings)
    print(f"upscaled: {len(jobs) - len(failures)} of {len(jobs)} into {out}", flush=True)
    for job, why in failures:
        print(f"failed: {job.source}: {why}", file=sys.stderr)
    return 1 if failures else 0


def _run_all(
    jobs: Sequence[UpscalingJob],
    target: TargetSize,
    upscaler: Upscaler,
    expected: Sequence[float],
    png_level: int | None,
    settings: Mapping[str, object],
) -> list[tuple[UpscalingJob, str]]:
    """Do the jobs; return those that failed, with the reason.

    Meanwhile the next picture is read and previous results are written. The progress bar counts the
    pixels that the network is shown; `expected` gives their number for each job. An interrupted
    video continues if `settings` are the same.
    """
    reasons: dict[UpscalingJob, str] = {}
    done = 0.0
    prepare_decoders()  # one core per thread
    with (
        _bar(sum(expected)) as bar,
        ThreadPoolExecutor(1) as reader,
        ResultWriter(reasons, png_level) as writer,
    ):
        for (job, reading), work in zip(_read_ahead(jobs, reader), expected, strict=True):
            with _recording_failure(job, reasons):
                job.target.parent.mkdir(parents=True, exist_ok=True)
                if reading is None:
                    from pipeline.inference.video import upscale_video

                    upscale_video(
                        job.source,
                        job.target,
                        target,
                        upscaler,
                        lambda pixels: bar.update(pixels / 1e6),
                        settings,
                    )
                else:
                    writer.put(
                        job,
                        upscale_picture(
                            _first_picture(job, reading.result()),
                            target,
                            upscaler,
                            lambda pixels: bar.update(pixels / 1e6),
                        ),
                    )
            done += work / 1e6
            bar.update(done - bar.n)  # the rest of a job that failed
    return [(job, reasons[job]) for job in jobs if job in reasons]


@dataclass
class ResultWriter:
    """Encodes and writes results in a few threads; leaving the context waits for all of them."""

    reasons: dict[UpscalingJob, str]
    """Receives the reason for every job whose result could not be written."""
    png_level: int | None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(WRITERS))
    _waiting: deque[tuple[UpscalingJob, int, Future[None]]] = field(default_factory=deque)

    def __enter__(self) -> ResultWriter:
        return self

    def put(self, job: UpscalingJob, picture: Picture) -> None:
        """Queue a result; first wait until the queue is short and small enough."""
        size = picture.pixels.nbytes
        while self._waiting and (
            len(self._waiting) > WRITERS
            or size + sum(held for _, held, _ in self._waiting) > WAITING_BYTES
        ):
            self._finish()
        self._waiting.append((job, size, self._pool.submit(self._write, picture, job.target)))

    def __exit__(self, *_: object) -> None:
        while self._waiting:
            self._finish()
        self._pool.shutdown()

    def _write(self, picture: Picture, target: Path) -> None:
        write_atomically(target, encode_picture(picture, target.suffix, self.png_level))

    def _finish(self) -> None:
        job, _, written = self._waiting.popleft()
        with _recording_failure(job, self.reasons):
            written.result()


def _digest(network: Path) -> str:
    """Return the SHA-256 of a network's file or, for OpenVINO, of both files."""
    weights = network.with_suffix(".bin")
    has_weights = network.suffix.lower() == ".xml" and weights.is_file()
    return digest(*(path.read_bytes() for path in [network, *([weights] if has_weights else [])]))


def _bar(pixels: float) -> tqdm:
    return tqdm(
        total=pixels / 1e6,
        unit="MP",
        desc="upscaling",
        **bar_options(),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} MP "
        "[{elapsed}<{remaining}, {rate_fmt}]",
    )


def _read_ahead(
    jobs: Sequence[UpscalingJob], pool: Executor
) -> Iterator[tuple[UpscalingJob, Future[Picture] | None]]:
    """Yield each job with its picture (`None` for a video), reading one picture ahead."""
    waiting: deque[tuple[UpscalingJob, Future[Picture] | None]] = deque()
    for job in jobs:
        waiting.append((job, None if job.is_video else pool.submit(read_picture, job.source)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _first_picture(job: UpscalingJob, picture: Picture) -> Picture:
    if picture.num_frames > 1:
        tqdm.write(
            f"note: {job.source} contains {picture.num_frames} pictures; only the first is "
            "upscaled",
            file=sys.stderr,
        )
    return picture


@contextmanager
def _recording_failure(job: UpscalingJob, reasons: dict[UpscalingJob, str]) -> Iterator[None]:
    """Record errors of the file, the disk or the memory as the reason why `job` failed.

    `ValueError` and `RuntimeError` come from encoders, and from networks that do not accept an
    image of this size. Raises `RunError` if the disk takes no more results: all further ones would
    be computed in vain.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK | {errno.EROFS}:
            raise RunError(
                f"{reason(error, job.target)}; the results so far are complete: make room there, "
                "then run the same command with --skip-existing"
            ) from error
        reasons[job] = " ".join(str(error).split())[:500]
    except (RunError, MemoryError, ValueError, RuntimeError) as error:
        reasons[job] = " ".join(str(error).split())[:500] or "not enough memory"


def _work(job: UpscalingJob, target: TargetSize, scale: int) -> float:
    """Return how many pixels the network will be shown; 0 if the file's header does not say."""
    try:
        if job.is_video:
            from pipeline.inference.video import video_size

            frames, height, width = video_size(job.source)
            return frames * target.work(height, width, scale)
        return target.work(*picture_size(job.source), scale)
    except Exception:  # decoders raise anything; the job itself will report what is wrong
        return 0.0
