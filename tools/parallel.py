"""Threads, progress bars and silenced libraries, shared by all tools."""

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


def thread_count(requested: int) -> int:
    """Return `requested`, or one thread per available core if `requested` is 0.

    Raises `UserError` for negative values.
    """
    if requested < 0:
        raise UserError(f"--threads {requested}: must be at least 0; 0 uses one thread per core")
    if requested:
        return requested
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Map on a thread pool and yield results in the order of `items`.

    Only a few items are submitted ahead, so memory stays bounded.
    """
    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also after an error or CTRL+C: start nothing new, let running items finish
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[Item], count: int = 16) -> Iterator[list[Item]]:
    """Yield lists of up to `count` items.

    Batches reduce the overhead of threads where one item takes only microseconds.
    """
    items = iter(items)
    while batch := list(islice(items, count)):
        yield batch


def progress(total: int | None, unit: str) -> tqdm:
    """Progress bar on stderr with rate and ETA (if `total` is known).

    Shown only on a terminal and after two seconds of work.
    """
    return tqdm(total=total, unit=unit, file=sys.stderr, **bar_options())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what libraries print to stderr about bad images.

    The tools report these images themselves, with the file's name. Python's own stderr (errors,
    progress bars) stays visible. The effect is process-wide, because file descriptor 2 is shared by
    all threads.
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
