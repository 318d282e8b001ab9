"""A study on disk: its folder, its journal, what it is a study of, and which searcher has which
trial.

    runs/<study>/journal.jsonl           Optuna's, of all trials
    runs/<study>/trial-0007/             the training run of trial 7, an ordinary run folder

Several searchers, on several machines, may share it: a trial belongs to whoever holds its lock,
which dies with its process. A trial that is running after the journal, but whose lock is free, was
interrupted and is gone on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import Trial, TrialState

from pipeline.cli import UserError

JOURNAL_FILE = "journal.jsonl"
STUDY = "search"  # its name in the journal, whatever its folder is called
IDENTITY = "identity"  # the study's attribute with what it is a study of
Pruner = Literal["median", "hyperband", "none"]

optuna.logging.set_verbosity(optuna.logging.ERROR)


class StudyFolder:
    """The folder of a study, shared with other searchers for as long as it is entered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def entered(self, *, reset: bool) -> Iterator[Path | None]:
        """Take part in the study. With `reset`, move an old one aside, which yields its new
        place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.parent / f".{self.path.name}.study.lock", "a") as file:
            is_alone = _try_lock(file)
            if reset and not is_alone:
                raise UserError(
                    f"{self.path} is being searched by another process; stop it before --reset"
                )
            kept = self._move_aside() if reset else None
            self.path.mkdir(exist_ok=True)
            if (
                is_alone
            ):  # one left by a searcher that was killed while it wrote would be waited for
                (self.path / f"{JOURNAL_FILE}.lock").unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_SH)
            yield kept

    def _move_aside(self) -> Path | None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        kept = self.path.with_name(f"{self.path.name}.{time.strftime('bak-%Y%m%d-%H%M%S')}")
        self.path.rename(kept)
        return kept

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other searcher chooses trials or tidies up meanwhile."""
        with open(self.path / ".choosing.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take(self, number: int) -> IO[str] | None:
        """The lock of a trial, to be closed once its end is written down; None if another searcher
        has it."""
        file = open(self.path / f".{trial_name(number)}.searcher.lock", "a")  # noqa: SIM115 (lives as long as it)
        if _try_lock(file):
            return file
        file.close()
        return None

    def trial_dir(self, number: int) -> Path:
        return self.path / trial_name(number)

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL_FILE


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_study(
    folder: StudyFolder, direction: str, pruner: optuna.pruners.BasePruner
) -> optuna.Study:
    """The study of a folder, made if there is none.

    The journal is locked by a file that only one process can create (NFS 3 and later). Optuna's
    other lock, by a symbolic link, is not possible on every shared disk.
    """
    lock = JournalFileOpenLock(str(folder.journal))
    lock.acquire()
    try:
        _cut_torn_line(folder.journal)
    finally:
        lock.release()
    return _reading(
        folder,
        lambda: optuna.create_study(
            study_name=STUDY,
            direction=direction,
            pruner=pruner,
            load_if_exists=True,
            storage=JournalStorage(JournalFileBackend(str(folder.journal), lock_obj=lock)),
        ),
    )


def read_study(folder: StudyFolder) -> optuna.Study | None:
    """The study of a folder, to be looked at; None where there is none yet."""
    if not folder.journal.is_file():
        return None
    backend = JournalFileBackend(
        str(folder.journal), lock_obj=JournalFileOpenLock(str(folder.journal))
    )
    try:
        return _reading(
            folder, lambda: optuna.load_study(study_name=STUDY, storage=JournalStorage(backend))
        )
    except KeyError:  # Optuna's: the journal was just begun
        return None


def _reading(folder: StudyFolder, read: Callable[[], optuna.Study]) -> optuna.Study:
    try:
        return read()
    except ValueError as error:  # Optuna's for a line that is no JSON
        raise UserError(
            f"{folder.journal} cannot be read ({error}); search again with --reset, which keeps "
            "the old "
            "study, or give another --output-dir"
        ) from error


def _cut_torn_line(path: Path) -> None:
    """Take off what a searcher that was killed in the middle of a line has left: the next line
    would join it."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def pruner_of(name: Pruner, steps: int, prune_after: int) -> optuna.pruners.BasePruner:
    """Median: below the median of the finished trials at that step, once there are five. Hyperband:
    by its brackets."""
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=prune_after)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, prune_after), max_resource=steps)
    return optuna.pruners.NopPruner()


def sampler_of(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of trial `number`: what it draws follows from the seed, the number and the trials
    before alone.

    So a study that was interrupted goes on as it would have, and searchers beside each other do not
    repeat each other.
    """
    return optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)


def next_trial(
    folder: StudyFolder, study: optuna.Study, most: int, seed: int, own: set[int]
) -> tuple[Trial, IO[str]] | None:
    """An interrupted trial, or else a new one as long as there are fewer than `most`; None if there
    is none to run."""
    with folder.alone():
        trials = study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == TrialState.RUNNING and frozen.number not in own:
                lock = folder.take(frozen.number)
                if lock and study.trials[frozen.number].state == TrialState.RUNNING:
                    study.sampler = sampler_of(seed, frozen.number)
                    return Trial(study, frozen._trial_id), lock
                if lock:  # its searcher has just ended it
                    lock.close()
        if len(trials) >= most:
            return None
        trial = study.ask()
        study.sampler = sampler_of(seed, trial.number)
        lock = folder.take(trial.number)
        assert lock is not None, "a new trial is nobody's"
        return trial, lock


def waits_for_others(study: optuna.Study, own: set[int]) -> bool:
    """Whether trials are running that are not this searcher's."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(frozen.number not in own for frozen in running)
