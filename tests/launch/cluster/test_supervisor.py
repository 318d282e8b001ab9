"""The supervisor and its guards: if one rank ends early, all are stopped and the cause is named.

The processes are real, without a network. A copy of the checkout has a stand-in for `train.py`:
each rank runs the lines of Python that the test gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, environment
from launch.cluster import messages

NAME, KEY = "0123456789abcdef", "secret" * 8
HOSTS = ("here", "there")
SECONDS = 10
"""Time limit for all ranks to end, on a busy machine."""

TRAIN = """
import os, signal, sys, time
rank = int(os.environ["RANK"])

def leave(name):
    with open(f".{name}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f".{name}", name)

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.02)

leave(f"train-{rank}")
exec(sys.argv[1 + rank])
"""

LAUNCHER = """
import json, os, subprocess, sys, time
constants, size, word = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
FIRST
command = [sys.executable, "-u", "CHECKOUT/launch/cluster/guard.py", word]
if constants:
    code = f'''
import sys
sys.path.insert(0, "CHECKOUT")
from launch.cluster import guard, messages
for name, value in {constants}.items():
    setattr(guard if hasattr(guard, name) else messages, name, value)
sys.exit(guard.main())
'''
    command = [sys.executable, "-u", "-c", code, word]
guards = []
for rank in range(size):
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                 "LOCAL_SIZE": str(size), "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "29500"}
    guards.append(subprocess.Popen(command, env={**os.environ, **variables}))
    with open(f"guard-{rank}", "w") as file:
        file.write(str(guards[-1].pid))
sys.exit(max(guard.wait() != 0 for guard in guards))
"""

SUPERVISE = """
import asyncio, json, os, sys, time
from pathlib import Path
sys.path.insert(0, "CHECKOUT")
from launch.cluster import messages, supervisor
from launch.cluster.job import ClusterJob

given = json.loads(sys.argv[1])
for name, value in given["constants"].items():
    setattr(supervisor if hasattr(supervisor, name) else messages, name, value)
hosts = {host: tuple(range(given["hosts"].count(host))) for host in given["hosts"]}
job = ClusterJob(hosts, "127.0.0.1", 29500, tuple(given["ranks"]), given["variables"],
          given["directory"], Path(given["logs"]))

messages.deposit_key(given["run"], given["key"])

async def supervise(watch):
    port = await watch.listen("127.0.0.1")
    Path(".port").write_text(str(port))
    os.rename(".port", "port")
    word, own = job.word(watch.run, port), dict(os.environ)
    if given["launcher"]:
        await watch.watch([*given["launcher"], word], own, os.getcwd())
    else:
        command, variables = job.command(Path.cwd(), word), job.launcher_variables(Path.cwd(), own)
        await watch.watch(command, variables, "CHECKOUT")

with open("launcher.log", "w") as log:
    watch = supervisor.Supervisor(job.hosts, given["run"], given["key"], job.task, log,
                                  names_are_ranks=given["names_are_ranks"])
    asyncio.run(supervise(watch))
messages.remove_key(watch.run)
failure = watch.failure and vars(watch.failure)
Path("outcome").write_text(json.dumps({"stopped_by": watch.stopped_by, "failure": failure}))
"""

SHORT = {"TOGETHER_SECONDS": 0.5, "END_SECONDS": 2, "GRACE_SECONDS": 5, "LAUNCHER_SECONDS": 2}
"""The supervisor's time limits in these tests."""

SLEEP = "leave(f'ready-{rank}'); time.sleep(60)\n"
SAVE = (
    """
def save(*_):
    leave(f'saved-{rank}')
    print('stopped and saved')
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
"""
    + SLEEP
)
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP
WELL = "wait_for('go')\n"
RAISE = "wait_for('ready-0')\nraise ArithmeticError('the seventh step')\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "train.py").write_text(TRAIN)
    (folder / "supervise.py").write_text(SUPERVISE.replace("CHECKOUT", str(folder)))
    return folder


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended, and what a user has seen."""

    stopped_by: int
    cause: str
    tail: str
    status: int  # 0: no failure
    stdout: str
    stderr: str


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Run:
    """A supervisor in its own process, whose launcher starts a guard for each rank on this
    machine."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder, self.logs = checkout, folder, folder / "run.logs"
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *ranks: str,
        hosts: tuple[str, ...] = HOSTS,
        first: str = "",
        launcher: str = LAUNCHER,
        guard: Mapping[str, float] | None = None,
        names_are_ranks: bool = True,
        directory: str = "",
        variables: Mapping[str, str] | None = None,
        logs: Path | None = None,
        **constants: float,
    ) -> None:
        """Start the job. `guard` and `constants` are time limits of the guards and the supervisor.

        `launcher` is the launcher's program, empty for DeepSpeed's own; `first` is what it does
        before it starts any guard.
        """
        program = self.folder / "launcher.py"
        program.write_text(launcher.replace("FIRST", first).replace("CHECKOUT", str(self.checkout)))
        command = (
            [sys.executable, str(program), json.dumps(guard or {}), str(len(hosts))]
            if launcher
            else []
        )
        given = {
            "constants": {**SHORT, **constants},
            "hosts": hosts,
            "ranks": ranks,
            "variables": variables or {},
            "directory": directory or str(self.folder),
            "logs": str(logs or self.logs),
            "run": NAME,
            "key": KEY,
            "names_are_ranks": names_are_ranks,
            "launcher": command,
        }
        own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        with (
            open(self.folder / "stdout", "wb") as stdout,
            open(self.folder / "stderr", "wb") as stderr,
        ):
            self.process = subprocess.Popen(
                [sys.executable, str(self.checkout / "supervise.py"), json.dumps(given)],
                env=own
                | {
                    "HOME": str(self.folder),
                    "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
                },
                cwd=self.folder,
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
            )

    def read(self, name: str) -> str:
        """Return the text of a file, waiting for it if necessary."""
        wait_until(
            lambda: (self.folder / name).exists(), f"{name} did not come: {self.printed('stderr')}"
        )
        return (self.folder / name).read_text()

    def printed(self, name: str) -> str:
        return (self.folder / name).read_text()

    def pid(self, name: str) -> int:
        return int(self.read(name))

    def go(self) -> None:
        (self.folder / "go").touch()

    def finish(self, seconds: float = 60) -> JobOutcome:
        """Wait for the end. No rank, guard or launcher may be left."""
        assert self.process is not None
        assert self.process.wait(seconds) == 0, self.printed("stderr")
        self.assert_nothing_left()
        outcome = json.loads(self.read("outcome"))
        failure = outcome["failure"] or {"cause": "", "tail": "", "status": 0}
        return JobOutcome(
            outcome["stopped_by"],
            **failure,
            stdout=self.printed("stdout"),
            stderr=self.printed("stderr"),
        )

    def run(self, *ranks: str, **options: Any) -> JobOutcome:
        self.start(*ranks, **options)
        return self.finish()

    def assert_nothing_left(self, seconds: float = 5) -> None:
        wait_until(lambda: not self.left(), "something is left", seconds)

    def left(self) -> list[int]:
        """Return the ids of the job's processes that still exist."""
        files = [*self.folder.glob("train-*"), *self.folder.glob("guard-*")]
        return [pid for pid in (int(file.read_text() or 0) for file in files) if is_alive(pid)]

    def readers_of_the_key(self) -> list[str]:
        """Return what shows the key of the processes here, other than the test's supervisor."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    if KEY.encode() in (process / name).read_bytes():
                        found.append(f"{process.name} {name}")
        return [one for one in found if one != f"{self.process.pid} cmdline"]

    def connect(self, *said: bytes) -> socket.socket:
        """Connect to the supervisor and send these lines."""
        connection = socket.create_connection(("127.0.0.1", int(self.read("port"))), 10)
        with contextlib.suppress(ConnectionError):  # it may be closed before everything is sent
            connection.sendall(b"".join(said))
        return connection

    def join(self, rank: Any, *said: bytes, key: str = KEY) -> socket.socket:
        """Connect to the supervisor as the guard of `rank` does, and send these lines."""
        connection = self.connect()
        challenge = json.loads(next(connection.makefile()))["challenge"]
        about = NAME, rank, "x", challenge, "nonce"
        connection.sendall(
            json.dumps(
                {
                    "rank": rank,
                    "host": "x",
                    "challenge": "nonce",
                    "proof": messages.proof(key, "guard", *about),
                }
            ).encode()
            + b"\n"
            + b"".join(said)
        )
        return connection


def wait_until(holds: Callable[[], bool], otherwise: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


@pytest.fixture
def run(checkout: Path, tmp_path: Path) -> Iterator[Run]:
    made = Run(checkout, tmp_path)
    yield made
    for pid in made.left():  # left by a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


# --- Tasks and output of ranks ---


def test_a_job_that_ends_well(run: Run) -> None:
    """The first rank's output is the job's; each rank's output is in a file of its own."""
    # Write each line at once: print() on an unbuffered stream makes several writes, and the other
    # stream's output may come in between.
    say = (
        "sys.stdout.write(f\"out of {rank} {os.environ['NCCL_X']} {os.getcwd()}\\n\"); "
        "sys.stderr.write(f'err of {rank}\\n')\n"
    )
    for _ in range(2):
        outcome = run.run(say, say, variables={"NCCL_X": "$(a) 'b'"})
        assert outcome == JobOutcome(
            0, "", "", 0, f"out of 0 $(a) 'b' {run.folder}\n", "err of 0\n"
        )
    for rank in (0, 1):
        lines = (run.logs / f"rank-0000{rank}.log").read_text().splitlines()
        assert len(lines) == 6  # the second job's lines follow the first's
        assert lines[0].endswith(f"rank {rank} of 2 on {socket.gethostname()}")
        assert sorted(lines[4:]) == [f"err of {rank}", f"out of {rank} $(a) 'b' {run.folder}"]


def test_much_output_is_heard_to_its_end(run: Run) -> None:
    """Bytes that are not text are not a failure, either."""
    say = r"""
sys.stdout.buffer.write(b'\xff\0\n')
print('\n'.join(f'line {number:06} of rank 0' for number in range(40_000)))
sys.exit(3)
"""
    outcome = run.run(say, SLEEP)
    whole = "".join(f"line {number:06} of rank 0\n" for number in range(40_000))
    assert outcome.stdout == "\ufffd\0\n" + whole
    assert (run.logs / "rank-00000.log").read_bytes().partition(b"\n")[
        2
    ] == b"\xff\0\n" + whole.encode()
    assert outcome.tail == whole[-messages.TAIL_CHARACTERS :]
    assert outcome.cause == "rank 0 on here ended with status 3"


def test_multibyte_characters_are_not_split(run: Run) -> None:
    outcome = run.run("sys.stdout.buffer.write('x'.encode() + 'é'.encode() * 100_000)", "")
    assert outcome.stdout == "x" + "é" * 100_000


def test_a_folder_that_is_not_there_is_no_failure(run: Run) -> None:
    """A host need not have the folder in which the command was started."""
    outcome = run.run("print(os.getcwd())", "", directory="/no/such/folder")
    assert (outcome.status, outcome.stdout) == (0, f"{run.folder}\n")  # the launcher's own


def test_processes_left_by_a_rank_are_killed(run: Run) -> None:
    """Even if it holds the rank's output open."""
    leave = (
        "import subprocess; child = subprocess.Popen(['sleep', '60'], stderr=subprocess.DEVNULL)\n"
        "with open('train-left', 'w') as file: file.write(str(child.pid))\n"
    )
    assert run.run(leave + "print('done')", "").stdout == "done\n"
    assert run.pid("train-left")


# --- Failures of ranks ---


def test_a_rank_that_raises_ends_the_others(run: Run) -> None:
    run.start(SLEEP, "sys.stderr.write('x' * 30_000 + '\\n')\n" + RAISE)
    run.read("ready-0")
    began = time.monotonic()
    outcome = run.finish()
    assert time.monotonic() - began < SECONDS
    assert outcome.cause == "rank 1 on there ended with status 1"
    assert outcome.status == 1
    assert outcome.tail.startswith("xxxx")
    assert len(outcome.tail) == messages.TAIL_CHARACTERS
    assert "Traceback (most recent call last)" in outcome.tail
    assert outcome.tail.endswith("ArithmeticError: the seventh step\n")
    assert (outcome.stdout, outcome.stderr) == ("", "")


def test_an_error_of_the_user_keeps_its_status(run: Run) -> None:
    outcome = run.run(
        SLEEP, "wait_for('ready-0'); sys.stderr.write('error: no such recipe\\n'); sys.exit(2)"
    )
    assert (outcome.cause, outcome.status) == ("rank 1 on there ended with status 2", 2)
    assert outcome.tail == "error: no such recipe\n"


def test_a_rank_that_is_killed_is_named(run: Run) -> None:
    run.start(SLEEP, SLEEP)
    run.read("ready-0")
    os.kill(run.pid("ready-1"), signal.SIGKILL)
    outcome = run.finish()
    assert (outcome.cause, outcome.status) == ("rank 1 on there was killed by SIGKILL", 1)


def test_a_rank_that_ignores_the_signal_is_killed(run: Run) -> None:
    run.start(DEAF, RAISE, END_SECONDS=0.5)
    run.read("ready-0")
    began = time.monotonic()
    outcome = run.finish()
    assert time.monotonic() - began < SECONDS
    assert outcome.cause == "rank 1 on there ended with status 1"


def test_the_cause_is_distinguished_from_its_echo(run: Run) -> None:
    """Rank 0 ends first because it lost rank 1, whose own error arrives a moment later."""
    echo = (
        "print('RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:4711', "
        "file=sys.stderr); sys.exit(1)"
    )
    cause = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); leave('ready'); time.sleep(0.3); "
        "raise "
        "MemoryError('none')"
    )
    outcome = run.run("wait_for('ready'); " + echo, cause, TOGETHER_SECONDS=5)
    assert outcome.cause == "rank 1 on there ended with status 1"
    assert outcome.tail.endswith("MemoryError: none\n")


def test_a_watchdogs_end_names_the_rank_that_is_stuck(run: Run) -> None:
    watchdog = "wait_for('ready-1'); print('Timeout (0:00:06)!\\nThread 0x1:'); sys.exit(1)"
    outcome = run.run(watchdog, DEAF, END_SECONDS=0.3)
    assert outcome.cause == (
        "rank 0 on here made no progress for too long (--watchdog-minutes); rank 1 on there did "
        "not answer: stopped or stuck"
    )
    assert "Thread 0x1:" in outcome.tail


# --- CTRL+C ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ranks_save_when_the_user_stops_them(run: Run, number: int) -> None:
    run.start(SAVE, SAVE)
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    for _ in range(3):  # an impatient user
        os.kill(run.process.pid, number)
    outcome = run.finish()
    assert (outcome.stopped_by, outcome.status, outcome.stdout) == (
        number,
        0,
        "stopped and saved\n",
    )
    assert (run.folder / "saved-0").exists()
    assert (run.folder / "saved-1").exists()


def test_ranks_that_have_not_begun_are_stopped_too(run: Run) -> None:
    run.start(SLEEP, SLEEP, first="time.sleep(0.7)")
    run.read("port")
    time.sleep(0.3)
    os.kill(run.process.pid, signal.SIGINT)
    outcome = run.finish()
    assert (outcome.stopped_by, outcome.status) == (signal.SIGINT, 0)


def test_a_rank_that_fails_while_it_saves_is_named(run: Run) -> None:
    fail = (
        "def fail(*_): raise OSError('No space left on device')\nsignal.signal(signal.SIGTERM, "
        "fail)\n"
    ) + SLEEP
    run.start(SAVE, fail)
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    os.kill(run.process.pid, signal.SIGINT)
    outcome = run.finish()
    assert (outcome.stopped_by, outcome.cause) == (
        signal.SIGINT,
        "rank 1 on there ended with status 1",
    )
    assert outcome.tail.endswith("OSError: No space left on device\n")


def test_a_rank_that_does_not_save_in_time_is_named(run: Run) -> None:
    run.start(SAVE, DEAF, GRACE_SECONDS=0.5)
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    os.kill(run.process.pid, signal.SIGINT)
    outcome = run.finish()
    assert (outcome.stopped_by, outcome.status, outcome.stdout) == (
        signal.SIGINT,
        1,
        "stopped and saved\n",
    )
    assert outcome.cause == "rank 1 on there did not end within 0 s and was killed"


# --- Connections that are not from ranks ---


STRANGE = [
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    b'{"rank": 0, "host": "evil", "challenge": "a", "proof": "b"}\n'
    b'{"out": "evil"}\n{"exit": 1, "tail": "evil"}\n',
    b'{"rank": 0}\n{"exit": 1}\n',
    b'{"exit": 1}\n',
    b"[1]\n",
    b"null\n",
    b"\n",
    b"\xff\xfe\0\n",
    b"x" * (2 * messages.MOST_BYTES),
]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side closes the connection and has sent nothing but its challenge."""
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
            assert re.fullmatch(rb'{"challenge": "[0-9a-f]{32}"}\n', received)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_strangers_are_not_taken_for_ranks(run: Run) -> None:
    """Neither before the ranks have connected nor afterwards; a silent stranger does no harm,
    either."""
    run.start(
        "print('well'); " + WELL, WELL, first="while not os.path.exists('begin'): time.sleep(0.02)"
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.connect())
        for said in STRANGE:
            assert is_closed(stack.enter_context(run.connect(said)))
        (run.folder / "begin").touch()
        for rank in (0, 1):
            run.read(f"train-{rank}")
        # Both ranks have already connected.
        for said in STRANGE:
            assert is_closed(stack.enter_context(run.connect(said)))
        for rank in (-1, 0, 1, 2, "0", None, 0.5):
            connection = stack.enter_context(run.join(rank, b'{"out": "evil"}\n{"exit": 1}\n'))
            assert is_closed(connection)
        run.go()
        outcome = run.finish()
    assert outcome == JobOutcome(0, "", "", 0, "well\n", "")


# --- Lost guards and launchers ---

NO_GUARDS = """
import os, time
while not os.path.exists("go"):
    time.sleep(0.02)
"""


def heard(connection: socket.socket) -> messages.Message:
    """Return the supervisor's next message that is no beat, proof or task; {} if it has closed the
    connection."""
    received = (json.loads(line) for line in connection.makefile())
    return next(
        (message for message in received if not message.keys() & {"beat", "proof", "task"}), {}
    )


def test_a_guard_that_vanishes_is_named(run: Run) -> None:
    run.start(launcher=NO_GUARDS)
    with run.join(0) as one:
        run.join(1).close()
        assert heard(one) == {"stop": SHORT["END_SECONDS"]}
        run.go()
        one.sendall(b'{"exit": 143, "tail": "stopped and saved"}\n')
        outcome = run.finish()
    assert (outcome.cause, outcome.status) == (
        "rank 1 on there vanished together with its guard",
        1,
    )


def test_a_host_that_falls_silent_is_named(run: Run) -> None:
    """A rank counts as alive as long as its guard sends beats, and the second sends none."""
    run.start(launcher=NO_GUARDS, SILENCE_SECONDS=1.5, BEAT_SECONDS=0.2)
    with run.join(0) as one, run.join(1):
        began = time.monotonic()
        lines = one.makefile()
        for line in lines:
            if "stop" in json.loads(line):
                break
            assert json.loads(line).keys() & {"beat", "proof", "task"}
            one.sendall(b'{"beat": 0}\n')
        assert 1.0 < time.monotonic() - began < SECONDS
        run.go()
        one.sendall(b'{"exit": 143, "tail": ""}\n')
        outcome = run.finish()
    assert outcome.cause == (
        "there fell silent (no sign of rank 1 on there for 2 s): the machine or its network is down"
    )


@pytest.mark.parametrize(
    "echo", ["recv: No route to host", "[gloo] Connection closed by peer [10.0.0.2]:4711"]
)
def test_a_host_that_falls_silent_is_named_though_its_peer_ends_first(run: Run, echo: str) -> None:
    """The kernel may tell a rank that its peer is gone long before that host counts as silent."""
    run.start(launcher=NO_GUARDS, SILENCE_SECONDS=1.5, BEAT_SECONDS=0.2, TOGETHER_SECONDS=0.1)
    with run.join(1):
        run.join(0, json.dumps({"exit": 1, "tail": f"RuntimeError: {echo}"}).encode() + b"\n")
        run.go()
        outcome = run.finish()
    assert outcome.cause == (
        "there fell silent (no sign of rank 1 on there for 2 s): the machine or its network is down"
    )


def test_hosts_are_asked_where_ranks_are(run: Run) -> None:
    """Slurm may number the ranks in another order than the hostfile."""
    run.start(launcher=NO_GUARDS, names_are_ranks=False)
    with run.join(0) as one, run.join(1, b'{"exit": 1, "tail": "no"}\n'):
        assert "stop" in heard(one)
        run.go()
        one.sendall(b'{"exit": 143, "tail": ""}\n')
        outcome = run.finish()
    assert (outcome.cause, outcome.tail) == ("rank 1 on x ended with status 1", "no")


def test_the_first_of_several_echoes_is_named_if_there_is_no_cause(run: Run) -> None:
    run.start(launcher=NO_GUARDS)
    said = b'{"exit": 1, "tail": "Connection reset by peer"}\n'
    with run.join(1, said), run.join(0) as other:
        assert "stop" in heard(other)
        run.go()
        other.sendall(said)
        outcome = run.finish()
    assert (outcome.cause, outcome.tail) == (
        "rank 1 on there ended with status 1",
        "Connection reset by peer",
    )


def test_a_launcher_that_is_killed_leaves_nothing(run: Run) -> None:
    run.start(SLEEP, SLEEP, first="open('launcher', 'w').write(str(os.getpid()))")
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    os.kill(run.pid("launcher"), signal.SIGKILL)
    outcome = run.finish()
    assert outcome.status == 1
    assert outcome.cause.endswith("was killed by SIGTERM")


def test_a_rank_that_never_comes_is_named(run: Run) -> None:
    run.start(SLEEP, SLEEP, first="size = 1", START_SECONDS=2)
    outcome = run.finish()
    assert outcome.cause == "rank 1 on there did not report within 2 s"
    assert outcome.status == 1


def test_a_host_that_ssh_does_not_reach_is_named(run: Run) -> None:
    """With the output from there, but without DeepSpeed's log lines."""
    said = (
        "there: [2026-01-01 00:00:00,000] [INFO] [launch.py:1:main] chatter",
        "there: No module named deepspeed",
        "pdsh@here: there: ssh exited with exit code 1",
    )
    first = f"print({chr(10).join(said)!r}, flush=True); size = 1"
    run.start(SLEEP, SLEEP, first=first)
    outcome = run.finish()
    assert (outcome.cause, outcome.status) == ("rank 1 on there did not start", 1)
    assert outcome.tail == "No module named deepspeed\nssh exited with exit code 1\n"
    assert run.printed("launcher.log").splitlines() == list(said)


def test_a_launcher_that_ends_at_once_ends_the_job(run: Run) -> None:
    began = time.monotonic()
    outcome = run.run(launcher="print('here: no such option')\nraise SystemExit(2)")
    assert time.monotonic() - began < SECONDS
    assert (outcome.cause, outcome.tail, outcome.status) == (
        "rank 0 on here did not start",
        "no such option\n",
        1,
    )


def test_output_without_a_hosts_name_is_reported(run: Run) -> None:
    """On a single host there is no pdsh that puts the host's name before each line."""
    outcome = run.run(launcher="print('no such option')\nraise SystemExit(2)", hosts=("here",))
    assert "did not report within" not in outcome.cause
    assert "no such option" in outcome.tail


def test_a_long_line_of_the_launcher_does_no_harm(run: Run) -> None:
    outcome = run.run("", first="print('x' * 200_000, flush=True)", hosts=("here",))
    assert (outcome.status, outcome.stderr) == (0, "")
    assert run.printed("launcher.log") == "x" * 200_000 + "\n"


def test_deepspeeds_own_launcher_is_supervised_too(run: Run) -> None:
    """It starts the guards itself, without the task in their command lines, and ends with them."""
    ranks = (
        "print(os.environ['CROSS_SIZE'], os.environ['LOCAL_SIZE'])\n" + SLEEP,
        "wait_for('ready-0')\nraise ArithmeticError('the seventh step')",
    )
    ranks = (ranks[0], "wait_for('go')\n" + ranks[1])
    run.start(*ranks, hosts=("localhost", "localhost"), launcher="")
    run.read("ready-0")
    assert run.readers_of_the_key() == []
    run.go()
    outcome = run.finish()
    assert outcome.cause == "rank 1 on localhost ended with status 1"
    assert outcome.tail.endswith("ArithmeticError: the seventh step\n")
    assert outcome.stdout == "1 2\n"


# --- A guard without its supervisor ---


def test_ranks_save_when_their_supervisor_is_killed(run: Run) -> None:
    """A rank that ignores the signal is killed."""
    run.start(SAVE, DEAF, guard={"SAVE_SECONDS": 0.5})
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    run.process.kill()
    run.assert_nothing_left(SECONDS)
    assert (run.logs / "rank-00000.log").read_text().endswith("stopped and saved\n")


def test_ranks_save_when_their_supervisor_falls_silent(run: Run) -> None:
    run.start(SAVE, DEAF, guard={"GRACE_SECONDS": 0.5, "SILENCE_SECONDS": 1.0})
    for rank in (0, 1):
        run.read(f"ready-{rank}")
    os.kill(run.process.pid, signal.SIGSTOP)
    wait_until(lambda: not is_alive(run.pid("train-1")), "the rank is left", SECONDS)
    log = run.logs / "rank-00000.log"
    wait_until(
        lambda: log.read_text().endswith("stopped and saved\n"), "nothing was saved", SECONDS
    )


def lone_guard(run: Run, port: int, seconds: float) -> subprocess.Popen[str]:
    keys = run.folder / messages.KEYS
    keys.mkdir(mode=0o700, parents=True)
    with open(keys / NAME, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(KEY)
    word = messages.pack({"run": NAME, "supervisor": ["127.0.0.1", port]})
    code = (
        f"import sys; sys.path.insert(0, {str(run.checkout)!r}); from launch.cluster import guard; "
        f"guard.CONNECT_SECONDS = {seconds}; sys.exit(guard.main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, word],
        env={**environment(), "HOME": str(run.folder), "RANK": "0", "WORLD_SIZE": "1"},
        cwd=run.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_guard_that_cannot_reach_its_supervisor_says_so(run: Run, closed_port: int) -> None:
    guard = lone_guard(run, closed_port, 0.2)
    stdout, stderr = guard.communicate(timeout=10)
    assert (guard.returncode, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(
        f"error: {socket.gethostname()} cannot reach the first node at 127.0.0.1:{closed_port}: "
    )
    assert stderr.endswith(
        "; open its firewall for this network, or give its address with --master-addr\n"
    )
    assert not (run.folder / "begun").exists()


def test_a_guard_can_be_ended_before_it_has_begun(run: Run, closed_port: int) -> None:
    guard = lone_guard(run, closed_port, 30)
    time.sleep(0.5)
    guard.terminate()
    assert guard.communicate(timeout=5) == ("", "")
    # or before its handler was set
    assert guard.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert not (run.folder / "begun").exists()


def test_a_log_that_cannot_be_written_is_the_cause(run: Run) -> None:
    (run.folder / "file").touch()
    outcome = run.run(SLEEP, SLEEP, logs=run.folder / "file" / "logs")
    assert outcome.status == 1
    assert str(run.folder / "file" / "logs") in outcome.cause + outcome.tail


# --- Messages ---


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b'{"beat": 0}\n{"out": "a\\nb"}\n', [{"beat": 0}, {"out": "a\nb"}]),
        (b'{"exit": 0}', [{"exit": 0}]),  # the connection broke after it
        (b'{"beat": 0}\n{"ex', [{"beat": 0}]),
        (b'{"beat": 0}\n[]\n{"beat": 1}\n', [{"beat": 0}]),
        (b'{"beat": 0}\nno message\n{"beat": 1}\n', [{"beat": 0}]),
        (b'{"beat": 0}\n\xff\n{"beat": 1}\n', [{"beat": 0}]),
        (b'{"beat": 0}\n' + b"x" * (2 * messages.MOST_BYTES) + b'\n{"beat": 1}\n', [{"beat": 0}]),
        (b'{"beat": 0}\n' + b"[" * 100_000 + b'\n{"beat": 1}\n', [{"beat": 0}]),
        (b"", []),
    ],
)
def test_messages_after_an_invalid_one_are_ignored(
    said: bytes, heard: list[dict[str, Any]]
) -> None:
    async def listen() -> list[dict[str, Any]]:
        reader = asyncio.StreamReader()
        reader.feed_data(said)
        reader.feed_eof()
        return [message async for message in messages.Inbox(reader, messages.MOST_BYTES)]

    assert asyncio.run(listen()) == heard
