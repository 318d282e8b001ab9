"""The protocol between supervisor and guards: JSON objects over TCP, one per line.

    guard -> supervisor   {"hello": RUN, "rank": 3, "host": "node2"}   {"beat": 0}
                          {"out": TEXT}   {"err": TEXT}   {"note": TEXT}
                          {"exit": STATUS, "tail": TEXT, "ago": SECONDS, "overdue": BOOL}
    supervisor -> guard   {"task": WHAT TO RUN}   {"beat": 0}
                          {"stop": 60}   save, and end within this many seconds

A side that hears nothing for `SILENCE_SECONDS` considers the other one lost. Nothing is encrypted:
the LAN and the users of its machines are trusted. RUN is a random token drawn for each launch, so
that a stray connection is not mistaken for a rank. A rank's task, which includes any keys in its
environment, appears in no command line and no log.
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
    """Send without waiting. A lost connection is not an error here; the other side's silence is."""
    with suppress(OSError, RuntimeError):
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """Yield the other side's messages until the connection ends or an invalid message arrives."""
    with suppress(OSError, ValueError, RecursionError, asyncio.IncompleteReadError):
        while line := await reader.readline():
            message = json.loads(line)
            if not isinstance(message, dict):
                return
            yield message


def pack(value: Mapping[str, Any]) -> str:
    """Encode a JSON value as one base64 word, which contains nothing that a shell interprets."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def unpack(word: str) -> dict[str, Any]:
    """Decode a word made by `pack`."""
    return json.loads(base64.urlsafe_b64decode(word))
