"""Compare training with the loops of other projects: same network, crops, batch and precision.

They take turns on one machine.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil
import tyro

from benchmarks.loader import cut_photographs
from benchmarks.loader_ways import Setting
from benchmarks.peers_loops import BASICSR, LOOPS, NETWORKS
from pipeline.cli import RunError, UserError, run
from pipeline.distributed.launcher import free_port
from pipeline.run_folder import LOG_FILE
from tools.parallel import progress

SIZE = 480  # side of the files in HR pixels, as in BasicSR's sub-images
OURS, OURS_TWO = "ours", "ours, 2 ranks"
PATIENCE = 600.0  # seconds that a participant may take for a window, including the first


@dataclass(frozen=True)
class Options:
    """Train the same network with this project and with other loops, and print their speeds.

    They take turns: the processes of a participant are stopped (SIGSTOP) while another runs. A
    window is a number of steps; medians over all windows are reported. CPU seconds are those of all
    processes of a participant.

    Example: python benchmarks/peers.py ~/Pictures/Kodak --network msrresnet --basicsr-python
    ~/basicsr/bin/python
    """

    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")]
    """Folders of photographs of at least 480x480 pixels."""
    network: str = "vapsr"
    """vapsr, msrresnet, compact, or rrdbnet (with 6 blocks); x4."""
    ways: Annotated[str, tyro.conf.arg(metavar="A,B,...")] = "ours,plain,ancestor"
    """The participants: ours, plain (a torch loop with a DataLoader), ancestor (DALI without
    overlap on PNG, torch.compile's backend "eager", waiting for the device in every step), basicsr;
    and on two ranks ours2, ddp, lightning."""
    batch: int = 8
    """Global batch: images per step over all ranks."""
    crop: int = 192
    """Side of the crops in HR pixels."""
    steps: int = 4
    """Steps per window."""
    rounds: int = 5
    """Windows per participant."""
    threads: int = 2
    """Threads of DALI, and processes of the DataLoader."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Overrides for this project's run, as in training: compile=on."""
    basicsr_python: Path | None = None
    """The Python of an environment with torch and the package basicsr, which is used unchanged."""
    basicsr_network: Path | None = None
    """A Python file that registers one network with BasicSR (@ARCH_REGISTRY.register()), which
    BasicSR then trains instead of its own or ours: the official vapsr.py, for example."""


@dataclass
class Participant:
    """A running training in its own processes, which are stopped except during its turns."""

    name: str
    process: subprocess.Popen[bytes]
    file: Path  # it appends a line for each window
    mark: str  # the text that identifies such a line
    output: Path
    walls: list[float]
    cpus: list[float]

    def windows(self) -> int:
        """Return the number of finished windows."""
        with suppress(FileNotFoundError):
            return sum(
                self.mark in line for line in self.file.read_text(errors="replace").splitlines()
            )
        return 0

    def turn(self) -> tuple[float, float]:
        """Let it run to the end of its next window; return the window's wall and CPU seconds."""
        done, before = self.windows(), self._cpu()
        for process in reversed(self._processes()):
            process.resume()
        began = time.perf_counter()
        while self.windows() == done:
            if self.process.poll() is not None or time.perf_counter() - began > PATIENCE:
                words = self.output.read_text(errors="replace").strip().splitlines()[-3:]
                raise RunError(
                    f"{self.name} ended early, or did not finish a window within {PATIENCE} s; "
                    f"its last output: {' | '.join(words)}"
                )
            time.sleep(0.005)
        wall = time.perf_counter() - began
        for process in self._processes():
            process.suspend()
        return wall, self._cpu() - before

    def resident_mebibytes(self) -> float:
        """Return the current resident memory of all its processes."""
        return sum(process.memory_info().rss for process in self._processes()) / 2**20

    def end(self) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        """Return all its processes, parents first; a launcher puts ranks into their own groups."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def _cpu(self) -> float:
        total = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def main(options: Options) -> int:
    """Cut the photographs, start the participants, let them take turns, print the table."""
    ways = _check(options)
    # Exit through `finally`, so that no stopped process is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(Path(scratch) / "files", options.crop, 4, options.batch, options.threads)
        setting.folder.mkdir()
        count = cut_photographs(options.photos, setting, SIZE, 1000)
        _write_lists(setting)
        print(
            f"{options.network} x4, crops of {options.crop}, batch {options.batch}, {count} files "
            f"of {SIZE}x{SIZE}; windows of {options.steps} steps, {options.rounds} per "
            f"participant, taking turns; {len(os.sched_getaffinity(0))} CPU cores"
        )
        participants: list[Participant] = []
        try:
            with progress(len(ways) * (options.rounds + 1), "window") as bar:
                for way in ways:
                    participants.append(_start(way, options, setting, Path(scratch)))
                    participants[-1].turn()  # start-up, compilation and warm-up are not measured
                    bar.update()
                for number in range(options.rounds):
                    for participant in participants if number % 2 == 0 else reversed(participants):
                        wall, cpu = participant.turn()
                        participant.walls.append(wall)
                        participant.cpus.append(cpu)
                        bar.update()
            _print_table(participants, options)
        finally:
            for participant in participants:
                participant.end()
    return 0


def _check(options: Options) -> list[str]:
    known = {"ours": OURS, "ours2": OURS_TWO, "basicsr": BASICSR, **{name: name for name in LOOPS}}
    ways = [way.strip() for way in options.ways.split(",")]
    for way in ways:
        if way not in known:
            raise UserError(f"--ways: unknown {way!r}; choose from {', '.join(known)}")
    if options.network not in NETWORKS:
        raise UserError(
            f"--network: unknown {options.network!r}; choose from {', '.join(NETWORKS)}"
        )
    sizes = options.batch, options.steps, options.rounds, options.threads
    if min(sizes) < 1 or options.crop % 4 or options.crop > SIZE:
        raise UserError(
            "--batch, --steps, --rounds and --threads must be 1 or more, and --crop a multiple of "
            f"4 up to {SIZE}"
        )
    if "basicsr" in ways and options.basicsr_python is None:
        raise UserError(
            "basicsr needs --basicsr-python, the Python of an environment that has it "
            "(python -m venv DIR; DIR/bin/pip install torch torchvision basicsr)"
        )
    if options.basicsr_network is not None and not options.basicsr_network.is_file():
        raise UserError(f"--basicsr-network: there is no file {options.basicsr_network}")
    if not options.photos:
        raise UserError("no photographs: give folders of photographs of at least 480x480 pixels")
    return [known[way] for way in ways]


def _write_lists(setting: Setting) -> None:
    """Write this project's dataset lists: all files for training, one of them for validation."""
    names = [f"npy/{file.name}" for file in setting.files("npy")]
    (setting.folder / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names))
    (setting.folder / "validation_file_list.txt").write_text(f"{names[0]}\n")


def _start(way: str, options: Options, setting: Setting, scratch: Path) -> Participant:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    mark, file = "window", folder / "windows"
    if way in (OURS, OURS_TWO):
        command, file, mark = (
            _our_command(options, setting, folder, 2 if way == OURS_TWO else 1),
            folder / "run" / LOG_FILE,
            '"event": "train"',
        )
    else:
        python = str(options.basicsr_python) if way == BASICSR else sys.executable
        what = {
            "loop": way,
            "network": options.network,
            "files": str(setting.folder),
            "crop": options.crop,
            "batch": options.batch,
            "steps": options.steps,
            "threads": options.threads,
            "out": str(file),
            "folder": str(folder),
            "port": free_port(),
            "basicsr_network": str(options.basicsr_network or ""),
        }
        command = [python, str(ROOT / "benchmarks" / "peers_loops.py"), json.dumps(what)]
    output = folder / "output.txt"
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    return Participant(way, process, file, mark, output, [], [])


def _our_command(options: Options, setting: Setting, folder: Path, procs: int) -> list[str]:
    never = "1000000000"
    network = json.dumps(NETWORKS[options.network])
    return [
        sys.executable,
        str(ROOT / "train.py") if procs == 1 else str(ROOT / "launch" / "local.py"),
        *([] if procs == 1 else ["--procs", str(procs)]),
        "--recipe",
        "vapsr_x4",
        "--dataset-dir",
        str(setting.folder),
        "--output-dir",
        str(folder / "run"),
        f"generator={network}",
        f"data.crop={options.crop}",
        f"data.threads={options.threads}",
        f"ds.train_batch_size={options.batch}",
        f"steps={never}",
        f"log_every={options.steps}",
        f"validate_every={never}",
        f"save_every={never}",
        "save_minutes=100000",
        "previews.count=0",
        "ds.fp16.enabled=false",
        *options.overrides,
    ]


def _print_table(participants: list[Participant], options: Options) -> None:
    images = options.batch * options.steps
    rates = {p.name: [images / wall for wall in p.walls] for p in participants}
    print(
        f"\n{'':16}{'images/s':>10} {'min':>8} {'max':>8}{'ratio':>8}"
        f"{'CPU s per image':>16}{'MiB':>8}"
    )
    for participant in participants:
        own, theirs = participant.walls, participants[0].walls
        ratio = statistics.median(mine / other for mine, other in zip(own, theirs, strict=True))
        rate = rates[participant.name]
        print(
            f"{participant.name:16}"
            f"{statistics.median(rate):10.2f} {min(rate):8.2f} {max(rate):8.2f} {1 / ratio:7.2f}"
            f"{statistics.median(participant.cpus) / images:16.3f}"
            f"{participant.resident_mebibytes():8.0f}"
        )
    print(f"ratio: speed relative to {participants[0].name} in the same round; above 1 is faster")


if __name__ == "__main__":
    run(Options, main)
