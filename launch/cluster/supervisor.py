"""Supervise a job on many hosts from the first node: it runs on all of them or is stopped on all.

DeepSpeed's launcher starts the ranks. By itself it waits forever for a rank that died before it met
the others, for a host that fell off the network and for one that hangs, and its own way of stopping
a job kills other users' runs (deepspeed issue 6807). So each rank has a guard (`guard.py`) that
reports here, and if one rank ends early, all are stopped.
"""

from __future__ import annotations

import asyncio
import queue
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

from launch.cluster import messages
from pipeline.distributed.launcher import raise_file_limit
from pipeline.signals import is_stopped, stop_signals

START_SECONDS = 180  # for all guards to report; DeepSpeed is imported on their hosts first
GRACE_SECONDS = 60  # for saving, after CTRL+C
END_SECONDS = 10  # for the other ranks to end, once one has failed
TOGETHER_SECONDS = 3  # failures this close together are treated as one, with one cause
LAUNCHER_SECONDS = 15  # for the launcher to end, after the last rank
MOST_LINES = 100  # of the launcher's output that are kept
MOST_WAITING = 10_000  # texts queued for a terminal that does not read; further ones are dropped
_SSH_END = re.compile(r"pdsh@[^:\s]+: ([^:\s]+): (ssh exited with exit code \d+)")
_CHATTER = re.compile(r"\[[\d:, -]+\] \[(INFO|WARNING)\]")
_LOST_PEER = re.compile(
    r"[Cc]onnection (closed|reset|refused|timed out)|Broken pipe|No route to host|"
    r"(Network|Host) is (unreachable|down)|DistBackendError|NCCL|Socket Timeout|Timed out waiting"
)
_WORD = re.compile(r"eyJ[\w-]{20,}=*")  # a guard's command-line word: base64 of JSON


@dataclass
class Rank:
    """State of one rank. Times are seconds of the monotonic clock."""

    number: int
    host: str
    writer: asyncio.StreamWriter | None = None  # None until its guard reports
    heard: float = 0.0  # when its guard last sent a message
    beat_sent: float = 0.0  # when it was last sent a sign of life
    status: int | None = None  # exit status, as a shell reports it
    tail: str = ""  # its last output
    ended: float = 0.0
    is_lost: bool = False  # ended without an exit status
    is_silent: bool = False  # lost because its guard stopped sending messages
    is_late: bool = False  # did not report in time, though the launcher was still running
    is_overdue: bool = False  # killed by its guard because it did not stop when asked to

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"

    @property
    def has_ended(self) -> bool:
        return self.status is not None or self.is_lost


@dataclass(frozen=True)
class Failure:
    """Why a job failed: the cause in one line, the last output from there, and the exit status."""

    cause: str
    tail: str
    status: int


@dataclass
class Supervisor:
    """Supervises one launch of all ranks.

    After `watch`, `stopped_by` is the signal that stopped the job (0: none) and `failure` says why
    it failed (None: it did not).
    """

    hosts: Sequence[str]  # the host of each rank
    run: str  # name of this launch
    key: str  # of this launch, which its guards know; see `messages`
    task: Mapping[str, Any]  # what each guard is told to run
    log: IO[str]  # for the launcher's own output
    names_are_ranks: bool = True  # `hosts` is in the order of the ranks; else guards name theirs
    stopped_by: int = 0
    failure: Failure | None = None
    _ranks: list[Rank] = field(default_factory=list)
    _launcher_says: dict[str, list[str]] = field(default_factory=dict)  # by host
    # lines about all hosts
    _launcher_said: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_LINES))
    _launcher_status: int | None = None
    _ssh_ended: str = ""  # the first host whose ssh ended while its ranks were still running
    _speaker: _Speaker = field(default_factory=lambda: _Speaker())
    _labels: dict[str, str] = field(default_factory=dict)  # the launcher's name of a host -> host
    # connections that have not yet proved that they belong to the run, oldest first
    _strangers: dict[asyncio.StreamWriter, None] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _failed_at: float | None = None
    _end_at: float | None = None

    def __post_init__(self) -> None:
        self._ranks = [Rank(number, host) for number, host in enumerate(self.hosts)]
        first_parts = [host.partition(".")[0] for host in dict.fromkeys(self.hosts)]
        # pdsh omits a domain that all hosts share.
        self._labels = {
            part: host
            for part, host in zip(first_parts, dict.fromkeys(self.hosts), strict=True)
            if first_parts.count(part) == 1
        } | {host: host for host in self.hosts}

    async def listen(self, address: str) -> int:
        """Listen for guards on a free port of `address`; return the port."""
        raise_file_limit()  # each guard holds a connection
        # asyncio stops receiving once twice the limit is waiting.
        self._server = await asyncio.start_server(
            self._meet, address, 0, limit=messages.HELLO_BYTES // 2
        )
        return self._server.sockets[0].getsockname()[1]

    async def watch(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        directory: str,
        stdin: str = "",
    ) -> None:
        """Run the launcher, with `stdin`, until every rank has ended.

        Sets `failure` unless all of them succeeded.
        """
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._interrupted, number)
        # Stopped by CTRL+Z, this process would look like a lost node to the ranks.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        # The launcher gets a session of its own, so that CTRL+C reaches only this process, which
        # asks the guards to save. DeepSpeed's launcher would react by killing processes by name,
        # including other users' runs.
        launcher = await asyncio.create_subprocess_exec(
            *command,
            env=dict(variables),
            cwd=directory,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            start_new_session=True,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        if launcher.stdin is not None:
            launcher.stdin.write(stdin.encode())
            launcher.stdin.close()
        reading = asyncio.create_task(self._read_launcher(launcher))
        try:
            # Deadlines and silence cause no event, so they are checked ten times a second.
            while not self._is_over():
                self._look()
                await asyncio.sleep(0.1)
            self._settle()
            await self._end_launcher(launcher)
        finally:
            reading.cancel()
            _kill_tree(launcher.pid)
            # asyncio would close it after the loop has ended, and print a traceback.
            launcher._transport.close()
            # No longer than this: a terminal that nobody reads must not keep the job from ending.
            await asyncio.to_thread(self._speaker.finish, 2)
            self._server.close()
            for rank in self._ranks:
                if rank.writer:
                    rank.writer.close()

    def _is_over(self) -> bool:
        if all(rank.has_ended for rank in self._ranks):
            # After a failure, wait a moment for exit statuses: one may show the cause.
            return (
                self._failed_at is None
                or time.monotonic() > self._failed_at + TOGETHER_SECONDS
                or all(rank.status is not None for rank in self._ranks)
            )
        # Guards have had time to kill their ranks and to report. Hosts that are gone never will.
        if self._end_at is not None and time.monotonic() > self._end_at:
            return True
        # Ranks that never reported end together with the launcher.
        absent = all(rank.has_ended or rank.writer is None for rank in self._ranks)
        return self._launcher_status is not None and absent and self._failed_at is not None

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a guard's connection from its first message to its last."""
        rank, inbox = None, messages.Inbox(reader)
        # CancelledError: the job is over. The others: an invalid message, which ends a connection.
        with suppress(asyncio.CancelledError, ValueError, TypeError):
            rank = await self._authenticate(inbox, writer)
            if rank is not None:
                async for message in inbox:
                    rank.heard = time.monotonic()
                    self._hear(rank, message)
        if rank is None:
            writer.close()
        elif rank.status is None:
            # A guard reports the exit status of its rank before it closes the connection. Without
            # one, the guard itself or its host is gone.
            rank.is_lost, rank.ended = True, time.monotonic()
            self._fail()

    async def _authenticate(
        self, inbox: messages.Inbox, writer: asyncio.StreamWriter
    ) -> Rank | None:
        """Return the rank whose guard has connected; None for anybody else, who is told nothing.

        Strangers can take neither memory nor file handles: there are few connections that have not
        proved who they are, none for long. Of too many the oldest is closed, because a guard needs
        milliseconds.
        """
        self._strangers[writer] = None
        if len(self._strangers) > messages.STRANGERS * len(self._ranks):
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        try:
            return await asyncio.wait_for(self._welcome(inbox, writer), messages.HELLO_SECONDS)
        except asyncio.TimeoutError:
            return None
        finally:
            self._strangers.pop(writer, None)

    async def _welcome(self, inbox: messages.Inbox, writer: asyncio.StreamWriter) -> Rank | None:
        """Exchange proofs with a guard and send its task. None if it is no rank of this launch."""
        own = messages.new_nonce()
        messages.send(writer, {"challenge": own})
        message = await anext(inbox, {})
        number, host, theirs = (message.get(name) for name in ("rank", "host", "challenge"))
        about = self.run, number, host, own, theirs
        if not messages.is_proof(message.get("proof"), self.key, "guard", *about):
            return None
        if not isinstance(number, int) or not 0 <= number < len(self._ranks):
            return None
        rank = self._ranks[number]
        if rank.writer is not None:
            return None
        rank.writer, rank.heard = writer, time.monotonic()
        inbox.most_bytes = messages.MOST_BYTES
        if not self.names_are_ranks:
            rank.host = str(host)
        messages.send(writer, {"proof": messages.proof(self.key, "supervisor", *about)})
        # The task travels here and not in the guard's command line, which every user of the host
        # can read: its environment may contain keys.
        messages.send(writer, {"task": dict(self.task)})
        if self._end_at is not None:  # the job is being stopped already
            messages.send(writer, {"stop": max(0.0, self._end_at - time.monotonic())})
        return rank

    def _hear(self, rank: Rank, message: messages.Message) -> None:
        """Handle a guard's message."""
        if "out" in message:
            self._speaker.say(sys.stdout, str(message["out"]))
        elif "err" in message:
            self._speaker.say(sys.stderr, str(message["err"]))
        elif "note" in message:
            self._speaker.say(self.log, str(message["note"]))
        elif "exit" in message:
            rank.status, rank.tail = int(message["exit"]), str(message.get("tail", ""))
            # The guard says how long ago its rank ended: a report waits for the last output, and
            # the clocks of hosts differ. The order of the ends shows the cause.
            rank.ended = time.monotonic() - float(message.get("ago", 0.0))
            rank.is_overdue = bool(message.get("overdue"))
            # After CTRL+C, ranks end with a signal's status once they have saved, which is no
            # failure. `_settle` names those that had to be killed. The signal is SIGTERM, which
            # guards send, or the one that a scheduler has sent to everything in its job.
            if rank.status != 0 and not (
                self.stopped_by and (rank.is_overdue or is_stopped(rank.status))
            ):
                self._fail()

    def _look(self) -> None:
        """Detect what no message reports: silent guards, ranks that never reported, a launcher that
        ended."""
        now = time.monotonic()
        for rank in self._ranks:
            if rank.has_ended:
                continue
            if rank.writer is not None:
                # The connection to a host that is gone stays open for many minutes. Only missing
                # messages show that nobody is at its other end.
                if now - rank.heard > messages.SILENCE_SECONDS:
                    rank.is_lost, rank.is_silent, rank.ended = True, True, now
                    self._fail()
                elif now - rank.beat_sent > messages.BEAT_SECONDS:
                    rank.beat_sent = now
                    messages.send(rank.writer, {"beat": 0})
        # Once the launcher has ended, no further guard can start.
        missing = [rank for rank in self._ranks if rank.writer is None and not rank.has_ended]
        if missing and (now - self._began > START_SECONDS or self._launcher_status is not None):
            for rank in missing:
                rank.is_lost, rank.ended, rank.is_late = True, now, self._launcher_status is None
            self._fail()

    def _fail(self) -> None:
        """Stop all ranks because one ended that should not have.

        `_settle` names the cause later, once the other ranks have reported.
        """
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        self._stop(END_SECONDS)

    def _interrupted(self, number: int) -> None:
        if not self.stopped_by:
            self.stopped_by = number
            self._stop(GRACE_SECONDS)

    def _stop(self, grace: float) -> None:
        """Tell all guards to stop their ranks within `grace` seconds; only ever shortens the
        time."""
        deadline = time.monotonic() + grace
        if self._end_at is not None and self._end_at <= deadline + END_SECONDS:
            return
        # The guards need a moment to kill and to report.
        self._end_at = deadline + END_SECONDS
        for rank in self._ranks:
            if rank.writer is not None and not rank.has_ended:
                messages.send(rank.writer, {"stop": grace})

    async def _read_launcher(self, launcher: asyncio.subprocess.Process) -> None:
        """Log the launcher's output, sort it by host, and notice an ssh that ends."""
        assert launcher.stdout is not None
        async for line in _lines(launcher.stdout):
            line = _WORD.sub("…", line)
            self._launcher_said.append(line)
            self._speaker.say(self.log, line)
            label, colon, text = line.partition(": ")
            host = self._labels.get(label, "")
            if colon and host:
                self._launcher_says.setdefault(host, []).append(text)
                del self._launcher_says[host][:-MOST_LINES]
            end = _SSH_END.search(line)
            host = self._labels.get(end[1], "") if end else ""
            if end and any(rank.host == host and not rank.has_ended for rank in self._ranks):
                self._launcher_says.setdefault(host, []).append(end[2] + "\n")
                # Not at once: the guards' last messages, which contain exit statuses, may arrive
                # after ssh's end.
                asyncio.get_running_loop().call_later(TOGETHER_SECONDS / 2, self._host_ended, host)
        self._launcher_status = await launcher.wait()

    def _host_ended(self, host: str) -> None:
        """Fail if the launcher's ssh to `host` has ended but its ranks have not."""
        ranks = [rank for rank in self._ranks if rank.host == host and not rank.has_ended]
        for rank in ranks:
            if rank.writer is None:
                rank.is_lost, rank.ended = True, time.monotonic()
        if ranks:
            self._ssh_ended = self._ssh_ended or host
            self._fail()

    async def _end_launcher(self, launcher: asyncio.subprocess.Process) -> None:
        deadline = time.monotonic() + (LAUNCHER_SECONDS if self.failure is None else 3)
        while self._launcher_status is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    def _settle(self) -> None:
        """Name the cause: the first rank that failed by itself.

        A rank that failed because it lost a peer, or because it was told to stop, is not the cause.
        """
        if self._failed_at is None:
            # No rank failed, but after CTRL+C one may have been killed because it was too slow.
            late = [rank for rank in self._ranks if rank.is_overdue or not rank.has_ended]
            if late:
                self.failure = Failure(
                    f"{late[0]} did not end within {GRACE_SECONDS:.0f} s and was killed",
                    late[0].tail,
                    1,
                )
            return
        failed = sorted(
            (rank for rank in self._ranks if rank.has_ended and rank.status != 0),
            key=lambda rank: rank.ended,
        )
        # The order of almost simultaneous failures says little: a rank that lost a peer may end
        # before the peer whose error started it all. Later failures are consequences.
        first = [
            rank for rank in failed if rank.ended <= self._failed_at + TOGETHER_SECONDS
        ] or failed
        candidates = [rank for rank in first if self._speaks_for_itself(rank)]
        # A cut cable may break connections long before a host counts as silent.
        candidates = candidates or [rank for rank in failed if rank.is_silent]
        if not candidates and self._ssh_ended:
            self.failure = Failure(
                f"the connection to {self._ssh_ended} ended, and its ranks with it",
                self._said_on(self._ssh_ended),
                1,
            )
            return
        candidates = candidates or first
        if candidates:
            self.failure = self._describe(candidates[0])
        else:
            absent = [rank for rank in self._ranks if not rank.has_ended]
            self.failure = (
                self._describe(absent[0]) if absent else Failure("the launcher ended early", "", 1)
            )

    def _describe(self, rank: Rank) -> Failure:
        """Say in one line how `rank` ended."""
        said = self._said_on(rank.host)
        if self._launcher_status is not None and not said and not rank.is_late:
            said = "".join(line for line in self._launcher_said if not _CHATTER.match(line))
        if rank.status is not None:
            how = (
                f"was killed by {signal.Signals(rank.status - 128).name}"
                if _is_signal(rank.status)
                else f"ended with status {rank.status}"
            )
            # faulthandler's first word: the rank was ended by its watchdog.
            if "Timeout (" in rank.tail:
                how = self._hung(rank)
            # Status 2 is kept, because bad input is the same on the next attempt: `--max-restarts`
            # does not try it again.
            return Failure(f"{rank} {how}", rank.tail, 2 if rank.status == 2 else 1)
        if rank.writer is None:
            what = (
                f"did not report within {START_SECONDS:.0f} s" if rank.is_late else "did not start"
            )
            return Failure(f"{rank} {what}", said, 1)
        if rank.is_silent:
            return Failure(
                f"{rank.host} fell silent (no sign of {rank} for {messages.SILENCE_SECONDS:.0f} "
                "s): the machine or its network is down",
                said,
                1,
            )
        return Failure(f"{rank} vanished together with its guard", said, 1)

    def _said_on(self, host: str) -> str:
        """The launcher's output about `host`, without DeepSpeed's log lines."""
        return "".join(
            line for line in self._launcher_says.get(host, []) if not _CHATTER.match(line)
        )

    def _speaks_for_itself(self, rank: Rank) -> bool:
        """Whether a rank failed by itself, and neither followed another's failure nor was stopped
        by us."""
        if rank.is_overdue:
            return False
        # A signal to stop is a cause only if it came before the supervisor stopped the ranks.
        if is_stopped(rank.status):
            return (
                self._failed_at is not None
                and rank.ended <= self._failed_at
                and not self.stopped_by
            )
        if rank.status is None:
            return True
        # Other signals are causes. SIGABRT need not be one: NCCL aborts a rank that lost a peer.
        if _is_signal(rank.status) and rank.status != 128 + signal.SIGABRT:
            return True
        return bool(rank.tail.strip()) and not _LOST_PEER.search(rank.tail[-4000:])

    def _hung(self, rank: Rank) -> str:
        """Describe the end of `rank` by its watchdog.

        The likely cause is a rank that did not answer: one that hangs so hard that even its own
        watchdog could not run.
        """
        mute = [
            other
            for other in self._ranks
            if other.status is None or other.status == 128 + signal.SIGKILL
        ]
        if mute:
            names = ", ".join(map(str, mute[:3])) + (
                f" and {len(mute) - 3} more" if len(mute) > 3 else ""
            )
            return (
                f"made no progress for too long (--watchdog-minutes); {names} did not answer: "
                "stopped or stuck"
            )
        return (
            "made no progress for too long (--watchdog-minutes); each rank's log shows what it was "
            "doing"
        )


class _Speaker:
    """Writes texts to streams that may be slow, stopped or full, without blocking the caller.

    A thread writes them in the order in which they were given.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[IO[str], str]] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def say(self, stream: IO[str], text: str) -> None:
        """Queue `text` for `stream`.

        While nobody reads the stream (CTRL+S, `| less`), the text waits; it is dropped if the queue
        is full.
        """
        with suppress(queue.Full):
            self._waiting.put_nowait((stream, text))

    def finish(self, seconds: float) -> None:
        """Return once everything is written, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            stream, text = self._waiting.get()
            # A full disk or a closed terminal must not end the job.
            with suppress(Exception):
                stream.write(text)
                stream.flush()
            self._waiting.task_done()


def _kill_tree(pid: int) -> None:
    """Kill a process and all its descendants.

    A signal to its group would miss some: pdsh puts each ssh into a group of its own.
    """
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        # All are listed before the first is killed: later they would no longer be the launcher's
        # descendants.
        for process in (launcher, *launcher.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_signal(status: int) -> bool:
    return status > 128 and (status - 128) in {int(number) for number in signal.Signals}


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream; lines above the size of a message are split."""
    rest = b""
    # Not by `readline`, which raises for a line that is longer than its limit.
    while data := await stream.read(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace") + "\n"
        if len(rest) > messages.MOST_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
