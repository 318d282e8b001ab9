"""The bytes of an archive, read forwards and bounded whatever they say; and the headers of tar
archives among them.

A `File` is the archive on disk, a `Window` a part of another stream, `expanded` a decompressed one.
`next_header` reads a tar header with the long names and large sizes of whoever wrote it.
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
_XZ_MEMORY = 512 * MIB  # what `xz -9` and all usual settings stay below
COMPRESSED = _GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
ZEROS = bytes(BLOCK)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_MAX_TAIL = (
    4 * MIB
)  # zero bytes after an archive's end: more are a hole, as unfinished downloads have


@dataclass(frozen=True)
class Limits:
    """What an archive may ask for, so that a hostile one fills neither memory nor the day."""

    member_bytes: int = 256 * MIB  # a photograph, since it is held in memory
    expansion: int = (
        100  # a compressed archive may expand to this many times its size (gzip ends at 1032)
    )
    free_bytes: int = 256 * MIB  # ... and so much larger on top
    names: int = 10_000_000  # photographs in one archive: their names are remembered, 80 bytes each
    header_bytes: int = MIB  # an extended header: long names, attributes
    depth: int = 2  # archives within archives


class LostError(Exception):
    """The rest of an archive cannot be read; the message says why."""


class BombError(LostError):
    """The archive expands beyond all measure: whatever lies around it is given up too."""


class Growth:
    """How much the file of an archive has become, over all its layers of compression."""

    def __init__(self, file: File, limits: Limits) -> None:
        self._file, self._limits, self._expanded = file, limits, 0

    def add(self, count: int) -> None:
        """Count bytes that came out of a decompressor."""
        self._expanded += count
        if self._expanded > self._limits.free_bytes + self._limits.expansion * self._file.position:
            raise BombError(
                f"it expands to more than {self._limits.expansion} times its size: a decompression "
                "bomb?"
            )


class Bytes(ABC):
    """A stream that is read forwards. `position` is how much of it is done."""

    position = 0

    @abstractmethod
    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end. Raises `LostError`."""

    def skip(self, count: int) -> int:
        """Pass by as many bytes, fewer only at the end; returns how many."""
        start = self.position
        while count > 0 and (data := self.read(min(count, MIB))):
            count -= len(data)
        return self.position - start


class File(Bytes):
    """A file on a disk, which is skipped through without being read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        try:
            data = self._file.read(count)
        except OSError as error:
            raise LostError(f"it could not be read: {error.strerror or error}") from None
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        count = max(0, min(count, self._size - self.position))
        self.position = self._file.seek(self.position + count)
        return count


class _Expanded(Bytes):
    """What a decompressor gives. After an error it gives nothing but that error."""

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
            self._failure = "its compressed data is cut off"
        except (
            Exception
        ) as error:  # decompressors meet hostile bytes here and raise whatever they like
            self._failure = f"its compressed data is damaged ({' '.join(str(error).split())[:100]})"
        if self._failure:
            raise LostError(self._failure)
        self.position += len(data)
        self._growth.add(len(data))
        return data


class Window(Bytes):
    """The next bytes of another stream, `size` at most, with a look ahead."""

    def __init__(self, source: Bytes, size: int = 1 << 63) -> None:
        self._source, self._left, self._head = source, size, b""

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end, which `read` will give again."""
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
        """Pass by all that is left; False where the other stream ends before."""
        self.skip(len(self._head) + self._left)
        return self._left == 0

    def _from_source(self, count: int) -> bytes:
        data = self._source.read(min(count, self._left)) if count > 0 and self._left else b""
        self._left -= len(data)
        return data


class _XzFile(io.RawIOBase):
    """As `lzma.LZMAFile`, but a file cannot ask for any amount of memory."""

    def __init__(self, source: Bytes) -> None:
        self._source = source
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = chunk = b""
        while not data:
            if self._decoder.eof:
                chunk = self._decoder.unused_data.lstrip(
                    b"\0"
                )  # streams may follow one another, padded
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
    """`source`, decompressed where it is compressed."""
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
                "compressed by zstd, which needs Python 3.14; decompress it with `unzstd`"
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
    """The header of the next member, long names and sizes included; `None` at the end of the
    archive."""
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
                raise LostError("something that is no tar follows its end")
        if not block:
            raise LostError("it ends without an end mark: cut off?")
        header = _parsed(block, source)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(_payload(source, header.size, limit))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended.setdefault("path", _payload(source, header.size, limit).partition(b"\0")[0])
        elif header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _payload(source, header.size, limit)  # says nothing about this member's name and data
        else:
            return _with_extended(header, extended)


def _parsed(block: bytes, source: Window) -> TarHeader:
    """A header block alone, its size that of the data that follows in the archive."""
    if len(block) < BLOCK:
        raise LostError("it is cut off within a header")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise LostError(f"a corrupt header ends at byte {source.position} ({error})") from None
    if info.size < 0:
        raise LostError(f"a header that ends at byte {source.position} says {info.size} bytes")
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE
    more = is_sparse and block[482]
    while more:  # the map of the holes goes on
        block = source.read(BLOCK)
        if len(block) < BLOCK:
            raise LostError("it is cut off within a header")
        more = block[504]
    has_data = info.type not in (
        *LINKS,
        *DEVICES,
        tarfile.DIRTYPE,
    )  # the others' sizes mean something else
    return TarHeader(info.name, info.type, info.size if has_data else 0, is_sparse)


def _payload(source: Window, size: int, limit: int) -> bytes:
    """The data of an extended header."""
    if size > limit:
        raise LostError(f"an extended header of {size} bytes, above the limit of {limit}")
    data = source.read(size + -size % BLOCK)
    if len(data) < size:
        raise LostError("it is cut off within a header")
    return data[:size]


def _pax_records(data: bytes) -> dict[str, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header that matter here."""
    records, at = {}, 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else at
        key, equals, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise LostError("a corrupt extended header")
        if key in (b"path", b"size"):
            records[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = b""
        at = end
    return records


def _with_extended(header: TarHeader, extended: dict[str, bytes]) -> TarHeader:
    """`header` with what the extended headers before it say instead."""
    name, size = header.name, header.size
    if "path" in extended:
        name = extended["path"].decode("utf-8", "surrogateescape")
    if "size" in extended and header.type not in (*LINKS, *DEVICES, tarfile.DIRTYPE):
        if not re.fullmatch(rb"\d{1,20}", extended["size"]):
            raise LostError("a corrupt size in an extended header")
        size = int(extended["size"])
    return TarHeader(name, header.type, size, header.is_sparse or "sparse" in extended)


def after_end(source: Window) -> bytes:
    """The block after the zeros that end an archive; empty at the file's end, else another tar was
    put behind it."""
    for _ in range(_MAX_TAIL // BLOCK):
        block = source.read(BLOCK)
        if not block or block.count(0) < len(block):
            return block
    raise LostError(
        f"more than {_MAX_TAIL} zero bytes where a header should be (an unfinished download?)"
    )


def is_tar(head: bytes) -> bool:
    """Whether a tar's header starts here; its checksum says."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
