"""Other users of the machines of a run attack its supervisor and its guards, over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, environment
from launch.cluster import messages
from launch.cluster.job import ClusterJob
from launch.cluster.supervisor import Supervisor
from pipeline.cli import UserError
from pipeline.libraries import keep_compiled_code_private

NAME, KEY = "0123456789abcdef", "the key of this launch"
TASK = {"environment": {"WANDB_API_KEY": "planted"}}


def greeting(rank: int, challenge: str, key: str = KEY, nonce: str = "nonce") -> bytes:
    """Return what a guard says to a supervisor that has sent `challenge`."""
    proof = messages.proof(key, "guard", NAME, rank, "host", challenge, nonce)
    said = {"rank": rank, "host": "host", "challenge": nonce, "proof": proof}
    return json.dumps(said).encode() + b"\n"


# --- Against the supervisor ---


class Attacker:
    """A connection to a supervisor; it has received the supervisor's challenge."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.challenge = reader, writer, ""

    @classmethod
    async def connect(cls, port: int) -> Attacker:
        made = cls(*await asyncio.open_connection("127.0.0.1", port))
        made.challenge = json.loads(await made.reader.readline())["challenge"]
        return made

    async def hears(self, *said: bytes) -> bytes:
        """Return all that the supervisor answers until it closes the connection."""
        try:
            for part in said:
                self.writer.write(part)
                await self.writer.drain()
            return await asyncio.wait_for(self.reader.read(), 20)
        except ConnectionError:
            return b""


def attack(what: Callable[[int, Supervisor], Awaitable[None]], ranks: int = 2) -> None:
    """Run `what` against a supervisor that listens on a port; it must not get the task."""

    async def run() -> None:
        supervisor = Supervisor(["here"] * ranks, NAME, KEY, TASK, io.StringIO())
        port = await supervisor.listen("127.0.0.1")
        await what(port, supervisor)
        supervisor._server.close()
        for rank in supervisor._ranks:
            if rank.writer:
                rank.writer.close()

    asyncio.run(run())


async def as_guard(port: int, rank: int) -> Attacker:
    """Connect with the key, and check that the supervisor proves that it has it and sends the
    task."""
    guard = await Attacker.connect(port)
    guard.writer.write(greeting(rank, guard.challenge))
    answer = json.loads(await guard.reader.readline())
    about = NAME, rank, "host", guard.challenge, "nonce"
    assert messages.is_proof(answer["proof"], KEY, "supervisor", *about)
    assert json.loads(await guard.reader.readline()) == {"task": TASK}
    return guard


def test_nobody_gets_the_ranks_environment_without_the_key() -> None:
    async def what(port: int, _supervisor: Supervisor) -> None:
        wrong = await Attacker.connect(port)
        assert await wrong.hears(greeting(0, wrong.challenge, key="another key")) == b""
        # The word in the guards' command lines, which everybody sees, is not enough.
        for said in (
            {"hello": NAME, "rank": 0, "host": "host"},
            {"rank": 0, "host": "host", "challenge": "a", "proof": ""},
            {"rank": 0, "host": "host", "challenge": "a", "proof": None},
            {"rank": 0, "host": "host", "challenge": "a", "proof": "\udc80é"},
            {"rank": [0], "host": {}, "challenge": 1e99, "proof": [KEY]},
        ):
            stranger = await Attacker.connect(port)
            assert await stranger.hears(json.dumps(said).encode() + b"\n") == b""
        for rank in (0, 1):
            await as_guard(port, rank)

    attack(what)


def test_a_recorded_greeting_is_worth_nothing() -> None:
    """Neither while the rank is free nor when it is taken, nor does a side's proof pass for the
    other's."""

    async def what(port: int, _supervisor: Supervisor) -> None:
        first = await Attacker.connect(port)
        recorded = greeting(1, first.challenge)  # seen by the attacker, who is faster
        second = await Attacker.connect(port)
        assert second.challenge != first.challenge
        assert await second.hears(recorded) == b""
        first.writer.close()
        third = await Attacker.connect(port)
        proof = messages.proof(KEY, "supervisor", NAME, 1, "host", third.challenge, "nonce")
        said = {"rank": 1, "host": "host", "challenge": "nonce", "proof": proof}
        assert await third.hears(json.dumps(said).encode() + b"\n") == b""
        await as_guard(port, 1)
        again = await Attacker.connect(port)
        assert await again.hears(greeting(1, again.challenge)) == b""

    attack(what)


def test_a_stranger_cannot_hold_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greeting is due within HELLO_SECONDS, however many bytes of it arrive one by one."""
    monkeypatch.setattr(messages, "HELLO_SECONDS", 0.5)

    async def what(port: int, supervisor: Supervisor) -> None:
        mute = await Attacker.connect(port)
        slow = await Attacker.connect(port)
        guard = await as_guard(port, 0)

        async def drip() -> None:
            while True:
                slow.writer.write(b" ")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await mute.hears() == b""
        assert await slow.hears() == b""
        dripping.cancel()
        assert not supervisor._strangers
        await asyncio.sleep(0.6)
        assert supervisor._ranks[0].writer is not None
        assert not guard.reader.at_eof()  # a guard may be silent for longer

    attack(what)


def test_a_stranger_cannot_fill_the_memory() -> None:
    """The supervisor stops reading a greeting of more than HELLO_BYTES, with or without lines."""

    async def what(port: int, _supervisor: Supervisor) -> None:
        for said in (b"x" * (1 << 20), b'{"rank": "' + b"9" * (1 << 20), b"[" * (1 << 20)):
            stranger = await Attacker.connect(port)
            assert await stranger.hears(said) == b""
        await as_guard(port, 0)

    attack(what)


def test_strangers_leave_room_for_guards() -> None:
    """Of more than four connections per rank the oldest is closed."""

    async def what(port: int, supervisor: Supervisor) -> None:
        crowd = [await Attacker.connect(port) for _ in range(30)]
        assert len(supervisor._strangers) == 2 * messages.STRANGERS
        for stranger in crowd[: -2 * messages.STRANGERS]:
            assert await stranger.hears() == b""
        for rank in (0, 1):
            await as_guard(port, rank)

    attack(what)


# --- Against a guard ---

TRAIN = """
import os, signal, sys, time

def save(*_):
    time.sleep(0.5)
    open("saved", "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


class GuardProcess:
    """A real guard of rank 0, which looks for its supervisor where the test listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(30)
        self.port = self.listener.getsockname()[1]
        keys = folder / messages.KEYS
        keys.mkdir(parents=True, mode=0o700)
        with open(keys / NAME, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(KEY)
        (folder / "train.py").write_text(TRAIN)
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
            "from launch.cluster import guard, messages; "
            f"guard.ROOT = Path({str(folder)!r}); messages.SILENCE_SECONDS = 1.0; "
            "sys.exit(guard.main())"
        )
        word = messages.pack({"run": NAME, "supervisor": ["127.0.0.1", self.port]})
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, word],
            env={
                **environment(),
                "HOME": str(folder),
                "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
                "VASTSCALE_CPU": "1",
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def task(self, mark: str) -> dict[str, Any]:
        """Return an order that runs a program which leaves the file `mark`."""
        return {
            "logs": str(self.folder / "logs"),
            "arguments": [mark],
            "environment": {},
            "directory": str(self.folder),
        }

    def accept(self, key: str, mark: str) -> socket.socket:
        """Answer the guard as a supervisor with `key`, and send it a task."""
        connection, _ = self.listener.accept()
        connection.settimeout(30)
        connection.sendall(b'{"challenge": "theirs"}\n')
        said = json.loads(next(connection.makefile()))
        about = NAME, 0, said["host"], "theirs", said["challenge"]
        assert messages.is_proof(said["proof"], KEY, "guard", *about)
        # What an attacker has: the guard's own proof, or one that was made without the key.
        proofs = {KEY: messages.proof(KEY, "supervisor", *about), "": said["proof"]}
        proof = proofs.get(key, messages.proof(key, "supervisor", *about))
        for message in ({"proof": proof}, {"task": self.task(mark)}):
            connection.sendall(json.dumps(message).encode() + b"\n")
        return connection

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name}: {self.process.poll()}"
            time.sleep(0.02)


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[GuardProcess]:
    made = GuardProcess(tmp_path)
    yield made
    made.listener.close()
    if made.process.poll() is None:
        made.process.kill()
    made.process.communicate()


@pytest.mark.parametrize("key", ["another key", ""], ids=["wrong key", "its own proof"])
def test_a_guard_takes_no_order_from_a_stranger(guard: GuardProcess, key: str) -> None:
    """Such as one who listens on the port of a supervisor that is gone."""
    with guard.accept(key, "ran"):
        stdout, stderr = guard.process.communicate(timeout=30)
    assert guard.process.returncode == 1
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert stderr == (
        f"error: {socket.gethostname()}: what answers at 127.0.0.1:{guard.port} does not know the "
        "key of this run; its supervisor is gone, so start the run again\n"
    )
    assert not (guard.folder / "ran").exists()


def test_a_guard_takes_no_order_after_its_first_supervisor(guard: GuardProcess) -> None:
    """Not even from one with the key: it does not connect again, and its rank saves."""
    with guard.accept(KEY, "first"):
        guard.wait_for("first")
    guard.listener.settimeout(3)
    with pytest.raises(TimeoutError):
        guard.accept(KEY, "second")
    assert guard.process.wait(30) == 143
    assert (guard.folder / "saved").exists()
    assert not (guard.folder / "second").exists()


def test_orders_of_a_silent_supervisor_come_too_late(guard: GuardProcess) -> None:
    """The guard has given it up and lets its rank save; an order to kill changes nothing."""
    with guard.accept(KEY, "first") as connection:
        guard.wait_for("first")
        time.sleep(1.6)  # SILENCE_SECONDS, and the guard's interval of looking
        connection.sendall(b'{"stop": 0}\n')
        assert guard.process.wait(30) == 143
    assert (guard.folder / "saved").exists()


def test_nobody_reads_the_key_from_processes_or_files(guard: GuardProcess) -> None:
    with guard.accept(KEY, "first"):
        guard.wait_for("first")
        pids = [guard.process.pid]
        for pid in pids:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        assert len(pids) == 2
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        guard.process.send_signal(signal.SIGTERM)
        assert guard.process.wait(30) == 143
    log = guard.folder / "logs" / "rank-00000.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_the_key_is_in_no_command(tmp_path: Path, launcher: Any) -> None:
    slots = {"node1": (0, 1), "node2": (0, 1)}
    job = ClusterJob(slots, "10.0.0.1", 1, (), dict(TASK), "/", tmp_path, launcher)
    words = job.command(tmp_path, job.word(NAME, 1))
    variables = job.launcher_variables(tmp_path, {"PATH": "/bin"})
    files = "".join(path.read_text() for path in tmp_path.iterdir())
    for secret in (KEY, "planted"):
        assert secret not in " ".join([*words, *variables.values(), files])
        assert secret not in json.dumps(messages.unpack(words[-1]))


# --- The key's file ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_key_is_left_for_its_owner_only(home: Path) -> None:
    folder = home / messages.KEYS
    folder.mkdir(parents=True, mode=0o755)
    (folder / "old").touch()
    os.utime(folder / "old", (1, 1))
    before = os.umask(0)
    try:
        messages.deposit_key(NAME, KEY)
    finally:
        os.umask(before)
    assert messages.read_key(NAME) == KEY
    assert (folder / NAME).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in folder.iterdir()] == [NAME]
    with pytest.raises(FileExistsError):  # what somebody else has put there is not used
        messages.deposit_key(NAME, "another")
    messages.remove_key(NAME)
    assert list(folder.iterdir()) == []


def test_the_same_on_other_hosts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ssh, which runs the last word of its command line here."""
    programs = home / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(
        f'#!/bin/bash\necho "$*" >> "{home}/calls"\nexport HOME="{home}/there"\n'
        'exec sh -c "${@: -1}"\n'
    )
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (home / "there" / messages.KEYS).mkdir(parents=True, mode=0o755)
    messages.deposit_key(NAME, KEY, ["node2"], ["-p", "2222"])
    file = home / "there" / messages.KEYS / NAME
    assert file.read_text() == KEY
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    calls = (home / "calls").read_text()
    assert KEY not in calls
    assert "-p 2222 -T -- node2" in calls


def test_a_key_that_others_can_read_or_replace_is_refused(home: Path) -> None:
    folder = home / messages.KEYS
    with pytest.raises(FileNotFoundError):
        messages.read_key(NAME)
    messages.deposit_key(NAME, KEY)
    (folder / NAME).chmod(0o640)
    with pytest.raises(PermissionError, match="is not a private file of this user"):
        messages.read_key(NAME)
    (folder / NAME).chmod(0o600)
    (folder / NAME).rename(home / "elsewhere")
    (folder / NAME).symlink_to(home / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        messages.read_key(NAME)
    folder.rename(home / "keys")
    folder.symlink_to(home / "keys")
    with pytest.raises(UserError, match="is not a folder of your own"):
        messages.read_key(NAME)


# --- Compiled code ---


@pytest.fixture
def caches(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    return home


def test_compiled_code_is_kept_where_nobody_else_can_write(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_compiled_code_private()
    folder = caches / "cache" / "vastscale" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert folder in Path(os.environ[name]).parents
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    keep_compiled_code_private()
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen"
    assert folder in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents


def test_a_prepared_folder_for_compiled_code_is_refused(caches: Path) -> None:
    """Where the user's cache cannot be written, /tmp is used, where anyone may make folders."""
    (caches / "cache").touch()
    (caches / "theirs").mkdir()
    own = caches / f"vastscale-{os.geteuid()}"
    own.symlink_to(caches / "theirs")
    with pytest.raises(UserError, match="is not a folder of your own"):
        keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ""
    own.unlink()
    keep_compiled_code_private()
    assert own in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert own.stat().st_mode & 0o777 == 0o700
