"""Check whether single files can be trained on; used by check_training_data.py for every image."""

from __future__ import annotations

import enum
import filecmp
import hashlib
import os
import posixpath
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.data.decoding import HostDecoder
from pipeline.data.image_files import BadFileError, BadNpyError, is_npy, load_npy, npy_layout
from pipeline.data.image_headers import (
    BadImageError,
    ImageHeader,
    NoEndError,
    can_check,
    check_complete,
    check_file_size,
    read_header,
)
from pipeline.data.image_pixels import (
    check_megapixels,
    decode_rgb,
    foreign_profile,
    has_fast_decoder,
    to_8_bits,
)
from tools.crops.duplicates import NearDuplicates
from tools.crops.leakage import BenchmarkIndex
from tools.crops.manifest import CropRecord, DatasetHash, ManifestIndex, iterate_records
from tools.crops.pairs import tone_fault
from tools.crops.quality import file_gates, is_flat, is_soft
from tools.files import printable


class FileStatus(enum.Enum):
    """Outcome of checking a file."""

    GOOD = "good"
    BAD = "bad"
    UNREADABLE = "could not be read"  # an I/O problem, never a reason to remove the file


@dataclass(frozen=True)
class FileCheck:
    """Result of checking one file: status, reason, and the number of bytes read.

    `path` is relative to the dataset.
    """

    path: str
    status: FileStatus
    reason: str = ""
    bytes: int = 0
    # Gate that a bad file fails: file (broken), size, flat, soft, leak, pair, duplicate,
    # near-duplicate.
    gate: str = ""
    perceptual_hash: str = ""  # of a good file, in hexadecimal, if known
    sha256: str = ""  # of the pixels, if a manifest lists the file
    profile: str = ""  # colour profile of a good file, if training converts it to sRGB
    depth: int = 8  # bits per value of a good file, 8 or 16


@dataclass(frozen=True)
class FileRules:
    """Requirements for a file; sizes apply to both sides, in pixels."""

    min_size: int
    max_size: int | None
    max_megapixels: float
    decode: bool  # False: check only the container's checksums, markers and lengths
    min_gradient: float = 0
    min_sharpness: float = 0


class FileChecker:
    """Checks files; thread-safe."""

    def __init__(
        self, root: Path, rules: FileRules, crops: ManifestIndex, benchmark: BenchmarkIndex | None
    ) -> None:
        self._root, self._rules, self._crops, self._benchmark = root, rules, crops, benchmark
        self._of_thread = threading.local()
        self._listings: dict[str, list[str]] = {}

    def __call__(self, name: str) -> FileCheck:
        """Check the file `name`, relative to the dataset.

        Returns the problem instead of raising, whatever is wrong with the file.
        """
        path, record = self._root / name, self._crops.get(name)
        try:
            profile = ""
            if is_npy(name):
                size, pixels, depth = self._check_npy(path, record)
            else:
                size, pixels, depth, profile = self._check_encoded(path, record)
            gates = self._gates(record, pixels)
            self._check_gates(gates)
            self._check_leak(pixels, record)
            self._check_pair(name, record, pixels)
        except BadNpyError as error:
            return FileCheck(name, FileStatus.BAD, error.reason, gate="file")
        except _GateError as error:
            return FileCheck(name, FileStatus.BAD, error.reason, gate=error.gate)
        except BadImageError as error:
            return FileCheck(name, FileStatus.BAD, str(error), gate="file")
        except MemoryError:  # not the file's fault: the size in its header is within the limits
            return FileCheck(name, FileStatus.UNREADABLE, "not enough memory to read it")
        # Includes FileNotFoundError: a dangling link, or a file that was removed meanwhile.
        except OSError as error:
            return FileCheck(name, FileStatus.UNREADABLE, error.strerror or str(error))
        return FileCheck(
            name,
            FileStatus.GOOD,
            "",
            size,
            perceptual_hash=str(gates.get("hash", "")),
            sha256=record.sha256 if record else "",
            profile=profile,
            depth=depth,
        )

    def _check_npy(
        self, path: Path, record: CropRecord | None
    ) -> tuple[int, np.ndarray | None, int]:
        """Return (bytes read, pixels in 8 bits, depth).

        The pixels are `None` if only the header was read.
        """
        if not path.exists():
            raise FileNotFoundError(None, "No such file (a dangling link?)")
        layout = npy_layout(path)
        self._check_size(layout.height, layout.width, record)
        check_megapixels(
            ImageHeader("npy", layout.height, layout.width), self._rules.max_megapixels
        )
        if not self._rules.decode:
            return layout.offset, None, layout.depth
        with open(path, "rb") as file:
            file.seek(layout.offset)
            data = file.read()
        if record:
            _check_pixels(record, data)
        pixels = np.frombuffer(data, layout.dtype).reshape(layout.height, layout.width, 3)
        return layout.offset + len(data), to_8_bits(pixels), layout.depth

    def _check_encoded(
        self, path: Path, record: CropRecord | None
    ) -> tuple[int, np.ndarray | None, int, str]:
        """Return (bytes read, pixels, depth, converted colour profile).

        The pixels have 8 bits; they are `None` if they need not be decoded.
        """
        with open(path, "rb") as file:
            header = read_header(file)
            self._check_size(header.height, header.width, record)
            check_megapixels(header, self._rules.max_megapixels)
            check_file_size(header, os.fstat(file.fileno()).st_size)
            file.seek(0)
            if not self._rules.decode and can_check(header):
                data = self._read_into_buffer(file)
                try:
                    check_complete(data, header)
                    return len(data), None, header.pixel_depth, foreign_profile(header)
                except NoEndError:  # only decoding shows whether pixels are missing
                    data = bytes(data)
            else:
                data = file.read()
        pixels = self._decode(data, header)
        if record and self._rules.decode:
            _check_pixels(record, pixels)
        decoded = to_8_bits(pixels) if self._rules.decode else None
        return len(data), decoded, header.pixel_depth, foreign_profile(header)

    def _read_into_buffer(self, file: BinaryIO) -> memoryview:
        """Read a whole file into a buffer that the thread's next call reuses.

        Allocating new memory would take as long as reading the file.
        """
        size = os.fstat(file.fileno()).st_size
        buffer = getattr(self._of_thread, "buffer", b"")
        if len(buffer) <= size:
            buffer = self._of_thread.buffer = bytearray(size + (1 << 20))
        view, length = memoryview(buffer), 0
        while count := file.readinto(view[length:]):
            length += count
        return view[:length]

    def _decode(self, data: bytes, header: ImageHeader) -> np.ndarray:
        """Decode the pixels as training does, in the depth of the file.

        Raises `BadImageError` also for damage that only `decode_rgb` detects.
        """
        if not header.is_for_dali or has_fast_decoder(header):
            # The same pixels that DALI decodes or receives.
            return decode_rgb(data, header, header.pixel_depth)
        # DALI accepts damaged files that the tools which cut crops reject.
        if header.format == "jpeg":
            decode_rgb(data, header)
        else:
            check_complete(data, header)
        decoder = getattr(self._of_thread, "decoder", None)
        if decoder is None:
            decoder = self._of_thread.decoder = HostDecoder(threads=1, batch=1)
        return decoder.decode_content(data)

    def _check_size(self, height: int, width: int, record: CropRecord | None) -> None:
        rules = self._rules
        if min(height, width) < rules.min_size and not (record and record.role == "lr"):
            raise _GateError(
                "size",
                f"{height}x{width} is too small: both sides must be at least {rules.min_size} "
                "(--min-size)",
            )
        if rules.max_size is not None and max(height, width) > rules.max_size:
            raise _GateError(
                "size",
                f"{height}x{width} is too large: both sides may be at most {rules.max_size} "
                "(--max-size)",
            )

    def _gates(
        self, record: CropRecord | None, pixels: np.ndarray | None
    ) -> Mapping[str, float | str]:
        """Gate measures from when the crop was cut (its pixels are unchanged), or measured now."""
        if record:
            return record.gates if record.role != "lr" else {}
        if pixels is None or min(pixels.shape[:2]) < 8:  # too few pixels to measure
            return {}
        return file_gates(pixels)

    def _check_gates(self, gates: Mapping[str, float | str]) -> None:
        rules = self._rules
        if "gradient" in gates and is_flat(gates, rules.min_gradient):
            raise _GateError(
                "flat",
                f"flat: gradient of {gates['gradient']:.3g} gray levels per pixel is below "
                f"{rules.min_gradient:g} (--min-gradient)",
            )
        if "source_sharpness" in gates and is_soft(gates, rules.min_sharpness):
            raise _GateError(
                "soft",
                f"blurred or upscaled: sharpness of {gates['source_sharpness']:.3g} is below "
                f"{rules.min_sharpness:g} (--min-sharpness)",
            )

    def _check_leak(self, pixels: np.ndarray | None, record: CropRecord | None) -> None:
        if self._benchmark is None or pixels is None or (record and record.role == "lr"):
            return
        leak = self._benchmark.find(pixels)
        if leak:
            raise _GateError("leak", f"near-identical to the benchmark image {leak} (--against)")

    def _check_pair(self, name: str, record: CropRecord | None, hr: np.ndarray | None) -> None:
        """Compare an HR image with its LR sides, if it has any and its pixels were read."""
        if hr is None:
            return
        if record:
            names = [record.lr] if record.lr else []
        else:
            names = _sides_by_name(self._root, name, self._listings)
        for lr_name in names:
            mark = _LR_MARK.search(lr_name)
            lr = self._lr_pixels(lr_name) if mark else None
            if mark is None or lr is None:
                continue
            scale = int(mark[1])
            if lr.shape != (hr.shape[0] // scale, hr.shape[1] // scale, 3):
                raise _GateError(
                    "pair",
                    f"its LR side, {printable(lr_name)}, has {lr.shape[0]}x{lr.shape[1]} pixels, "
                    f"not 1/{scale} of {hr.shape[0]}x{hr.shape[1]}",
                )
            if fault := tone_fault(hr[: lr.shape[0] * scale, : lr.shape[1] * scale], lr):
                raise _GateError("pair", f"not a pair with {printable(lr_name)}: {fault}")

    def _lr_pixels(self, name: str) -> np.ndarray | None:
        """Read an LR side; `None` if it is broken, which the check of that file reports."""
        path = self._root / name
        try:
            if is_npy(name):
                return to_8_bits(load_npy(path))
            with open(path, "rb") as file:
                header = read_header(file)
                check_megapixels(header, self._rules.max_megapixels)
                file.seek(0)
                return decode_rgb(file.read(), header)
        except (BadFileError, BadImageError, OSError):
            return None


class _GateError(Exception):
    """A file that must not be trained on, rejected by a gate."""

    def __init__(self, gate: str, reason: str) -> None:
        super().__init__(reason)
        self.gate, self.reason = gate, reason


def _check_pixels(record: CropRecord, pixels: bytes | np.ndarray) -> None:
    if hashlib.sha256(pixels).hexdigest() != record.sha256:
        raise BadImageError(
            "the pixels differ from those that the manifest recorded (bit rot, or the file was "
            "changed)"
        )


# --- Duplicates within a dataset ---


class DuplicateFiles:
    """Finds the good files that repeat an earlier one, given the results of all files in order.

    Files are stored by their position in that order rather than by name, so millions of them need
    little memory.
    """

    def __init__(self, root: Path, max_distance: int) -> None:
        """`max_distance`: largest distance of perceptual hashes, in bits, between duplicates."""
        self._root = root
        self._hashes = NearDuplicates(max_distance)
        self._count = 0
        self._found: list[tuple[FileCheck, int]] = []

    def is_duplicate(self, check: FileCheck) -> bool:
        """Whether an earlier file shows the same picture.

        Must be called for every result, in order.
        """
        number, self._count = self._count, self._count + 1
        if check.status is not FileStatus.GOOD or not check.perceptual_hash:
            return False
        earlier = self._hashes.add(number, bytes.fromhex(check.perceptual_hash))
        if earlier is None:
            return False
        self._found.append((check, int(earlier)))
        return True

    def resolve(self, names: Iterable[str]) -> tuple[list[FileCheck], list[FileCheck]]:
        """Return (results of the duplicates, results of earlier files that are no longer good).

        The latter are links to a duplicate: the file stays, not the link. `names` are the names of
        all files, in the same order as before.
        """
        wanted = {earlier for _, earlier in self._found}
        named = (
            {number: name for number, name in enumerate(names) if number in wanted}
            if wanted
            else {}
        )
        targets: dict[int, str] = {}  # the file that is kept instead of an earlier link to it
        for check, earlier in self._found:
            if earlier not in targets and self._is_link_to(named[earlier], check.path):
                targets[earlier] = check.path
        duplicates, links = [], []
        for check, earlier in self._found:
            if targets.get(earlier) == check.path:
                duplicates.append(check)
                links.append(
                    self._duplicate(replace(check, path=named[earlier], bytes=0), check.path)
                )
            else:
                duplicates.append(self._duplicate(check, targets.get(earlier, named[earlier])))
        return duplicates, links

    def _is_link_to(self, name: str, other: str) -> bool:
        """Whether `name` is a symbolic link to `other`, which is not a link itself."""
        try:
            return (
                (self._root / name).is_symlink()
                and not (self._root / other).is_symlink()
                and os.path.samefile(self._root / name, self._root / other)
            )
        except OSError:  # one of them was removed meanwhile
            return False

    def _duplicate(self, check: FileCheck, earlier: str) -> FileCheck:
        path, other = self._root / check.path, self._root / earlier
        what, gate = "nearly the same image as", "near-duplicate"
        try:
            if os.path.samefile(path, other):
                what, gate = (
                    ("a link to" if path.is_symlink() or other.is_symlink() else "a hard link of"),
                    "duplicate",
                )
            elif filecmp.cmp(path, other, shallow=False):
                what, gate = "the same file as", "duplicate"
        except OSError:  # one of them was removed meanwhile
            pass
        return replace(
            check,
            status=FileStatus.BAD,
            gate=gate,
            reason=f"{what} {printable(earlier)} (--keep-duplicates)",
        )


# --- The other side of HR and LR crops: neither can be trained on without it ---


_LR_MARK = re.compile(r"_lr([1-9]\d*)\.\w+$")
_SIDE = re.compile(r"((?:f\d+_)?x\d+_\d+_\d+)(_lr\d+)?(\.\w+)")


def other_sides(
    root: Path, crops: ManifestIndex, manifests: Iterable[str], names: Collection[str]
) -> dict[str, str]:
    """Map the other side of each pair to the name in `names`, both relative to `root`.

    Pairs are taken from the manifests. For crops in no manifest, the file names decide
    (`x1_000_000_lr4.npy` beside `x1_000_000.npy`). Only existing files are returned.
    """
    sides: dict[str, str] = {}
    lr_names: set[str] = set()
    listings: dict[str, list[str]] = {}
    for name in names:
        record = crops.get(name)
        if record is None:
            sides |= dict.fromkeys(_sides_by_name(root, name, listings), name)
        elif record.lr:
            sides[record.lr] = name
        elif record.role == "lr":
            lr_names.add(name)
    if lr_names:
        sides |= {
            record.path: record.lr
            for record in iterate_records(root, manifests)
            if record.lr in lr_names
        }
    return {other: name for other, name in sides.items() if os.path.lexists(root / other)}


def _sides_by_name(root: Path, name: str, listings: dict[str, list[str]]) -> list[str]:
    """Files beside `name` that are its other side; `listings` caches the contents of folders."""
    folder, base = posixpath.split(name)
    side = _SIDE.fullmatch(base)
    if side is None:
        return []
    if side[2]:
        return [posixpath.join(folder, f"{side[1]}{side[3]}")]
    if folder not in listings:
        listings[folder] = [entry for entry in os.listdir(root / folder) if "_lr" in entry]
    lr = re.compile(rf"{re.escape(side[1])}_lr\d+{re.escape(side[3])}")
    return [posixpath.join(folder, entry) for entry in listings[folder] if lr.fullmatch(entry)]


# --- Results of checking a dataset ---


@dataclass
class Findings:
    """Results of a check; good files are only counted, because a dataset may have millions."""

    good: int = 0
    bytes: int = 0
    seconds: float = 0
    bad: list[FileCheck] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    # Good files by colour profile, if not sRGB.
    converted: Counter[str] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)  # of good files: bits -> files
    # Hash of the good files that a manifest lists.
    recorded: DatasetHash = field(default_factory=DatasetHash)

    def uncount(self, check: FileCheck, sha256: str) -> None:
        """Uncount a file that was counted as good; the caller must count it again."""
        self.good -= 1
        if sha256:
            self.recorded.remove(check.path, sha256)
