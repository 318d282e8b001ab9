"""Cut one picture into crops on disk: the per-thread work of the tools that build datasets.

`open_picture` or `read_picture` decodes it, the gates judge it, and `cut_picture` cuts it at every
scale and writes the crops. Every rejection becomes one line of rejects.jsonl (`reject_line`) next
to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.cli import UserError
from pipeline.data.image_headers import ImageHeader, check_file_size, read_header
from pipeline.data.image_pixels import (
    check_megapixels,
    decode_rgb,
    decoder_name,
    foreign_profile,
    to_8_bits,
)
from pipeline.files import parse_json
from tools.crops.grid import Crop, cover_grid, crop_grid, pyramid
from tools.crops.leakage import BenchmarkIndex
from tools.crops.manifest import CropRecord
from tools.crops.quality import crop_gates, is_flat, is_soft, picture_gates
from tools.files import printable
from tools.images import encode

_OURS = re.compile(r"(f\d+_)?x\d+_\d+_\d+(_lr\d+)?\.(npy|png|webp|jp2)(\.tmp)?")
SETTINGS = "dataset.json"
REJECTS = "rejects.jsonl"
# These outcomes depend only on the settings, the source and (for copies) the twin, so they are
# final until one of these changes. All other gates mean damage, which may be repaired.
FINAL_GATES = frozenset({"size", "flat", "soft", "duplicate", "near-duplicate", "leak"})
# Fields of a line of rejects.jsonl, and their types.
_NEEDED = {
    "photo": str,
    "folder": str,
    "gate": str,
    "reason": str,
    "photo_bytes": int,
    "photo_mtime_ns": int,
    "whole": bool,
}
_OPTIONAL = {
    "path": (str,),
    "twin": (str,),
    "scale": (int,),
    "top": (int,),
    "left": (int,),
    "time": (int, float),
}


@dataclass(frozen=True)
class CropSettings:
    """Settings that determine the bytes of a dataset; tools/crops/options.py explains each."""

    size: int
    format: str
    seed: int
    cover: bool
    keep_lossy_size: bool
    num_scales: int | None
    min_gradient: float
    min_sharpness: float
    max_hash_distance: int | None  # None: duplicates are kept
    against: tuple[str, ...]  # folders of benchmark images
    depth: int = 8  # 16: crops of deeper pictures are uint16; the others stay uint8


class Unit(NamedTuple):
    """What is cut, and resumed, as a whole: a photo, an archive member, a segment of a video."""

    folder: str  # folder of its crops, relative to OUT; no other unit shares it
    photo: str  # the training/validation split is made by this name
    bytes: int  # size and modification time of the source file
    mtime_ns: int


@dataclass(frozen=True)
class SourcePicture:
    """A decoded picture to cut: uint8 or uint16 RGB (height, width, 3), upright."""

    pixels: np.ndarray
    is_lossy: bool
    decoder: str
    sha256: str = ""  # hash of the source's bytes, if it is a file of its own
    profile: str = ""  # colour profile of the source, if it was converted to sRGB
    time: float | None = None  # time of the frame in its video, in seconds
    prefix: str = ""  # prefix of its crops' file names, if a folder holds several pictures


@dataclass(frozen=True)
class Reject:
    """A picture or crop that a gate rejected, and the reason."""

    gate: str  # size, decode, flat, soft, duplicate, near-duplicate, leak, pair
    reason: str
    scale: int | None = None  # reduction of the rejected crop; None: the whole picture
    top: int | None = None
    left: int | None = None
    time: float | None = None
    twin: str | None = None  # for a copy: the folder of the unit with the original


@dataclass
class CutPicture:
    """Result of cutting a picture: crops on disk, and rejects."""

    records: list[CropRecord] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    pixels: int = 0
    profile: str = ""  # see `SourcePicture`


def open_picture(
    file: BinaryIO, settings: CropSettings, max_megapixels: float
) -> SourcePicture | Reject:
    """Decode the photograph in `file`, unless its header already shows that no crop fits.

    Raises `BadImageError` if the image is broken or exceeds `max_megapixels`, `OSError` if it
    cannot be read.
    """
    header = read_header(file)
    check_megapixels(header, max_megapixels)
    first = first_reduction(header.is_lossy, settings)
    if min(header.height, header.width) // first < settings.size:
        return too_small(header.height, header.width, first, settings.size)
    return read_picture(file, header, settings.depth)


def read_picture(file: BinaryIO, header: ImageHeader, depth: int = 8) -> SourcePicture:
    """Decode the photograph in `file`, whose header was already read and accepted.

    With a `depth` of 16, a photograph of more than 8 bits is decoded to uint16. Raises as
    `open_picture` does.
    """
    check_file_size(header, file.seek(0, os.SEEK_END))
    file.seek(0)
    data = file.read()
    return SourcePicture(
        decode_rgb(data, header, min(depth, header.pixel_depth)),
        header.is_lossy,
        decoder_name(header),
        hashlib.sha256(data).hexdigest(),
        foreign_profile(header),
    )


def first_reduction(is_lossy: bool, settings: CropSettings) -> int:
    """Smallest reduction that is cut: 2 for lossy pictures, which hides their artefacts, else 1.

    With `keep_lossy_size` it is always 1.
    """
    return 2 if is_lossy and not settings.keep_lossy_size else 1


def crop_places(height: int, width: int, size: int, settings: CropSettings, key: str) -> list[Crop]:
    """Where to cut crops of `size` pixels from a picture; `key` seeds its random gaps."""
    if settings.cover:
        return cover_grid(height, width, size)
    return crop_grid(height, width, size, f"{settings.seed}/{key}")


def cut_picture(
    picture: SourcePicture,
    unit: Unit,
    out: Path,
    settings: CropSettings,
    benchmark: BenchmarkIndex | None,
) -> CutPicture:
    """Write the crops of `picture` that pass the gates into the existing folder `out/unit.folder/`.

    Raises `UserError` if the crops cannot be written (disk full, no permission).
    """
    height, width = picture.pixels.shape[:2]
    first = first_reduction(picture.is_lossy, settings)
    if min(height, width) // first < settings.size:
        return CutPicture(
            rejects=[replace(too_small(height, width, first, settings.size), time=picture.time)]
        )
    cutter = _Cutter(picture, unit, out, settings, benchmark)
    try:
        cutter.cut(first)
    except _LeakError as leak:
        discard(cutter.result.records, out)
        cutter.result = CutPicture(rejects=[leak.reject])
    cutter.result.pixels, cutter.result.profile = height * width, picture.profile
    if picture.time is not None:
        cutter.result.rejects = [
            replace(reject, time=picture.time) for reject in cutter.result.rejects
        ]
    return cutter.result


class _LeakError(Exception):
    """The picture contains part of a benchmark image."""

    def __init__(self, reject: Reject) -> None:
        super().__init__(reject.reason)
        self.reject = reject


class _Cutter:
    """Cuts one picture."""

    def __init__(
        self,
        picture: SourcePicture,
        unit: Unit,
        out: Path,
        settings: CropSettings,
        benchmark: BenchmarkIndex | None,
    ) -> None:
        self._picture, self._unit, self._out = picture, unit, out
        self._settings, self._benchmark = settings, benchmark
        self._source: dict[str, float | str] = (
            {"source_sha256": picture.sha256} if picture.sha256 else {}
        )
        self.result = CutPicture()

    def cut(self, first: int) -> None:
        """Write the crops of every size from 1/`first` down, except soft ones."""
        self._refuse_leak(self._picture.pixels)
        settings, is_sharp = self._settings, False
        for scale, reduced in pyramid(
            self._picture.pixels, settings.size, first, settings.num_scales
        ):
            if not is_sharp:
                gates = picture_gates(to_8_bits(reduced))
                is_sharp = not is_soft(gates, settings.min_sharpness)
                if not is_sharp:
                    self.result.rejects.append(
                        replace(soft_picture(gates, settings, f"1/{scale}"), scale=scale)
                    )
                    continue
                self._source |= gates
            self._cut_scale(reduced, scale)

    def _cut_scale(self, reduced: np.ndarray, scale: int) -> None:
        settings = self._settings
        key = f"{scale}/{self._unit.photo}{self._picture.prefix}"
        for crop in crop_places(*reduced.shape[:2], settings.size, settings, key):
            window = reduced[
                crop.top : crop.top + settings.size, crop.left : crop.left + settings.size
            ]
            window = np.ascontiguousarray(window)
            gates = crop_gates(to_8_bits(window))
            if is_flat(gates, settings.min_gradient):
                self.result.rejects.append(flat_crop(gates, settings, scale, crop.top, crop.left))
                continue
            self._refuse_leak(window)
            self.result.records.append(self._write(window, crop, scale, gates))

    def _refuse_leak(self, pixels: np.ndarray) -> None:
        if leak := find_leak(pixels, self._benchmark):
            raise _LeakError(leak)

    def _write(
        self, window: np.ndarray, crop: Crop, scale: int, gates: dict[str, float | str]
    ) -> CropRecord:
        settings, picture, unit = self._settings, self._picture, self._unit
        stem = f"{picture.prefix}x{scale}_{crop.row:03d}_{crop.column:03d}"
        name = f"{unit.folder}/{stem}.{settings.format}"
        num_bytes = write_crop(self._out, name, unit, window, settings.format)
        return CropRecord(
            name,
            unit.photo,
            scale,
            crop.top,
            crop.left,
            settings.size,
            num_bytes,
            hashlib.sha256(window).hexdigest(),
            picture.decoder,
            {**gates, **self._source},
            unit.bytes,
            unit.mtime_ns,
            0,
            picture.time,
        )


def make_folder(out: Path, folder: str) -> None:
    """Create a unit's folder, or empty it of crops from an outdated source or a killed run."""
    try:
        (out / folder).mkdir(parents=True, exist_ok=True)
        remove_crops(out / folder)
    except OSError as error:
        raise UserError(
            f"{out / folder}: cannot be written: {error.strerror}; free disk space or fix the "
            "permissions, then run the same command again; it continues where it stopped"
        ) from error


def write_crop(out: Path, name: str, unit: Unit, pixels: np.ndarray, form: str) -> int:
    """Write the crop `out/name` atomically and return its size in bytes.

    There is no fsync; the next run checks which crops exist. Raises `UserError` if it cannot be
    written.
    """
    content = encode(pixels, form)
    temporary = out / f"{name}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, out / name)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{out}: a crop of {unit.photo} cannot be written: {error.strerror or error}; "
                "free disk space or fix the permissions, then run the same command again; it "
                "continues where it stopped"
            ) from error
        raise
    return len(content)


def discard(records: Iterable[CropRecord], out: Path) -> None:
    """Delete crops that were written but must not stay."""
    for record in records:
        (out / record.path).unlink(missing_ok=True)


def remove_crops(folder: Path) -> None:
    """Delete the crops and half-written crops in a unit's folder; leave all other files."""
    for entry in list(os.scandir(folder)):
        if _OURS.fullmatch(entry.name):
            os.unlink(entry.path)


# --- Rejects ---


def too_small(height: int, width: int, first: int, size: int) -> Reject:
    """Reject a picture that is smaller than one crop at 1/`first` of its size."""
    halved = f" ({height // 2}x{width // 2} after halving a lossy picture)" if first == 2 else ""
    return Reject("size", f"too small: {height}x{width}{halved} holds no crop of {size}x{size}")


def flat_crop(
    gates: Mapping[str, float | str], settings: CropSettings, scale: int, top: int, left: int
) -> Reject:
    """Reject a crop with too little detail."""
    reason = (
        f"flat: gradient {gates['gradient']:.3g} below {settings.min_gradient:g} (--min-gradient)"
    )
    return Reject("flat", reason, scale, top, left)


def soft_picture(gates: Mapping[str, float | str], settings: CropSettings, what: str) -> Reject:
    """Reject a picture (at this size) without detail in its finest octave."""
    sharpness = gates["source_sharpness"]
    return Reject(
        "soft",
        f"{what} is blurred or upscaled: sharpness {sharpness:.3g} below "
        f"{settings.min_sharpness:g} "
        "(--min-sharpness)",
    )


def find_leak(pixels: np.ndarray, benchmark: BenchmarkIndex | None) -> Reject | None:
    """Reject a picture or crop that also occurs in a benchmark; `None` if it does not."""
    name = benchmark.find(to_8_bits(pixels)) if benchmark else None
    return (
        Reject("leak", f"near-identical to the benchmark image {printable(name)} (--against)")
        if name
        else None
    )


def reject_line(unit: Unit, reject: Reject, is_whole: bool) -> str:
    values = {
        "photo": unit.photo,
        "folder": unit.folder,
        **asdict(reject),
        "photo_bytes": unit.bytes,
        "photo_mtime_ns": unit.mtime_ns,
        "whole": is_whole,
    }
    return (
        json.dumps(
            {name: value for name, value in values.items() if value is not None}, ensure_ascii=False
        )
        + "\n"
    )


def parse_reject(line: bytes | str) -> dict | None:
    """Parse a line of rejects.jsonl; `None` if it is torn or foreign."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    is_ours = (
        isinstance(values, dict)
        and all(type(values.get(name)) is kind for name, kind in _NEEDED.items())
        and all(type(values[name]) in _OPTIONAL[name] for name in _OPTIONAL.keys() & values.keys())
    )
    if not is_ours:
        return None
    try:
        "".join(value for value in values.values() if isinstance(value, str)).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no name in our files has
        return None
    return values


def reject_groups(lines: Iterable[bytes]) -> Iterator[tuple[str, list[dict]]]:
    """Yield (folder, rejects) for each unit, in file order."""
    group: list[dict] = []
    for values in filter(None, map(parse_reject, lines)):
        if group and values["folder"] != group[0]["folder"]:
            yield group[0]["folder"], group
            group = []
        group.append(values)
    if group:
        yield group[0]["folder"], group
