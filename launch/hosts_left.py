"""What a run goes on with after a failure: the hosts that answer, as many ranks as share the global batch."""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.cluster.hostfile import Slots, world_size
from launch.cluster.remote import CONNECT_SECONDS, run_on
from pipeline.cli import RunError

POLL_SECONDS = 5


def answering(slots: Slots, *, timeout: float = 2 * CONNECT_SECONDS) -> Slots:
    """Those of the hosts that run a command now. The first is this machine."""
    first, *others = slots
    done = run_on(others, ["true"], timeout=timeout)
    return {host: numbers for host, numbers in slots.items() if host == first or done[host].status == 0}


def wait_for_all(slots: Slots, seconds: float, say: Callable[[str], None]) -> None:
    """Return when every host answers. `RunError` names those that still do not after so many seconds."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        there = answering(slots)
        missing = [host for host in slots if host not in there]
        if not missing:
            return
        names = ", ".join(missing)
        if time.monotonic() > deadline:
            raise RunError(f"{names} did not come back within {seconds:.0f} s; mend that, or go on without: --exclude "
                           f"{'@'.join(missing)}, or --elastic")
        if not told:
            say(f"waiting up to {seconds:.0f} s for {names} (--elastic goes on without)")
            told = True
        time.sleep(POLL_SECONDS)


def share_batch(slots: Slots, total: int, largest_micro_batch: int) -> tuple[Slots, int]:
    """As many of the slots as can share the global batch `total`, and the micro-batch with which they do.

    No rank gets more samples at a time than before, `largest_micro_batch`: accumulation makes up for ranks that are
    gone. The last slots of the last hosts are left out where there are too many.
    """
    used = dict(slots)
    while total % world_size(used):
        last = list(used)[-1]
        used[last] = used[last][:-1]
        if not used[last]:
            del used[last]
    ranks = world_size(used)
    micro = max(size for size in range(1, largest_micro_batch + 1) if total % (size * ranks) == 0)
    return used, micro
