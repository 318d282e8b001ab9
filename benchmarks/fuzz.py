"""Feed mutated files to every reader of foreign files: each must accept them or refuse in one line.

Inputs are numbered. The number, the reader's name and the seed determine an input, so that a run
continues where it was stopped, and a failure can be repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from benchmarks.fuzz_readers import READERS, Reader, Sample, mutated
from pipeline.cli import UserError, nearest, run

SLICE = 10.0
"""CPU seconds for one reader before the next one has its turn."""
WALL_SECONDS = 120
"""Limit for an input that waits without computing, such as for a pipe."""


@dataclass(frozen=True)
class Options:
    """Feed mutated files to every reader of foreign files, and keep those that it does not refuse.

    A reader fails if it raises an exception that its commands do not turn into one line, if that
    line is not a single one, if its process dies, or if it needs too much time or memory. A run
    with the same --state continues after the inputs that are done.

    Example: python benchmarks/fuzz.py --minutes 30 --reader images tar
    """

    minutes: float = 1
    """CPU minutes of this run, over all readers."""
    reader: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Readers to test: names in benchmarks/fuzz_readers.py. Default: all."""
    seed: int = 0
    """Seed of the inputs."""
    state: Path = Path("fuzz.jsonl")
    """File of what is done: one line per turn of a reader. Failing inputs are kept beside it, in
    the folder of the same name with the suffix .failures."""
    memory: int = 2048
    """MiB that a process may allocate in addition to what it has at its start."""
    seconds: int = 10
    """CPU seconds for one input."""
    repeat: Path | None = None
    """A kept input to feed again to the single --reader, with the whole traceback."""


@dataclass
class Turn:
    """What one turn of a reader, or all its turns, found."""

    reader: str
    seed: int
    first: int
    """Number of its first input."""
    inputs: int = 0
    accepted: int = 0
    clear: int = 0
    """Inputs that were refused with one clear line."""
    cpu_seconds: float = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Number, fault and file of each failing input."""


def main(options: Options) -> int:
    """Test the readers in turns; the exit status is 1 if one failed."""
    names = options.reader or tuple(READERS)
    for name in names:
        if name not in READERS:
            raise UserError(f"--reader {name}: no such reader{nearest(name, READERS)}")
    if options.repeat is not None:
        return _repeat(options, names)
    turns = _turns(options.state)
    total = {name: _sum_of(turns, name, options.seed) for name in names}
    left = 60 * options.minutes
    while left > 0:
        share = min(SLICE, left / len(names))
        for name in names:  # a round is completed, so that every reader gets inputs
            turn = _take_turn(options, name, total[name].inputs, share)
            with open(options.state, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(turn)) + "\n")
            turns.append(turn)
            total[name] = _sum_of(turns, name, options.seed)
            left -= max(turn.cpu_seconds, 0.01)
    print(_table(total.values()))
    return int(any(turn.failures for turn in total.values()))


def _turns(state: Path) -> list[Turn]:
    """Return the turns of earlier runs; a line that a killed run left incomplete does not count."""
    if not state.is_file():
        return []
    turns = []
    for line in state.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            turns.append(Turn(**json.loads(line)))
    return turns


def _sum_of(turns: list[Turn], name: str, seed: int) -> Turn:
    found = Turn(name, seed, 0)
    for turn in turns:
        if (turn.reader, turn.seed) == (name, seed):
            found.inputs += turn.inputs
            found.accepted += turn.accepted
            found.clear += turn.clear
            found.cpu_seconds += turn.cpu_seconds
            found.failures += turn.failures
    return found


def _table(turns: Any) -> str:
    lines = [f"{'reader':14}{'inputs':>9}{'accepted':>10}{'clear lines':>13}{'failures':>10}"]
    lines.append("-" * len(lines[0]))
    kinds: dict[str, Counter[str]] = {}
    examples: dict[tuple[str, str], str] = {}
    for turn in turns:
        lines.append(
            f"{turn.reader:14}{turn.inputs:9}{turn.accepted:10}{turn.clear:13}"
            f"{len(turn.failures):10}"
        )
        for failure in turn.failures:
            kinds.setdefault(turn.reader, Counter())[failure["fault"]] += 1
            examples.setdefault((turn.reader, failure["fault"]), failure["file"])
    for reader, faults in kinds.items():
        lines += [
            f"{reader}: {count} x {fault}: {examples[reader, fault]}"
            for fault, count in faults.most_common()
        ]
    return "\n".join(lines)


# A turn: this process draws no inputs itself, but watches the one that does.


def _take_turn(options: Options, name: str, first: int, cpu_seconds: float) -> Turn:
    """Feed inputs from number `first` on to a reader, until the CPU seconds are used up.

    Every death of the process that reads them costs one input.
    """
    turn = Turn(name, options.seed, first)
    context = multiprocessing.get_context("fork")
    while turn.cpu_seconds < cpu_seconds:
        number = first + turn.inputs
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_work, args=(options, name, number, cpu_seconds - turn.cpu_seconds, theirs)
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        worker.start()
        theirs.close()
        fault = _watch(ours, turn)
        if fault == "waits without computing":
            worker.kill()
        worker.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        turn.cpu_seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if fault and worker.exitcode == -signal.SIGPROF:
            fault = f"needs more than {options.seconds} CPU seconds"
        elif fault and worker.exitcode is not None and worker.exitcode < 0:
            fault = f"the process dies of {signal.Signals(-worker.exitcode).name}"
        if fault:
            turn.inputs += 1
            turn.failures.append(_kept(options, name, first + turn.inputs - 1, fault))
    return turn


def _watch(results: Connection, turn: Turn) -> str:
    """Add the results of a process to `turn`; return what went wrong with the input after them."""
    while True:
        if not results.poll(WALL_SECONDS):
            return "waits without computing"
        try:
            result = results.recv()
        except EOFError:
            return "the process ends"
        if result is None:
            return ""
        fault, is_accepted, failure = result
        turn.inputs += 1
        turn.accepted += not fault and is_accepted
        turn.clear += not fault and not is_accepted
        if fault:
            turn.failures.append(failure)


def _work(options: Options, name: str, number: int, seconds: float, results: Connection) -> None:
    """Feed inputs to a reader and send the results, in a process with limits."""
    reader = READERS[name]
    samples = list(reader.samples())
    _silence()
    _limit_memory(options.memory)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    started = time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        while time.process_time() - started < seconds:
            path = _write(folder, name, options.seed, number, samples)
            signal.setitimer(signal.ITIMER_PROF, options.seconds)
            fault, is_accepted = _feed(reader, path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            failure = _kept(options, name, number, fault, path) if fault else None
            shutil.rmtree(path.parent)
            results.send((fault, is_accepted, failure))
            number += 1
        results.send(None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _silence() -> None:
    """Send what native libraries write about bad files to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _limit_memory(mebibytes: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(folder: Path, name: str, seed: int, number: int, samples: list[Sample]) -> Path:
    """Write input `number` and the files beside it into a folder of its own; return its path."""
    draw = random.Random(f"{name} {seed} {number}")
    sample = draw.choice(samples)
    inner = folder / f"{number}"
    for other, content in sample.beside.items():
        (inner / other).parent.mkdir(parents=True, exist_ok=True)
        (inner / other).write_bytes(content)
    inner.mkdir(exist_ok=True)
    path = inner / sample.name
    path.write_bytes(mutated(draw, sample, samples))
    return path


def _feed(reader: Reader, path: Path) -> tuple[str, bool]:
    """Return (the fault, or ""; whether all readers accept the file)."""
    is_accepted = True
    for read in reader.read:
        try:
            read(path)
        except reader.clear as error:
            is_accepted = False
            if "\n" in str(error) or not str(error):
                return f"{read.__name__}: {type(error).__name__} of several lines or none", False
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in place if f"{ROOT}/" in frame.filename] or place
            where = f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].name}"
            return f"{read.__name__}: {type(error).__name__} in {where}", False
    return "", is_accepted


def _kept(
    options: Options, name: str, number: int, fault: str, path: Path | None = None
) -> dict[str, Any]:
    """Keep a failing input; return its entry in the state."""
    folder = options.state.with_suffix(".failures")
    kept = folder / f"{name}-{options.seed}-{number}"
    kept.mkdir(parents=True, exist_ok=True)
    if path is None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
            samples = list(READERS[name].samples())
            path = _write(Path(temporary), name, options.seed, number, samples)
            shutil.copytree(path.parent, kept, dirs_exist_ok=True)
    else:
        shutil.copytree(path.parent, kept, dirs_exist_ok=True)
    return {"number": number, "fault": fault, "file": str(kept / path.name)}


def _repeat(options: Options, names: tuple[str, ...]) -> int:
    if len(names) != 1 or options.repeat is None:
        raise UserError("--repeat FILE needs the --reader that failed")
    _limit_memory(options.memory)
    for read in READERS[names[0]].read:
        try:
            read(options.repeat)
        except READERS[names[0]].clear as error:
            print(f"{read.__name__}: {error}")
        else:
            print(f"{read.__name__}: accepted")
    return 0


if __name__ == "__main__":
    run(Options, main)
