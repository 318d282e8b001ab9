"""Find files that cannot be trained on, before training finds them; nothing is moved unless asked."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST, QUARANTINE, TRAINING_LIST, VALIDATION_LIST, read_file_list
from tools.common.dataset_walk import Files, walk
from tools.common.image_judging import Judge, Judgement, Rules, Verdict
from tools.common.manifest import read_manifests
from tools.common.parallel import ordered_map, progress, quiet_libraries, thread_count

REPORT = "report.jsonl"
MAX_BAD_FRACTION = 0.05  # more than this is rather a wrong option or a broken disk than so many bad files
MAX_BAD_FILES = 20       # ... unless it is a handful


@dataclass(frozen=True)
class Options:
    """Judge every image below the dataset folder: can training read it, is it large enough, is it what was written?

    Encoded images are decoded by the decoder that training uses (DALI) and must be complete to the last byte; .npy
    crops are read in full and compared with the checksums in their manifest. By default this only looks: it prints what
    is bad and exits with 1. --clean moves bad files to DATA_DIR/quarantine/, from where they can be moved back.
    Files that could not be read (permissions, a failing disk) are reported, never moved. File lists, manifests, the
    quarantine and files that are not images are left alone.

    Example: python tools/check_training_data.py --data-dir ~/dataset --clean
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: the folder below which all images are judged."""
    fast: bool = False
    """Read headers only: finds wrong types, wrong sizes and cut .npy and WebP files, but no damage inside a file."""
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
    threads: int = 0
    """Number of threads; 0 is one a core."""


def main(options: Options) -> int:
    """Judge, print, and clean where asked. 0: all good; 1: some files are (or were) bad or could not be read."""
    _check_options(options)
    root = options.data_dir.expanduser()
    files = walk(root, MANIFEST)
    if not files.images:
        raise UserError(f"{root}: no images below this folder{files.links_note()}; make crops with "
                        "`python tools/images_to_data.py`, or give another --data-dir")
    crops = read_manifests(root, files.manifests)
    rules = Rules(options.min_size, options.max_size, options.max_megapixels, decode=not options.fast)
    started = time.monotonic()
    judgements = _judge_all(files.images, Judge(root, rules, crops), thread_count(options.threads))
    bad = [judgement for judgement in judgements if judgement.verdict is Verdict.BAD]
    unreadable = [judgement for judgement in judgements if judgement.verdict is Verdict.UNREADABLE]
    for judgement in bad + unreadable:
        print(f"{judgement.verdict.value}: {_shown(judgement.path)}: {judgement.reason}")
    _summarize(files, judgements, len(bad), len(unreadable), time.monotonic() - started)
    missing = len(crops.keys() - set(files.images))
    if missing:
        print(f"{missing} crops that a manifest names are not there; images_to_data.py makes them again")
    if bad and options.clean:
        _refuse_too_many(len(bad), len(files.images), options.force)
        _clean(root, bad, options.delete)
    elif bad:
        print(f"nothing was changed; --clean moves the bad files to {root / QUARANTINE}")
    return 1 if bad or unreadable else 0


def _check_options(options: Options) -> None:
    """Refuse options that contradict each other."""
    if options.delete and not options.clean:
        raise UserError("--delete: only with --clean; --clean alone moves bad files to a quarantine and can be undone")
    if options.force and not options.clean:
        raise UserError("--force: only with --clean; without it nothing is changed anyway")
    if options.min_size < 1:
        raise UserError(f"--min-size {options.min_size}: must be at least 1")
    if options.max_size is not None and options.max_size < options.min_size:
        raise UserError(f"--max-size {options.max_size}: below --min-size {options.min_size}, every file would be bad")
    if not options.max_megapixels > 0:
        raise UserError(f"--max-megapixels {options.max_megapixels:g}: must be above 0")


def _judge_all(names: list[str], judge: Judge, threads: int) -> list[Judgement]:
    """The judgements on all files, in their order."""
    judgements, read = [], 0
    with quiet_libraries(), progress(len(names), "file") as bar:
        for judgement in ordered_map(judge, names, threads):
            judgements.append(judgement)
            read += judgement.bytes
            bar.update()
            bar.set_postfix(MB=read // 1_000_000, refresh=False)
    return judgements


def _summarize(files: Files, judgements: list[Judgement], bad: int, unreadable: int, seconds: float) -> None:
    """One line on what was looked at."""
    megabytes = sum(judgement.bytes for judgement in judgements) / 1e6
    print(f"{len(judgements)} images judged in {seconds:.1f} s ({len(judgements) / max(seconds, 1e-3):.0f} files/s, "
          f"{megabytes:.0f} MB read): {len(judgements) - bad - unreadable} good, {bad} bad, "
          f"{unreadable} could not be read; {files.foreign} other files left alone")
    if files.linked_folders:
        print(f"links to folders were not followed: {', '.join(map(_shown, files.linked_folders))}")


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
             "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with open(quarantine / REPORT, "a", encoding="utf-8") as report:
        report.write(json.dumps(entry) + "\n")
        report.flush()
        os.fsync(report.fileno())
    os.rename(root / judgement.path, target)


def _names_in_lists(root: Path) -> set[str]:
    """All files that the training and the validation list name, as far as there are lists."""
    lists = [root / name for name in (TRAINING_LIST, VALIDATION_LIST)]
    return {name for path in lists if path.exists() for name in read_file_list(path, root)}


def _shown(name: str) -> str:
    """A file name that any terminal can show."""
    return name if name.isprintable() else ascii(name)


if __name__ == "__main__":
    run(Options, main)
