"""One rank's guard: starts `train.py` as its child, and ends it when the first node says so or
falls silent.

DeepSpeed's launcher starts it once a rank, with everything it has to know in one base64 word:
shells on the way find nothing in it to read. It needs neither torch nor DeepSpeed, so that it can
act where a rank hangs inside them.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.cluster import messages
from launch.environment import prepare
from pipeline.distributed import gpus, launcher

CONNECT_SECONDS = 30
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL, where nobody waits for a checkpoint
ORPHAN_SECONDS = 60  # where the supervisor is gone and the other ranks are there: they save
LAST_WORDS_SECONDS = 3  # for what the child has said and is still on its way


class Guard:
    """A child process, the connection to the supervisor, and what follows when either ends."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._place = launcher.find_place()
        self._rank = self._place.rank
        self._tail: deque[str] = deque()
        self._child: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")
        self._was_killed = False
        self._heard = time.monotonic()
        self._ended = 0.0

    async def run(self) -> int:
        """The child's whole life. Exit status: the child's, as a shell tells it; 1 if there is no
        supervisor."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, GRACE_SECONDS)
        try:
            reader, writer = await self._connect()
        except OSError as error:
            address, port = self._task["supervisor"]
            print(
                f"error: {socket.gethostname()} cannot reach the first node at {address}:{port}: "
                f"{error}; open its "
                "firewall for this network, or name its address with --master-addr",
                file=sys.stderr,
            )
            return 1
        messages.send(
            writer, {"hello": self._task["run"], "rank": self._rank, "host": socket.gethostname()}
        )
        heard = messages.receive(reader)
        try:
            self._task |= (await asyncio.wait_for(anext(heard), CONNECT_SECONDS))["task"]
        except (StopAsyncIteration, asyncio.TimeoutError, KeyError):
            print(
                f"error: the first node takes no rank {self._rank} from {socket.gethostname()}: "
                "its run is over, or "
                "there is one already",
                file=sys.stderr,
            )
            return 1
        try:
            log = self._open_log(writer)
            child = self._child = self._start()
        except OSError as error:
            await self._take_leave(
                writer,
                1,
                f"error: {socket.gethostname()}: {error.filename or self._task['logs']}: "
                f"{error.strerror}\n",
            )
            return 1
        with log:
            copies = [
                self._copy(child.stdout, log, writer, "out"),
                self._copy(child.stderr, log, writer, "err"),
            ]
            chores = [
                asyncio.create_task(work) for work in (self._listen(heard), self._watch(writer))
            ]
            status = await asyncio.to_thread(child.wait)
            self._ended = time.monotonic()
            await asyncio.to_thread(_join, copies, LAST_WORDS_SECONDS)
            self._signal(signal.SIGKILL)  # whatever the child has left behind
            await asyncio.to_thread(_join, copies, 1)
            for chore in chores:
                chore.cancel()
        status = status if status >= 0 else 128 - status
        await self._take_leave(writer, status, "".join(self._tail)[-messages.TAIL_CHARACTERS :])
        return status

    async def _take_leave(self, writer: asyncio.StreamWriter, status: int, tail: str) -> None:
        ago = time.monotonic() - self._ended if self._ended else 0.0
        messages.send(
            writer, {"exit": status, "tail": tail, "ago": ago, "overdue": self._was_killed}
        )
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.drain(), 5)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), 5)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address, port = self._task["supervisor"]
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return await asyncio.wait_for(
                    asyncio.open_connection(address, port, limit=messages.MOST_BYTES), 5
                )
            except (OSError, asyncio.TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise OSError(str(error) or "no answer") from error
                await asyncio.sleep(0.5)

    def _open_log(self, writer: asyncio.StreamWriter) -> IO[bytes]:
        """This rank's file; on a host that can have no such folder, somewhere else, which is
        told."""
        name = f"rank-{self._rank:05d}.log"
        try:
            log = _open(Path(self._task["logs"]), name)
        except OSError:
            if self._rank == 0:
                raise
            folder = Path(tempfile.mkdtemp(prefix="vastscale-logs-"))
            messages.send(
                writer,
                {
                    "note": (
                        f"{socket.gethostname()}: {folder / name} has rank {self._rank}'s output\n"
                    )
                },
            )
            log = _open(folder, name)
        with suppress(OSError):
            log.write(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} of "
                f"{self._place.world_size} on "
                f"{socket.gethostname()}\n".encode()
            )
        return log

    def _start(self) -> subprocess.Popen[bytes]:
        os.environ.update(self._task["environment"])
        variables = prepare(
            self._place.local_size or 1, on_gpu=gpus.may_have_gpu() and not gpus.is_cpu_wanted()
        )
        directory = self._task["directory"]
        return subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "train.py"), *self._task["arguments"]],
            env={**variables, launcher.GUARDED: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=launcher.end_with_parent,
            cwd=directory if os.path.isdir(directory) else None,
        )

    def _copy(
        self, stream: IO[bytes] | None, log: IO[bytes], writer: asyncio.StreamWriter, name: str
    ) -> Thread:
        """What the child says goes to its log; of the first rank also to the supervisor."""
        assert stream is not None
        loop, descriptor = asyncio.get_running_loop(), stream.fileno()

        def copy() -> None:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            while True:
                data = os.read(descriptor, 1 << 16)
                with suppress(OSError, ValueError):  # a full disk must not stop the rank
                    log.write(data)
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(
                        self._tell, writer, name, decoder.decode(data, final=not data)
                    )
                if not data:
                    return

        thread = Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def _tell(self, writer: asyncio.StreamWriter, name: str, text: str) -> None:
        self._tail.append(text)
        while (
            len(self._tail) > 1
            and sum(map(len, self._tail)) - len(self._tail[0]) > messages.TAIL_CHARACTERS
        ):
            self._tail.popleft()
        if self._rank == 0:
            messages.send(writer, {name: text})

    async def _listen(self, heard: AsyncIterator[messages.Message]) -> None:
        async for message in heard:
            self._heard = time.monotonic()
            if "stop" in message:
                self._stop(float(message["stop"]))
        self._stop(ORPHAN_SECONDS)  # the supervisor is gone

    async def _watch(self, writer: asyncio.StreamWriter) -> None:
        while True:
            messages.send(writer, {"beat": 0})
            if time.monotonic() - self._heard > messages.SILENCE_SECONDS:
                self._stop(GRACE_SECONDS)
            if time.monotonic() > self._kill_at:
                self._was_killed = True
                self._signal(signal.SIGKILL)
            await asyncio.sleep(messages.BEAT_SECONDS / 4)

    def _stop(self, grace: float) -> None:
        """Ask the child to save and stop, once; end it after `grace` seconds, or sooner if somebody
        said so."""
        if self._child is None:
            sys.exit(128 + signal.SIGTERM)
        if self._kill_at == float("inf"):
            self._signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + grace)

    def _signal(self, number: int) -> None:
        assert self._child is not None
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


def _open(folder: Path, name: str) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / name, "ab", buffering=0)


def _join(threads: Iterable[Thread], seconds: float) -> None:
    """Wait so long for all of them together."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def main() -> int:
    task = messages.unpack(sys.argv[1])
    launcher.end_with_parent(signal.SIGTERM)  # DeepSpeed's launcher on this host
    with suppress(OSError, ValueError):  # many ranks have many connections
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2
        )
    return asyncio.run(Guard(task).run())


if __name__ == "__main__":
    sys.exit(main())
