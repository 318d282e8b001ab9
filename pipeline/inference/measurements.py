"""What was found out about one network on this machine, kept beside the converted networks in the
user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.files import write_atomically


def cache_folder() -> Path:
    """Where converted networks are kept: `$XDG_CACHE_HOME` or `~/.cache`, and `vastscale` in it."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vastscale" / "converted"
    )


def digest(*parts: object) -> str:
    """SHA-256, in hexadecimal digits, of byte strings and of the `repr` of anything else."""
    return hashlib.sha256(
        repr(
            [hashlib.sha256(part).digest() if isinstance(part, bytes) else part for part in parts]
        ).encode()
    ).hexdigest()


class Measurements:
    """JSON values by name, in the file `DIGEST.json` of `cache_folder()`; a broken file is an empty
    one.

    Args: digest: of the network's weights and of all else that could change what is measured;
        empty: nothing is kept
            on disk.
    """

    def __init__(self, digest: str = "") -> None:
        self._path = cache_folder() / f"{digest}.json" if digest else None
        self._values: dict[str, Any] = self._read()

    def get(self, name: str) -> Any:
        """The value of that name; `None` where there is none."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value, now and on disk; what another process has kept meanwhile stays."""
        self._values = {**self._values, **self._read(), name: value}
        if self._path is not None:
            keep(self._path, json.dumps(self._values, indent=1, sort_keys=True).encode())

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of that name, measured where it is not known yet."""
        if (value := self.get(name)) is None:
            value = measure()
            self.put(name, value)
        return value

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_bytes()) if self._path is not None else {}
            return found if isinstance(found, dict) else {}
        return {}


def keep(path: Path, content: bytes) -> bool:
    """Write a file of the cache; whether that worked. A cache that cannot be written is no error:
    it saves time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError:  # read-only, or full
        return False
    return True
