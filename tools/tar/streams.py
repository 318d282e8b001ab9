"""Forward-only byte streams of archives with bounded resources, and the tar headers in them.

A `File` is the archive on disk, a `Window` is a part of another stream, `expanded` decompresses
one. `next_header` reads a tar header including the long names and large sizes of all tar variants.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import re
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

MIB = 1 << 20
BLOCK = tarfile.BLOCKSIZE
_XZ_MEMORY = 512 * MIB  # `xz -9` and all usual settings need less
COMPRESSED = _GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
ZEROS = bytes(BLOCK)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
# Zero bytes after the end of an archive; more indicate a hole, as in unfinished downloads.
_MAX_TAIL = 4 * MIB


@dataclass(frozen=True)
class Limits:
    """Limits on an archive, so that a hostile one exhausts neither memory nor time."""

    member_bytes: int = 256 * MIB  # one photograph, which is held in memory
    # Maximum growth factor of a compressed archive (gzip reaches at most 1032).
    expansion: int = 100
    free_bytes: int = 256 * MIB  # allowed in addition to that
    names: int = 10_000_000  # photographs in one archive; each remembered name takes 80 bytes
    header_bytes: int = MIB  # of an extended header: long names, attributes
    depth: int = 2  # archives within archives


class LostError(Exception):
    """The rest of an archive cannot be read; the message gives the reason."""


class BombError(LostError):
    """The archive expands far beyond its limit, so the surrounding archives are abandoned too."""


class Growth:
    """Tracks how much an archive expands, over all its layers of compression."""

    def __init__(self, file: File, limits: Limits) -> None:
        self._file, self._limits, self._expanded = file, limits, 0

    def add(self, count: int) -> None:
        """Count decompressed bytes; raises `BombError` above the limit."""
        self._expanded += count
        if self._expanded > self._limits.free_bytes + self._limits.expansion * self._file.position:
            raise BombError(
                f"expands to more than {self._limits.expansion} times its size; is it a "
                "decompression bomb?"
            )


class Bytes(ABC):
    """A forward-only stream; `position` is the number of bytes read or skipped."""

    position = 0

    @abstractmethod
    def read(self, count: int) -> bytes:
        """Read `count` bytes, fewer only at the end. Raises `LostError`."""

    def skip(self, count: int) -> int:
        """Skip `count` bytes, fewer only at the end; returns the number skipped."""
        start = self.position
        while count > 0 and (data := self.read(min(count, MIB))):
            count -= len(data)
        return self.position - start


class File(Bytes):
    """A file on disk; skipping seeks instead of reading."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        try:
            data = self._file.read(count)
        except OSError as error:
            raise LostError(f"could not be read: {error.strerror or error}") from None
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        count = max(0, min(count, self._size - self.position))
        self.position = self._file.seek(self.position + count)
        return count


class _Expanded(Bytes):
    """Output of a decompressor; after an error, every read raises that error again."""

    def __init__(self, file: BinaryIO, growth: Growth) -> None:
        self._file, self._growth, self._failure = file, growth, ""

    def read(self, count: int) -> bytes:
        if self._failure:
            raise LostError(self._failure)
        try:
            data = self._file.read(count)
        except LostError:
            raise
        except EOFError:
            self._failure = "its compressed data is truncated"
        # Decompressors get hostile bytes here and may raise any exception.
        except Exception as error:
            self._failure = f"its compressed data is damaged ({' '.join(str(error).split())[:100]})"
        if self._failure:
            raise LostError(self._failure)
        self.position += len(data)
        self._growth.add(len(data))
        return data


class Window(Bytes):
    """Up to `size` next bytes of another stream, with look-ahead."""

    def __init__(self, source: Bytes, size: int = 1 << 63) -> None:
        self._source, self._left, self._head = source, size, b""

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes (fewer only at the end) without consuming them."""
        self._head += self._from_source(count - len(self._head))
        return self._head[:count]

    def read(self, count: int) -> bytes:
        head, self._head = self._head[:count], self._head[count:]
        data = self._from_source(count - len(head))
        self.position += len(head) + len(data)
        return head + data if head else data

    def skip(self, count: int) -> int:
        dropped = min(len(self._head), count)
        self._head = self._head[dropped:]
        skipped = self._source.skip(min(count - dropped, self._left))
        self._left -= skipped
        self.position += dropped + skipped
        return dropped + skipped

    def skip_rest(self) -> bool:
        """Skip the remaining bytes; returns False if the other stream ends first."""
        self.skip(len(self._head) + self._left)
        return self._left == 0

    def _from_source(self, count: int) -> bytes:
        data = self._source.read(min(count, self._left)) if count > 0 and self._left else b""
        self._left -= len(data)
        return data


class _XzFile(io.RawIOBase):
    """Same as `lzma.LZMAFile`, but with a memory limit that the file cannot exceed."""

    def __init__(self, source: Bytes) -> None:
        self._source = source
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = chunk = b""
        while not data:
            if self._decoder.eof:
                # Streams may be concatenated, with padding.
                chunk = self._decoder.unused_data.lstrip(b"\0")
                while not chunk:
                    chunk = self._source.read(1 << 16)
                    if not chunk:
                        return 0
                    chunk = chunk.lstrip(b"\0")
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)
            elif self._decoder.needs_input:
                chunk = self._source.read(1 << 16)
                if not chunk:
                    raise EOFError
            data, chunk = self._decoder.decompress(chunk, len(buffer)), b""
        buffer[: len(data)] = data
        return len(data)


def expanded(source: Window, growth: Growth) -> Window:
    """Return `source`, decompressed if it is compressed."""
    head = source.peek(BLOCK)
    if head.startswith(_GZIP):
        file = gzip.GzipFile(fileobj=source, mode="rb")
    elif head.startswith(_BZIP2):
        file = bz2.BZ2File(source)
    elif head.startswith(_XZ):
        file = io.BufferedReader(_XzFile(source))
    elif head.startswith(_ZSTD):
        try:
            file = importlib.import_module("compression.zstd").ZstdFile(source)
        except ImportError:
            raise LostError(
                "compressed with zstd, which needs Python 3.14; decompress it with `unzstd`"
            ) from None
    else:
        return source
    return Window(_Expanded(file, growth))


# --- Headers ---


class TarHeader(NamedTuple):
    name: str
    type: bytes
    size: int  # of the data that follows, in bytes
    is_sparse: bool


def next_header(source: Window, limit: int) -> TarHeader | None:
    """Read the header of the next member with its long name and size; `None` at the end.

    Raises `LostError` if the rest of the archive cannot be read.
    """
    extended: dict[str, bytes] = {}
    while True:
        block = source.read(BLOCK)
        if block == ZEROS:
            if extended:
                raise LostError("a long name without a file")
            block = after_end(source)
            if not block:
                return None
            if not is_tar(block):
                raise LostError("it is followed by data that is not a tar archive")
        if not block:
            raise LostError("it has no end mark; is it truncated?")
        header = _parsed(block, source)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(_payload(source, header.size, limit))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended.setdefault("path", _payload(source, header.size, limit).partition(b"\0")[0])
        elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _payload(source, header.size, limit)  # irrelevant to the name and data of this member
        else:
            return _with_extended(header, extended)


def _parsed(block: bytes, source: Window) -> TarHeader:
    """Parse a single header block; the size is that of the data that follows in the archive."""
    if len(block) < BLOCK:
        raise LostError("it is truncated within a header")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise LostError(f"corrupt header ending at byte {source.position} ({error})") from None
    if info.size < 0:
        raise LostError(
            f"the header ending at byte {source.position} has a size of {info.size} bytes"
        )
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE
    more = is_sparse and block[482]
    while more:  # the map of holes continues
        block = source.read(BLOCK)
        if len(block) < BLOCK:
            raise LostError("it is truncated within a header")
        more = block[504]
    # The size field of these types has another meaning.
    has_data = info.type not in (*LINKS, *DEVICES, tarfile.DIRTYPE)
    return TarHeader(info.name, info.type, info.size if has_data else 0, is_sparse)


def _payload(source: Window, size: int, limit: int) -> bytes:
    """Read the data of an extended header."""
    if size > limit:
        raise LostError(f"an extended header of {size} bytes exceeds the limit of {limit}")
    data = source.read(size + -size % BLOCK)
    if len(data) < size:
        raise LostError("it is truncated within a header")
    return data[:size]


def _pax_records(data: bytes) -> dict[str, bytes]:
    r"""Parse the relevant records `<length> <key>=<value>\n` of a pax header."""
    records, at = {}, 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else at
        key, equals, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise LostError("corrupt extended header")
        if key in (b"path", b"size"):
            records[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = b""
        at = end
    return records


def _with_extended(header: TarHeader, extended: dict[str, bytes]) -> TarHeader:
    """Return `header` with the values that extended headers replace."""
    name, size = header.name, header.size
    if "path" in extended:
        name = extended["path"].decode("utf-8", "surrogateescape")
    if "size" in extended and header.type not in (*LINKS, *DEVICES, tarfile.DIRTYPE):
        if not re.fullmatch(rb"\d{1,20}", extended["size"]):
            raise LostError("corrupt size in an extended header")
        size = int(extended["size"])
    return TarHeader(name, header.type, size, header.is_sparse or "sparse" in extended)


def after_end(source: Window) -> bytes:
    """Read the first non-zero block after the end of an archive; empty at the end of the file.

    Such a block means that another tar was appended.
    """
    for _ in range(_MAX_TAIL // BLOCK):
        block = source.read(BLOCK)
        if not block or block.count(0) < len(block):
            return block
    raise LostError(
        f"more than {_MAX_TAIL} zero bytes where a header should be (an unfinished download?)"
    )


def is_tar(head: bytes) -> bool:
    """Whether a tar header starts here, by its checksum."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
