"""Find files that cannot be trained on, before training finds them; nothing is moved unless
asked."""

from __future__ import annotations

import posixpath
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from pipeline.cli import UserError, run, say
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
from tools.dataset.judging import Findings, Judge, Judgement, Rules, Twins, Verdict, other_sides
from tools.files import IMAGES, EntryKind, converted_note, links_note, printable, scan
from tools.parallel import batched, ordered_map, progress, quiet_libraries, thread_count

MAX_BAD_FRACTION = (
    0.05  # more than this is rather a wrong option or a broken disk than so many bad files
)
MAX_BAD_FILES = 20  # ... unless it is a handful


@dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
    """Judge every image below the dataset folder: can training read it, is it large enough, is it
    what was written, and does it teach anything?

    Encoded images are decoded (plain PNG, JPEG and WebP files by fast decoders, all others by DALI,
    which training uses: the same pixels) and must be complete to the last byte; .npy crops are read
    in full; both are compared with the checksums in their manifest. Flat images, blurred or
    upscaled ones, copies of an earlier one, links to another one, and (--against) parts of
    benchmark images are bad too; a bad side of an HR and LR pair takes the other along. By default
    this only looks: it prints what is bad and exits with 1. --clean moves bad files to
    DATA_DIR/quarantine/, from where they can be moved back. Broken crops are made again by the tool
    that made them, crops that were bad for another reason are not (rejects.jsonl beside their
    manifest names them). Files that could not be read (permissions, a failing disk) are reported,
    never moved. File lists, manifests, the quarantine and files that are not images are left alone.

    Example: python tools/check_training_data.py --data-dir ~/dataset --clean
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: the folder below which all images are judged."""
    fast: bool = False
    """Decode nothing: PNG checksums, JPEG markers, WebP, BMP, TIFF and .npy lengths show files that
    were cut short and most damage; the gates judge by what the manifests recorded."""
    clean: bool = False
    """Move bad files to DATA_DIR/quarantine/<same path>; quarantine/report.jsonl says why."""
    delete: bool = False
    """With --clean: delete bad files for good instead of moving them."""
    force: bool = False
    """With --clean: go on even where more than 5 % of the files (and more than 20) are bad."""
    min_size: int = 256
    """Least height and width in pixels; at least the HR crop of the recipe."""
    max_size: int | None = None
    """Greatest height and width in pixels; by default any."""
    max_megapixels: float = 300
    """Larger images are bad: decoding them could fill the memory."""


def main(options: Options) -> int:
    """Judge, print, and clean where asked. 0: all good; 1: some files are (or were) bad or could
    not be read."""
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
    rules = Rules(
        options.min_size,
        options.max_size,
        options.max_megapixels,
        not options.fast,
        options.min_gradient,
        options.min_sharpness,
    )
    prepare_decoders()
    judge = Judge(root, rules, crops, open_benchmark(options.benchmark_folders()))
    findings = _judge_all(root, judge, survey.images, options, crops)
    made_again = _add_other_sides(root, survey, crops, findings)
    _summarize(survey, findings)
    if cleaned := cleaned_away(root, survey.manifests, crops):
        print(
            f"{cleaned} crops that a manifest names were taken away by --clean and are not made "
            "again"
        )
    if crops.missing():
        print(
            f"{crops.missing()} crops that a manifest names are not there; the tool that made them "
            "makes them again"
        )
    if findings.bad and options.clean:
        _refuse_too_many(len(findings.bad), survey.images, options.force)
        named = _names_in_lists(
            root
        )  # before anything moves: a broken list must not stop us halfway
        with Cleaner(root, survey.manifests, made_again, findings.bad, options.delete) as cleaner:
            for judgement in findings.bad:
                cleaner.take(judgement)
        _say_cleaned(
            root,
            cleaner,
            options.delete,
            any(judgement.path in named for judgement in findings.bad),
        )
    elif findings.bad:
        print(f"nothing was changed; --clean moves the bad files to {root / QUARANTINE}")
    return 1 if findings.bad or findings.unreadable else 0


def _check_options(options: Options) -> None:
    """Refuse options that contradict each other."""
    options.check_gates()
    if options.delete and not options.clean:
        raise UserError(
            "--delete: only with --clean; --clean alone moves bad files to a quarantine and can be "
            "undone"
        )
    if options.force and not options.clean:
        raise UserError("--force: only with --clean; without it nothing is changed anyway")
    if options.fast and options.against:
        raise UserError(
            "--against: needs the pixels, which --fast does not read; leave --fast away"
        )
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
    """How many files lie below the dataset folder."""

    images: int = 0
    foreign: int = 0
    manifests: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)

    def has_looked_at(self, name: str) -> bool:
        """Whether an image that is there was among those that were judged."""
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


def _judge_all(
    root: Path, judge: Judge, total: int, options: Options, crops: ManifestIndex
) -> Findings:
    """Judge all files, in their order, and print the bad ones as they are found."""
    findings, started, threads = Findings(), time.monotonic(), thread_count(options.threads)
    distance = options.max_hash_distance()
    twins = None if distance is None else Twins(root, distance)
    with quiet_libraries(), progress(total, "file") as bar:
        for judgements in ordered_map(
            lambda names: [judge(name) for name in names], batched(_images(root)), threads
        ):
            for judgement in judgements:
                findings.bytes += judgement.bytes
                if twins is None or not twins.is_twin(judgement):
                    _take_in(findings, judgement, bar)
            bar.update(len(judgements))
            bar.set_postfix(MB=findings.bytes // 1_000_000, bad=len(findings.bad), refresh=False)
        found, links = twins.verdicts(_images(root)) if twins else ([], [])
        for link in links:
            findings.take_back(link, _sha256(crops, link.path))
        for judgement in [*found, *links]:
            _take_in(findings, judgement, bar)
    findings.seconds = time.monotonic() - started
    return findings


def _take_in(findings: Findings, judgement: Judgement, bar: tqdm) -> None:
    """Count a judgement, and print it unless it is good."""
    if judgement.verdict is Verdict.GOOD:
        findings.good += 1
        if judgement.profile:
            findings.converted[judgement.profile] += 1
        if judgement.sha256:
            findings.recorded.add(judgement.path, judgement.sha256)
        return
    if judgement.verdict is Verdict.BAD:
        findings.bad.append(judgement)
    else:
        findings.unreadable.append(judgement.path)
    bar.write(
        f"{judgement.verdict.value}: {printable(judgement.path)}: {judgement.reason}",
        file=sys.stdout,
    )


def _sha256(crops: ManifestIndex, name: str) -> str:
    record = crops.get(name)
    return record.sha256 if record else ""


def _add_other_sides(
    root: Path, survey: Survey, crops: ManifestIndex, findings: Findings
) -> set[str]:
    """Call bad what cannot be trained on without its other side; returns the bad files that are to
    be made again."""
    made_again = {judgement.path for judgement in findings.bad if judgement.gate == "file"}
    passed = {judgement.path for judgement in findings.bad}.union(findings.unreadable)
    sides = other_sides(
        root, crops, survey.manifests, [judgement.path for judgement in findings.bad]
    )
    for path, bad_side in sorted(sides.items()):
        if path in passed or not survey.has_looked_at(path):
            continue
        side = Judgement(
            path,
            Verdict.BAD,
            f"the other side of its pair is bad: {printable(bad_side)}",
            gate="pair",
        )
        findings.take_back(side, _sha256(crops, path))
        findings.bad.append(side)
        print(f"bad: {printable(path)}: {side.reason}")
        if bad_side in made_again:
            made_again.add(path)
    return made_again


def _summarize(survey: Survey, findings: Findings) -> None:
    """What was looked at, and what was found."""
    num_bad, seconds = len(findings.bad), max(findings.seconds, 1e-3)
    print(
        f"{survey.images} images judged in {seconds:.1f} s ({survey.images / seconds:.0f} files/s, "
        f"{findings.bytes / 1e6:.0f} MB read): {findings.good} good, {num_bad} bad, "
        f"{len(findings.unreadable)} could not be read; {survey.foreign} other files left alone"
    )
    if findings.bad:
        counts = Counter(judgement.gate for judgement in findings.bad)
        print(f"why: {', '.join(f'{count} {gate}' for gate, count in sorted(counts.items()))}")
    if findings.converted:
        print(converted_note(findings.converted, "images", "training converts them to sRGB"))
    if survey.unread:
        print(unread_note(survey.unread))
    if survey.linked_folders:
        print(
            "links to folders were not followed: "
            f"{', '.join(map(printable, survey.linked_folders))}"
        )
    if findings.recorded.count:
        print(
            f"hash of the {findings.recorded.count} good images that manifests know (the same on "
            "every node): "
            f"{findings.recorded.hexdigest()}"
        )


def _refuse_too_many(bad: int, total: int, force: bool) -> None:
    """Stop a --clean that would take away a large part of the dataset."""
    if bad > MAX_BAD_FILES and bad > MAX_BAD_FRACTION * total and not force:
        raise UserError(
            f"{bad} of {total} files are bad, more than {MAX_BAD_FRACTION:.0%}: look at the "
            "reasons above "
            "(a wrong --min-size? a failing disk?); nothing was changed; --clean --force goes on"
        )


def _say_cleaned(root: Path, cleaner: Cleaner, delete: bool, are_listed: bool) -> None:
    """What was taken away, and how to go on."""
    for path, reason in cleaner.failed:
        print(f"could not be {'deleted' if delete else 'moved'}: {printable(path)}: {reason}")
    if delete:
        print(f"deleted {cleaner.taken} files")
    else:
        print(
            f"moved {cleaner.taken} files to {root / QUARANTINE}; to undo, move a file back: it "
            "lies there under its "
            f"old path ({REPORT} lists all, with reasons)"
        )
    if are_listed:
        say(
            "the file lists name some of them: write the lists again with "
            f"`python tools/select_training_files.py --data-dir {root}` (and the same options as "
            "before)"
        )


def _names_in_lists(root: Path) -> set[str]:
    """All files that the training and the validation list name, as far as there are lists."""
    lists = [root / name for name in (TRAINING_LIST, VALIDATION_LIST)]
    return {name for path in lists if path.exists() for name in read_file_list(path, root)}


if __name__ == "__main__":
    run(Options, main)
