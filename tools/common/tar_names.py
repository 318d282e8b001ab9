"""Names of members of archives: cleaned, so that crops can lie in folders of these names, and unique."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from tools.tar.streams import LostError

_MAX_PART, _MAX_NAME = 200, 1000  # bytes of a part of a path and of a path; file systems end at 255 and 4096
_CROP_NAME = re.compile(r"(f\d+_)?x\d+_\d+_\d+\.\w+(\.tmp)?")  # a folder of such a name would stand in a crop's way



def clean_name(name: str) -> str:
    """`name` as a relative POSIX path that leads nowhere but down, printable, in UTF-8, short enough for a disk."""
    parts = []
    for part in re.sub(r"^/*[A-Za-z]:", "", name.replace("\\", "/")).split("/"):
        part = "".join(letter if letter.isprintable() else "_" for letter in part)
        if part.strip("."):
            parts.append(_short(part + "_" if _CROP_NAME.fullmatch(part) else part))
    if not parts:
        return "unnamed"
    if len("/".join(parts).encode()) > _MAX_NAME:
        return f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}/{parts[-1]}"
    return "/".join(parts)


def _short(part: str) -> str:
    content = part.encode()
    if len(content) <= _MAX_PART:
        return part
    return f"{content[: _MAX_PART - 20].decode(errors='ignore')}~{hashlib.sha256(content).hexdigest()[:16]}"


class Names:
    """Gives every photograph and archive within one archive a name of its own: the second `a.jpg` becomes `a.jpg~2`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[int] = set()      # hashes: a million names take 80 MB less
        self._folders: set[int] = set()    # which a taken name lies in
        self._archives: set[int] = set()
        self._numbers: dict[int, int] = {}  # where to go on counting, or a million equal names would take a day

    def propose(self, name: str, is_archive: bool = False) -> str:
        """`name`, changed if it is taken; the same until `take` is called."""
        if self._archives and any(name_hash(folder) in self._archives for folder in _folders_of(name)):
            name = name.replace("/", "~")  # or it would look like a member of that archive
        key = name_hash(name)
        number, candidate = self._numbers.get(key, 1), name
        while True:
            candidate = name if number == 1 else f"{name}~{number}"
            at = name_hash(candidate)
            if at not in self._taken and not (is_archive and at in self._folders):
                break
            number += 1
        if number > 1:
            self._numbers[key] = number
        return candidate

    def take(self, name: str, is_archive: bool = False) -> None:
        """Never propose `name` again."""
        self._taken.add(name_hash(name))
        self._folders.update(map(name_hash, _folders_of(name)))
        if is_archive:
            self._archives.add(name_hash(name))
        if len(self._taken) + len(self._folders) > self._limit:
            raise LostError(f"more than {self._limit} names")


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _folders_of(name: str) -> Iterator[str]:
    """The folders that a path lies in, from the innermost."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
