"""Statistics of one source of a dataset: a folder with a manifest, or images in no manifest.

`ManifestReader` reads a manifest line by line, `PlainReader` looks at files; both fill a `Source`.
`PhotoRuns` counts the crops of each photograph in a few bytes per photograph.
"""

from __future__ import annotations

import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.cli import UserError
from pipeline.data.image_files import BadNpyError, is_npy, npy_layout
from pipeline.data.image_headers import BadImageError, read_header
from pipeline.files import parse_json
from tools.crops.cutting import SETTINGS
from tools.crops.manifest import CropRecord, DatasetHash, iterate_lines
from tools.crops.quality import MIN_GRADIENT, MIN_SHARPNESS
from tools.dataset.rejects import FileList, Rejects
from tools.dataset.sampling import HashSample, Histogram, KeySet, LowestOfGroups, Tally, path_key

NUM_LARGEST = 10
# Values outside the edges count in the outermost bins.
GATE_EDGES = {
    "gradient": [
        2 ** (step / 8) for step in range(-16, 49)
    ],  # gray levels per pixel, 0.25 to 64, eight bins per octave
    "source_sharpness": [step / 40 for step in range(81)],  # ratio, 0 to 2
    "sharpness": [step / 40 for step in range(81)],
    "entropy": [step / 10 for step in range(81)],  # bits per pixel, 0 to 8
}
GATE_THRESHOLDS = {"gradient": MIN_GRADIENT, "source_sharpness": MIN_SHARPNESS}
SIZES_LOOKED_AT = 16  # files whose headers are read in a folder without a manifest


@dataclass
class PhotoCounts:
    """Numbers of photographs and videos in one source."""

    photographs: int = 0  # including videos
    films: int = 0
    training: int = 0  # photographs with a crop in the list
    validation: int = 0
    in_both: int = 0  # validation sees training data
    # n -> photographs with 2^n to 2^(n+1) - 1 crops.
    by_size: Counter[int] = field(default_factory=Counter)
    # (crops, photograph), largest first.
    largest: list[tuple[int, str]] = field(default_factory=list)


def new_histograms() -> dict[str, Histogram]:
    """Create an empty histogram for each gate."""
    return {name: Histogram(edges, GATE_THRESHOLDS.get(name)) for name, edges in GATE_EDGES.items()}


@dataclass
class Source:
    """A folder with a manifest (`is_recorded`), or a top-level folder's images in no manifest."""

    folder: str  # relative to the dataset; ".": the dataset itself
    is_recorded: bool
    tool: str = "no manifest"
    settings: Mapping[str, object] = field(default_factory=dict)
    images: int = 0  # images that training may read, without the LR sides of pairs
    lr_images: int = 0
    bytes: int = 0  # of the files, as recorded in the manifest or else found on disk
    pixels: int = 0  # of the recorded images
    missing: int = 0  # recorded but not on disk; or a dangling link
    training: int = 0  # images named by the list
    validation: int = 0
    scales: Tally = field(default_factory=Tally)
    # "512", or "480x640"; without a manifest, of SIZES_LOOKED_AT files.
    sizes: Tally = field(default_factory=Tally)
    formats: Tally = field(default_factory=Tally)
    decoders: Tally = field(default_factory=Tally)
    hash: DatasetHash = field(default_factory=DatasetHash)  # of paths relative to `folder`
    gates: dict[str, Histogram] = field(default_factory=new_histograms)
    without_gates: int = 0
    photos: PhotoCounts = field(default_factory=PhotoCounts)
    rejects: Rejects = field(default_factory=Rejects)

    @property
    def sides(self) -> str:
        """Sizes of the crops, or the range of the sampled image sizes, in pixels."""
        if self.is_recorded:
            sizes = [size for size, _ in self.sizes.by_count()]
            return (
                ", ".join(sizes[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
                or "-"
            )
        sides = sorted(
            {int(side) for size in self.sizes for side in size.split("x") if side.isdigit()}
        )
        return f"{sides[0]} to {sides[-1]}" if sides else "-"

    @property
    def unlisted(self) -> int:
        """Number of images in neither list."""
        return max(self.images - self.training - self.validation, 0)


@dataclass(frozen=True)
class SampledImage:
    """An image that a report may show.

    `path` and `photo` are relative to the dataset; `record` is `None` if no manifest lists the
    image.
    """

    path: str
    photo: str
    record: CropRecord | None


class SampledImages:
    """The images to show in a report."""

    def __init__(self, size: int, seed: int) -> None:
        """Sample `size` images at random, and half as many with the lowest values of each gate."""
        self.recorded: HashSample[SampledImage] = HashSample(size, seed)
        self.plain: HashSample[SampledImage] = HashSample(size, seed)
        self.lowest: dict[str, LowestOfGroups[SampledImage]] = {
            name: LowestOfGroups(size // 2)
            for name in ("source_sharpness", "sharpness", "gradient")
        }
        self.size, self.seed = size, seed

    def add(self, image: SampledImage, gates: Mapping[str, object]) -> None:
        """Offer an image for the lowest values."""
        for name, lowest in self.lowest.items():
            value = gates.get(name)
            if isinstance(value, (int, float)):
                lowest.add(image.photo, value, image.path, image)


@dataclass(frozen=True)
class Lists:
    """The training and the validation list; `None` if missing."""

    training: FileList | None
    validation: FileList | None

    def name(self, key: int) -> tuple[bool, bool]:
        """Whether (the training list, the validation list) names the file with this key."""
        return (
            self.training is not None and key in self.training.keys,
            self.validation is not None and key in self.validation.keys,
        )

    def find(self, key: int) -> tuple[bool, bool]:
        """Same as `name`, for a file that exists; counts it as found."""
        named = self.name(key)
        for names, is_named in zip((self.training, self.validation), named, strict=True):
            if names is not None:
                names.found += is_named
        return named


class ManifestReader:
    """Reads one manifest into a `Source` and collects the keys of its files."""

    def __init__(
        self, root: Path, manifest: str, lists: Lists, samples: SampledImages, total: DatasetHash
    ) -> None:
        self._path, self._lists, self._samples, self._total = root / manifest, lists, samples, total
        self._prefix = posixpath.dirname(manifest)
        settings = _read_settings(self._path.with_name(SETTINGS))
        self.source = Source(
            self._prefix or ".", True, str(settings.get("tool", "unknown tool")), settings
        )
        self.files = KeySet()
        self._photos = PhotoRuns()

    def read(self) -> Iterator[int]:
        """Read the whole manifest; yields byte offsets now and then for a progress bar."""
        try:
            for number, (offset, record) in enumerate(iterate_lines(self._path)):
                self._add(offset, record)
                if number % 1000 == 0:
                    yield offset
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self._path}: {ascii(error.object)[:80]} is not a valid file name; remove its "
                "line, then run the tool that made the dataset again"
            ) from None
        self.source.photos = self._photos.summary(self._path, self._prefix)

    def _add(self, offset: int, record: CropRecord) -> None:
        source, path = self.source, posixpath.join(self._prefix, record.path)
        key = path_key(path)
        self.files.add(key)
        self._total.add(path, record.sha256)
        source.hash.add(record.path, record.sha256)
        source.bytes += record.bytes
        if record.role == "lr":
            source.lr_images += 1
            return
        named = self._lists.name(key)
        self._count(record, named)
        self._photos.add(record.photo, record.time is not None, *named, offset)
        image = SampledImage(path, posixpath.join(self._prefix, record.photo), record)
        self._samples.recorded.add(path, image)
        self._samples.add(image, record.gates)

    def _count(self, record: CropRecord, named: tuple[bool, bool]) -> None:
        source = self.source
        source.images += 1
        source.pixels += record.size**2
        source.training += named[0]
        source.validation += named[1]
        source.scales.add(str(record.scale))
        source.sizes.add(str(record.size))
        source.formats.add(suffix(record.path))
        source.decoders.add(record.decoder)
        is_known = False
        for name, histogram in source.gates.items():
            value = record.gates.get(name)
            if isinstance(value, (int, float)):
                histogram.add(value)
                is_known = True
        source.without_gates += not is_known


def _read_settings(path: Path) -> Mapping[str, object]:
    """Contents of a dataset.json; empty if it is missing or invalid."""
    try:
        settings = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


class PhotoRuns:
    """Counts crops per photograph in manifest order.

    Each run of consecutive crops of one photograph takes 23 bytes.
    """

    def __init__(self) -> None:
        self._photo: str | None = None
        self._keys, self._places, self._counts = array("Q"), array("Q"), array("L")
        self._flags = array("B")  # bits: 1 video; 2 in the training list; 4 in the validation list

    def add(
        self, photo: str, is_film: bool, in_training: bool, in_validation: bool, offset: int
    ) -> None:
        """Count a crop whose line starts at byte `offset` of its manifest."""
        if photo != self._photo:
            self._photo = photo
            self._keys.append(path_key(photo))
            self._places.append(offset)
            self._counts.append(0)
            self._flags.append(0)
        self._counts[-1] += 1
        self._flags[-1] |= is_film | in_training << 1 | in_validation << 2

    def summary(self, manifest: Path, folder: str) -> PhotoCounts:
        """Return the counts by photograph.

        Reads the names of the largest ones from `manifest`, and prepends `folder` to them.
        """
        if not self._keys:
            return PhotoCounts()
        _, first, photo_of_run = np.unique(
            np.frombuffer(self._keys, np.uint64), return_index=True, return_inverse=True
        )
        counts = np.bincount(
            photo_of_run, np.frombuffer(self._counts, f"u{self._counts.itemsize}")
        ).astype(np.int64)
        flags = np.zeros(len(counts), np.uint8)
        np.bitwise_or.at(flags, photo_of_run, np.frombuffer(self._flags, np.uint8))
        exponents, numbers = np.unique(np.frexp(counts)[1] - 1, return_counts=True)
        order = np.lexsort((first, -counts))[:NUM_LARGEST]
        names = _photos_at(manifest, [self._places[int(first[at])] for at in order])
        return PhotoCounts(
            len(counts),
            int((flags & 1 > 0).sum()),
            int((flags & 2 > 0).sum()),
            int((flags & 4 > 0).sum()),
            int((flags & 6 == 6).sum()),
            Counter(dict(zip(exponents.tolist(), numbers.tolist(), strict=True))),
            [
                (int(counts[at]), posixpath.join(folder, name))
                for at, name in zip(order, names, strict=True)
            ],
        )


def _photos_at(manifest: Path, offsets: list[int]) -> list[str]:
    """Names of the photographs in the lines at these byte offsets."""
    names = []
    with open(manifest, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            names.append(parse_json(file.readline())["photo"])
    return names


class PlainReader:
    """Collects the images of a top-level folder that no manifest lists."""

    def __init__(self, root: Path, folder: str, lists_seed: int) -> None:
        self._root = root
        self.source = Source(folder, is_recorded=False)
        self._looked_at: HashSample[str] = HashSample(SIZES_LOOKED_AT, lists_seed)

    def add(self, name: str, named: tuple[bool, bool]) -> None:
        """Add a file by its name relative to the dataset.

        `named`: whether the training and the validation list name it.
        """
        source = self.source
        source.images += 1
        source.training += named[0]
        source.validation += named[1]
        source.formats.add(suffix(name))
        self._looked_at.add(name, name)
        try:
            source.bytes += (self._root / name).stat().st_size
        except OSError:  # a dangling link, or a file that was removed meanwhile
            source.missing += 1

    def finish(self) -> Source:
        """Return the statistics after all files were added."""
        source = self.source
        source.photos = PhotoCounts(source.images, 0, source.training, source.validation)
        for name in self._looked_at:
            size = image_size(self._root / name)
            if size:
                source.sizes.add(f"{size[0]}x{size[1]}")
        return source


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) from the header of an image; `None` if it cannot be read.

    check_training_data.py reports the reason.
    """
    try:
        if is_npy(path):
            layout = npy_layout(path)
            return layout.height, layout.width
        with open(path, "rb") as file:
            header = read_header(file)
        return header.height, header.width
    except (BadNpyError, BadImageError, UserError, OSError):
        return None


def suffix(name: str) -> str:
    """Image format according to the file name."""
    return os.path.splitext(name)[1].lower().lstrip(".") or "none"
