"""Find files that cannot be trained on, before training finds them; nothing is moved unless asked."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST, QUARANTINE, TRAINING_LIST, VALIDATION_LIST, read_file_list
from tools.common.crop_options import GateOptions, open_benchmark
from tools.common.dataset_files import shown
from tools.common.dataset_walk import IMAGES, Kind, links_note, scan
from tools.common.image_judging import Judge, Judgement, Rules, Verdict
from tools.common.manifest import DatasetHash, ManifestIndex
from tools.common.parallel import batched, ordered_map, progress, quiet_libraries, thread_count
from tools.common.photo_decoding import prepare_decoders
from tools.common.twins import Twins

REPORT = "report.jsonl"
MAX_BAD_FRACTION = 0.05  # more than this is rather a wrong option or a broken disk than so many bad files
MAX_BAD_FILES = 20       # ... unless it is a handful


@dataclass(frozen=True, kw_only=True)
class Options(GateOptions):
    """Judge every image below the dataset folder: can training read it, is it large enough, is it what was written, and
    does it teach anything?

    Encoded images are decoded (plain PNG, JPEG and WebP files by fast decoders, all others by DALI, which training
    uses: the same pixels) and must be complete to the last byte; .npy crops are read in full; both are compared with
    the checksums in their manifest. Flat images, blurred or upscaled ones, copies of an earlier one, and (--against)
    parts of benchmark images are bad too. By default this only looks: it prints what is bad and exits with 1. --clean
    moves bad files to DATA_DIR/quarantine/, from where they can be moved back. Files that could not be read
    (permissions, a failing disk) are reported, never moved. File lists, manifests, the quarantine and files that are
    not images are left alone.

    Example: python tools/check_training_data.py --data-dir ~/dataset --clean
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: the folder below which all images are judged."""
    fast: bool = False
    """Decode nothing: PNG checksums, JPEG markers, WebP, BMP, TIFF and .npy lengths show files that were cut short and
    most damage; the gates judge by what the manifests recorded."""
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


@dataclass
class Outcome:
    """What a check found, good files only as numbers: a dataset may have millions."""

    good: int = 0
    bytes: int = 0
    seconds: float = 0
    bad: list[Judgement] = field(default_factory=list)
    unreadable: int = 0
    recorded: DatasetHash = field(default_factory=DatasetHash)  # of the good files that a manifest knows


def main(options: Options) -> int:
    """Judge, print, and clean where asked. 0: all good; 1: some files are (or were) bad or could not be read."""
    _check_options(options)
    root = options.data_dir.expanduser()
    survey = _survey(root)
    if not survey.images:
        raise UserError(f"{root}: no images below this folder{links_note(survey.linked_folders)}; make crops with "
                        "`python tools/images_to_data.py`, or give another --data-dir")
    crops = ManifestIndex(root, survey.manifests)
    rules = Rules(options.min_size, options.max_size, options.max_megapixels, not options.fast, options.min_gradient,
                  options.min_sharpness)
    prepare_decoders()
    judge = Judge(root, rules, crops, open_benchmark(options.benchmark_folders()))
    outcome = _judge_all(root, judge, survey.images, options)
    _summarize(survey, outcome)
    if crops.missing():
        print(f"{crops.missing()} crops that a manifest names are not there; the tool that made them makes them again")
    if outcome.bad and options.clean:
        _refuse_too_many(len(outcome.bad), survey.images, options.force)
        _clean(root, outcome.bad, options.delete)
    elif outcome.bad:
        print(f"nothing was changed; --clean moves the bad files to {root / QUARANTINE}")
    return 1 if outcome.bad or outcome.unreadable else 0


def _check_options(options: Options) -> None:
    """Refuse options that contradict each other."""
    options.check_gates()
    if options.delete and not options.clean:
        raise UserError("--delete: only with --clean; --clean alone moves bad files to a quarantine and can be undone")
    if options.force and not options.clean:
        raise UserError("--force: only with --clean; without it nothing is changed anyway")
    if options.fast and options.against:
        raise UserError("--against: needs the pixels, which --fast does not read; leave --fast away")
    if options.min_size < 1:
        raise UserError(f"--min-size {options.min_size}: must be at least 1")
    if options.max_size is not None and options.max_size < options.min_size:
        raise UserError(f"--max-size {options.max_size}: below --min-size {options.min_size}, every file would be bad")
    if not options.max_megapixels > 0:
        raise UserError(f"--max-megapixels {options.max_megapixels:g}: must be above 0")


@dataclass
class Survey:
    """How many files lie below the dataset folder."""

    images: int = 0
    foreign: int = 0
    manifests: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)


def _survey(root: Path) -> Survey:
    survey = Survey()
    for kind, name in scan(root, MANIFEST):
        survey.images += kind in IMAGES
        survey.foreign += kind is Kind.FOREIGN
        if kind is Kind.MANIFEST:
            survey.manifests.append(name)
        elif kind is Kind.LINKED_FOLDER:
            survey.linked_folders.append(name)
    return survey


def _images(root: Path) -> Iterator[str]:
    return (name for kind, name in scan(root, MANIFEST) if kind in IMAGES)


def _judge_all(root: Path, judge: Judge, total: int, options: Options) -> Outcome:
    """Judge all files, in their order, and print the bad ones as they are found."""
    outcome, started, threads = Outcome(), time.monotonic(), thread_count(options.threads)
    distance = options.max_hash_distance()
    twins = None if distance is None else Twins(root, distance)
    with quiet_libraries(), progress(total, "file") as bar:
        for judgements in ordered_map(lambda names: [judge(name) for name in names], batched(_images(root)), threads):
            for judgement in judgements:
                outcome.bytes += judgement.bytes
                if twins is None or not twins.is_twin(judgement):
                    _take_in(outcome, judgement, bar)
            bar.update(len(judgements))
            bar.set_postfix(MB=outcome.bytes // 1_000_000, bad=len(outcome.bad), refresh=False)
        for judgement in twins.verdicts(_images(root)) if twins else ():
            _take_in(outcome, judgement, bar)
    outcome.seconds = time.monotonic() - started
    return outcome


def _take_in(outcome: Outcome, judgement: Judgement, bar: tqdm) -> None:
    """Count a judgement, and print it unless it is good."""
    if judgement.verdict is Verdict.GOOD:
        outcome.good += 1
        if judgement.sha256:
            outcome.recorded.add(judgement.path, judgement.sha256)
        return
    if judgement.verdict is Verdict.BAD:
        outcome.bad.append(judgement)
    else:
        outcome.unreadable += 1
    bar.write(f"{judgement.verdict.value}: {shown(judgement.path)}: {judgement.reason}", file=sys.stdout)


def _summarize(survey: Survey, outcome: Outcome) -> None:
    """What was looked at, and what was found."""
    num_bad, seconds = len(outcome.bad), max(outcome.seconds, 1e-3)
    print(f"{survey.images} images judged in {seconds:.1f} s ({survey.images / seconds:.0f} files/s, "
          f"{outcome.bytes / 1e6:.0f} MB read): {outcome.good} good, {num_bad} bad, "
          f"{outcome.unreadable} could not be read; {survey.foreign} other files left alone")
    if outcome.bad:
        counts = Counter(judgement.gate for judgement in outcome.bad)
        print(f"why: {', '.join(f'{count} {gate}' for gate, count in sorted(counts.items()))}")
    if survey.linked_folders:
        print(f"links to folders were not followed: {', '.join(map(shown, survey.linked_folders))}")
    if outcome.recorded.count:
        print(f"hash of the {outcome.recorded.count} good images that manifests know (the same on every node): "
              f"{outcome.recorded.hexdigest()}")


def _refuse_too_many(bad: int, total: int, force: bool) -> None:
    """Stop a --clean that would take away a large part of the dataset."""
    if bad > MAX_BAD_FILES and bad > MAX_BAD_FRACTION * total and not force:
        raise UserError(f"{bad} of {total} files are bad, more than {MAX_BAD_FRACTION:.0%}: look at the reasons above "
                        "(a wrong --min-size? a failing disk?); nothing was changed; --clean --force goes on")


def _clean(root: Path, bad: list[Judgement], delete: bool) -> None:
    """Move the bad files to the quarantine, or delete them, and say how to go on."""
    named = _names_in_lists(root)  # before anything moves: a broken list must not stop us halfway
    if delete:
        for judgement in bad:
            os.unlink(root / judgement.path)
        print(f"deleted {len(bad)} files")
    else:
        for judgement in bad:
            _quarantine(root, judgement)
        print(f"moved {len(bad)} files to {root / QUARANTINE}; to undo, move a file back: it lies there under its old "
              f"path ({REPORT} lists all, with reasons)")
    if named.intersection(judgement.path for judgement in bad):
        print("the file lists name some of them: write the lists anew with "
              f"`python tools/select_training_files.py --data-dir {root}` (and the same options as before)")


def _quarantine(root: Path, judgement: Judgement) -> None:
    """Move one file to quarantine/<same path>, the report first: what was moved is always known."""
    quarantine = root / QUARANTINE
    target, number = quarantine / judgement.path, 1
    while os.path.lexists(target):  # an earlier file of that name: keep both
        number += 1
        target = (quarantine / judgement.path).with_name(f"{Path(judgement.path).name}.{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    entry = {"path": judgement.path, "moved_to": target.relative_to(root).as_posix(), "reason": judgement.reason,
             "gate": judgement.gate, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with open(quarantine / REPORT, "a", encoding="utf-8") as report:
        report.write(json.dumps(entry) + "\n")
        report.flush()
        os.fsync(report.fileno())
    os.rename(root / judgement.path, target)


def _names_in_lists(root: Path) -> set[str]:
    """All files that the training and the validation list name, as far as there are lists."""
    lists = [root / name for name in (TRAINING_LIST, VALIDATION_LIST)]
    return {name for path in lists if path.exists() for name in read_file_list(path, root)}


if __name__ == "__main__":
    run(Options, main)
