"""What the supervisor and the guards say to each other: JSON objects over TCP, one per line.

    guard -> supervisor   {"hello": RUN, "rank": 3, "host": "node2"}   {"beat": 0}
                          {"out": TEXT}   {"err": TEXT}   {"note": TEXT}
                          {"exit": STATUS, "tail": TEXT, "ago": SECONDS, "overdue": BOOL}
    supervisor -> guard   {"task": WHAT TO RUN}   {"beat": 0}
                          {"stop": 60}   save, and end within so many seconds

Whoever hears nothing for `SILENCE_SECONDS` takes the other side for lost. There is no encryption:
this is for a LAN, and users of its machines, that are trusted. RUN is drawn for every launch, so
that a stranger's connection is not taken for a rank. A rank's task, with any keys in its
environment, is in no command line and no log.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
MOST_BYTES = 1 << 20  # of a line
TAIL_CHARACTERS = 16_000  # of a rank's output, sent when it fails

Message = dict[str, Any]


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send without waiting. A side that is gone gets nothing; that is no error here: its silence is
    one."""
    with suppress(OSError, RuntimeError):
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """The messages of the other side, until it closes or breaks the connection, or sends what is
    not a message."""
    with suppress(OSError, ValueError, RecursionError, asyncio.IncompleteReadError):
        while line := await reader.readline():
            message = json.loads(line)
            if not isinstance(message, dict):
                return
            yield message


def pack(value: Mapping[str, Any]) -> str:
    """Anything that JSON can express, as one word in which shells find nothing to read."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def unpack(word: str) -> dict[str, Any]:
    return json.loads(base64.urlsafe_b64decode(word))
