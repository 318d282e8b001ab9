"""What the supervisor and the guards say to each other: one JSON object a line, over TCP.

    guard -> supervisor   {"hello": RUN, "rank": 3, "host": "node2"}   {"beat": 0}   {"out": TEXT}   {"err": TEXT}
                          {"exit": STATUS, "tail": TEXT, "ago": SECONDS, "overdue": BOOL}   {"note": TEXT}
    supervisor -> guard   {"task": WHAT TO RUN}   {"beat": 0}   {"stop": 60}   save, and end within so many seconds

Whoever hears nothing for `SILENCE_SECONDS` takes the other side for lost. There is no encryption: for a LAN, and users
of its machines, that are trusted. RUN is drawn anew for every launch, so that a stranger's connection is not taken for
a rank; what a rank is told, keys in its environment among it, is in no command line and no log.
"""

from __future__ import annotations

import asyncio
import base64
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import IO, Any

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
MOST_BYTES = 1 << 20  # of a line
TAIL_CHARACTERS = 16_000  # of a rank's output, told when it fails

Message = dict[str, Any]


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send without waiting. To a side that is gone nothing is sent, and that is no error: its silence is."""
    with suppress(OSError, RuntimeError):
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """The messages of the other side, until it closes the connection, breaks it, or says what is none."""
    with suppress(OSError, ValueError, RecursionError, asyncio.IncompleteReadError):
        while line := await reader.readline():
            message = json.loads(line)
            if not isinstance(message, dict):
                return
            yield message


def pack(value: Mapping[str, Any]) -> str:
    """Anything that JSON can say as one word that no shell reads otherwise."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def unpack(word: str) -> dict[str, Any]:
    return json.loads(base64.urlsafe_b64decode(word))


# Says things to a terminal or a file that may be slow, stopped or full, without ever waiting for it.


MOST_WAITING = 10_000  # texts; what comes on top of them is lost


class Speaker:
    """Texts for several streams, written by a thread of its own in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[IO[str], str]] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def say(self, stream: IO[str], text: str) -> None:
        """Write `text`, later. Where nobody reads the stream any more (CTRL+S, `| less`), it waits, or is lost."""
        with suppress(queue.Full):
            self._waiting.put_nowait((stream, text))

    def finish(self, seconds: float) -> None:
        """Return when all is written, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            stream, text = self._waiting.get()
            with suppress(Exception):  # a full disk, a closed terminal: the job is not to end of it
                stream.write(text)
                stream.flush()
            self._waiting.task_done()
