"""A study on disk: its folder, journal and identity, and which searcher owns which trial.

runs/<study>/journal.jsonl is Optuna's journal of all trials; runs/<study>/trial-0007/ is the
training run of trial 7, an ordinary run folder.

Several searchers, on several machines, may share a study. A trial belongs to the searcher that
holds its lock, which disappears with the searcher's process. A trial that the journal lists as
running but whose lock is free was interrupted and is continued.
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
STUDY = "search"  # name in the journal, whatever the folder is called
IDENTITY = "identity"  # study attribute that describes what is searched
Pruner = Literal["median", "hyperband", "none"]

optuna.logging.set_verbosity(optuna.logging.ERROR)


class StudyFolder:
    """The folder of a study, shared with other searchers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def entered(self, *, reset: bool) -> Iterator[Path | None]:
        """Join the study; `reset` first moves an old one aside and yields its new path.

        Raises `UserError` if another process is searching and `reset` is set.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Of the real folder, so that a link to it does not lead around the lock.
        real = self.path.resolve()
        with open(real.parent / f".{real.name}.study.lock", "a") as file:
            is_alone = _try_lock(file)
            if reset and not is_alone:
                raise UserError(f"{self.path} is in use by another search; stop it before --reset")
            kept = self._move_aside() if reset else None
            self.path.mkdir(exist_ok=True)
            # A searcher that was killed while writing leaves this lock behind, which would block.
            if is_alone:
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
        """Prevent other searchers from choosing trials or cleaning up meanwhile."""
        with open(self.path / ".choosing.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take(self, number: int) -> IO[str] | None:
        """Lock a trial until its end is recorded; `None` if another searcher has it.

        The caller must close the returned file.
        """
        file = open(self.path / f".{trial_name(number)}.searcher.lock", "a")  # noqa: SIM115 - closed by the caller
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
    """Open the study of a folder, or create it.

    The journal is locked by a file that only one process can create (NFS 3 and later). Optuna's
    other kind of lock, a symbolic link, is not supported on every shared disk.
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
    """Open the study of a folder for reading; `None` if there is none yet."""
    if not folder.journal.is_file():
        return None
    backend = JournalFileBackend(
        str(folder.journal), lock_obj=JournalFileOpenLock(str(folder.journal))
    )
    try:
        return _reading(
            folder, lambda: optuna.load_study(study_name=STUDY, storage=JournalStorage(backend))
        )
    except KeyError:  # raised by Optuna if the journal was only just created
        return None


def _reading(folder: StudyFolder, read: Callable[[], optuna.Study]) -> optuna.Study:
    try:
        return read()
    except ValueError as error:  # raised by Optuna for a line that is not JSON
        raise UserError(
            f"{folder.journal} cannot be read ({error}); start again with --reset, which keeps "
            "the old study, or give another --output-dir"
        ) from error


def _cut_torn_line(path: Path) -> None:
    """Remove the incomplete line of a searcher that was killed while writing.

    Otherwise the next line would be appended to it.
    """
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def pruner_of(name: Pruner, steps: int, prune_after: int) -> optuna.pruners.BasePruner:
    """Create the pruner called `name`.

    Median prunes a trial below the median of the finished trials at that step, once there are five.
    Hyperband prunes by its brackets.
    """
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=prune_after)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, prune_after), max_resource=steps)
    return optuna.pruners.NopPruner()


def sampler_of(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Create the sampler of trial `number`.

    Its draws depend only on the seed, the number and the earlier trials. So an interrupted study
    continues as it would have without the interruption, and parallel searchers do not repeat each
    other.
    """
    return optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)


def next_trial(
    folder: StudyFolder, study: optuna.Study, most: int, seed: int, own: set[int]
) -> tuple[Trial, IO[str]] | None:
    """Return an interrupted trial, or a new one if there are fewer than `most`, with its lock.

    `None` if there is no trial to run. `own` are the trials of this searcher.
    """
    with folder.alone():
        trials = study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == TrialState.RUNNING and frozen.number not in own:
                lock = folder.take(frozen.number)
                if lock and study.trials[frozen.number].state == TrialState.RUNNING:
                    study.sampler = sampler_of(seed, frozen.number)
                    return Trial(study, frozen._trial_id), lock
                if lock:  # its searcher has just finished it
                    lock.close()
        if len(trials) >= most:
            return None
        trial = study.ask()
        study.sampler = sampler_of(seed, trial.number)
        lock = folder.take(trial.number)
        assert lock is not None, "a new trial is locked by another searcher"
        return trial, lock


def waits_for_others(study: optuna.Study, own: set[int]) -> bool:
    """Whether trials of other searchers are running."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(frozen.number not in own for frozen in running)
