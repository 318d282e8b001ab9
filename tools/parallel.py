"""Threads, progress and quiet: what every tool does around its own work."""

from __future__ import annotations

import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from pipeline.cli import UserError, bar_options

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(asked: int) -> int:
    """`asked` threads, or one per core that this process may use where `asked` is 0."""
    if asked < 0:
        raise UserError(f"--threads {asked}: must be above 0, or 0 for one thread a core")
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map` on threads: results in the order of `items`, at most a few items ahead, so that memory
    stays bounded."""
    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after an error or CTRL+C too: begin nothing new, let what runs come to its end
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[Item], count: int = 16) -> Iterator[list[Item]]:
    """Lists of `count` items: where one item takes microseconds, threads cost less by the batch."""
    items = iter(items)
    while batch := list(islice(items, count)):
        yield batch


def progress(total: int | None, unit: str) -> tqdm:
    """A bar with rate and ETA (where the total is known) on stderr, for people only, after two
    seconds of work."""
    return tqdm(total=total, unit=unit, file=sys.stderr, **bar_options())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide what libraries print and warn on stderr about bad images; we say it ourselves, with the
    file's name.

    Python's own stderr (errors, progress bars) stays visible. Process-wide: file descriptor 2 has
    no owner.
    """
    visible = os.dup(2)
    python_stderr = sys.stderr
    sys.stderr.flush()
    is_plain = python_stderr is sys.__stderr__ and python_stderr.fileno() == 2
    if is_plain:
        sys.stderr = os.fdopen(os.dup(visible), "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(visible, 2)
        os.close(visible)
        if is_plain:
            sys.stderr.close()
            sys.stderr = python_stderr
