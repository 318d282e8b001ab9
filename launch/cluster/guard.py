"""The guard of one rank: runs `train.py` and ends it when the first node says so or falls silent.

DeepSpeed's launcher starts one guard per rank, and passes it all it needs to know as one base64
word, which no shell on the way can misinterpret. It imports neither torch nor DeepSpeed, so it can
still act while a rank hangs inside them.
"""

from __future__ import annotations

import asyncio
import codecs
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.cluster import messages
from launch.environment import prepare
from pipeline.cli import RunError, UserError
from pipeline.distributed import gpus, launcher
from pipeline.signals import stop_signals

CONNECT_SECONDS = 30
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL, if the other ranks cannot be reached
SAVE_SECONDS = 60  # the same if all ranks are stopped together: they save
LAST_WORDS_SECONDS = 3  # for output of the child that is still in the pipe


class Guard:
    """Runs a child process, reports to the supervisor, and stops the child if either side ends."""

    def __init__(self, task: dict[str, Any], key: str) -> None:
        self._task, self._key = task, key
        self._place = launcher.find_rank_info()
        self._rank = self._place.rank
        self._tail: deque[str] = deque()
        self._child: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")
        self._was_killed = False
        self._heard = time.monotonic()
        self._ended = 0.0
        self._is_alone = False  # the supervisor fell silent; nothing counts that it says later

    async def run(self) -> int:
        """Run the child from start to end.

        Returns its exit status as a shell reports it, or 1 if the supervisor cannot be reached.
        """
        # From DeepSpeed's launcher, which stops its children by SIGTERM, or from a scheduler. The
        # rank then saves, together with the others if theirs is stopped, too.
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, self._stop, SAVE_SECONDS)
        try:
            inbox, writer = await self._join()
        except OSError as error:
            address, port = self._task["supervisor"]
            print(
                f"error: {socket.gethostname()} cannot reach the first node at {address}:{port}: "
                f"{error}; open its firewall for this network, or give its address with "
                "--master-addr",
                file=sys.stderr,
            )
            return 1
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        try:
            log = self._open_log(writer)
            child = self._child = self._start()
        except OSError as error:
            await self._sign_off(
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
                asyncio.create_task(work) for work in (self._listen(inbox), self._watch(writer))
            ]
            status = await asyncio.to_thread(child.wait)
            self._ended = time.monotonic()
            # The last output may still be in the pipes. Do not wait for their end: a process that
            # the child left behind can hold them open for as long as it lives.
            await asyncio.to_thread(_join, copies, LAST_WORDS_SECONDS)
            # Kill what the child left behind: it began a session of its own, so those processes are
            # in its group.
            self._signal(signal.SIGKILL)
            await asyncio.to_thread(_join, copies, 1)
            for chore in chores:
                chore.cancel()
        status = status if status >= 0 else 128 - status
        await self._sign_off(writer, status, "".join(self._tail)[-messages.TAIL_CHARACTERS :])
        return status

    async def _sign_off(self, writer: asyncio.StreamWriter, status: int, tail: str) -> None:
        """Send the exit status and the last output, then close the connection."""
        ago = time.monotonic() - self._ended if self._ended else 0.0
        messages.send(
            writer, {"exit": status, "tail": tail, "ago": ago, "overdue": self._was_killed}
        )
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.drain(), 5)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), 5)

    async def _join(self) -> tuple[messages.Inbox, asyncio.StreamWriter]:
        """Connect to the supervisor, exchange proofs, and add what it sends to the task.

        `OSError` if it cannot be reached, `RunError` if it turns this rank away, or if something
        else answers at its address: no task is taken from that.
        """
        address, port = self._task["supervisor"]
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            writer = None
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 5)
                inbox = messages.Inbox(reader)
                # Closed at once: too many others have just connected.
                challenge = await asyncio.wait_for(_next(inbox, "challenge", ConnectionError), 5)
                break
            except (OSError, asyncio.TimeoutError) as error:
                if writer:
                    writer.close()
                if time.monotonic() > deadline:
                    raise OSError(str(error) or "no answer") from error
                await asyncio.sleep(0.5)
        own, host = messages.new_nonce(), socket.gethostname()
        about = self._task["run"], self._rank, host, challenge, own
        messages.send(
            writer,
            {
                "rank": self._rank,
                "host": host,
                "challenge": own,
                "proof": messages.proof(self._key, "guard", *about),
            },
        )
        try:
            given = await asyncio.wait_for(_next(inbox, "proof", RunError), CONNECT_SECONDS)
            if not messages.is_proof(given, self._key, "supervisor", *about):
                writer.close()
                raise RunError(
                    f"{host}: what answers at {address}:{port} does not know the key of this run; "
                    "its supervisor is gone, so start the run again"
                )
            inbox.most_bytes = messages.MOST_BYTES
            task = await asyncio.wait_for(_next(inbox, "task", RunError), CONNECT_SECONDS)
        except (RunError, asyncio.TimeoutError) as error:
            raise RunError(
                str(error)
                or f"the first node rejected rank {self._rank} from {host}: its run is over, or it "
                "already has this rank"
            ) from error
        self._task |= task
        self._heard = time.monotonic()
        return inbox, writer

    def _open_log(self, writer: asyncio.StreamWriter) -> IO[bytes]:
        """Open this rank's log. A host that cannot create its folder uses a temporary one.

        The supervisor is told which; on rank 0 an `OSError` is raised instead.
        """
        name = f"rank-{self._rank:05d}.log"
        try:
            log = _open(Path(self._task["logs"]), name)
        except OSError:
            # Rank 0 runs where the run folder is. If its log cannot be created beside that, the
            # run could not save anything, either.
            if self._rank == 0:
                raise
            folder = Path(tempfile.mkdtemp(prefix="vastscale-logs-"))
            messages.send(
                writer,
                {
                    "note": (
                        f"{socket.gethostname()}: rank {self._rank}'s output is in "
                        f"{folder / name}\n"
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
        # The rank gets a session of its own, so that one signal reaches it and its children. It
        # dies with its guard, because nobody else could stop it. -u: what it printed last is in the
        # pipe even if it is killed.
        return subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "train.py"), *self._task["arguments"]],
            env={**variables, launcher.GUARDED: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=launcher.end_with_parent,
            # A host need not have the folder in which the run was started.
            cwd=directory if os.path.isdir(directory) else None,
        )

    def _copy(
        self, stream: IO[bytes] | None, log: IO[bytes], writer: asyncio.StreamWriter, name: str
    ) -> Thread:
        """Start a thread that copies the child's output to the log and, on rank 0, to the
        supervisor."""
        assert stream is not None
        loop, descriptor = asyncio.get_running_loop(), stream.fileno()

        def copy() -> None:
            # A read may end in the middle of a character.
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            while True:
                # Returns what is there, whereas a buffered stream would wait for more.
                data = os.read(descriptor, 1 << 16)
                # A full disk must not stop the rank.
                with suppress(OSError, ValueError):
                    log.write(data)
                # RuntimeError: the loop is closed, and nobody listens any more.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(
                        self._forward, writer, name, decoder.decode(data, final=not data)
                    )
                if not data:
                    return

        # Threads, because writing to a slow disk blocks, and the event loop must keep sending signs
        # of life.
        thread = Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def _forward(self, writer: asyncio.StreamWriter, name: str, text: str) -> None:
        """Keep the last `TAIL_CHARACTERS` of output; send rank 0's to the supervisor."""
        self._tail.append(text)
        while (
            len(self._tail) > 1
            and sum(map(len, self._tail)) - len(self._tail[0]) > messages.TAIL_CHARACTERS
        ):
            self._tail.popleft()
        if self._rank == 0:
            messages.send(writer, {name: text})

    async def _listen(self, inbox: messages.Inbox) -> None:
        async for message in inbox:
            if self._is_alone:
                return
            self._heard = time.monotonic()
            if "stop" in message:
                self._stop(float(message["stop"]))
        # The supervisor is gone, but the other ranks may be alive. Their guards have lost it too,
        # so all ranks have time to save together.
        self._stop(SAVE_SECONDS)

    async def _watch(self, writer: asyncio.StreamWriter) -> None:
        while True:
            messages.send(writer, {"beat": 0})
            # Most likely the network is down. Ranks then cannot agree on a save, so they get less
            # time.
            if time.monotonic() - self._heard > messages.SILENCE_SECONDS:
                self._is_alone = True
                self._stop(GRACE_SECONDS)
            if time.monotonic() > self._kill_at:
                self._was_killed = True
                self._signal(signal.SIGKILL)
            await asyncio.sleep(messages.BEAT_SECONDS / 4)

    def _stop(self, grace: float) -> None:
        """Ask the child once to save and stop, and kill it after `grace` seconds.

        A later call can only shorten the time left.
        """
        # The rank has not been started, so there is nothing to save.
        if self._child is None:
            sys.exit(128 + signal.SIGTERM)
        if self._kill_at == float("inf"):
            # Only once: a second signal would tell the rank nothing new.
            self._signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + grace)

    def _signal(self, number: int) -> None:
        assert self._child is not None
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


def _open(folder: Path, name: str) -> IO[bytes]:
    folder.mkdir(0o700, parents=True, exist_ok=True)
    # A rank may print what its environment contains.
    return open(
        folder / name, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)
    )


async def _next(inbox: messages.Inbox, name: str, otherwise: type[Exception]) -> Any:
    """Return entry `name` of the next message; raise `otherwise` if there is none."""
    message = await anext(inbox, {})
    if name not in message:
        raise otherwise
    return message[name]


def _join(threads: Iterable[Thread], seconds: float) -> None:
    """Join all threads, waiting at most `seconds` in total."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _read_key(task: dict[str, Any]) -> str:
    """Return the key of this launch, from stdin or from its file on this host."""
    if not task.get("key_by_stdin"):
        return messages.read_key(task["run"])
    if not select.select([sys.stdin], [], [], CONNECT_SECONDS)[0]:
        raise OSError(errno.ETIMEDOUT, "srun passed no key on stdin", "stdin")
    key = sys.stdin.readline().strip()
    if not key:
        raise OSError(errno.ENODATA, "srun passed no key on stdin", "stdin")
    return key


def main() -> int:
    task = messages.unpack(sys.argv[1])
    # The parent is DeepSpeed's launcher on this host. If it is killed by SIGKILL, it cannot stop
    # its children, and the ranks would keep training.
    launcher.end_with_parent(signal.SIGTERM)
    launcher.raise_file_limit()
    try:
        key = _read_key(task)
    except (OSError, UserError) as error:
        print(
            f"error: {socket.gethostname()} has no key of this run, which "
            f"launch_distributed_train.sh leaves there over ssh: {error}",
            file=sys.stderr,
        )
        return 1
    return asyncio.run(Guard(task, key).run())


if __name__ == "__main__":
    sys.exit(main())
