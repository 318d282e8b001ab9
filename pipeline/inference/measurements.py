"""Measurements of a network on this machine, kept in the user's cache beside converted networks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.files import parse_json, write_atomically
from pipeline.installation import user_cache_dir


def cache_folder() -> Path:
    """Return the folder of converted networks: `vastscale/converted` in the user's cache folder.

    That is `$XDG_CACHE_HOME` or `~/.cache`.
    """
    return user_cache_dir() / "converted"


def digest(*parts: object) -> str:
    """Return the SHA-256, in hexadecimal digits, of byte strings and the `repr` of other values."""
    return hashlib.sha256(
        repr(
            [hashlib.sha256(part).digest() if isinstance(part, bytes) else part for part in parts]
        ).encode()
    ).hexdigest()


class Measurements:
    """JSON values by name, kept as `DIGEST.json` in `cache_folder()`.

    A broken file counts as empty.

    Args:
        digest: digest of the network's weights and of everything else that may change the
            measurements. If empty, nothing is written to disk.
    """

    def __init__(self, digest: str = "") -> None:
        self._path = cache_folder() / f"{digest}.json" if digest else None
        self._values: dict[str, Any] = self._read()

    def get(self, name: str) -> Any:
        """Return a value; `None` if there is none."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Store a value in memory and on disk, together with what other processes have stored."""
        self._values = {**self._values, **self._read(), name: value}
        if self._path is not None:
            keep(self._path, json.dumps(self._values, indent=1, sort_keys=True).encode())

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a value; measure and store it first if it is not known yet."""
        if (value := self.get(name)) is None:
            value = measure()
            self.put(name, value)
        return value

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = parse_json(self._path.read_bytes()) if self._path is not None else {}
            return found if isinstance(found, dict) else {}
        return {}


def keep(path: Path, content: bytes) -> bool:
    """Write a file of the cache; return whether that worked.

    Failing is no error, because the cache only saves time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError:  # read-only or full
        return False
    return True
