"""The host side of a batch: which files, which part of them, how it is turned and degraded, as arrays for DALI.

Of a memory-mapped `.npy` just the region that a sample needs is copied; of an encoded file the bytes are read and
decoded in the graph. Where a cache is asked for, the host decodes, and keeps what fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count as naturals
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import UserError
from pipeline.data.dataset import Dataset
from pipeline.data.decoding import BadFileError, HostDecoder, read_encoded
from pipeline.data.degradations import build_degradation
from pipeline.data.degradations.base import KEYS, WORDS, LrNoise, Parameters
from pipeline.data.image_files import is_npy, npy_layout
from pipeline.data.sampling import Draws, Sampler, anchor, uniforms
from pipeline.data_spec import DataSpec

OPEN_MAPS = 512  # memory maps kept open per rank; each holds a file descriptor
MOST_ATTEMPTS = 100  # bad files in a row for one sample

Bytes = NDArray[np.uint8]


class Position(NamedTuple):
    """A rank's place in the run's stream of samples: which micro-batches are its own."""

    rank: int
    world_size: int
    micro_batch: int

    def first_sample(self, index: int) -> int:
        """Number of the first sample of this rank's `index`-th micro-batch since the run began."""
        return (index * self.world_size + self.rank) * self.micro_batch


class Skip(NamedTuple):
    """A file that was passed over, and the sample that was to show it."""

    sample: int
    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """Everything about one sample but its pixels; with the dataset it makes them."""

    number: int
    path: str
    lr_path: str | None  # of the LR file, where it is read
    top: int  # of the HR crop, in the file's pixels
    left: int
    region: tuple[int, int, int, int]  # top, left, height, width of what is read around it
    flip_vertical: int
    flip_horizontal: int
    transpose: int
    brightness: float  # factor
    degradation: Parameters
    noise_sigma: float  # of the noise on LR, in levels
    skipped: tuple[Skip, ...]

    def as_dict(self) -> dict[str, Any]:
        """For people and for JSON."""
        return asdict(self) | {"skipped": [skip._asdict() for skip in self.skipped]}


class _Opened(NamedTuple):
    """One side of a file that can be read."""

    height: int
    width: int
    pixels: Bytes | None  # or
    stream: Bytes | None


class ImageFiles:
    """The files of one side of the dataset, HR or LR, and the arrays that bring them into the graph."""

    def __init__(self, name: str, paths: Sequence[str], cache: ImageCache | None) -> None:
        self.paths, self.cache = paths, cache
        self.encoded = np.array([not is_npy(path) for path in paths])
        any_encoded = bool(self.encoded.any()) and cache is None
        all_encoded = any_encoded and bool(self.encoded.all())
        self.has_pixels, self.has_streams = not all_encoded, any_encoded
        self.columns = [name] * self.has_pixels + [f"{name}_{of}" for of in ("stream", "corner", "shape")] * any_encoded
        if self.has_pixels and self.has_streams:
            self.columns.append(f"{name}_is_pixels")
        self._map = lru_cache(maxsize=OPEN_MAPS)(self._open_map)

    def open(self, file: int) -> _Opened:
        """Raises `BadFileError` for a file that cannot be trained on, `OSError` where the disk is at fault."""
        path = self.paths[file]
        if not self.encoded[file]:
            image = self._map(file)
        elif self.cache:
            image = self.cache.image(path)
        else:
            encoded = read_encoded(path)
            return _Opened(encoded.height, encoded.width, None, encoded.stream)
        return _Opened(*image.shape[:2], image, None)

    def arrays(self, files: Sequence[_Opened], regions: Sequence[tuple[int, int, int, int]]) -> list[Any]:
        """The columns: of each opened file the region (top, left, height, width)."""
        columns: list[Any] = []
        if self.has_pixels:
            columns.append(_cut(files, regions))
        if self.has_streams:
            columns.append([_NO_BYTES if file.stream is None else file.stream for file in files])
            columns += [np.array([region[:2] for region in regions], np.int32),
                        np.array([region[2:] for region in regions], np.int32)]
        if self.has_pixels and self.has_streams:
            columns.append(np.array([file.stream is None for file in files]))
        return columns

    def _open_map(self, file: int) -> Bytes:
        layout = npy_layout(self.paths[file])
        return np.memmap(self.paths[file], np.uint8, "r", layout.offset, (layout.height, layout.width, 3))


def _cut(files: Sequence[_Opened], regions: Sequence[tuple[int, int, int, int]]) -> Any:
    """The regions' pixels: one array if all have the same shape, else a list."""
    if all(region[2:] == regions[0][2:] for region in regions) and all(file.pixels is not None for file in files):
        together = np.empty((len(files), *regions[0][2:], 3), np.uint8)
        for target, file, (top, left, height, width) in zip(together, files, regions, strict=True):
            target[...] = file.pixels[top:top + height, left:left + width]
        return together
    return [_NO_PIXELS if file.pixels is None
            else np.ascontiguousarray(file.pixels[top:top + height, left:left + width])
            for file, (top, left, height, width) in zip(files, regions, strict=True)]


_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
_NO_BYTES = np.zeros(1, np.uint8)


class ImageCache:
    """Decoded images in memory, up to `capacity` bytes; what does not fit any more is decoded each time it is needed.

    Nothing is thrown out: each file comes once an epoch, so that no image is likelier to come soon than another.
    """

    def __init__(self, capacity: float, threads: int, batch: int) -> None:
        self.room, self._decoder = capacity, HostDecoder(threads, batch)
        self._kept: dict[str, Bytes | BadFileError] = {}
        self._passing: dict[str, Bytes | BadFileError] = {}

    def load(self, paths: Sequence[str]) -> None:
        """Decode, several at once, those of `paths` that are not here."""
        paths = [path for path in dict.fromkeys(paths) if path not in self._kept]
        self._passing = dict(zip(paths, self._decoder.decode(paths), strict=True))
        for path, image in self._passing.items():
            size = 0 if isinstance(image, BadFileError) else image.nbytes
            if size <= self.room:
                self._kept[path] = image
                self.room -= size

    def image(self, path: str) -> Bytes:
        """HWC bytes. Raises the `BadFileError` of a file that cannot be decoded."""
        if path not in self._kept and path not in self._passing:
            self.load([path])
        image = self._kept[path] if path in self._kept else self._passing[path]
        if isinstance(image, BadFileError):
            raise image
        return image

    def close(self) -> None:
        self._decoder.close()


class CropSource:
    """Makes the host side of micro-batches, in order, from any starting point."""

    def __init__(self, hr_paths: Sequence[str], sampler: Sampler, spec: DataSpec, *, scale: int, position: Position,
                 lr_paths: Sequence[str] | None = None) -> None:
        self.sampler, self.spec, self.scale, self.position = sampler, spec, scale, position
        self.crop = spec.crop
        self.cache = ImageCache(spec.cache_gb * 2**30, spec.threads, position.micro_batch) if spec.cache_gb else None
        self.hr = ImageFiles("hr", hr_paths, self.cache)
        self.lr = ImageFiles("lr", lr_paths, self.cache) if lr_paths is not None else None
        self.degradation = build_degradation(spec.degradation, scale)
        self.lr_noise = LrNoise(spec.lr_noise) if spec.lr_noise.probability else None
        self.has_brightness = spec.brightness.probability > 0
        self.has_margin = self.lr is None  # LR that is made needs more of the photograph than the crop
        self.columns = (*self.hr.columns, *(self.lr.columns if self.lr else ()), *["start"] * self.has_margin,
                        "flip_vertical", "flip_horizontal", "transpose", *["brightness"] * self.has_brightness,
                        *self.degradation.columns, *(LrNoise.columns if self.lr_noise else ()))
        self.bad: dict[str, str] = {}  # files that were passed over, with the reason
        self._made: dict[int, list[Sample]] = {}  # of micro-batches that were not taken yet

    @classmethod
    def of_dataset(cls, dataset: Dataset, spec: DataSpec, *, scale: int, seed: int, position: Position) -> CropSource:
        """The source that a recipe asks for."""
        images = dataset.training
        sampler = Sampler(dataset.folder_sizes, seed, multiplier=spec.multiplier, weights=spec.weights,
                          augment=spec.augment)
        is_paired = spec.degradation.name == "paired"
        return cls([image.path for image in images], sampler, spec, scale=scale, position=position,
                   lr_paths=[str(image.lr_path) for image in images] if is_paired else None)

    def micro_batches(self, index: int) -> Iterator[tuple[Any, ...]]:
        """Endless, from micro-batch `index` on: the arrays of `columns`."""
        for number in naturals(index):
            yield self.make(number)

    def make(self, index: int) -> tuple[Any, ...]:
        """The arrays of `columns` of micro-batch `index`."""
        samples, hr, lr, keys = self._samples(self.position.first_sample(index), self.position.micro_batch)
        self._made[index] = samples
        arrays = self.hr.arrays(hr, [sample.region for sample in samples])
        if self.lr:
            arrays += self.lr.arrays(lr, [tuple(side // self.scale for side in sample.region) for sample in samples])
        if self.has_margin:
            arrays.append(np.array([self._start(sample) for sample in samples], np.int32))
        arrays += [np.array([sample.flip_vertical for sample in samples], np.int32),
                   np.array([sample.flip_horizontal for sample in samples], np.int32),
                   np.array([sample.transpose for sample in samples], bool)]
        if self.has_brightness:
            arrays.append(np.array([sample.brightness for sample in samples], np.float32))
        return (*arrays, *self._drawn_arrays(samples, keys))

    def samples(self, first: int, count: int) -> list[Sample]:
        """Samples first .. first + count - 1, as they are made, without their pixels."""
        return self._samples(first, count)[0]

    def files_of(self, index: int) -> list[str]:
        """The files that micro-batch `index` reads, for messages."""
        made = self._made.get(index)
        if made:  # with what stands in for bad files
            return [path for sample in made for path in (sample.path, sample.lr_path) if path]
        first = self.position.first_sample(index)
        files = self.sampler.draw(first, self.position.micro_batch).files.tolist()
        return [side.paths[file] for side in (self.hr, self.lr) if side for file in files]

    def take_skips(self, index: int) -> tuple[Skip, ...]:
        """What was passed over for micro-batch `index`, which has been made and is forgotten with those before it."""
        skips = tuple(skip for sample in self._made[index] for skip in sample.skipped)
        self._made = {made: samples for made, samples in self._made.items() if made > index}
        return skips

    def reject(self, error: BadFileError) -> None:
        """Take no sample of this file any more.

        Raises `UserError` if the recipe wants to stop for it, or when there are too many such files.
        """
        if self.spec.on_error == "stop":
            numbers = [sample.number for made in self._made.values() for sample in made
                       if error.path in (sample.path, sample.lr_path)]
            raise UserError(f"{error}{f' (sample {numbers[0]})' if numbers else ''}") from error
        self.bad.setdefault(error.path, error.reason)
        refuse_too_many(self.bad, self.sampler.num_files, self.spec)

    def close(self) -> None:
        if self.cache:
            self.cache.close()

    def _samples(self, first: int, count: int) -> tuple[list[Sample], list[_Opened], list[_Opened], list[list[int]]]:
        draws = self.sampler.draw(first, count)
        if self.cache:
            self.cache.load([side.paths[file] for side in (self.hr, self.lr) if side
                             for file in draws.files.tolist() if side.encoded[file]])
        words = self.sampler.degradation_words(first, count, WORDS)
        fractions, keys = uniforms(words[:, :-KEYS]).tolist(), words[:, -KEYS:].tolist()
        made = [self._sample(draws, i, iter(fractions[i])) for i in range(count)]
        return [one[0] for one in made], [one[1] for one in made], [one[2] for one in made if one[2]], keys

    def _sample(self, draws: Draws, i: int, chances: Iterator[float]) -> tuple[Sample, _Opened, _Opened | None]:
        number = int(draws.samples[i])
        file, hr, lr, skipped = self._open(number, int(draws.files[i]))
        height, width, scale = hr.height - hr.height % self.scale, hr.width - hr.width % self.scale, self.scale
        top = anchor(draws.top[i], height, self.crop, scale)
        left = anchor(draws.left[i], width, self.crop, scale)
        above, before = self.degradation.place(chances)
        extent = self.crop + self.degradation.surroundings
        region_height, region_width = min(extent, height), min(extent, width)
        region = (min(max(top - above, 0), height - region_height), min(max(left - before, 0), width - region_width),
                  region_height, region_width)
        degradation = self.degradation.draw(chances, region_height, region_width)
        sigma = self.lr_noise.draw(chances) if self.lr_noise else 0.0
        is_brightened, fraction = draws.brightness[i]
        low, high = self.spec.brightness.range
        brightness = low + (high - low) * fraction if is_brightened < self.spec.brightness.probability else 1.0
        sample = Sample(number, self.hr.paths[file], self.lr.paths[file] if self.lr else None, top, left, region,
                        int(draws.flip_vertical[i]), int(draws.flip_horizontal[i]), int(draws.transpose[i]),
                        float(brightness), degradation, sigma, skipped)
        return sample, hr, lr

    def _open(self, number: int, file: int) -> tuple[int, _Opened, _Opened | None, tuple[Skip, ...]]:
        """The file of a sample, or the one that replaces it, opened."""
        skipped: list[Skip] = []
        for attempt in range(MOST_ATTEMPTS):
            try:
                return (file, *self._open_pair(file), tuple(skipped))
            except BadFileError as error:
                if self.spec.on_error == "stop":
                    raise UserError(f"{error} (sample {number})") from error
                self.reject(error)
                skipped.append(Skip(number, error.path, error.reason))
                file = self.sampler.replacement(number, attempt)
        raise UserError(f"{MOST_ATTEMPTS} files drawn for sample {number} are all bad; the last was "
                        f"{skipped[-1].path}: {skipped[-1].reason}")

    def _open_pair(self, file: int) -> tuple[_Opened, _Opened | None]:
        for side in (self.hr, self.lr):
            if side and side.paths[file] in self.bad:
                raise BadFileError(side.paths[file], self.bad[side.paths[file]])
        hr = self.hr.open(file)
        if min(hr.height, hr.width) < self.crop:
            raise BadFileError(self.hr.paths[file], f"{hr.height}x{hr.width} is smaller than data.crop {self.crop}")
        if self.lr is None:
            return hr, None
        lr = self.lr.open(file)
        if (lr.height, lr.width) != (hr.height // self.scale, hr.width // self.scale):
            raise BadFileError(self.lr.paths[file], f"{lr.height}x{lr.width} is not 1/{self.scale} of "
                               f"{hr.height}x{hr.width}, the size of {self.hr.paths[file]}")
        return hr, lr

    def _start(self, sample: Sample) -> tuple[int, int]:
        """Where the crop begins in its region, after the flips."""
        top, left, height, width = sample.region
        row, column = sample.top - top, sample.left - left
        return (height - self.crop - row if sample.flip_vertical else row,
                width - self.crop - column if sample.flip_horizontal else column)

    def _drawn_arrays(self, samples: Sequence[Sample], keys: Sequence[Sequence[int]]) -> list[list[NDArray[Any]]]:
        made = [self.degradation.arrays(sample.degradation, of) for sample, of in zip(samples, keys, strict=True)]
        columns = [[one[name] for one in made] for name in self.degradation.columns]
        if self.lr_noise:
            shape = self.crop // self.scale, self.crop // self.scale
            fields = [self.lr_noise.arrays(sample.noise_sigma, shape, of[-2:])
                      for sample, of in zip(samples, keys, strict=True)]
            columns += [[one[name] for one in fields] for name in LrNoise.columns]
        return columns


def refuse_too_many(bad: Mapping[str, str], num_files: int, spec: DataSpec) -> None:
    """Raise `UserError` if more files are bad (path -> reason) than the recipe lets `on_error: skip` pass over."""
    most = max(1, int(spec.max_bad_files * num_files))
    if len(bad) > most:
        some = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
        raise UserError(f"{len(bad)} of {num_files} files are bad and data.max_bad_files {spec.max_bad_files:g} allows "
                        f"{most} ({some}, …); judge the dataset with `python tools/check_training_data.py --clean` and "
                        "select anew, or raise it")
