"""The host side of a batch: selects files, regions and changes, and makes DALI's input arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import UserError
from pipeline.data.dataset import Dataset
from pipeline.data.degradations import build_degradation
from pipeline.data.degradations.base import KEYS, WORDS, Degradation, LrNoise, Parameters
from pipeline.data.degradations.steps.sharpen import HR_REACH
from pipeline.data.image_access import NO_PART, ImageCache, ImageFiles, OpenedFile, Part, Region
from pipeline.data.image_files import BadFileError
from pipeline.data.sampling import Draws, Sampler, anchor, uniforms
from pipeline.data.spec import DataSpec, num_threads

MAX_ATTEMPTS = 100  # maximum number of bad files in a row for one sample


class Position(NamedTuple):
    """A rank's position in the run's stream of samples, which determines its micro-batches."""

    rank: int
    world_size: int
    micro_batch: int
    # Where the stream passes over samples: (first, count) for each gap, `first` counted as if there
    # were no gaps. Gaps begin and end where updates do.
    gaps: tuple[tuple[int, int], ...] = ()

    def first_sample(self, index: int) -> int:
        """Return the number of the first sample of this rank's micro-batch number `index`."""
        # Ranks take neighbouring micro-batches. With a global batch of B, update number u therefore
        # uses the B samples from u * B on, however B is divided into ranks, micro-batches and
        # accumulation. This is why a run may continue on another number of ranks.
        sample = (index * self.world_size + self.rank) * self.micro_batch
        return sample + sum(count for first, count in self.gaps if first <= sample)


class Skip(NamedTuple):
    """A file that was skipped, and the sample that it was drawn for."""

    sample: int
    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """Everything about one sample except its pixels, which follow from it and the dataset."""

    number: int
    path: str
    lr_path: str | None  # of the LR file, if LR is read
    top: int  # first row of the HR crop in the file
    left: int
    region: Region  # part of the file that is read, including the crop
    flip_vertical: int
    flip_horizontal: int
    transpose: int
    brightness: float  # factor
    degradation: Parameters
    noise_sigma: float  # standard deviation of the noise on LR, in levels (0..255)
    skipped: tuple[Skip, ...]
    folder: int = 0  # position of its dataset folder

    def corner(self, crop: int, *, is_turned: bool) -> tuple[int, int]:
        """Return the row and column of the HR crop in the region, as read or as turned."""
        top, left = self.top - self.region[0], self.left - self.region[1]
        if not is_turned:
            return top, left
        if self.flip_vertical:
            top = self.region[2] - crop - top
        if self.flip_horizontal:
            left = self.region[3] - crop - left
        return (left, top) if self.transpose else (top, left)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict that JSON can represent."""
        return asdict(self) | {"skipped": [skip._asdict() for skip in self.skipped]}


class CropSource:
    """Makes the host side of micro-batches, in order, from any starting point.

    With `degrades_on_host` (CPU graphs only), LR is made by the degradation's own host chain if it
    has one; a degradation that has nothing else is always made on the host. `columns` then omits
    the arrays that the graph would need for it, and `degraded` returns what was drawn. Otherwise
    the graph makes LR, or if `is_split`, its first steps. The samples in `excluded` are made from
    another file.
    """

    def __init__(
        self,
        hr_paths: Sequence[str],
        sampler: Sampler,
        spec: DataSpec,
        *,
        scale: int,
        position: Position,
        lr_paths: Sequence[str] | None = None,
        degrades_on_host: bool = False,
        excluded: frozenset[int] = frozenset(),
    ) -> None:
        self.sampler, self.spec, self.scale, self.position = sampler, spec, scale, position
        self.excluded = excluded
        self.crop, threads = spec.crop, num_threads(spec.threads)
        # Bits per value of the pixels that the graph gets.
        self.depth = spec.bits
        self.cache = (
            ImageCache(spec.cache_gb * 2**30, threads, position.micro_batch, self.depth)
            if spec.cache_gb or self.depth == 16
            else None
        )
        self.hr = ImageFiles("hr", hr_paths, self.cache, self.depth)
        self.lr = (
            ImageFiles("lr", lr_paths, self.cache, self.depth) if lr_paths is not None else None
        )
        # One for each folder, or one for all. With several, the host makes LR, because a graph has
        # a fixed one.
        self.degradations = [build_degradation(of, scale) for of in spec.degradation.by_folder]
        self.degradation = self.degradations[0]
        self.degrades_on_host = len(self.degradations) > 1 or (
            self.degradation.has_host_chain and (degrades_on_host or not self.degradation.has_nodes)
        )
        # Whether the graph makes LR's first steps and the host the others, and noise on LR.
        self.is_split = not self.degrades_on_host and self.degradation.is_split
        self.lr_noise = LrNoise(spec.lr_noise) if spec.lr_noise.probability else None
        self.has_brightness = spec.brightness.probability > 0
        # Making LR needs pixels around the crop; paired LR does not.
        self.has_margin = not all(spec.degradation.paired_folders)
        # In the order in which `make` returns the arrays.
        self.columns = (
            *self.hr.columns,
            *(self.lr.columns if self.lr else ()),
            *(("start",) if self.has_margin else ()),
            "flip_vertical",
            "flip_horizontal",
            "transpose",
            *(("brightness",) if self.has_brightness else ()),
        )
        ends_in_graph = not (self.degrades_on_host or self.is_split)
        self.noises_in_graph = ends_in_graph and self.lr_noise is not None
        # Whether the graph cuts LR out of a region that it has turned.
        self.cuts_turned = ends_in_graph and self.degradation.turns_first
        if not self.degrades_on_host:
            self.columns += (
                *(("turned_start",) if self.cuts_turned else ()),
                *self.degradation.columns,
                *(LrNoise.columns if self.noises_in_graph else ()),
            )
        # Whether the graph decodes.
        self.has_streams = any(side.has_streams for side in (self.hr, self.lr) if side)
        # Messages for the user about irregularities, until the caller removes them.
        self.notes: list[str] = []
        # Path -> name of the profile from which the file's colours are converted to sRGB.
        self.profiles: dict[str, str] = {}
        self.bad: dict[str, str] = {}  # path -> reason of the files that were skipped
        self.end: int | None = None  # the first micro-batch that is not made
        self.failure: Exception | None = None  # why it is not made
        # Seconds that each kind of degradation step has taken on the host so far, over all threads.
        self.step_seconds: Mapping[str, float] = {}
        self._made: dict[int, list[Sample]] = {}  # samples of micro-batches that were not taken yet

    @classmethod
    def of_dataset(
        cls,
        dataset: Dataset,
        spec: DataSpec,
        *,
        scale: int,
        seed: int,
        position: Position,
        degrades_on_host: bool = False,
        excluded: frozenset[int] = frozenset(),
    ) -> CropSource:
        """Build the source for a dataset as the recipe's data section asks for."""
        sampler = Sampler(
            dataset.folder_sizes,
            seed,
            multiplier=spec.multiplier,
            weights=spec.weights,
            augment=spec.augment,
        )
        return cls(
            dataset.training_paths,
            sampler,
            spec,
            scale=scale,
            position=position,
            lr_paths=(dataset.training_lr_paths if any(spec.degradation.paired_folders) else None),
            degrades_on_host=degrades_on_host,
            excluded=excluded,
        )

    def micro_batches(self, index: int) -> Iterator[tuple[Any, ...]]:
        """Yield the arrays of `columns` from micro-batch `index` on, until `end` or a failure."""
        for number in itertools.count(index):
            if number == self.end:
                return
            try:
                arrays = self.make(number)
            except Exception as error:
                # Not raised here: DALI would drop the good micro-batches that it has prepared.
                # `reader.batches` raises it once these have been handed out.
                self.fail(number, error)
                return
            yield arrays

    def fail(self, index: int, error: Exception) -> None:
        """Make no micro-batch from `index` on; the consumer raises `error` after the good ones."""
        self.end, self.failure = index, error

    def first_sample(self, index: int) -> int:
        """Return the number of the first sample of micro-batch `index`."""
        return self.position.first_sample(index)

    def make(self, index: int) -> tuple[Any, ...]:
        """Return the arrays of `columns` for micro-batch `index`."""
        first, count = self.first_sample(index), self.position.micro_batch
        if self.cache:
            # Decode what is not cached as one batch, with all threads. Below, each image would be
            # decoded alone.
            self.cache.load(
                [
                    side.paths[file]
                    for side in (self.hr, self.lr)
                    if side
                    for file in self.sampler.draw(first, count).files.tolist()
                    if side.paths[file] and side.is_cached(file)
                ]
            )
        made = [*self._samples(first, count, is_read=True)]
        # Kept until the loader takes the micro-batch. DALI requests some micro-batches ahead, so
        # the latest one is not the one that fails or is taken next.
        self._made[index] = samples = [sample for sample, _, _ in made]
        arrays = self.hr.arrays([hr for _, hr, _ in made])
        if self.lr:
            arrays += self.lr.arrays([lr for _, _, lr in made])
        if self.has_margin:
            arrays.append(
                np.array(
                    [
                        (sample.top - sample.region[0], sample.left - sample.region[1])
                        for sample in samples
                    ],
                    np.int32,
                )
            )
        arrays += [
            np.array([sample.flip_vertical for sample in samples], np.int32),
            np.array([sample.flip_horizontal for sample in samples], np.int32),
            np.array([sample.transpose for sample in samples], bool),
        ]
        if self.has_brightness:
            arrays.append(np.array([sample.brightness for sample in samples], np.float32))
        return (
            tuple(arrays)
            if self.degrades_on_host
            else (*arrays, *self._drawn_arrays(samples, self._keys(index)))
        )

    def degraded(self, index: int) -> list[tuple[Sample, list[int]]]:
        """Return the samples of micro-batch `index` and each one's noise keys.

        The micro-batch must have been made and not yet taken.
        """
        return list(zip(self._made[index], self._keys(index), strict=True))

    def _keys(self, index: int) -> list[list[int]]:
        words = self.sampler.degradation_words(
            self.first_sample(index), self.position.micro_batch, WORDS
        )
        # The last words of a sample are its noise keys; `_samples` turns the others into uniform
        # numbers.
        return words[:, -KEYS:].tolist()

    def samples(self, first: int, count: int) -> list[Sample]:
        """Return samples first .. first + count - 1 without their pixels."""
        return [sample for sample, _, _ in self._samples(first, count, is_read=False)]

    def files_of(self, index: int) -> list[str]:
        """Return the files that micro-batch `index` reads, for messages."""
        made = self._made.get(index)
        if made:  # including replacements of bad files
            return [path for sample in made for path in (sample.path, sample.lr_path) if path]
        first = self.first_sample(index)
        files = self.sampler.draw(first, self.position.micro_batch).files.tolist()
        paths = [side.paths[file] for side in (self.hr, self.lr) if side for file in files]
        return [path for path in paths if path]

    def take_skips(self, index: int) -> tuple[Skip, ...]:
        """Return the files skipped for micro-batch `index`, and forget it and all earlier ones."""
        skips = tuple(skip for sample in self._made[index] for skip in sample.skipped)
        self._made = {made: samples for made, samples in self._made.items() if made > index}
        return skips

    def reject(self, error: BadFileError) -> None:
        """Stop sampling from a bad file.

        Raises `UserError` if the recipe stops for bad files or too many files are bad.
        """
        if self.spec.on_error == "stop":
            numbers = [
                sample.number
                for made in self._made.values()
                for sample in made
                if error.path in (sample.path, sample.lr_path)
            ]
            raise UserError(f"{error}{f' (sample {numbers[0]})' if numbers else ''}") from error
        self.bad.setdefault(error.path, error.reason)
        refuse_too_many(self.bad, self.sampler.num_files, self.spec)

    def profile_note(self) -> str:
        """Return a line about files whose colours are converted to sRGB; "" if there are none."""
        if not self.profiles:
            return ""
        path, profile = next(iter(self.profiles.items()))
        return (
            f"{path} has the colour profile {profile}: files with a profile other than sRGB are "
            "converted to sRGB (`python tools/check_training_data.py` counts them)"
        )

    def degradation_of(self, folder: int) -> Degradation:
        """Return the degradation of a dataset folder, given its position among the folders."""
        return self.degradations[folder % len(self.degradations)]

    def close(self) -> None:
        if self.cache:
            self.cache.close()

    def _samples(
        self, first: int, count: int, *, is_read: bool
    ) -> Iterator[tuple[Sample, Part, Part]]:
        draws = self.sampler.draw(first, count)
        fractions = uniforms(
            self.sampler.degradation_words(first, count, WORDS)[:, :-KEYS]
        ).tolist()
        for i in range(count):
            yield self._sample(draws, i, fractions[i], is_read=is_read)

    def _sample(
        self, draws: Draws, i: int, fractions: list[float], *, is_read: bool
    ) -> tuple[Sample, Part, Part]:
        """Make a sample from its file, or from a replacement if that file is bad."""
        number, file = int(draws.samples[i]), int(draws.files[i])
        if number in self.excluded:
            file = self.sampler.replacement(number, MAX_ATTEMPTS)
        skipped: list[Skip] = []
        for attempt in range(MAX_ATTEMPTS):
            try:
                # Every attempt starts the sample's random numbers from the first, so that what a
                # replacement gets does not depend on how far the bad file could be read.
                return self._sample_of(
                    file, draws, i, iter(fractions), tuple(skipped), is_read=is_read
                )
            except BadFileError as error:
                if self.spec.on_error == "stop":
                    raise UserError(f"{error} (sample {number})") from error
                self.reject(error)
                skipped.append(Skip(number, error.path, error.reason))
                # Chosen by the sample's number, so that any number of ranks, and a continued run,
                # take the same replacement.
                file = self.sampler.replacement(number, attempt)
        raise UserError(
            f"sample {number}: all {MAX_ATTEMPTS} draws from its folder gave bad files, the last "
            f"one {skipped[-1].path}: {skipped[-1].reason}; run `python "
            "tools/check_training_data.py --clean`, then select the training files again"
        )

    def _sample_of(
        self,
        file: int,
        draws: Draws,
        i: int,
        randoms: Iterator[float],
        skipped: tuple[Skip, ...],
        *,
        is_read: bool,
    ) -> tuple[Sample, Part, Part]:
        folder = self.sampler.folder_of(file)
        degradation = self.degradation_of(folder)
        hr, lr = self._open_pair(file)
        height, width, scale = (
            hr.height - hr.height % self.scale,
            hr.width - hr.width % self.scale,
            self.scale,
        )
        # Height and width were cut to multiples of the scale: the rest would fill only a part of an
        # LR pixel.
        top = anchor(draws.top[i], height, self.crop, scale)
        left = anchor(draws.left[i], width, self.crop, scale)
        # From here on, `randoms` are used up in a fixed order. In another order a continued run
        # would draw other samples.
        above, before = degradation.place(randoms)
        surroundings = degradation.surroundings
        if self.spec.sharpen_hr:
            reach = -(-HR_REACH // scale) * scale
            above, before = above + reach, before + reach
            surroundings += 2 * reach
        extent = self.crop + surroundings
        region_height, region_width = min(extent, height), min(extent, width)
        # At the photograph's border the region is moved inwards instead of being cut, so that all
        # regions have the same size, unless the photograph is smaller than that.
        region = (
            min(max(top - above, 0), height - region_height),
            min(max(left - before, 0), width - region_width),
            region_height,
            region_width,
        )
        shape = region_height, region_width
        if degradation.turns_first and draws.transpose[i]:
            shape = shape[::-1]
        drawn = degradation.draw(randoms, *shape)
        sigma = self.lr_noise.draw(randoms) if self.lr_noise else 0.0
        is_brightened, fraction = draws.brightness[i]
        low, high = self.spec.brightness.range
        brightness = (
            low + (high - low) * fraction
            if is_brightened < self.spec.brightness.probability
            else 1.0
        )
        sample = Sample(
            int(draws.samples[i]),
            self.hr.paths[file],
            (self.lr.paths[file] or None) if self.lr else None,
            top,
            left,
            region,
            int(draws.flip_vertical[i]),
            int(draws.flip_horizontal[i]),
            int(draws.transpose[i]),
            float(brightness),
            drawn,
            sigma,
            skipped,
            folder,
        )
        if not is_read:
            return sample, NO_PART, NO_PART
        # Exact: with paired LR the region is the crop, which lies on the grid of the scale.
        y, x, rows, columns = (side // scale for side in region)
        return (
            sample,
            self.hr.part(hr, region, i),
            self.lr.part(lr, (y, x, rows, columns), i) if self.lr and lr else NO_PART,
        )

    def _open_pair(self, file: int) -> tuple[OpenedFile, OpenedFile | None]:
        for side in (self.hr, self.lr):
            # A file that is known to be bad fails in the same way as one that is found to be bad
            # now. Otherwise the numbers of the attempts, and with them the replacements, would
            # depend on history.
            if side and side.paths[file] and side.paths[file] in self.bad:
                raise BadFileError(side.paths[file], self.bad[side.paths[file]])
        hr = self.hr.open(file)
        if hr.profile:
            self.profiles[self.hr.paths[file]] = hr.profile
        if min(hr.height, hr.width) < self.crop:
            raise BadFileError(
                self.hr.paths[file],
                f"{hr.height}x{hr.width} is smaller than data.crop {self.crop}",
                "lower data.crop, or remove such files with `python tools/check_training_data.py "
                f"--clean --min-size {self.crop}`, then select the training files again",
            )
        if self.lr is None or not self.lr.paths[file]:
            return hr, None
        lr = self.lr.open(file)
        if lr.profile:
            self.profiles[self.lr.paths[file]] = lr.profile
        if (lr.height, lr.width) != (hr.height // self.scale, hr.width // self.scale):
            raise BadFileError(
                self.lr.paths[file],
                f"{lr.height}x{lr.width} is not 1/{self.scale} of "
                f"{hr.height}x{hr.width}, the size of {self.hr.paths[file]}",
            )
        return hr, lr

    def _drawn_arrays(
        self, samples: Sequence[Sample], keys: Sequence[Sequence[int]]
    ) -> list[list[NDArray[Any]]]:
        made = [
            self.degradation.arrays(sample.degradation, of)
            for sample, of in zip(samples, keys, strict=True)
        ]
        columns = [[one[name] for one in made] for name in self.degradation.columns]
        if self.cuts_turned:
            corners = [sample.corner(self.crop, is_turned=True) for sample in samples]
            columns.insert(0, [np.array(corner, np.int32) for corner in corners])
        if self.lr_noise and self.noises_in_graph:
            shape = self.crop // self.scale, self.crop // self.scale
            fields = [
                # Its keys are the last two; degradations use those before.
                self.lr_noise.arrays(sample.noise_sigma, shape, of[-2:])
                for sample, of in zip(samples, keys, strict=True)
            ]
            columns += [[one[name] for one in fields] for name in LrNoise.columns]
        return columns


def refuse_too_many(bad: Mapping[str, str], num_files: int, spec: DataSpec) -> None:
    """Raise `UserError` if more files are bad than the recipe's `max_bad_files` allows.

    `bad` maps path -> reason.
    """
    # Always allow one bad file: in a small dataset, a small share would round down to none.
    limit = max(1, int(spec.max_bad_files * num_files)) if spec.max_bad_files else 0
    if len(bad) > limit:
        some = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3]) + "; …" * (
            len(bad) > 3
        )
        raise UserError(
            f"{len(bad)} of {num_files} files are bad, but data.max_bad_files "
            f"{spec.max_bad_files:g} allows only {limit} ({some}); run `python "
            "tools/check_training_data.py --clean`, then select the training files again, or raise "
            "data.max_bad_files"
        )
