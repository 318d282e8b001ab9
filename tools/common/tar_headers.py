"""The headers of a tar archive, long names and large sizes included, of whoever wrote them."""

from __future__ import annotations

import re
import tarfile
from typing import NamedTuple

from tools.tar.streams import MIB, LostError, Window

ZEROS = bytes(BLOCK)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_MAX_TAIL = 4 * MIB           # zero bytes after an archive's end: more are a hole, as unfinished downloads have



class Header(NamedTuple):
    name: str
    type: bytes
    size: int  # of the data that follows, in bytes
    is_sparse: bool


def next_header(source: Window, limit: int) -> Header | None:
    """The header of the next member, long names and sizes included; `None` at the end of the archive."""
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


def _parsed(block: bytes, source: Window) -> Header:
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
    has_data = info.type not in (*LINKS, *DEVICES, tarfile.DIRTYPE)  # the others' sizes mean something else
    return Header(info.name, info.type, info.size if has_data else 0, is_sparse)


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


def _with_extended(header: Header, extended: dict[str, bytes]) -> Header:
    """`header` with what the extended headers before it say instead."""
    name, size = header.name, header.size
    if "path" in extended:
        name = extended["path"].decode("utf-8", "surrogateescape")
    if "size" in extended and header.type not in (*LINKS, *DEVICES, tarfile.DIRTYPE):
        if not re.fullmatch(rb"\d{1,20}", extended["size"]):
            raise LostError("a corrupt size in an extended header")
        size = int(extended["size"])
    return Header(name, header.type, size, header.is_sparse or "sparse" in extended)


def after_end(source: Window) -> bytes:
    """The block after the zeros that end an archive; empty at the file's end, else another tar was put behind it."""
    for _ in range(_MAX_TAIL // BLOCK):
        block = source.read(BLOCK)
        if not block or block.count(0) < len(block):
            return block
    raise LostError(f"more than {_MAX_TAIL} zero bytes where a header should be (an unfinished download?)")


def is_tar(head: bytes) -> bool:
    """Whether a tar's header starts here; its checksum says."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
