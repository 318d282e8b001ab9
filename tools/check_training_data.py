"""Find files that cannot be used for training, before it starts; move them only if asked to."""

from __future__ import annotations

import posixpath
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from tqdm import tqdm

from pipeline.cli import UserError, counted, run, say
from pipeline.data.image_files import (
    MANIFEST,
    QUARANTINE,
    TRAINING_LIST,
    VALIDATION_LIST,
    read_file_list,
)
from pipeline.data.image_headers import unread_note
from pipeline.data.image_pixels import prepare_decoders
from tools.crops.manifest import ManifestIndex
from tools.crops.options import GateOptions, open_benchmark
from tools.dataset.cleaning import REPORT, Cleaner, check_can_clean, cleaned_away
from tools.dataset.judging import (
    DuplicateFiles,
    FileCheck,
    FileChecker,
    FileRules,
    FileStatus,
    Findings,
    other_sides,
)
from tools.files import IMAGES, EntryKind, converted_note, links_note, printable, scan
from tools.parallel import batched, ordered_map, progress, quiet_libraries, thread_count

MAX_BAD_FRACTION = 0.05  # more than this points to a wrong option or a broken disk
MAX_BAD_FILES = 20  # up to this number --clean never needs --force


@dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
    """Check every image below the dataset folder.

    Can training read it, is it large enough, undamaged and informative? Encoded images are decoded
    (plain PNG, JPEG and WebP files by fast decoders, all others by DALI, which training uses; the
    pixels are the same) and must be complete to the last byte. .npy crops are read in full. Both
    are compared with the checksums in their manifest. Flat, blurred or upscaled images, copies of
    or links to an earlier one, and (--against) parts of benchmark images are bad too. If one side
    of an HR/LR pair is bad, so is the other.

    By default, the bad files are only printed, and the exit status is 1. --clean moves them to
    DATA_DIR/quarantine/, from where they can be moved back. The tool that made the crops makes
    broken ones again, but not those that were bad for another reason (rejects.jsonl beside their
    manifest lists these). Files that could not be read (permissions, a failing disk) are reported,
    never moved. File lists, manifests, the quarantine and files that are not images are left alone.

    Example: python tools/check_training_data.py --data-dir ~/dataset --clean
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: all images below this folder are checked."""
    fast: bool = False
    """Decode nothing: PNG checksums, JPEG markers and the lengths of WebP, BMP, TIFF and .npy files
    reveal truncated files and most damage; the gates use the measurements in the manifests."""
    clean: bool = False
    """Move bad files to DATA_DIR/quarantine/<same path>; quarantine/report.jsonl lists the
    reasons."""
    delete: bool = False
    """With --clean: delete bad files permanently instead of moving them."""
    force: bool = False
    """With --clean: continue even if more than 5 % of the files (and more than 20) are bad."""
    min_size: int = 256
    """Minimum height and width in pixels; should be at least the recipe's HR crop size."""
    max_size: int | None = None
    """Maximum height and width in pixels; unlimited by default."""
    max_megapixels: float = 300
    """Larger images are bad, because decoding them could exhaust the memory."""


def main(options: Options) -> int:
    """Check, print, and clean if asked.

    Returns 0 if all files are good, 1 if some are (or were) bad or could not be read.
    """
    _check_options(options)
    root = options.data_dir.expanduser()
    if options.clean and not options.delete and root.is_dir():
        check_can_clean(root)
    survey = _survey(root)
    if not survey.images:
        raise UserError(
            f"{root}: no images below this folder{links_note(survey.linked_folders)}; make crops "
            "with "
            "`python tools/images_to_data.py`, or give another --data-dir"
        )
    crops = ManifestIndex(root, survey.manifests)
    rules = FileRules(
        options.min_size,
        options.max_size,
        options.max_megapixels,
        not options.fast,
        options.min_gradient,
        options.min_sharpness,
    )
    prepare_decoders()
    checker = FileChecker(root, rules, crops, open_benchmark(options.benchmark_folders()))
    findings = _check_all(root, checker, survey.images, options, crops)
    made_again = _add_other_sides(root, survey, crops, findings)
    _summarize(survey, findings)
    if cleaned := cleaned_away(root, survey.manifests, crops):
        print(f"listed crops that --clean removed, which are not recreated: {cleaned}")
    if crops.missing():
        print(f"listed crops that are missing: {crops.missing()}; rerun the tool that made them")
    if findings.bad and options.clean:
        _refuse_too_many(findings, survey.images, options)
        # Read the lists before anything moves: a broken list must not stop the run halfway.
        named = _names_in_lists(root)
        with Cleaner(root, survey.manifests, made_again, findings.bad, options.delete) as cleaner:
            for check in findings.bad:
                cleaner.take(check)
        _report_cleaned(
            root,
            cleaner,
            options.delete,
            any(check.path in named for check in findings.bad),
        )
    elif findings.bad:
        print(f"nothing was changed; --clean moves the bad files to {root / QUARANTINE}")
    return 1 if findings.bad or findings.unreadable else 0


def _check_options(options: Options) -> None:
    """Raise `UserError` for options that contradict each other."""
    options.check_gates()
    if options.delete and not options.clean:
        raise UserError(
            "--delete: needs --clean; --clean alone moves bad files to a quarantine, which can be "
            "undone"
        )
    if options.force and not options.clean:
        raise UserError("--force: needs --clean; nothing is changed without it")
    if options.fast and options.against:
        raise UserError("--against: needs the pixels, which --fast does not read; omit --fast")
    if options.min_size < 1:
        raise UserError(f"--min-size {options.min_size}: must be at least 1")
    if options.max_size is not None and options.max_size < options.min_size:
        raise UserError(
            f"--max-size {options.max_size}: below --min-size {options.min_size}, every file would "
            "be bad"
        )
    if not options.max_megapixels > 0:
        raise UserError(f"--max-megapixels {options.max_megapixels:g}: must be above 0")


@dataclass
class Survey:
    """Contents of the dataset folder."""

    images: int = 0
    foreign: int = 0
    manifests: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)

    def was_checked(self, name: str) -> bool:
        """Whether an existing image was among those that were checked."""
        parts = posixpath.dirname(name).split("/")
        return (
            QUARANTINE not in parts
            and not any(part.startswith(".") for part in parts)
            and not any(name.startswith(f"{folder}/") for folder in self.linked_folders)
        )


def _survey(root: Path) -> Survey:
    survey = Survey()
    for kind, name in scan(root, MANIFEST):
        survey.images += kind in IMAGES
        survey.foreign += kind is EntryKind.FOREIGN
        if kind is EntryKind.MANIFEST:
            survey.manifests.append(name)
        elif kind is EntryKind.UNREAD:
            survey.unread.append(name)
        elif kind is EntryKind.LINKED_FOLDER:
            survey.linked_folders.append(name)
    return survey


def _images(root: Path) -> Iterator[str]:
    return (name for kind, name in scan(root, MANIFEST) if kind in IMAGES)


def _check_all(
    root: Path, checker: FileChecker, total: int, options: Options, crops: ManifestIndex
) -> Findings:
    """Check all files in order, and print the bad ones as they are found."""
    findings, started, threads = Findings(), time.monotonic(), thread_count(options.threads)
    distance = options.max_hash_distance()
    duplicates = None if distance is None else DuplicateFiles(root, distance)
    with quiet_libraries(), progress(total, "file") as bar:
        for checks in ordered_map(
            lambda names: [checker(name) for name in names], batched(_images(root)), threads
        ):
            for check in checks:
                findings.bytes += check.bytes
                if duplicates is None or not duplicates.is_duplicate(check):
                    _count(findings, check, bar)
            bar.update(len(checks))
            bar.set_postfix(MB=findings.bytes // 1_000_000, bad=len(findings.bad), refresh=False)
        found, links = duplicates.resolve(_images(root)) if duplicates else ([], [])
        for link in links:
            findings.uncount(link, _sha256(crops, link.path))
        for check in [*found, *links]:
            _count(findings, check, bar)
    findings.seconds = time.monotonic() - started
    return findings


def _count(findings: Findings, check: FileCheck, bar: tqdm) -> None:
    """Count a result, and print it unless it is good."""
    if check.status is FileStatus.GOOD:
        findings.good += 1
        findings.depths[check.depth] += 1
        if check.profile:
            findings.converted[check.profile] += 1
        if check.sha256:
            findings.recorded.add(check.path, check.sha256)
        return
    if check.status is FileStatus.BAD:
        findings.bad.append(check)
    else:
        findings.unreadable.append(check.path)
    bar.write(
        f"{check.status.value}: {printable(check.path)}: {check.reason}",
        file=sys.stdout,
    )


def _sha256(crops: ManifestIndex, name: str) -> str:
    record = crops.get(name)
    return record.sha256 if record else ""


def _add_other_sides(
    root: Path, survey: Survey, crops: ManifestIndex, findings: Findings
) -> set[str]:
    """Mark as bad the files whose other side is bad, since they cannot be used alone.

    Returns all bad files that may be cut again.
    """
    made_again = {check.path for check in findings.bad if check.gate == "file"}
    passed = {check.path for check in findings.bad}.union(findings.unreadable)
    sides = other_sides(root, crops, survey.manifests, [check.path for check in findings.bad])
    for path, bad_side in sorted(sides.items()):
        if path in passed or not survey.was_checked(path):
            continue
        side = FileCheck(
            path,
            FileStatus.BAD,
            f"the other side of its pair is bad: {printable(bad_side)}",
            gate="pair",
        )
        findings.uncount(side, _sha256(crops, path))
        findings.bad.append(side)
        print(f"bad: {printable(path)}: {side.reason}")
        if bad_side in made_again:
            made_again.add(path)
    return made_again


def _summarize(survey: Survey, findings: Findings) -> None:
    """Print what was checked and what was found."""
    num_bad, seconds = len(findings.bad), max(findings.seconds, 1e-3)
    print(
        f"{counted(survey.images, 'image')} checked in {seconds:.1f} s "
        f"({survey.images / seconds:.0f} files/s, {findings.bytes / 1e6:.0f} MB read): "
        f"{findings.good} good, {num_bad} bad, {len(findings.unreadable)} could not be read; "
        f"{survey.foreign} other files left alone"
    )
    if findings.bad:
        counts = Counter(check.gate for check in findings.bad)
        print(f"reasons: {', '.join(f'{count} {gate}' for gate, count in sorted(counts.items()))}")
    if findings.converted:
        print(converted_note(findings.converted, "images", "training converts them to sRGB"))
    if deep := findings.depths[16]:
        plain = findings.depths[8]
        print(
            f"mixed depths: {deep} images have 16 bits per value and {plain} have 8; training "
            "works in 16 bits and scales the others to them (data.depth=8: round all to 8)"
            if plain
            else f"all {deep} good images have 16 bits per value, and training works in 16"
        )
    if survey.unread:
        print(unread_note(survey.unread))
    if survey.linked_folders:
        print(
            "links to folders were not followed: "
            f"{', '.join(map(printable, survey.linked_folders))}"
        )
    if findings.recorded.count:
        print(
            f"hash of the {findings.recorded.count} good images listed in manifests (the same on "
            f"every node): {findings.recorded.hexdigest()}"
        )


def _refuse_too_many(findings: Findings, total: int, options: Options) -> None:
    """Raise `UserError` if --clean would remove a large part of the dataset, or all of it."""
    bad, force = len(findings.bad), options.force
    small = [check for check in findings.bad if "is too small" in check.reason]
    pairs = [check for check in findings.bad if check.gate == "pair"]  # of a small side
    if small and bad == total and not force and len(small) + len(pairs) == bad:
        raise UserError(
            f"all {total} files are smaller than --min-size {options.min_size}; nothing was "
            "changed; give a smaller --min-size and train with a data.crop as small, or use larger "
            "images"
        )
    if bad > MAX_BAD_FILES and bad > MAX_BAD_FRACTION * total and not force:
        raise UserError(
            f"{bad} of {total} files are bad, more than {MAX_BAD_FRACTION:.0%}: check the reasons "
            "above (a wrong --min-size? a failing disk?); nothing was changed; --clean --force "
            "removes them anyway"
        )


def _report_cleaned(root: Path, cleaner: Cleaner, delete: bool, are_listed: bool) -> None:
    """Print what was removed, and how to continue."""
    for path, reason in cleaner.failed:
        print(f"could not be {'deleted' if delete else 'moved'}: {printable(path)}: {reason}")
    if delete:
        print(f"files deleted: {cleaner.taken}")
    else:
        print(
            f"files moved to {root / QUARANTINE}, each to its old path there: {cleaner.taken}; to "
            f"undo, move them back ({REPORT} lists all files and the reasons)"
        )
    if are_listed:
        say(
            "the file lists name some of these files: write the lists again with `python "
            f"tools/select_training_files.py --data-dir {root}` (and the same options as before)"
        )


def _names_in_lists(root: Path) -> set[str]:
    """All files in the training and the validation list, as far as the lists exist."""
    lists = [root / name for name in (TRAINING_LIST, VALIDATION_LIST)]
    return {name for path in lists if path.exists() for name in read_file_list(path, root)}


if __name__ == "__main__":
    run(Options, main)
