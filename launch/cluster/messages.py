"""The protocol between supervisor and guards: JSON objects over TCP, one per line.

    supervisor -> guard   {"challenge": NONCE}
    guard -> supervisor   {"rank": 3, "host": "node2", "challenge": NONCE, "proof": HMAC}
    supervisor -> guard   {"proof": HMAC}   {"task": WHAT TO RUN}

    guard -> supervisor   {"beat": 0}   {"out": TEXT}   {"err": TEXT}   {"note": TEXT}
                          {"exit": STATUS, "tail": TEXT, "ago": SECONDS, "overdue": BOOL}
    supervisor -> guard   {"beat": 0}
                          {"stop": 60}   save, and end within this many seconds

Both sides first prove that they know the launch's key, over a nonce that each draws for this
connection, so that no other user of these machines gets a rank's environment, which may contain
keys, or starts a program through a guard. The key is drawn for each launch. It appears in no
command line and no environment: `deposit_key` puts it on each host into a file that only its owner
can read. Nothing is encrypted: the network between the hosts is trusted.

A side that hears nothing for `SILENCE_SECONDS` considers the other one lost, for good.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.cluster.remote import CONNECT_SECONDS, run_on
from pipeline.files import private_dir

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
HELLO_SECONDS = 10.0  # for a connection to prove that it belongs to the run
HELLO_BYTES = 1 << 16  # of a line, until then
STRANGERS = 4  # connections that have not proved it, per rank
MOST_BYTES = 1 << 20  # of a line
TAIL_CHARACTERS = 16_000  # of a rank's output, sent when it fails
KEYS = Path(".cache") / "vastscale" / "keys"  # below the home folder of each host
KEY_MINUTES = 60  # guards read a key when they start; older ones are removed by the next launch
_DEPOSIT = (
    'umask 077 && cd && mkdir -p "$1" && cd "$1" && chmod 700 . && cat > ".$0.$$" && '
    f'mv ".$0.$$" "$0" && find . -type f -mmin +{KEY_MINUTES} -delete'
)

Message = dict[str, Any]


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send without waiting. A lost connection is not an error here; the other side's silence is."""
    with suppress(OSError, RuntimeError):
        writer.write(json.dumps(message).encode() + b"\n")


class Inbox:
    """Iterates over the other side's messages until the connection ends or one is invalid.

    `most_bytes` limits a line; raise it to `MOST_BYTES` for a side that has proved who it is.
    """

    def __init__(self, reader: asyncio.StreamReader, most_bytes: int = HELLO_BYTES) -> None:
        self.most_bytes = most_bytes
        self._reader, self._received = reader, bytearray()

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> Message:
        """Return the next message, a JSON object."""
        message = None
        with suppress(OSError, ValueError, RecursionError):
            message = json.loads(await self._line())
        if not isinstance(message, dict):
            raise StopAsyncIteration
        return message

    async def _line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            if len(self._received) > self.most_bytes:
                raise ValueError("the line is too long")
            searched = len(self._received)
            data = await self._reader.read(HELLO_BYTES // 2)
            if not data:
                end = searched
                break
            self._received += data
        if end > self.most_bytes:
            raise ValueError("the line is too long")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def pack(value: Mapping[str, Any]) -> str:
    """Encode a JSON value as one base64 word, which contains nothing that a shell interprets."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def unpack(word: str) -> dict[str, Any]:
    """Decode a word made by `pack`."""
    return json.loads(base64.urlsafe_b64decode(word))


# --- Who is at the other side ---


def new_nonce() -> str:
    """Return a nonce of 128 random bits."""
    return secrets.token_hex(16)


def proof(key: str, side: str, *about: Any) -> str:
    """Return the HMAC-SHA256 by which `side` shows that it knows the key.

    `about` are JSON values: the run, the rank and both nonces, so that a recorded proof fits no
    other connection. `side` keeps the other side's proof from being sent back to it.
    """
    text = json.dumps([side, *about])
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


def is_proof(given: Any, key: str, side: str, *about: Any) -> bool:
    """Whether `given` is the `proof`."""
    return isinstance(given, str) and hmac.compare_digest(
        given.encode(errors="replace"), proof(key, side, *about).encode()
    )


def deposit_key(
    run: str, key: str, hosts: Iterable[str] = (), ssh_arguments: Sequence[str] = ()
) -> None:
    """Write the key of a launch into a file on this machine and, over ssh's stdin, on `hosts`.

    A host that does not answer gets none: its guards report that they have no key.
    """
    folder = private_dir(Path.home() / KEYS)
    for file in folder.iterdir():
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > KEY_MINUTES * 60:
                file.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(folder / run, "w", opener=lambda path, _: os.open(path, flags, 0o600)) as file:
        file.write(key)
    command = ["sh", "-c", _DEPOSIT, run, str(KEYS)]
    run_on(hosts, command, timeout=2 * CONNECT_SECONDS, stdin=key, ssh_arguments=ssh_arguments)


def read_key(run: str) -> str:
    """Return the key that `deposit_key` has left on this host.

    Raises `OSError` if there is none, and `UserError` if others could have read or written it.
    """
    folder = private_dir(Path.home() / KEYS)
    descriptor = os.open(folder / run, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor) as file:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(1, "is not a private file of this user", str(folder / run))
        return file.read().strip()


def remove_key(run: str) -> None:
    """Remove the key of a launch that is over from this machine."""
    with suppress(OSError):
        (Path.home() / KEYS / run).unlink()
