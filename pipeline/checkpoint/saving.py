"""Write checkpoints while training continues. A checkpoint folder exists completely or not at all.

`Saver.begin` stops the training thread only for a copy to host memory (see `snapshot.py`); a
background thread does the rest. It writes to `.tmp-step-N`, flushes, hashes, agrees with all ranks,
then renames the folder to `step-N`, whose MANIFEST.json lists every file with size and SHA-256. A
kill or a full disk costs the checkpoint being written and never a finished one: only committed
checkpoints count when the newest or the best is looked for and when old ones are removed. Ranks on
hosts that do not see the run folder send their files to the first rank.

Ranks write together, so their threads have to agree several times: that all have written, what a
network disk must show, that the first rank has committed. They do so over a process group of their
own. Collectives of one group must come in the same order on every rank, but how far a background
thread has got relative to its training thread differs from rank to rank: in the control group or
the gradients' group, its messages would be mistaken for training's. In the threads' own group the
order is fixed, because each rank has one such thread and all ranks start each save at the same
step, one save after the other. The alternative, agreeing on the training thread during the
following steps, would send files from hosts without the run folder while training waits, and could
leave a save uncommitted if a run ends between two of those steps.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from pipeline.checkpoint.averages import store_averages
from pipeline.checkpoint.checkpoint import Contents
from pipeline.checkpoint.engine_state import capture_engine
from pipeline.checkpoint.progress import Progress, progress_in
from pipeline.checkpoint.pruning import (
    begin_folder,
    make_way,
    prune,
    remove_replaced,
    remove_unfinished,
    tidy,
)
from pipeline.checkpoint.random_states import random_states
from pipeline.checkpoint.snapshot import Frozen, HostMemory, Snapshot
from pipeline.checkpoint.transfer import collect, private_folder
from pipeline.checkpoint_index import damage, describe, write_index
from pipeline.distributed.ranks import Ranks
from pipeline.files import flush, reason, size_text, write_all
from pipeline.models.weights import SavedNetwork, write_network
from pipeline.run_folder import (
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    STATE_FILE,
    checkpoint_dir,
    checkpoint_size,
    checkpoint_steps,
    power_average_file,
)

Result = TypeVar("Result")
VISIBLE_SECONDS = 90  # longer than NFS caches a folder's content
LAST_SECONDS = 60  # for a save in progress when the run ends with an error


class SaveError(Exception):
    """A checkpoint could not be written, and why; earlier ones are intact."""


@dataclass(frozen=True)
class _Moment:
    """What this rank has to write for one step, in host memory."""

    progress: Progress
    snapshot: Snapshot
    states: Mapping[str, Frozen]  # the engines', by path in the checkpoint
    networks: Mapping[str, Frozen]  # generator weights by file; empty on all ranks but the first
    random: Mapping[str, Any]
    ema_updates: int


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint is written, and how many of the newest are kept there."""

    run_dir: Path
    contents: Contents  # with this rank's view of that folder
    keep: int


class Saver:
    """Saves a run's checkpoints, one after the other.

    All ranks make one and call its methods together, except `poll`. `keep`: number of newest
    checkpoints that are kept after a save, besides the best.
    """

    def __init__(self, run_dir: Path, contents: Contents, keep: int, ranks: Ranks) -> None:
        self._run_dir, self._contents, self._keep, self._ranks = run_dir, contents, keep, ranks
        self._writers = ranks.with_own_group()
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._notes: deque[str] = deque()  # of the writing thread
        self._known_notes: set[str] = set()
        self._preparing: threading.Thread | None = None

    def prepare(self) -> None:
        """Allocate the memory for copies in the background, once the optimizer has its states.

        Otherwise the first save would wait for fresh pages, which takes several times as long as
        the copy.
        """
        snapshot = self._capture(Progress()).snapshot
        self._preparing = threading.Thread(
            target=_reserve, args=(snapshot,), name="memory", daemon=True
        )
        self._preparing.start()

    @property
    def is_writing(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, progress: Progress, spill: Path | None = None) -> None:
        """Copy the present state and start writing it as the checkpoint of `progress.step`.

        It is written to the run folder, or to `spill` instead, where only the newest is kept. Call
        `wait` first: there is one save at a time. Does nothing if the disk already holds all of
        `progress`. Raises `SaveError` on every rank if a host has no memory for the copy, or if
        `spill` cannot be made.
        """
        assert self._thread is None, "wait() must be called before the next save"
        place = self._place(spill, progress.step)
        final = checkpoint_dir(place.run_dir, progress.step)
        # Only the first rank looks. The others may not see the folder, or not yet, and all must
        # decide the same: a rank that returned alone would leave the others waiting.
        if self._ranks.agree(self._ranks.is_first and _is_saved(final, progress)):
            return
        # The preparation allocates the same memory that the copy is made into.
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        # Capturing runs the engines' own collectives, so the training thread must do it. After the
        # copy, training may change weights and moments again.
        moment = self._capture(progress)
        # A host that has no memory for the copy fails the save on all ranks here, before any of
        # them starts a thread that would wait for it.
        _attempt_on_all_ranks(moment.snapshot.copy, self._ranks, progress.step, "")
        self._thread = threading.Thread(
            target=self._write, args=(moment, place), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _place(self, spill: Path | None, step: int) -> _Place:
        if spill is None:
            return _Place(self._run_dir, self._contents, self._keep)

        def make() -> None:
            if self._ranks.is_first:
                spill.mkdir(parents=True, exist_ok=True)
                # `sees_folder` makes a file there, too, but ends the run if it cannot.
                (mark := spill / f".vastscale-{os.getpid()}").touch()
                mark.unlink()

        _attempt_on_all_ranks(make, self._ranks, step, spill)
        # Other hosts may see the run folder and not this one, or the other way round.
        sees = self._ranks.sees_folder(spill)
        return _Place(spill, replace(self._contents, sees_run_dir=sees, snapshots=None), keep=1)

    def wait(self) -> SaveError | None:
        """Wait for the save in progress, if any.

        Returns its `SaveError`, once; raises any other error.
        """
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def poll(self) -> SaveError | None:
        """Like `wait`, but only for a save that has ended: never blocks."""
        if self._thread is None or self.is_writing:
            return None
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None and not isinstance(failure, SaveError):
            raise failure
        return failure

    def notes(self) -> list[str]:
        """Return what was renamed or left in `checkpoints/` since the last call, on the first rank.

        What every save finds again is returned once.
        """
        new = []
        while self._notes:
            note = self._notes.popleft()
            if note not in self._known_notes:
                new.append(note)
                self._known_notes.add(note)
        return new

    def close(self) -> None:
        """Give a save in progress time to finish when the run ends with an error."""
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    def _capture(self, progress: Progress) -> _Moment:
        contents, snapshot = self._contents, Snapshot(self._memory)
        states: dict[str, Frozen] = {}
        for name, engine in contents.engines.items():
            states |= capture_engine(engine, name, snapshot)
        # Weights and their averages are the same on all ranks, so the first rank's copy is enough.
        networks = {}
        if self._ranks.is_first:
            own = contents.engines["generator"].module.state_dict()
            weights = {GENERATOR_FILE: own, GENERATOR_EMA_FILE: contents.ema.network.state_dict()}
            for width in contents.ema.power:
                weights[power_average_file(width)] = contents.ema.power_state(width)
            networks = {file: snapshot.add(state) for file, state in weights.items()}
        return _Moment(
            progress.copy(),
            snapshot,
            states,
            networks,
            random_states(),
            contents.ema.num_updates,
        )

    def _write(self, moment: _Moment, place: _Place) -> None:
        try:
            moment.snapshot.wait()
            self._write_together(moment, place)
        except BaseException as error:
            # `poll` raises it in the training thread. In this thread it would go unnoticed.
            self._failure = error

    def _write_together(self, moment: _Moment, place: _Place) -> None:
        """Commit the checkpoint of `moment`; the threads of all ranks do it together.

        Raises `SaveError` on every rank, after removing the unfinished folder, if any rank could
        not write.
        """
        writers, contents, step = self._writers, place.contents, moment.progress.step
        final = checkpoint_dir(place.run_dir, step)
        aside = final.with_name(f".tmp-{final.name}")
        # What all ranks write into this folder, including those that send it from other hosts.
        needed = sum(writers.gather(moment.snapshot.size))
        try:
            # Each of the following steps ends with an agreement: if one rank fails, all raise. A
            # rank that gave up alone would leave the others waiting for its files.
            with ExitStack() as stack:
                own = _attempt_on_all_ranks(
                    lambda: _make_folders(aside, contents, writers, stack, needed, self._notes),
                    writers,
                    step,
                    final.parent,
                )
                _attempt_on_all_ranks(
                    lambda: _write_own_files(own, moment, contents, writers), writers, step, own
                )
                _raise_if_any_failed(
                    collect(own, aside, contents.sees_run_dir, writers), writers, step
                )
                # All files that the ranks have written. The first rank waits until its own view of
                # the folder shows them: a network disk may show a file late, and a file that is not
                # seen would be missing from the index.
                written = set().union(
                    *writers.gather(_names(aside) if contents.sees_run_dir else set())
                )
                # Only the first rank commits. The others wait for the outcome, so that no rank
                # believes in a checkpoint that does not exist.
                commit = partial(
                    _commit, aside, final, moment.progress, contents, writers, written, self._notes
                )
                _attempt_on_all_ranks(
                    commit if writers.is_first else lambda: None, writers, step, aside
                )
        except SaveError:
            # All ranks have reached this point, so none writes into the folder any more.
            if writers.is_first:
                self._notes += remove_unfinished(aside)
            raise
        # Only now that the new checkpoint is committed: a kill between removing and writing must
        # not leave fewer than `keep`.
        if writers.is_first:
            self._notes += remove_replaced(final)
            # Before an older checkpoint is removed: a snapshot that a kill, or a full disk, has
            # prevented is made from it now.
            self._notes += store_averages(place.run_dir, contents.snapshots)
            self._notes += prune(place.run_dir, place.keep, moment.progress.pinned_steps)


def _reserve(snapshot: Snapshot) -> None:
    # If memory is short, the save itself reports it.
    with suppress(OSError, RuntimeError):
        snapshot.reserve()


def _attempt_on_all_ranks(
    action: Callable[[], Result], ranks: Ranks, step: int, place: Path | str
) -> Result:
    """Run `action`, which must not wait for other ranks, on every rank.

    Raises `SaveError` on all ranks if disk or memory failed on one; `place` is what it names if the
    error does not name a file.
    """
    failure, result = "", None
    try:
        result = action()
    except OSError as error:
        # A full disk, or too little memory: any host may have these, and the run can go on without
        # this checkpoint. Any other error is a bug and ends the run.
        failure = reason(error, place)
    except (RuntimeError, MemoryError) as error:
        failure = str(error) or type(error).__name__
    _raise_if_any_failed(failure, ranks, step)
    return cast(Result, result)


def _raise_if_any_failed(failure: str, ranks: Ranks, step: int) -> None:
    """Raise `SaveError` on every rank if one reports a `failure`."""
    failures = [failure for failure in ranks.gather(failure) if failure]
    if failures:
        raise SaveError(f"the checkpoint of step {step} could not be written: {failures[0]}")


def _is_saved(final: Path, progress: Progress) -> bool:
    """Whether `final` is a checkpoint of all of `progress` (a validation may have followed it)."""
    # A damaged one is saved again: whoever changed its state need not have told this process.
    with suppress(OSError):
        return not damage(final, {STATE_FILE}) and progress_in(final) == progress
    return False


def _make_folders(
    aside: Path,
    contents: Contents,
    ranks: Ranks,
    stack: ExitStack,
    needed: int,
    notes: deque[str],
) -> Path:
    """Return the folder for this rank's files: `aside`, or a private one if it is not seen.

    Raises `OSError` if the disk has no space for `needed` bytes.
    """
    if ranks.is_first:
        # No other save is in progress: the run folder is locked, and saves come one after the
        # other.
        notes += tidy(aside.parents[1])
        require_space(aside.parent, needed)
        notes += begin_folder(aside)
    own = aside if contents.sees_run_dir else private_folder(stack)
    for name in contents.engines:
        # A folder that ranks share is made by the first. The agreement that follows makes the
        # others wait for it.
        if ranks.is_first or not contents.sees_run_dir:
            (own / name).mkdir(parents=True)
    return own


def require_space(checkpoints: Path, needed: int) -> None:
    """Raise `OSError` (ENOSPC) if a checkpoint of `needed` bytes does not fit on the disk.

    If the newest checkpoint in the folder is larger, its size counts: it includes what `needed`
    does not, such as weights that are stored twice. Finding out beforehand leaves the remaining
    space to the logs.
    """
    newest = checkpoint_steps(checkpoints.parent)[-1:]
    needed = max([needed, *(checkpoint_size(checkpoints.parent, step) for step in newest)])
    checkpoints.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(checkpoints)
    # Some network disks do not say how large they are.
    if disk.total and disk.free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {checkpoints} has {size_text(disk.free)} free, a "
            f"checkpoint needs {size_text(needed)}; {size_text(needed - disk.free)} are missing",
            "",
        )


def _write_own_files(own: Path, moment: _Moment, contents: Contents, ranks: Ranks) -> None:
    """Write this rank's files and flush them: a host cannot flush what another has written."""
    for path, state in moment.states.items():
        _save(state.thaw(), own / path)
    _save(moment.random, own / f"random-rank-{ranks.rank:05d}.pt")
    if not ranks.is_first:
        return
    described, step = contents.generator, moment.progress.step
    for file, weights in moment.networks.items():
        metadata = {**described.metadata, "step": str(step)}
        write_network(
            own / file,
            SavedNetwork(
                described.name, described.scale, described.params, weights.thaw(), metadata
            ),
        )
    state = moment.progress.as_state() | {
        "ema_updates": moment.ema_updates,
        "world_size": ranks.world_size,
    }
    (own / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")


class _File(io.FileIO):
    """A file for torch.save that remembers why it could not be written.

    torch reports a failed write as "unexpected pos 64 vs 0", whatever the reason.
    """

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            write_all(self.fileno(), content)
        except OSError as error:
            self.failure = self.failure or error
            raise
        return memoryview(content).nbytes


def _save(state: Any, path: Path) -> None:
    with _File(path, "w") as file:
        try:
            torch.save(state, file)
            os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            failure = file.failure or error
            if isinstance(failure, OSError):
                failure.filename = str(path)
            raise failure from None


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _wait_for(folder: Path, names: set[str]) -> None:
    """Wait until this host sees the others' files: a network disk may show them late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing := names - _names(folder):
        if time.monotonic() > deadline:
            raise OSError(
                f"{folder} does not show {min(missing)}, which another host has written; check how "
                "that disk is mounted"
            )
        time.sleep(0.5)


def _commit(
    aside: Path,
    final: Path,
    progress: Progress,
    contents: Contents,
    ranks: Ranks,
    written: set[str],
    notes: deque[str],
) -> None:
    _wait_for(aside, written)
    # Ranks have flushed what they wrote here themselves, but state.json and the files that came
    # from other hosts have not been flushed yet.
    for path in (p for p in aside.rglob("*") if p.is_file()):
        flush(path)
    # The index comes last: a folder without it does not count as a checkpoint. Its hashes later
    # show damage that loading would not notice, such as a flipped bit in a tensor.
    index = {
        "step": progress.step,
        "world_size": ranks.world_size,
        "identity": contents.identity,
        "files": describe(aside),
    }
    write_index(aside, index)
    # Flushing a file does not store its name, which belongs to its folder.
    for folder in [aside, *(p for p in aside.rglob("*") if p.is_dir())]:
        flush(folder)
    # This step may have been saved before, without the validation that followed. After a kill
    # between the two renames, `finish_replacing` puts the old one back.
    notes += make_way(final)
    # This is the commit. All content is on the disk before it: otherwise a power cut could leave
    # the final name with incomplete files behind it.
    os.rename(aside, final)
    # The renames themselves are stored in the parent.
    flush(final.parent)
