"""Read photographs from tar archives in bounded memory: compressed, nested, broken or hostile.

`TarReader` yields the photographs and problems of an archive in order. Each one has a clean and
unique name (`Names`), so that crops can be stored in folders with these names.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.cli import UserError
from pipeline.data.image_files import QUARANTINE, is_encoded
from pipeline.data.image_headers import starts_as_image
from tools.tar.streams import (
    BLOCK,
    COMPRESSED,
    DEVICES,
    LINKS,
    ZEROS,
    BombError,
    File,
    Growth,
    Limits,
    LostError,
    TarHeader,
    Window,
    expanded,
    is_tar,
    next_header,
)

# Bytes of one part of a path and of a whole path; file systems allow 255 and 4096.
_MAX_PART, _MAX_NAME = 200, 1000
# A folder with such a name would collide with a crop.
_CROP_NAME = re.compile(r"(f\d+_)?x\d+_\d+_\d+\.\w+(\.tmp)?")
DEFAULT_LIMITS = Limits()
_OTHERS = {
    b"PK\3\4": "a zip archive",
    b"PK\5\6": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-zip archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress (.Z)",
}
_TAR_NAME = re.compile(r".+\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
# GNU folder listings, multi-volume parts, old long names, labels.
_NO_FILES = (b"D", b"M", b"N", b"V")


@dataclass(frozen=True)
class Member:
    """A file in an archive that is a photograph by content or name."""

    name: str  # "<inner archive>/<member>": a clean, unique POSIX path
    data: bytes


@dataclass(frozen=True)
class Problem:
    """A member that cannot be read, or an archive whose rest is lost.

    `name` is empty for the outermost archive.
    """

    name: str
    reason: str


class TarReader:
    """Reads the photographs of one archive.

    `passed` counts skipped members by kind: links, devices, hidden, other.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits = DEFAULT_LIMITS,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        """`wanted` tells from a member's name whether to read it.

        Other members are skipped, in uncompressed archives without reading them.
        """
        self._path, self._limits, self._wanted = path, limits, wanted or (lambda name: True)
        self.passed: Counter[str] = Counter()
        self._file: File | None = None

    @property
    def position(self) -> int:
        """Number of bytes of the file that are done."""
        return self._file.position if self._file else 0

    def __iter__(self) -> Iterator[Member | Problem]:
        """Yield the photographs and problems in order.

        Raises `UserError` as `check_archive` does.
        """
        with _opened(self._path) as (file, status):
            self._file = File(file, status.st_size)
            self._growth = Growth(self._file, self._limits)
            try:
                yield from self._archive(expanded(Window(self._file), self._growth), "", 0)
            except LostError as error:
                yield Problem("", f"{error}; the rest is not read")
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                yield Problem("", "it changed while being read; run the same command again")

    def _archive(self, source: Window, prefix: str, depth: int) -> Iterator[Member | Problem]:
        """Read a whole archive; `prefix` is its name and a slash."""
        names, count = Names(self._limits.names), 0
        try:
            while (header := next_header(source, self._limits.header_bytes)) is not None:
                count += 1
                body = Window(source, header.size)
                yield from self._member(header, body, names, prefix, depth)
                if not body.skip_rest():
                    raise LostError(f"it is truncated within {clean_name(header.name)}")
                source.skip(-header.size % BLOCK)
            if not count:
                yield Problem(prefix[:-1], "an archive without members")
        except BombError:
            raise
        except LostError as error:
            yield Problem(
                prefix[:-1], f"{error}; the rest of this archive is lost (after {count} members)"
            )

    def _member(
        self, header: TarHeader, body: Window, names: Names, prefix: str, depth: int
    ) -> Iterator[Member | Problem]:
        """Read one member: a photograph, an archive, or neither."""
        kind = _passed_by(header)
        if kind:
            if kind != "folders":
                self.passed[kind] += 1
            return
        clean = clean_name(header.name)
        name = names.propose(clean)
        if header.is_sparse:
            yield Problem(
                prefix + name,
                "a sparse file (tar --sparse), which is not supported; pack it without --sparse",
            )
        elif not self._wanted(prefix + name):
            names.take(name)
        elif (inner := self._inner(body, clean)) is not None:
            name = names.propose(clean, is_archive=True)
            names.take(name, is_archive=True)
            yield from self._inner_archive(inner, prefix + name, depth)
        elif _is_image(body.peek(BLOCK)) or is_encoded(clean):
            names.take(name)
            yield from self._photograph(body, header.size, prefix + name)
        else:
            self.passed["other"] += 1

    def _inner(self, body: Window, name: str) -> Window | Problem | None:
        """Open a member as an archive: a `Problem` on failure, `None` if it is no archive."""
        head = body.peek(BLOCK)
        is_named_tar = _TAR_NAME.fullmatch(name) is not None
        # A tar may begin with BM, as bitmaps do.
        may_be = is_tar(head) or (is_named_tar and not _is_image(head))
        if not may_be and not head.startswith(COMPRESSED):
            return None
        try:
            source = expanded(body, self._growth)
            return source if is_named_tar or is_tar(source.peek(BLOCK)) else None
        except BombError:
            raise
        except LostError as error:
            return Problem("", str(error)) if is_named_tar else None

    def _inner_archive(
        self, inner: Window | Problem, name: str, depth: int
    ) -> Iterator[Member | Problem]:
        if isinstance(inner, Problem):
            yield Problem(name, inner.reason)
        elif depth == self._limits.depth:
            yield Problem(
                name, f"nested within {depth + 1} archives; unpack the outermost one first"
            )
        else:
            yield from self._archive(inner, name + "/", depth + 1)

    def _photograph(self, body: Window, size: int, name: str) -> Iterator[Member | Problem]:
        if size > self._limits.member_bytes:
            yield Problem(name, f"{size} bytes exceed the limit of {self._limits.member_bytes}")
            return
        data = body.read(size)
        if len(data) == size:  # otherwise the truncated archive is reported
            yield Member(name, data)


def check_archive(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in ns of an archive.

    Raises `UserError` if it is not a readable tar archive.
    """
    with _opened(path) as (_, status):
        return status.st_size, status.st_mtime_ns


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open the file of an archive; never blocks on a FIFO and never opens a device."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a regular file; give a tar archive on disk")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a tar archive") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; fix its permissions or the disk"
        ) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: no longer a regular file; give a tar archive on disk")
        _check_start(path, file, status.st_size)
        file.seek(0)
        yield file, status


def _check_start(path: Path, file: BinaryIO, size: int) -> None:
    """Raise `UserError` unless a tar archive, compressed or not, starts here."""
    way_out = "give a .tar, .tar.gz, .tar.bz2, .tar.xz or .tar.zst file"
    source = File(file, size)
    try:
        window = Window(source)
        head = window.peek(BLOCK)
        other = next((name for start, name in _OTHERS.items() if head.startswith(start)), None)
        if other:
            raise UserError(
                f"{path}: {other}, not a tar; unpack it and give the photographs to "
                "images_to_data.py"
            )
        head = expanded(window, Growth(source, Limits())).peek(BLOCK)
    except LostError as error:
        raise UserError(f"{path}: {error}; {way_out}") from None
    if not is_tar(head) and head != ZEROS:
        what = f"not a tar archive (its first bytes are {head[:8]!r})" if head else "empty"
        raise UserError(f"{path}: {what}; {way_out}")


def _passed_by(header: TarHeader) -> str:
    """Kind under which a member is skipped; empty if its data must be examined."""
    if header.type in LINKS:
        return "links"
    if header.type in DEVICES:
        return "devices"
    if header.type == tarfile.DIRTYPE:
        return "folders"  # these are not counted
    parts = header.name.replace("\\", "/").split("/")
    if any(
        (part.startswith(".") and part.strip(".")) or part in (QUARANTINE, "__MACOSX")
        for part in parts
    ):
        return "hidden"
    return "other" if header.type in _NO_FILES else ""


def _is_image(head: bytes) -> bool:
    """Whether a file with this start is an image, whatever its name."""
    return starts_as_image(head) and (head[:2] != b"BM" or head[6:10] == bytes(4))


# --- Names ---


def clean_name(name: str) -> str:
    """Convert `name` to a printable relative POSIX path in UTF-8 that file systems can hold.

    It never leads out of its folder.
    """
    parts = []
    for part in re.sub(r"^/*[A-Za-z]:", "", name.replace("\\", "/")).split("/"):
        part = "".join(letter if letter.isprintable() else "_" for letter in part)
        if part.strip("."):
            parts.append(_short(part + "_" if _CROP_NAME.fullmatch(part) else part))
    if not parts:
        return "unnamed"
    if len("/".join(parts).encode()) > _MAX_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{digest[:16]}/{parts[-1]}"
    return "/".join(parts)


def _short(part: str) -> str:
    content = part.encode()
    if len(content) <= _MAX_PART:
        return part
    start = content[: _MAX_PART - 20].decode(errors="ignore")
    return f"{start}~{hashlib.sha256(content).hexdigest()[:16]}"


class Names:
    """Gives all photographs and archives in an archive unique names, such as `a.jpg~2`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[int] = set()  # hashes, which take 80 MB less for a million names
        self._folders: set[int] = set()  # that contain a taken name
        self._archives: set[int] = set()
        # next number to try; otherwise a million equal names would take a day
        self._numbers: dict[int, int] = {}

    def propose(self, name: str, is_archive: bool = False) -> str:
        """Return a free name like `name`; the same one until `take` is called."""
        if self._archives and any(
            name_hash(folder) in self._archives for folder in _folders_of(name)
        ):
            name = name.replace("/", "~")  # otherwise it would look like a member of that archive
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
        """Mark `name` as taken.

        Raises `LostError` above the limit of names.
        """
        self._taken.add(name_hash(name))
        self._folders.update(map(name_hash, _folders_of(name)))
        if is_archive:
            self._archives.add(name_hash(name))
        if len(self._taken) + len(self._folders) > self._limit:
            raise LostError(f"more than {self._limit} names")


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _folders_of(name: str) -> Iterator[str]:
    """Yield the folders that contain a path, innermost first."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
