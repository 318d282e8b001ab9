"""Ranks on hosts that do not see the first rank's run folder, and files to and from them. All ranks
call it together.

The run folder lies where the first rank is: on a disk that all hosts share, or on that host alone.
Files travel over the control group, in pieces, so that no rank holds more than one in memory.
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

from pipeline.checkpoint.manifest import describe
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.run_folder import CHECKPOINTS_DIR

PIECE = 1 << 24  # bytes


def sees_run_dir(run_dir: Path, ranks: Ranks) -> bool:
    """Whether this rank sees the first rank's `run_dir`, which need not exist yet.

    What decides is the folder where checkpoints go or will go. See `Ranks.sees_folder`.
    """
    folder = next(
        folder
        for folder in (run_dir / CHECKPOINTS_DIR, run_dir, *run_dir.parents)
        if folder.is_dir()
    )
    return ranks.sees_folder(folder)


def private_folder(stack: contextlib.ExitStack) -> Path:
    """A folder on this host that goes when `stack` does, however that is. `OSError` where there is
    no room."""
    return Path(
        stack.enter_context(TemporaryDirectory(prefix="vastscale-", ignore_cleanup_errors=True))
    )


def collect(own: Path, to: Path, sees: bool, ranks: Ranks) -> str:
    """Bring what ranks that do not see `to` have written into their folders `own` there, one rank
    after the other.

    Returns why this rank could not read, or write, its part; empty if it could. It is judged when
    all is over: none waits for one that has failed.
    """
    disk = _Disk()
    listings = ranks.gather({} if sees else disk.attempt(lambda: describe(own)) or {})
    failure = disk.failure
    for source, files in enumerate(listings):
        for name, expected in files.items():
            if ranks.is_first:
                trouble = _take(
                    to / name,
                    expected,
                    lambda piece, source=source: dist.recv(piece, source, group=ranks.control),
                )
            elif source == ranks.rank:
                trouble = _give(
                    own / name, expected, lambda piece: dist.send(piece, 0, group=ranks.control)
                )
            else:
                trouble = ""
            failure = failure or trouble
    return failure


@contextlib.contextmanager
def local_copy(
    folder: Path, files: Mapping[str, Mapping[str, Any]], sees: bool, ranks: Ranks
) -> Iterator[Path]:
    """`folder` for those that see it; for the others a copy of `files` (size and SHA-256 by name),
    one a host.

    `files` are the first rank's; what the others give counts for nothing. The copy is gone
    afterwards. Raises `UserError` where a host has no room for it, or gets other bytes.
    """
    if all(ranks.gather(sees)):
        yield folder
        return
    with contextlib.ExitStack() as stack:
        own = ranks.on_all_ranks(lambda: None if sees else private_folder(stack))
        places = [place for place in ranks.gather(own) if place is not None]
        mine = (
            folder if sees else next(place for place in places if place.is_dir())
        )  # its host's first
        keepers = [rank for rank, keeps in enumerate(ranks.gather(mine == own)) if keeps]
        group = dist.new_group([0, *keepers], backend="gloo")
        failure = ""
        if ranks.is_first or mine == own:
            failure = _broadcast(folder if ranks.is_first else mine, files, group)
        _raise_together(failure, ranks)
        yield mine
        ranks.gather(None)  # all have read


def _broadcast(
    folder: Path, files: Mapping[str, Mapping[str, Any]], group: dist.ProcessGroup
) -> str:
    """Write the first rank's `files` of its `folder` into the others'."""
    box = [files]
    dist.broadcast_object_list(box, src=0, group=group)
    failure = ""
    pump = _give if dist.get_rank() == 0 else _take
    for name, expected in box[0].items():
        trouble = pump(folder / name, expected, lambda piece: dist.broadcast(piece, 0, group=group))
        failure = failure or trouble
    dist.destroy_process_group(group)
    return failure


def _raise_together(failure: str, ranks: Ranks) -> None:
    def complain() -> None:
        if failure:
            raise UserError(
                f"the checkpoint could not be copied: {failure}; make room there, or set TMPDIR"
            )

    ranks.on_all_ranks(complain)


class _Disk:
    """This host's disk, which is left alone after its first failure."""

    def __init__(self) -> None:
        self.failure = ""

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` returns; None where it, or one before it, failed."""
        if self.failure:
            return None
        try:
            return action()
        except OSError as error:
            self.failure = f"{socket.gethostname()}: {error}"
            return None


def _give(path: Path, expected: Mapping[str, Any], move: Callable[[Tensor], Any]) -> str:
    """Move the bytes of a file on. After a failure, which is returned, as many bytes go on as were
    announced."""
    disk = _Disk()
    with contextlib.ExitStack() as stack:
        file = disk.attempt(lambda: stack.enter_context(open(path, "rb")))
        for piece in _pieces(expected["size"]):
            disk.attempt(lambda piece=piece: file.readinto(piece.numpy()))
            move(piece)
    return disk.failure


def _take(path: Path, expected: Mapping[str, Any], move: Callable[[Tensor], Any]) -> str:
    """Write what `move` brings to a new file and see that it is what was announced. Returns what
    went wrong."""
    disk, content = _Disk(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        disk.attempt(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        file = disk.attempt(lambda: stack.enter_context(open(path, "xb", buffering=0)))
        for piece in _pieces(expected["size"]):
            move(piece)
            content.update(piece.numpy())
            disk.attempt(lambda piece=piece: _write_all(file, memoryview(piece.numpy())))
    if not disk.failure and content.hexdigest() != expected["sha256"]:
        return f"{socket.gethostname()}: {path.name} arrived damaged"
    return disk.failure


def _write_all(file: Any, content: memoryview) -> None:
    """All of it: a file without a buffer, which has nothing left to fail with when it is closed,
    may take a part."""
    while content:
        content = content[file.write(content) :]


def _pieces(size: int) -> Iterator[Tensor]:
    """Room for `size` bytes, piece by piece, in the same memory."""
    room = torch.empty(min(size, PIECE), dtype=torch.uint8)
    for start in range(0, size, PIECE):
        yield room[: min(PIECE, size - start)]
