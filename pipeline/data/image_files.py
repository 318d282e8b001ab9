"""The files of a dataset: image kinds, the format of .npy crops, and the two file lists.

A dataset is a folder ("root") of RGB images of 8 or 16 bits, mostly `.npy` crops, uint8 or uint16
(height, width, 3), and two lists of the files for training and validation. Needs no torch, so that
the dataset tools run on machines without it.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import operator
import os
import re
import stat
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import UserError
from pipeline.data.image_headers import IMAGE_SUFFIXES, suffix_of
from pipeline.files import read_regular_file, write_atomically

NPY_SUFFIX = ".npy"
TRAINING_LIST = "training_file_list.txt"
VALIDATION_LIST = "validation_file_list.txt"
QUARANTINE = "quarantine"
MANIFEST = "manifest.jsonl"

_MAKE_CROPS = "make the crops with `python tools/images_to_data.py`"
_CHECK = "run `python tools/check_training_data.py --clean`, then select the training files again"
_NPY_WAY_OUT = (
    f"{_MAKE_CROPS}, or move the file out of the way with `python "
    "tools/check_training_data.py --clean`"
)
MAX_SIDE = 10**9  # pixels
_NPY_MAGIC = b"\x93NUMPY"
# What NumPy writes for an HWC array of uint8 or uint16; other headers take a slower path with exact
# messages.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?:[|<>=]u1|(<u2))', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), (\d{1,9}), 3\), \} *\n?"
)


class BadFileError(UserError):
    """A file that cannot be used for training; `reason` is the message without path and way out."""

    def __init__(self, path: str, reason: str, way_out: str = _CHECK) -> None:
        super().__init__(f"{path}: {reason}; {way_out}")
        self.path, self.reason = path, reason


class BadNpyError(BadFileError):
    """An `.npy` file that is not a dataset image."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason, _NPY_WAY_OUT)


class MissingFileError(BadFileError):
    """A file that is in a list but not on disk."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            "no such file",
            "write the lists again with `python tools/select_training_files.py`",
        )


class NpyLayout(NamedTuple):
    """Position of the pixels in an `.npy` image.

    They are C-order uint8 or little-endian uint16 (height, width, 3) from byte `offset` to the end
    of the file.
    """

    offset: int
    height: int
    width: int
    depth: int = 8  # bits per value: 8 or 16

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the stored values."""
        return np.dtype("u1" if self.depth == 8 else "<u2")

    @property
    def row_bytes(self) -> int:
        """Number of bytes of a row."""
        return self.width * 3 * self.dtype.itemsize


def is_npy(name: str | os.PathLike[str]) -> bool:
    """Return whether the suffix, in any letter case, is that of a pixel array."""
    return os.fspath(name).lower().endswith(NPY_SUFFIX)


def is_encoded(name: str | os.PathLike[str]) -> bool:
    """Return whether the suffix is one of `IMAGE_SUFFIXES`, in any letter case."""
    return suffix_of(name) in IMAGE_SUFFIXES


def npy_layout(path: str | os.PathLike[str]) -> NpyLayout:
    """Read only the header of an `.npy` image (uint8 or uint16, C order, height x width x 3).

    Raises `MissingFileError`, and `BadNpyError` if the file is not exactly such an array, to the
    byte. Raises `OSError` for disk and permission errors, which say nothing about the file itself.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingFileError(os.fspath(path)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadNpyError(os.fspath(path), "not a regular file")
        head = os.read(descriptor, 512)
        if head[:6] == _NPY_MAGIC and head[6:7] in (b"\2", b"\3") and len(head) == 512:
            head += os.read(descriptor, 65536)
    finally:
        os.close(descriptor)
    return npy_layout_of(os.fspath(path), head, status.st_size)


def read_npy(
    path: str, layout: NpyLayout, region: tuple[int, int, int, int], rows: bytearray
) -> NDArray[Any]:
    """Read the region (top, left, height, width) of an `.npy` image as (height, width, 3).

    Returns a view into `rows`, a buffer for at least `height` whole rows. Reading costs half as
    much as mapping the file again, and a file truncated meanwhile raises `BadNpyError` here,
    whereas touching its map would kill the process.
    """
    top, left, height, width = region
    stride = layout.row_bytes
    target = memoryview(rows)[: height * stride]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingFileError(path) from None
    try:
        count = os.preadv(descriptor, [target], layout.offset + top * stride)
    finally:
        os.close(descriptor)
    if count < len(target):
        raise BadNpyError(path, f"truncated while it was read: row {top + height - 1} is missing")
    pixels = np.frombuffer(target, layout.dtype).reshape(height, layout.width, 3)
    return pixels[:, left : left + width]


def load_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read a whole `.npy` image as (height, width, 3), uint8 or uint16 as it is stored.

    Raises the errors of `npy_layout`.
    """
    layout = npy_layout(path)
    pixels = np.fromfile(path, layout.dtype, offset=layout.offset)
    return pixels.reshape(layout.height, layout.width, 3)


def npy_layout_of(path: str, head: bytes, file_size: int | None = None) -> NpyLayout:
    """Parse the first bytes of an `.npy` file and check them against the file size.

    Without a size, `head` is the whole file. Raises `BadNpyError`, which names `path`.
    """
    file_size = len(head) if file_size is None else file_size
    offset, header = _npy_header(path, head)
    match = _NPY_HEADER.fullmatch(header)
    if match:
        height, width, depth = int(match[2]), int(match[3]), 16 if match[1] else 8
    else:
        height, width, depth = _npy_array(path, header)
    if not (height and width):
        raise BadNpyError(path, f"an image of {height}x{width} pixels is empty")
    layout = NpyLayout(offset, height, width, depth)
    expected = offset + height * layout.row_bytes
    if file_size != expected:
        what = "truncated" if file_size < expected else "too long"
        raise BadNpyError(
            path,
            f"{what}: {height}x{width}x3 {'bytes' if depth == 8 else 'uint16'} of pixels need a "
            f"file of {expected} bytes, not {file_size}",
        )
    return layout


def _npy_header(path: str, head: bytes) -> tuple[int, bytes]:
    """Return (offset of the pixels, header text) from the first bytes of an `.npy` file."""
    if not head:
        raise BadNpyError(path, "empty file, not an .npy array")
    if head[:6] != _NPY_MAGIC or len(head) < 12:
        raise BadNpyError(path, f"not an .npy array (its first bytes are {head[:6]!r})")
    if head[6] == 1:
        start, length = 10, struct.unpack_from("<H", head, 8)[0]
    elif head[6] in (2, 3):
        start, length = 12, struct.unpack_from("<I", head, 8)[0]
    else:
        raise BadNpyError(path, f".npy version {head[6]} is not supported; it must be 1, 2 or 3")
    if len(head) < start + length:
        raise BadNpyError(path, "the .npy header is truncated or far too long")
    return start + length, head[start : start + length]


def _npy_array(path: str, header: bytes) -> tuple[int, int, int]:
    """Return (height, width, depth in bits) from a header that NumPy would write differently.

    Raises `BadNpyError` with the reason if the array cannot be used.
    """
    try:
        fields = ast.literal_eval(header.decode("latin1").strip())
        kind, fortran, shape = fields["descr"], fields["fortran_order"], tuple(fields["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise BadNpyError(path, "the .npy header cannot be read") from None
    if isinstance(kind, str) and "O" in kind:
        raise BadNpyError(path, "an array of Python objects (a pickle) is never opened")
    if not isinstance(kind, str) or (kind.lstrip("|<>=") != "u1" and kind != "<u2"):
        raise BadNpyError(
            path,
            f"pixels must be uint8 (0..255) or little-endian uint16 (0..65535), not {kind!r}",
        )
    if (
        len(shape) != 3
        or not all(isinstance(side, int) and 0 <= side < MAX_SIDE for side in shape)
        or shape[2] != 3
    ):
        raise BadNpyError(path, f"the shape must be (height, width, 3), not {shape}")
    if fortran:
        raise BadNpyError(path, "the pixels must be in C order (row after row), not Fortran order")
    return shape[0], shape[1], 16 if kind == "<u2" else 8


def read_file_list(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[str]:
    """Return the sorted file names in the list `path`.

    Names are UTF-8 POSIX paths relative to the dataset `root`, one per line. Blank lines are
    ignored. Whether the files exist is checked where they are opened. Raises `UserError` for a
    missing, empty or unreadable list, and for a name that is absolute, contains `..` or occurs
    twice.
    """
    way_out = f"write it with `python tools/select_training_files.py --data-dir {os.fspath(root)}`"
    try:
        text = read_regular_file(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{os.fspath(path)}: no such file list; {way_out}") from None
    except IsADirectoryError:
        raise UserError(f"{os.fspath(path)}: a folder, not a file list; {way_out}") from None
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {error.strerror}; {way_out}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not UTF-8 at byte {error.start}; {way_out}") from None
    lines = (
        text.split("\n") if "\r" not in text else [line.rstrip("\r") for line in text.split("\n")]
    )
    names = sorted(filter(None, lines))
    if not _may_leave(text) and not any(map(operator.eq, names, itertools.islice(names, 1, None))):
        if not names:
            raise UserError(f"{os.fspath(path)}: the list is empty; {way_out}")
        return names
    seen: set[str] = set()  # slow path: find the line to report
    for number, name in enumerate(lines, 1):
        where = f"{os.fspath(path)}, line {number}"
        _check_name(name, where, way_out)
        if name and name in seen:
            raise UserError(f"{where}: {name!r} is in the list twice; {way_out}")
        seen.add(name)
    return names


# Lists hold millions of names, and every start reads and hashes them several times. So the whole
# text is searched at once for signs of a bad name, and names are checked one by one only if it has
# any.


def _may_leave(text: str) -> bool:
    """Return whether a name in `text`, one per line, might lead out of the dataset.

    If not, `_check_name` accepts all of them.
    """
    return text.startswith("/") or "\n/" in text or "\0" in text or ".." in text


def _check_name(name: str, where: str, way_out: str) -> None:
    """Raise `UserError` for a name that could lead out of the dataset."""
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise UserError(
            f"{where}: {name!r} must be a path inside the dataset folder (relative, no '..'); "
            f"{way_out}"
        )


def write_file_list(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Write `names` (POSIX paths relative to the dataset root) to the list `path`, sorted.

    The list is written atomically. Raises `UserError` for a name that leads out of the dataset or
    does not fit on a line of UTF-8.
    """
    write_atomically(path, _list_bytes(names))


def is_listable(name: str) -> bool:
    """Return whether a file list can hold a name: it has no line break and is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\n" not in name and "\r" not in name


def lists_hash(*lists: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of the content of file lists, in the given order.

    It is the same on every node with the same data.
    """
    digest = hashlib.sha256()
    for names in lists:
        digest.update(hashlib.sha256(_list_bytes(names)).digest())
    return digest.hexdigest()


def _list_bytes(names: Iterable[str]) -> bytes:
    """Return the content of a file list: the sorted names, one per line."""
    names = sorted(names)
    text = "\n".join([*names, ""])
    # An empty name adds an empty line, and a name with a line break adds a line.
    if (
        _may_leave(text)
        or "\r" in text
        or text.startswith("\n")
        or "\n\n" in text
        or text.count("\n") != len(names)
    ):
        for name in names:
            _check_name(name, "file list", "rename or move the file")
            if "\n" in name or "\r" in name or not name:
                raise UserError(
                    f"{name!r}: a file list cannot hold a name with a line break; rename the file"
                )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{error.object[: error.end]!r}...: a file list cannot hold a name that is not UTF-8; "
            "rename the file"
        ) from None
