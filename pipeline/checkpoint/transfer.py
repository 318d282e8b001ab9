"""Transfer checkpoint files to and from hosts that do not see the first rank's run folder.

The run folder is where the first rank is: on a disk that all hosts share, or on that host only.
Files travel over the control group in pieces, so that no rank holds more than one piece in memory.
All ranks call these functions together.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint_index import describe
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.run_folder import CHECKPOINTS_DIR

PIECE = 1 << 24  # bytes


def sees_run_dir(run_dir: Path, ranks: Ranks) -> bool:
    """Whether this rank sees the first rank's `run_dir`, which need not exist yet.

    Checks the folder that holds the checkpoints, or its nearest existing parent; see
    `Ranks.sees_folder`.
    """
    folder = next(
        folder
        for folder in (run_dir / CHECKPOINTS_DIR, run_dir, *run_dir.parents)
        if folder.is_dir()
    )
    return ranks.sees_folder(folder)


def private_folder(stack: contextlib.ExitStack) -> Path:
    """Make a folder on this host that is removed with `stack`, even after an error.

    Raises `OSError` if there is no space.
    """
    return Path(
        stack.enter_context(TemporaryDirectory(prefix="vastscale-", ignore_cleanup_errors=True))
    )


def collect(own: Path, to: Path, sees: bool, ranks: Ranks) -> str:
    """Copy the files in `own` of ranks that do not see `to` into `to`, one rank after the other.

    Returns why this rank could not read or write its part, empty if it could. Failures are judged
    only at the end, so that no rank waits for one that has failed.
    """
    disk = _Disk()
    # A rank that cannot even list its files announces none, so that the first rank expects none.
    listings = ranks.gather({} if sees else disk.attempt(lambda: describe(own)) or {})
    failure = disk.failure
    # All ranks walk the same listings in the same order, so that each send meets its receive.
    for source, files in enumerate(listings):
        for name, expected in files.items():
            if ranks.is_first:
                trouble = _receive_file(
                    to / name,
                    expected,
                    lambda piece, source=source: dist.recv(piece, source, group=ranks.control),
                )
            elif source == ranks.rank:
                trouble = _send_file(
                    own / name, expected, lambda piece: dist.send(piece, 0, group=ranks.control)
                )
            else:
                trouble = ""
            # Go on after a failure: the other side does not know of it yet, and waits for the bytes
            # that were announced.
            failure = failure or trouble
    return failure


@contextlib.contextmanager
def local_copy(
    folder: Path, files: Mapping[str, Mapping[str, Any]], sees: bool, ranks: Ranks
) -> Iterator[Path]:
    """Yield `folder` to ranks that see it, and a copy of its `files` to the others, one per host.

    `files` (name -> size and SHA-256) is taken from the first rank. The copy is deleted afterwards.
    Raises `UserError` if a host has no space for it or its copy is damaged.
    """
    # The usual case: all hosts share the disk, so nothing is copied.
    if all(ranks.gather(sees)):
        yield folder
        return
    with contextlib.ExitStack() as stack:
        own = ranks.on_all_ranks(lambda: None if sees else private_folder(stack))
        places = [place for place in ranks.gather(own) if place is not None]
        # Ranks find out who shares their host by looking for each other's folders; names of hosts
        # prove nothing. The first folder that this host has serves all its ranks.
        mine = folder if sees else next(place for place in places if place.is_dir())
        keepers = [rank for rank, keeps in enumerate(ranks.gather(mine == own)) if keeps]
        # All ranks take part in making a group, whether or not they are in it.
        group = dist.new_group([0, *keepers], backend="gloo")
        failure = ""
        if ranks.is_first or mine == own:
            failure = _broadcast(folder if ranks.is_first else mine, files, group)
        # Before anybody reads: a rank with an incomplete copy must not start to load it.
        _raise_together(failure, ranks)
        yield mine
        # Wait until all have read: the copy, which serves all ranks of a host, is deleted next.
        ranks.gather(None)


def _broadcast(
    folder: Path, files: Mapping[str, Mapping[str, Any]], group: dist.ProcessGroup
) -> str:
    """Write the `files` of the first rank's `folder` into the other ranks' folders."""
    # Only the first rank has read the index. The others need the sizes to receive as many bytes.
    box = [files]
    dist.broadcast_object_list(box, src=0, group=group)
    failure = ""
    pump = _send_file if dist.get_rank() == 0 else _receive_file
    for name, expected in box[0].items():
        trouble = pump(folder / name, expected, lambda piece: dist.broadcast(piece, 0, group=group))
        failure = failure or trouble
    dist.destroy_process_group(group)
    return failure


def _raise_together(failure: str, ranks: Ranks) -> None:
    def raise_failure() -> None:
        if failure:
            raise UserError(
                f"the checkpoint could not be copied: {failure}; free disk space, or set TMPDIR"
            )

    ranks.on_all_ranks(raise_failure)


class _Disk:
    """Access to this host's disk, which stops after the first failure."""

    def __init__(self) -> None:
        self.failure = ""

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Return what `action` returns; None if it or an earlier one failed."""
        if self.failure:
            return None
        try:
            return action()
        except OSError as error:
            self.failure = f"{socket.gethostname()}: {error}"
            return None


def _send_file(path: Path, expected: Mapping[str, Any], move: Callable[[Tensor], Any]) -> str:
    """Send a file's bytes with `move` and return the failure, if any.

    After a failure it still sends as many bytes as were announced, because the receivers wait for
    them.
    """
    disk = _Disk()
    with contextlib.ExitStack() as stack:
        file = disk.attempt(lambda: stack.enter_context(open(path, "rb")))
        for piece in _pieces(expected["size"]):
            # After a failure the piece still holds old bytes. The receiver's hash shows that they
            # are wrong.
            disk.attempt(lambda piece=piece: file.readinto(piece.numpy()))
            move(piece)
    return disk.failure


def _receive_file(path: Path, expected: Mapping[str, Any], move: Callable[[Tensor], Any]) -> str:
    """Write the bytes that `move` receives to a new file; return the failure, if any.

    The file must have the SHA-256 that was announced.
    """
    disk, content = _Disk(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        disk.attempt(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        # Exclusive: if two ranks had files of the same name, one would overwrite the other's
        # without notice.
        file = disk.attempt(lambda: stack.enter_context(open(path, "xb", buffering=0)))
        for piece in _pieces(expected["size"]):
            move(piece)
            content.update(piece.numpy())
            disk.attempt(lambda piece=piece: _write_all(file, memoryview(piece.numpy())))
    if not disk.failure and content.hexdigest() != expected["sha256"]:
        return f"{socket.gethostname()}: {path.name} arrived damaged"
    return disk.failure


def _write_all(file: Any, content: memoryview) -> None:
    """Write all of `content`: an unbuffered file may take only a part of it at a time.

    The file is unbuffered so that nothing is left to fail when it is closed.
    """
    while content:
        content = content[file.write(content) :]


def _pieces(size: int) -> Iterator[Tensor]:
    """Yield buffers for `size` bytes in pieces, all in the same memory."""
    # Sending and receiving block, so this memory is free again when the next piece is asked for.
    room = torch.empty(min(size, PIECE), dtype=torch.uint8)
    for start in range(0, size, PIECE):
        yield room[: min(PIECE, size - start)]
