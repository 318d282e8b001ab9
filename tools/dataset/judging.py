"""Whether one file can be trained on: what check_training_data.py asks of every image."""

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
from pipeline.data.image_files import BadNpyError, is_npy, npy_layout
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
)
from tools.crops.duplicates import NearDuplicates
from tools.crops.leakage import BenchmarkIndex
from tools.crops.manifest import CropRecord, DatasetHash, ManifestIndex, iterate_records
from tools.crops.quality import file_gates, is_flat, is_soft
from tools.files import printable


class Verdict(enum.Enum):
    """What is known of a file."""

    GOOD = "good"
    BAD = "bad"
    UNREADABLE = "could not be read"  # says nothing about the file: never a reason to remove it


@dataclass(frozen=True)
class Judgement:
    """The verdict on one file (a path relative to the dataset), its reason, and how many bytes were
    read for it."""

    path: str
    verdict: Verdict
    reason: str = ""
    bytes: int = 0
    gate: str = (
        ""  # of a bad file: file (broken), size, flat, soft, leak, duplicate, near-duplicate
    )
    perceptual_hash: str = ""  # of a good file, in hexadecimal, where it is known
    sha256: str = ""  # of its pixels, where a manifest knows it
    profile: str = ""  # of a good file's colours, where training converts them to sRGB


@dataclass(frozen=True)
class Rules:
    """What a file must fulfil. Sizes are of both sides, in pixels."""

    min_size: int
    max_size: int | None
    max_megapixels: float
    decode: bool  # False: the container's checksums, markers and lengths only
    min_gradient: float = 0
    min_sharpness: float = 0


class Judge:
    """Judges files on any number of threads."""

    def __init__(
        self, root: Path, rules: Rules, crops: ManifestIndex, benchmark: BenchmarkIndex | None
    ) -> None:
        self._root, self._rules, self._crops, self._benchmark = root, rules, crops, benchmark
        self._of_thread = threading.local()

    def __call__(self, name: str) -> Judgement:
        """The judgement on the file `name`, relative to the dataset. Raises nothing that a file
        could cause."""
        path, record = self._root / name, self._crops.get(name)
        try:
            profile = ""
            if is_npy(name):
                size, pixels = self._judge_npy(path, record)
            else:
                size, pixels, profile = self._judge_encoded(path, record)
            gates = self._gates(record, pixels)
            self._check_gates(gates)
            self._refuse_leak(pixels, record)
        except BadNpyError as error:
            return Judgement(name, Verdict.BAD, error.reason, gate="file")
        except _GateError as error:
            return Judgement(name, Verdict.BAD, error.reason, gate=error.gate)
        except BadImageError as error:
            return Judgement(name, Verdict.BAD, str(error), gate="file")
        except (
            MemoryError
        ):  # says nothing about the file: what its header promises is within the limits
            return Judgement(name, Verdict.UNREADABLE, "not enough memory to read it")
        # FileNotFoundError too: a link into nowhere, or a file that went while we looked
        except OSError as error:
            return Judgement(name, Verdict.UNREADABLE, error.strerror or str(error))
        return Judgement(
            name,
            Verdict.GOOD,
            "",
            size,
            perceptual_hash=str(gates.get("hash", "")),
            sha256=record.sha256 if record else "",
            profile=profile,
        )

    def _judge_npy(self, path: Path, record: CropRecord | None) -> tuple[int, np.ndarray | None]:
        """(Bytes read, pixels or `None` where only the header was read)."""
        if not path.exists():
            raise FileNotFoundError(None, "No such file (a link into nowhere?)")
        layout = npy_layout(path)
        self._check_size(layout.height, layout.width, record)
        check_megapixels(
            ImageHeader("npy", layout.height, layout.width), self._rules.max_megapixels
        )
        if not self._rules.decode:
            return layout.offset, None
        with open(path, "rb") as file:
            file.seek(layout.offset)
            data = file.read()
        if record:
            _check_pixels(record, data)
        return layout.offset + len(data), np.frombuffer(data, np.uint8).reshape(
            layout.height, layout.width, 3
        )

    def _judge_encoded(
        self, path: Path, record: CropRecord | None
    ) -> tuple[int, np.ndarray | None, str]:
        """(Bytes read, pixels or `None` where they need not be decoded, profile that they are
        converted from)."""
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
                    return len(data), None, foreign_profile(header)
                except NoEndError:  # only decoding tells whether pixels are missing
                    data = bytes(data)
            else:
                data = file.read()
        pixels = self._decode(data, header)
        if record and self._rules.decode:
            _check_pixels(record, pixels)
        return len(data), pixels if self._rules.decode else None, foreign_profile(header)

    def _read_into_buffer(self, file: BinaryIO) -> memoryview:
        """All of a file, in memory that the next call uses again: to get new memory costs as much
        as to read."""
        size = os.fstat(file.fileno()).st_size
        buffer = getattr(self._of_thread, "buffer", b"")
        if len(buffer) <= size:
            buffer = self._of_thread.buffer = bytearray(size + (1 << 20))
        view, length = memoryview(buffer), 0
        while count := file.readinto(view[length:]):
            length += count
        return view[:length]

    def _decode(self, data: bytes, header: ImageHeader) -> np.ndarray:
        """The pixels that training would read. Raises `BadImageError` also where only `decode_rgb`
        sees damage."""
        if not header.is_for_dali or (has_fast_decoder(header) and header.format != "jp2"):
            return decode_rgb(data, header)  # the pixels that DALI gives, or is given
        if header.format in (
            "tiff",
            "jpeg",
        ):  # DALI takes damaged ones that the tools which cut crops turn away
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
        """What the gates measured when the crop was cut (its pixels are still the same), or measure
        now."""
        if record:
            return record.gates if record.role != "lr" else {}
        if pixels is None or min(pixels.shape[:2]) < 8:  # nothing can be told of a few pixels
            return {}
        return file_gates(pixels)

    def _check_gates(self, gates: Mapping[str, float | str]) -> None:
        rules = self._rules
        if gates and is_flat(gates, rules.min_gradient):
            raise _GateError(
                "flat",
                f"flat: its gradient of {gates['gradient']:.3g} grey levels a pixel is below "
                f"{rules.min_gradient:g} (--min-gradient)",
            )
        if "source_sharpness" in gates and is_soft(gates, rules.min_sharpness):
            raise _GateError(
                "soft",
                f"blurred or upscaled: its sharpness of {gates['source_sharpness']:.3g} is below "
                f"{rules.min_sharpness:g} (--min-sharpness)",
            )

    def _refuse_leak(self, pixels: np.ndarray | None, record: CropRecord | None) -> None:
        if self._benchmark is None or pixels is None or (record and record.role == "lr"):
            return
        leak = self._benchmark.find(pixels)
        if leak:
            raise _GateError("leak", f"near-identical to the benchmark image {leak} (--against)")


class _GateError(Exception):
    """A whole file that should not be trained on."""

    def __init__(self, gate: str, reason: str) -> None:
        super().__init__(reason)
        self.gate, self.reason = gate, reason


def _check_pixels(record: CropRecord, pixels: bytes | np.ndarray) -> None:
    if hashlib.sha256(pixels).hexdigest() != record.sha256:
        raise BadImageError(
            "its pixels are not those that the manifest recorded (bit rot, or somebody changed it)"
        )


# Copies within a dataset: files that are the same as an earlier one, or nearly so.


class Twins:
    """Takes the judgements on all files of a dataset, in order, and finds the good ones that repeat
    an earlier one.

    Files are remembered by their number in that order, not by name, so that millions need little
    memory.
    """

    def __init__(self, root: Path, max_distance: int) -> None:
        """`max_distance` is of perceptual hashes, in bits: up to it two images count as the
        same."""
        self._root = root
        self._hashes = NearDuplicates(max_distance)
        self._count = 0
        self._found: list[tuple[Judgement, int]] = []

    def is_twin(self, judgement: Judgement) -> bool:
        """Whether an earlier file shows the same; every judgement must be asked for, in order."""
        number, self._count = self._count, self._count + 1
        if judgement.verdict is not Verdict.GOOD or not judgement.perceptual_hash:
            return False
        earlier = self._hashes.add(number, bytes.fromhex(judgement.perceptual_hash))
        if earlier is None:
            return False
        self._found.append((judgement, int(earlier)))
        return True

    def verdicts(self, names: Iterable[str]) -> tuple[list[Judgement], list[Judgement]]:
        """(Judgements on the twins, judgements on earlier files that were called good and are not).

        The latter are links to a twin: the file stays, not the link. `names` are those of all
        files, in the same order as before.
        """
        wanted = {earlier for _, earlier in self._found}
        named = (
            {number: name for number, name in enumerate(names) if number in wanted}
            if wanted
            else {}
        )
        targets: dict[int, str] = {}  # the file that stays in place of an earlier link to it
        for judgement, earlier in self._found:
            if earlier not in targets and self._is_link_to(named[earlier], judgement.path):
                targets[earlier] = judgement.path
        twins, links = [], []
        for judgement, earlier in self._found:
            if targets.get(earlier) == judgement.path:
                twins.append(judgement)
                links.append(
                    self._verdict(replace(judgement, path=named[earlier], bytes=0), judgement.path)
                )
            else:
                twins.append(self._verdict(judgement, targets.get(earlier, named[earlier])))
        return twins, links

    def _is_link_to(self, name: str, other: str) -> bool:
        """Whether `name` is a symbolic link that leads to the file `other`, and that one is
        none."""
        try:
            return (
                (self._root / name).is_symlink()
                and not (self._root / other).is_symlink()
                and os.path.samefile(self._root / name, self._root / other)
            )
        except OSError:  # one of them went while we looked
            return False

    def _verdict(self, judgement: Judgement, earlier: str) -> Judgement:
        path, other = self._root / judgement.path, self._root / earlier
        what, gate = "nearly the same image as", "near-duplicate"
        try:
            if os.path.samefile(path, other):
                what, gate = (
                    ("a link to" if path.is_symlink() or other.is_symlink() else "a hard link of"),
                    "duplicate",
                )
            elif filecmp.cmp(path, other, shallow=False):
                what, gate = "the same file as", "duplicate"
        except OSError:  # one of them went while we looked
            pass
        return replace(
            judgement,
            verdict=Verdict.BAD,
            gate=gate,
            reason=f"{what} {printable(earlier)} (--keep-duplicates)",
        )


# The other side of HR and LR crops: neither can be trained on without it.


_SIDE = re.compile(r"((?:f\d+_)?x\d+_\d+_\d+)(_lr\d+)?(\.\w+)")


def other_sides(
    root: Path, crops: ManifestIndex, manifests: Iterable[str], names: Collection[str]
) -> dict[str, str]:
    """Other side -> name, for those of `names` (relative to `root`) that are a side of a pair.

    The manifests tell; of crops that no manifest knows, the names (`x1_000_000_lr4.npy` beside
    `x1_000_000.npy`). Only files that are there.
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
    """The files beside `name` that are the other side of it; `listings` remembers folders that were
    looked into."""
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


# What a check of a dataset found.


@dataclass
class Findings:
    """What a check found, good files only as numbers: a dataset may have millions."""

    good: int = 0
    bytes: int = 0
    seconds: float = 0
    bad: list[Judgement] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    converted: Counter[str] = field(
        default_factory=Counter
    )  # good files by the profile of their colours, if not sRGB
    recorded: DatasetHash = field(
        default_factory=DatasetHash
    )  # of the good files that a manifest knows

    def take_back(self, judgement: Judgement, sha256: str) -> None:
        """What was counted as good is not: somebody must count it anew."""
        self.good -= 1
        if sha256:
            self.recorded.remove(judgement.path, sha256)
