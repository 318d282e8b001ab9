"""`inference.py --folder`: run whole commands on a folder of pictures, each in its own process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cli import RunError, UserError
from tools.parallel import progress

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("bare-onnx", "plain-torch", "tile-loop", "auto", "torch", "onnx", "openvino")
"""The ways: loops of `inference_loops.py`, then the values of `upscale.py --backend`."""
_WATCH = """\
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
wall, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
print(json.dumps([wall, cpu, used.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
"""Runs a command from a small process, because Linux includes the parent's memory in the peak."""
_LOOPS = {"bare-onnx": "onnx", "plain-torch": "torch", "tile-loop": "tiles"}


@dataclass(frozen=True)
class Usage:
    """The resources of one run of a command."""

    seconds: float
    cpu_seconds: float
    """User and system time of the process and its children."""
    peak_bytes: int
    """Peak resident size of the process."""


@dataclass(frozen=True)
class FolderRow:
    """The result of one command: medians of the rounds."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: float
    ratio: float
    """Time divided by that of the first command."""
    psnr: float | None
    """PSNR of its pictures against those of the first command, in dB; `None` if all are equal."""


def measure_folder(
    folder: Path, model: Path, onnx_file: Path, commands: Sequence[str], rounds: int, threads: int
) -> list[FolderRow]:
    """Run every command `rounds` times, taking turns.

    The commands of `upscale.py` run once beforehand, so that their conversions are in the cache.

    Raises:
        UserError: the folder contains no PNG pictures.
        RunError: a command fails.
    """
    if not any(folder.glob("*.png")):
        raise UserError(f"no .png pictures in {str(folder)!r} of --folder")
    usages: dict[str, list[Usage]] = {name: [] for name in commands}
    ours = [name for name in commands if name not in _LOOPS]
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress(len(ours) + rounds * len(commands), "run") as bar,
    ):
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        for number, name in [
            *((0, name) for name in ours),
            *((1, name) for _ in range(rounds) for name in commands),
        ]:
            usage = _usage(_command(name, folder, model, onnx_file, Path(scratch, name)), variables)
            if number:
                usages[name].append(usage)
            bar.update()
        expected = _pictures(Path(scratch, commands[0]))
        psnrs = {name: _psnr(_pictures(Path(scratch, name)), expected) for name in commands}
    base = [usage.seconds for usage in usages[commands[0]]]
    return [_row(name, runs, base, psnrs[name]) for name, runs in usages.items()]


def measure_png(folder: Path, rounds: int) -> str:
    """Return a table of CPU time and size per picture of PNG encoders, for a folder's pictures."""
    import cv2
    import imagecodecs

    from pipeline.inference.png import encode_png

    pictures = [cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) for picture in _pictures(folder)]
    if not pictures:
        raise UserError(f"no .png pictures in {str(folder)!r} of --png")
    cv2.setNumThreads(1)
    ways = {
        "libpng, level 6": lambda pixels: imagecodecs.png_encode(pixels, level=6),
        "OpenCV": lambda pixels: cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1],
    }
    ways |= {
        f"--png-level {level}": lambda pixels, level=level: encode_png(pixels, level)
        for level in range(1, 13)
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            sizes[name] = sum(len(way(pixels)) for pixels in pictures)
            times[name].append((time.process_time() - start) / len(pictures))
    first = next(iter(ways))
    return "\n".join(
        [
            f"{len(pictures)} pictures of {folder}, medians of {rounds} rounds",
            f"{'':16}{'CPU ms':>9}{'kB':>9}{'size':>8}",
            *(
                f"{name:16}{1e3 * statistics.median(times[name]):9.1f}"
                f"{sizes[name] / len(pictures) / 1e3:9.1f}{sizes[name] / sizes[first]:8.3f}"
                for name in ways
            ),
        ]
    )


def psnr_text(psnr: float | None) -> str:
    """Format a PSNR in dB; `None` is "equal"."""
    return "equal" if psnr is None else f"{psnr:.1f} dB"


def folder_table(title: str, rows: Sequence[FolderRow]) -> str:
    """Return a table with one line per command."""
    lines = [title, f"{'':14}{'s':>9}{'ratio':>8}{'CPU s':>9}{'peak MiB':>10}{'PSNR':>10}"]
    for row in rows:
        lines.append(
            f"{row.name:14}{row.seconds:9.2f}{row.ratio:8.2f}{row.cpu_seconds:9.2f}"
            f"{row.peak_bytes / 2**20:10.0f}{psnr_text(row.psnr):>10}"
        )
    return "\n".join(lines)


def _command(name: str, folder: Path, model: Path, onnx_file: Path, out: Path) -> list[str]:
    if name in _LOOPS:
        file = onnx_file if name == "bare-onnx" else model
        return [
            sys.executable,
            str(ROOT / "benchmarks" / "inference_loops.py"),
            _LOOPS[name],
            str(file),
            str(folder),
            str(out),
        ]
    return [
        sys.executable,
        str(ROOT / "upscale.py"),
        str(folder),
        "-o",
        str(out),
        "--model",
        str(model),
        "--force",
        "--backend",
        name,
        "--device",
        "cpu",
    ]


def _usage(command: Sequence[str], variables: dict[str, str]) -> Usage:
    """Run a command and return its resources; raise `RunError` if it fails."""
    done = subprocess.run(
        [sys.executable, "-ISE", "-c", _WATCH, *command],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RunError(f"{Path(command[1]).name} {command[2]} failed: {lines[-1]}")
    return Usage(*json.loads(done.stdout))


def _row(name: str, runs: Sequence[Usage], base: Sequence[float], psnr: float | None) -> FolderRow:
    return FolderRow(
        name,
        statistics.median(run.seconds for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
        statistics.median(run.peak_bytes for run in runs),
        statistics.median(run.seconds / other for run, other in zip(runs, base, strict=True)),
        psnr,
    )


def _pictures(folder: Path) -> list[np.ndarray]:
    import cv2

    return [cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in sorted(folder.glob("*.png"))]


def _psnr(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float | None:
    errors = [
        np.square(one.astype(np.int32) - other).mean()
        for one, other in zip(found, expected, strict=True)
    ]
    error = float(np.mean(errors))
    return None if error == 0 else 10 * float(np.log10(255**2 / error))
