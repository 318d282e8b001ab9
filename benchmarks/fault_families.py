"""The families of faults that `faults.py` injects into training runs.

Each is a function of the campaign's `World`, a generator of random numbers and the folder for the
fault's run. It injects one fault, lets the run end, continues it with the same command and returns
what it saw.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from benchmarks import faults_tools
from benchmarks.fault_lives import ROOT, STEPS, Life, Outcome, Run, World
from benchmarks.fault_mutations import mutate
from pipeline.cli import UserError
from pipeline.run_folder import CHECKPOINTS_DIR, checkpoint_dir

Family = Callable[[World, random.Random, str], Outcome]
GUARD = ROOT / "launch" / "cluster" / "guard.py"
KILLED = 128 + signal.SIGKILL


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _run_until(
    run: Run, draw: random.Random, act: Callable[[Life], None], last: int = STEPS - 1, **calls: list
) -> tuple[Life, int]:
    """Start a life, and call `act` up to 0.05 s after a random step from 1 to `last`.

    `calls`: what happens in its scripts; `__` stands for the dot in a script's name. Returns the
    life and the step.
    """
    step, sign = draw.randint(1, last), run.folder / "reached"
    calls = {name.replace("__", "."): given for name, given in calls.items()}
    calls["train.py"] = [
        ["on_first_rank", "at_step", step, "touch", str(sign)],
        *calls.get("train.py", []),
    ]
    life = run.start(calls=calls)
    life.wait_for(sign.exists, f"step {step}")
    time.sleep(draw.uniform(0, 0.05))
    act(life)
    return life, step


# --- Kills ---


def kill_rank(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of a run with one rank."""
    run = Run(world, name)
    way = draw.choice(("file", "file", "step", "start"))
    if way == "file":
        number = draw.randint(1, world.num_file_events[""])
        life = run.start(calls={"train.py": [["kill_at_file_event", str(run.run_dir), number]]})
        moment = f"before file operation {number} of the run"
    elif way == "step":
        life, step = _run_until(run, draw, lambda life: _kill(life.pid("train.py")))
        moment = f"at step {step}"
    else:
        life, seconds = run.start(), draw.uniform(0, 1.5)
        pid = life.pid("train.py")
        with suppress(subprocess.TimeoutExpired):
            life.process.wait(seconds)
        _kill(pid)
        moment = f"{seconds:.2f} s after the start"
    status = life.join()
    outcome = Outcome("kill -9 of the rank", moment, status, life.reported())
    if way == "file" and status != KILLED:
        outcome.wrong.append(f"the run was not killed, but ended with status {status}")
    return run.conclude(outcome)


def kill_rank_again(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of a run with one rank, up to five times in a row."""
    run, outcome = Run(world, name), Outcome("kill -9 of the rank, again and again", count=0)
    moments, before = [], run.logged
    for _ in range(5):
        number = draw.randint(1, world.num_file_events[""] // 2)
        life = run.start(calls={"train.py": [["kill_at_file_event", str(run.run_dir), number]]})
        outcome.status = life.join()
        run.count_lost(outcome, before, life)
        before = run.logged
        if outcome.status != KILLED:
            break
        outcome.count += 1
        moments.append(str(number))
    outcome.moment = f"before file operations {', '.join(moments)} of its lives"
    if outcome.status not in (0, KILLED):
        outcome.wrong.append(f"ended with status {outcome.status}: {life.printed[-1500:]}")
    return run.conclude(outcome)


def kill_guarded_rank(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of one of two ranks."""
    return _kill_one_of_two(world, draw, name, "train.py", "kill -9 of one of two ranks")


def kill_guard(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of the guard of one of two ranks."""
    return _kill_one_of_two(world, draw, name, "guard.py", "kill -9 of a guard")


def _kill_one_of_two(
    world: World, draw: random.Random, name: str, script: str, fault: str
) -> Outcome:
    run, rank = Run(world, name, 2), draw.randrange(2)
    life, step = _run_until(run, draw, lambda life: _kill(life.pid(script, rank)))
    outcome = Outcome(f"{fault} (rank {rank})", f"at step {step}", life.join(), life.reported())
    if outcome.status and f"rank {rank} on localhost" not in outcome.reported:
        outcome.wrong.append("the report does not name the rank")
    return run.conclude(outcome)


def kill_supervisor(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of launch/distributed.py, which supervises two ranks."""
    run = Run(world, name, 2)
    life, step = _run_until(run, draw, lambda life: _kill(life.pid("distributed.py")))
    return run.conclude(
        Outcome("kill -9 of the supervisor", f"at step {step}", life.join(), life.reported())
    )


def kill_launcher(world: World, draw: random.Random, name: str) -> Outcome:
    """kill -9 of launch/local.py, or of DeepSpeed's launcher below it or below the supervisor."""
    launcher, procs, script = draw.choice(
        (
            ("launch/local.py", 1, "local.py"),
            ("launch/local.py", 1, "local.py"),
            ("launch/distributed.py", 2, "deepspeed runner.py"),
            ("launch/distributed.py", 2, "deepspeed launch.py"),
        )
    )
    run = Run(world, name, procs, launcher=launcher)
    if script == "deepspeed launch.py":
        # the guards must notice the end of their parent, which a fork of the server has not
        run.environment["WARM_REAL"] = str(GUARD)
    life, step = _run_until(run, draw, lambda life: _kill(life.pid(script)))
    fault = f"kill -9 of {script} ({procs} {'ranks' if procs > 1 else 'rank'})"
    return run.conclude(Outcome(fault, f"at step {step}", life.join(), life.reported()))


def stop(world: World, draw: random.Random, name: str) -> Outcome:
    """Signals to stop, at any step or in a validation."""
    run = Run(world, name)
    number = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    if draw.random() < 0.5:
        # Images 0 to 3 belong to the validation of step 8, which also measures bicubic, and 4 and 5
        # to that of step 16.
        image = draw.randrange(6)
        life = run.start(calls={"train.py": [["in_validation", image, "send", number]]})
        moment = f"in the validation of step {8 + 8 * (image // 4)}"
    else:
        step = draw.randint(1, STEPS - 1)
        life = run.start(calls={"train.py": [["at_step", step, "send", number]]})
        moment = f"at step {step}"
    outcome = Outcome(number.name, moment, life.join())
    outcome.reported = life.reported("^stopped and saved")
    if outcome.status != 128 + number:
        outcome.wrong.append(f"exit status {outcome.status}: {life.printed[-1500:]}")
    run.conclude(outcome)
    if outcome.lost_steps:
        outcome.wrong.append("steps were lost")
    return outcome


# --- Disks ---


def disk_error(world: World, draw: random.Random, name: str) -> Outcome:
    """EIO in one or more file operations of the run folder, most of them in saves."""
    run = Run(world, name)
    in_torch = draw.random() < 0.3
    times = draw.choice((1, 1, 2, 5, 20))
    part = CHECKPOINTS_DIR if in_torch or draw.random() < 0.8 else ""
    # eight saves with at least two of torch's files each
    first = draw.randint(1, 16 if in_torch else world.num_file_events[part])
    errors = ["disk_errors", str(run.run_dir / part), first, times, in_torch]
    retry = ["set_constants", "pipeline.training.loop", {"RETRY_SECONDS": 0.3}]
    life = run.start(calls={"train.py": [retry, errors]})
    where = "torch.save" if in_torch else "file operation"
    outcome = Outcome("EIO", f"{times} times from {where} {first} on", life.join())
    outcome.reported = life.reported(r"Input/output error|\[Errno 5\]")
    if "Traceback" in life.printed:
        outcome.wrong.append(f"a traceback: {life.printed[-1500:]}")
    return run.conclude(outcome)


def disk_full(world: World, draw: random.Random, name: str) -> Outcome:
    """ENOSPC: the disk is full after a random number of bytes; often it has space again later."""
    run = Run(world, name)
    size = sum(file.stat().st_size for file in world.straight(1).rglob("*") if file.is_file())
    kib = draw.randint(40, max(80, int(1.2 * size / 1024)))
    then = draw.choice(("space", "space", "SIGINT", "SIGKILL"))
    with _small_disk(run.folder / "disk", kib) as disk:
        run.move_to(disk / "run")
        retry = ["set_constants", "pipeline.training.loop", {"RETRY_SECONDS": 0.3}]
        life = run.start(calls={"train.py": [retry]})
        while life.process.poll() is None and "waits and tries again" not in life.printed:
            time.sleep(0.02)
        has_waited = life.process.poll() is None
        if has_waited:
            time.sleep(draw.uniform(0, 1))
            if then == "space":
                _enlarge(disk)
            else:
                os.kill(life.pid("train.py"), signal.Signals[then])
        outcome = Outcome("ENOSPC", f"after {kib} KiB", life.join())
        if has_waited:
            outcome.moment += f"; {then} while the run waits"
        outcome.reported = life.reported("No space left|space")
        if "Traceback" in life.printed:
            outcome.wrong.append(f"a traceback: {life.printed[-1500:]}")
        _enlarge(disk)
        run.conclude(outcome)
        if has_waited and then == "space" and (outcome.status or outcome.lost_steps):
            outcome.wrong.append("waiting for space has lost steps")
        return outcome


@contextmanager
def _small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a disk of `kib` KiB."""
    if os.geteuid() != 0:
        raise UserError("a full disk needs root, to mount a small one; choose other families")
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "campaign", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


# --- Stalls, links and clocks ---


def stall(world: World, draw: random.Random, name: str) -> Outcome:
    """A loader that stops, or SIGSTOP of a rank: for a moment, or for good."""
    if draw.random() < 0.7:
        seconds = draw.choice((draw.uniform(0.1, 0.8), 1000.0))
        batch = draw.randrange(2, STEPS)
        run = Run(world, name, options=("--watchdog-minutes", "0.03"))
        life = run.start(calls={"train.py": [["stop_loader", batch, seconds]]})
        fault = f"the loader stops {'for good' if seconds > 100 else f'for {seconds:.1f} s'}"
        moment = f"at batch {batch}"
        status = life.join()
        is_long = seconds > 100
    else:
        is_long = draw.random() < 0.7
        run = Run(world, name, 2, options=("--watchdog-minutes", "0.05"))
        rank = draw.randrange(2)

        def act(life: Life) -> None:
            pid = life.pid("train.py", rank)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                if not is_long:
                    time.sleep(draw.uniform(0.1, 0.8))
                    os.kill(pid, signal.SIGCONT)

        life, step = _run_until(run, draw, act)
        fault = f"SIGSTOP of rank {rank} of 2{'' if is_long else ', SIGCONT within 0.8 s'}"
        moment, status = f"at step {step}", life.join()
    outcome = Outcome(fault, moment, status, life.reported(r"^error: |Timeout \("))
    if not is_long and status:
        outcome.wrong.append(f"a short stall ended the run with status {status}")
    return run.conclude(outcome)


def cut_link(world: World, draw: random.Random, name: str) -> Outcome:
    """The link between a guard and the supervisor breaks, or carries nothing any more."""
    run = Run(world, name, 2)
    is_broken, rank = draw.random() < 0.5, draw.randrange(2)
    # shorter than in earnest, so that a fault takes seconds; the ranks wait in each step instead
    # of computing
    constants = ["set_constants", "launch.cluster.messages", {"SILENCE_SECONDS": 3.0}]
    limits = ["set_constants", "launch.cluster.guard", {"GRACE_SECONDS": 4.0}]
    ends = ["set_constants", "launch.cluster.supervisor", {"END_SECONDS": 5.0}]
    with Proxy(run.folder / "port") as proxy:
        behind = ["supervisor_behind", str(proxy.port_file), proxy.port]
        life, step = _run_until(
            run,
            draw,
            lambda _: proxy.cut(rank, is_broken),
            distributed__py=[constants, ends, behind],
            guard__py=[constants, limits],
            train__py=[["slow_steps", 0.3]],
        )
        status = life.join()
    kind = "breaks" if is_broken else "carries nothing"
    outcome = Outcome(f"the link of a guard {kind}", f"at step {step}", status, life.reported())
    if status == 0:
        outcome.wrong.append("the run ended as if nothing had happened")
    return run.conclude(outcome)


class Proxy:
    """Forwards the connections of guards to the supervisor, until one is cut."""

    def __init__(self, port_file: Path) -> None:
        self.port_file = port_file
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_mute: set[int] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for ends in self._pairs:
            for end in ends:
                end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                guard, _ = self._listener.accept()
                while not self.port_file.exists():
                    time.sleep(0.01)
                supervisor = socket.create_connection(
                    ("127.0.0.1", int(self.port_file.read_text()))
                )
                number = len(self._pairs)
                self._pairs.append((guard, supervisor))
                for source, target in ((guard, supervisor), (supervisor, guard)):
                    threading.Thread(
                        target=self._copy, args=(number, source, target), daemon=True
                    ).start()

    def _copy(self, number: int, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if number not in self._is_mute:
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self, number: int, is_broken: bool) -> None:
        """Cut connection `number`, in the order in which they were made: reset it, or drop all its
        data."""
        self._is_mute.add(number)
        if is_broken:
            for end in self._pairs[number]:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def jump_clock(world: World, draw: random.Random, name: str) -> Outcome:
    """The wall clock and the files' times jump by up to two years each way; then kill -9."""
    run = Run(world, name)
    jumps = [
        ["jump_clock", draw.randrange(1 << 30), draw.choice((60.0, 86400.0, 2 * 365 * 86400.0))]
    ]
    life, step = _run_until(run, draw, lambda life: _kill(life.pid("train.py")), train__py=jumps)
    outcome = Outcome(
        f"the clock jumps by up to {jumps[0][2]:.0f} s each way, then kill -9",
        f"at step {step}",
        life.join(),
        life.reported(),
    )
    newest = max(run.steps(), default=0)
    for path in run.run_dir.rglob("*"):
        moment = time.time() + draw.uniform(-2, 2) * 365 * 86400
        os.utime(path, (moment, moment), follow_symlinks=False)
    run.conclude(outcome, calls={"train.py": jumps})
    outcome.lost_seconds = 0.0  # the log's times are the jumping clock's
    if outcome.continued and outcome.resumed_at != newest:
        outcome.wrong.append(f"continued from step {outcome.resumed_at}, not from {newest}")
    return outcome


# --- Training files ---


def lose_file(world: World, draw: random.Random, name: str) -> Outcome:
    """A training file vanishes or breaks during a run; later it is back."""
    folder = world.folder / name
    dataset = folder / "dataset"
    shutil.copytree(world.dataset, dataset)
    run = Run(world, name, dataset=dataset)
    path = draw.choice(sorted((dataset / "photos").glob("*.npy"))[:10])
    content = path.read_bytes()
    what, change = draw.choice(
        (
            ("vanishes", path.unlink),
            ("is cut short", lambda: os.truncate(path, draw.randrange(len(content)))),
            ("is empty", lambda: os.truncate(path, 0)),
            ("is overwritten by noise", lambda: path.write_bytes(draw.randbytes(len(content)))),
            ("gets a wrong header", lambda: path.write_bytes(b"\x93NUMPY\x09" + content[7:])),
            ("becomes a folder", lambda: (path.unlink(), path.mkdir())),
            ("becomes a grey image", lambda: np.save(path, np.zeros((64, 64), np.uint8))),
        )
    )
    # not in the last steps, whose batches are already in memory
    life, step = _run_until(run, draw, lambda _: change(), 14, train__py=[["slow_steps", 0.02]])
    outcome = Outcome(f"a training file {what}", f"at step {step}", life.join())
    outcome.reported = life.reported()
    if outcome.status:
        if path.name not in outcome.reported:
            outcome.wrong.append("the report does not name the file")
        if not outcome.reported.startswith("error: ") or "Traceback" in life.printed:
            outcome.wrong.append(f"not one line: {life.printed[-1500:]}")
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)
    return run.conclude(outcome)


# --- Damaged checkpoints ---


def damage_checkpoint(world: World, draw: random.Random, name: str) -> Outcome:
    """Files of the newest checkpoint, or of the two newest, are changed, cut or lost."""
    run = Run(world, name)
    shutil.copytree(world.killed, run.run_dir)
    newest, previous, oldest, *_ = reversed(run.steps())
    pairs = [(newest, previous), (previous, oldest)][: 1 if draw.random() < 0.8 else 2]
    what = [
        mutate(checkpoint_dir(run.run_dir, step), checkpoint_dir(run.run_dir, before), draw)
        for step, before in pairs
    ]
    outcome = Outcome(f"damage to {len(pairs)} checkpoints", "; ".join(what))
    outcome.status = KILLED
    # A change that leaves the content as it was, such as an index without the hash of itself, as
    # older ones are, may leave the checkpoint in use. The end of the run shows that it was whole.
    run.conclude(outcome)
    outcome.reported = next(
        (line for line in run.last_life.printed.splitlines() if "damaged" in line), ""
    )
    return outcome


# --- Tools ---


def _of_tool(tool: str, kind: str) -> Family:
    """Return the family of a `kind` of faults of a dataset tool, see `faults_tools`."""

    def inject(world: World, draw: random.Random, name: str) -> Outcome:
        (world.folder / name).mkdir()
        campaign = faults_tools.Campaign(world.folder / "tools")
        found = faults_tools.FAULTS[kind](campaign, tool, draw)
        return Outcome(
            found.fault, found.moment, found.status, found.reported, True, wrong=found.lost
        )

    script = faults_tools.TOOLS[tool].script
    inject.__doc__ = f"{script}.py: {faults_tools.FAULTS[kind].__doc__}"
    return inject


FAMILIES: dict[str, Family] = {
    "rank": kill_rank,
    "rank-again": kill_rank_again,
    "guarded-rank": kill_guarded_rank,
    "guard": kill_guard,
    "launcher": kill_launcher,
    "supervisor": kill_supervisor,
    "stop": stop,
    "disk-full": disk_full,
    "disk-error": disk_error,
    "stall": stall,
    "link": cut_link,
    "clock": jump_clock,
    "files": lose_file,
    "checkpoint": damage_checkpoint,
    **{
        f"{tool}-{kind}": _of_tool(tool, kind)
        for kind in faults_tools.FAULTS
        for tool in faults_tools.TOOLS
    },
}
