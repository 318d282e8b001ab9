"""Cut photographs in tar archives, such as ImageNet's tar of tars, into crops without unpacking."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro
from tqdm import tqdm

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST, QUARANTINE
from pipeline.data.image_headers import BadImageError
from pipeline.data.image_pixels import prepare_decoders
from tools.crops.cutting import (
    REJECTS,
    SETTINGS,
    CropSettings,
    Reject,
    Unit,
    cut_picture,
    make_folder,
    open_picture,
    parse_reject,
)
from tools.crops.dataset import Clock, CropDataset, Stamp, UnitResult, open_dataset, refuse_nested
from tools.crops.leakage import BenchmarkIndex
from tools.crops.options import CropOptions, open_benchmark
from tools.files import name_fault
from tools.images import check_max_megapixels
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count
from tools.tar.members import Member, Problem, TarReader, check_archive
from tools.tar.streams import Limits

MB = 1_000_000
_SMALLER_SIZES = (384, 256, 192, 144, 128, 96, 64, 48, 32)  # sizes to suggest in the report
# Matches the wording of cutting.too_small.
_TOO_SMALL = re.compile(r"too small: (\d+)x(\d+)( \(\d+x\d+ after halving)?")


@dataclass(frozen=True, kw_only=True)
class Options(CropOptions):
    """Cut the photographs in tar archives into training crops, without unpacking the archives.

    Reads ImageNet's tar of tars (ILSVRC2012_img_train.tar) and any other .tar, .tar.gz, .tar.bz2,
    .tar.xz and (from Python 3.14 on) .tar.zst with photographs, up to two archives deep, in bounded
    memory. Photographs are recognised by their content; links, devices and hidden files are
    skipped. Crops are OUT/<tar>/<inner tar>/<member>/x<scale>_..., cut and filtered as by
    images_to_data.py. Run the same command again to continue a run that was stopped or killed;
    finished members are skipped. More archives may be added to OUT later.

    Example: python tools/imagenet_to_data.py ~/ILSVRC2012_img_train.tar --out ~/dataset/ImageNet
    """

    archives: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TAR...")]
    """The archives; their file names must differ, because crops are stored by archive name."""
    out: Path
    """Output folder of the crops, such as ~/dataset/ImageNet."""
    size: int = 128
    """Height and width of a crop in pixels. ImageNet's photographs are JPEGs of about 500x375,
    which are halved before cutting: 128 then fits once, 96 twice, 64 six times; 192 needs
    --keep-lossy-size."""
    max_megapixels: float = 300
    """Reject larger photos before decoding, because they could exhaust the memory."""
    max_member_mb: int = 256
    """Reject larger files in an archive before reading them; each thread holds up to two files in
    memory."""
    max_expansion: int = 100
    """Stop reading a compressed archive that expands to more than this many times its size (and 256
    MiB)."""


class Archive(NamedTuple):
    """An input archive; its crops are stored below OUT/name."""

    path: Path
    name: str
    stamp: Stamp


def main(options: Options) -> int:
    """Make the crops.

    Returns 0 if done, 1 if done but some photos or archives are damaged or no crop was made.
    """
    out = options.out.expanduser()
    settings, threads, limits = options.settings(), thread_count(options.threads), _limits(options)
    archives = _archives(options)
    for archive in archives:
        refuse_nested(archive.path, out)
    prepare_decoders()
    cutter = MemberCutter(out, settings, options.max_megapixels, open_benchmark(settings.against))
    clock = Clock()
    stamps = {archive.name: archive.stamp for archive in archives}
    with open_dataset(
        out, settings, lambda photo: stamps.get(photo.partition("/")[0]), "imagenet_to_data"
    ) as dataset:
        passed = _cut_all(dataset, archives, limits, cutter, threads)
        # If anything was bad, members may be missing because they were unreachable: keep all.
        for archive in archives if not dataset.totals.bad else ():
            dataset.forget(archive.name)
    clock.report(dataset.totals, out, "photo")
    if passed:
        print(f"skipped: {', '.join(f'{count} {kind}' for kind, count in sorted(passed.items()))}")
    _advise(out, settings)
    return 1 if dataset.totals.bad or dataset.is_empty else 0


def _limits(options: Options) -> Limits:
    """Limits on what an archive may contain."""
    check_max_megapixels(options.max_megapixels)
    if not 1 <= options.max_member_mb <= 4096:
        raise UserError(
            f"--max-member-mb {options.max_member_mb}: must be 1 to 4096; 256 suits all but giant "
            "photos"
        )
    if options.max_expansion < 1:
        raise UserError(
            f"--max-expansion {options.max_expansion}: must be at least 1; photographs need less "
            "than 10"
        )
    return Limits(member_bytes=options.max_member_mb * MB, expansion=options.max_expansion)


def _archives(options: Options) -> list[Archive]:
    """Check and return the given archives.

    Raises `UserError` for the first one that cannot be used.
    """
    if not options.archives:
        raise UserError("no archive given; give one or more .tar files before --out")
    archives: dict[str, Archive] = {}
    for given in options.archives:
        path = given.expanduser()
        name = path.name
        if (
            name_fault(name)
            or name.startswith(".")
            or name in (MANIFEST, SETTINGS, REJECTS, QUARANTINE)
        ):
            raise UserError(
                f"{str(path)!a}: crops cannot be stored in a folder with this name; rename the "
                "archive"
            )
        if name in archives:
            raise UserError(
                f"{archives[name].path} and {path}: both archives have the same name, so their "
                "crops would be mixed up; rename one, or use another OUT for it"
            )
        archives[name] = Archive(path, name, check_archive(path))
    return list(archives.values())


class Stream:
    """Unfinished members of the archives; the main thread iterates over it for the workers."""

    def __init__(
        self, archives: list[Archive], dataset: CropDataset, limits: Limits, bar: tqdm
    ) -> None:
        self._archives, self._dataset, self._limits, self._bar = archives, dataset, limits, bar
        self.passed: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[Archive, Member | Problem]]:
        done = 0
        for archive in self._archives:

            def wanted(name: str, archive: Archive = archive) -> bool:
                is_finished = self._dataset.is_finished(f"{archive.name}/{name}")
                self._dataset.totals.already += is_finished
                if is_finished:
                    self._show(done + reader.position)  # noqa: B023 - called in this iteration only
                return not is_finished

            reader = TarReader(archive.path, self._limits, wanted)
            for item in reader:
                self._show(done + reader.position)
                yield archive, item
            done += archive.stamp[0]
            self.passed += reader.passed

    def _show(self, position: int) -> None:
        self._bar.update(position // MB - self._bar.n)


def _cut_all(
    dataset: CropDataset,
    archives: list[Archive],
    limits: Limits,
    cutter: MemberCutter,
    threads: int,
) -> Counter[str]:
    """Cut unfinished members on threads while the main thread reads ahead.

    Returns the number of skipped members by kind.
    """
    total = sum(archive.stamp[0] for archive in archives) // MB
    with quiet_libraries(), progress(total, "MB") as bar:
        stream = Stream(archives, dataset, limits, bar)
        for result in ordered_map(cutter, stream, threads):
            dataset.add(result)
            bar.set_postfix(
                crops=dataset.totals.crops, rejected=dataset.totals.rejects.total(), refresh=False
            )
    return stream.passed


class MemberCutter:
    """Decodes and cuts members of archives; thread-safe."""

    def __init__(
        self,
        out: Path,
        settings: CropSettings,
        max_megapixels: float,
        benchmark: BenchmarkIndex | None,
    ) -> None:
        self._out, self._settings = out, settings
        self._max_megapixels, self._benchmark = max_megapixels, benchmark

    def __call__(self, found: tuple[Archive, Member | Problem]) -> UnitResult:
        """Decode a member and write its crops; a bad one gives a reject, not an exception."""
        archive, item = found
        name = f"{archive.name}/{item.name}" if item.name else archive.name
        unit = Unit(name, name, *archive.stamp)
        if isinstance(item, Problem):
            return UnitResult(unit, rejects=[Reject("decode", item.reason)])
        try:
            picture = open_picture(io.BytesIO(item.data), self._settings, self._max_megapixels)
        except BadImageError as error:
            return UnitResult(unit, rejects=[Reject("decode", str(error))])
        if isinstance(picture, Reject):
            return UnitResult(unit, rejects=[picture])
        make_folder(self._out, unit.folder)
        return UnitResult(
            unit, [cut_picture(picture, unit, self._out, self._settings, self._benchmark)]
        )


def _advise(out: Path, settings: CropSettings) -> None:
    """Print how many photos were too small in all runs, and what other sizes would keep."""
    # (shorter side in pixels, reduction before the first crop).
    sides: Counter[tuple[int, int]] = Counter()
    if (out / REJECTS).exists():
        with open(out / REJECTS, "rb") as file:
            for reject in filter(None, map(parse_reject, file)):
                match = _TOO_SMALL.match(reject["reason"]) if reject["gate"] == "size" else None
                if match:
                    sides[min(int(match[1]), int(match[2])), 2 if match[3] else 1] += 1
    if not sides:
        return
    offers, most = [], 0
    for size in _SMALLER_SIZES:
        kept = sum(count for (side, first), count in sides.items() if side // first >= size)
        if size < settings.size and kept > most:
            offers.append(f"--size {size} would keep {kept}")
            most = kept
    kept = sum(count for (side, _), count in sides.items() if side >= settings.size)
    if kept:
        offers.append(f"--keep-lossy-size would keep {kept} at this size")
    print(
        f"photos too small for --size {settings.size}: {sides.total()}"
        f"{'; ' + ', '.join(offers) if offers else ''}"
    )


if __name__ == "__main__":
    run(Options, main)
