"""Bind a rank to its share of the cores next to its GPU, on machines with several NUMA nodes.

Without binding, the system moves the threads of eight ranks over both sockets, and a batch is
decoded in the memory of one socket and sent to a GPU at the other. A bound rank stays on its GPU's
node, with as many cores as each other rank of that node; threads started later inherit this.
Nothing is bound on machines with one node, for a rank that is alone on its host and may need all
cores to decode, for a process that is already restricted to one node (by Slurm, taskset or a
container), if the GPU's node is unknown, or with `VASTSCALE_BIND=0`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.distributed.launcher import RankInfo

OPT_OUT = "VASTSCALE_BIND"
"""Environment variable: 0 disables binding."""
LEAST_CORES = 2  # per rank; with fewer, a node's ranks do better sharing all its cores
SYSTEM = Path("/sys")


def bind_to_cores(info: RankInfo, gpu: int, num_gpus: int) -> list[int]:
    """Bind this process to its share of cores if that is useful; return them, or [] if unbound.

    `gpu`: torch's index of this rank's GPU among the `num_gpus` that it sees. A host's ranks use
    their GPUs in order.
    """
    size = info.local_size or 1  # if unknown, the share is unknown, too
    if os.environ.get(OPT_OUT) == "0" or size == 1:
        return []
    nodes, allowed = node_cores(), os.sched_getaffinity(0)
    if sum(bool(allowed & cores) for cores in nodes.values()) < 2:
        return []
    # A rank that sees only its own GPU does not know the other GPUs' nodes; it assumes that all of
    # them are on its own node.
    homes = (
        [_home_of(index) for index in range(size)] if num_gpus >= size else [_home_of(gpu)] * size
    )
    cores = own_share(
        info.local_rank,
        homes,
        {node: cores & allowed for node, cores in nodes.items()},
        siblings(),
    )
    with suppress(OSError):  # a sandbox may forbid it; then the rank is only slower
        if cores:
            os.sched_setaffinity(0, cores)
            return cores
    return []


def own_share(
    rank: int, homes: Sequence[int], nodes: Mapping[int, set[int]], sibling_of: Mapping[int, int]
) -> list[int]:
    """Return the cores of a host's rank number `rank`, or [] if there would be too few.

    `homes`: node of each rank's GPU, -1 if unknown. `nodes`: node -> its cores. `sibling_of`: core
    -> first hardware thread of the same physical core; its threads stay together.
    """
    sharing = [other for other, node in enumerate(homes) if node == homes[rank]]
    physical: dict[int, list[int]] = {}
    for core in sorted(nodes.get(homes[rank], ())):
        physical.setdefault(sibling_of.get(core, core), []).append(core)
    groups, index = list(physical.values()), sharing.index(rank)
    own = groups[index * len(groups) // len(sharing) : (index + 1) * len(groups) // len(sharing)]
    cores = sorted(core for group in own for core in group)
    return cores if len(cores) >= LEAST_CORES else []


def node_cores() -> dict[int, set[int]]:
    """Return NUMA node -> the numbers of its cores."""
    found = {}
    for folder in (SYSTEM / "devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(folder.name[4:])] = read_ranges((folder / "cpulist").read_text())
    return found


def siblings() -> dict[int, int]:
    """Return core -> the first hardware thread of the same physical core."""
    found = {}
    for folder in (SYSTEM / "devices/system/cpu").glob("cpu[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(folder.name[3:])] = min(
                read_ranges((folder / "topology/thread_siblings_list").read_text())
            )
    return found


def read_ranges(text: str) -> set[int]:
    """Parse a set of cores as written in /sys: `0-3,8,10-11` -> {0, 1, 2, 3, 8, 10, 11}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found


def _home_of(gpu: int) -> int:
    """Return the NUMA node that a GPU is attached to; -1 if unknown."""
    try:
        return int((SYSTEM / "bus/pci/devices" / pci_address(gpu) / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def pci_address(gpu: int) -> str:
    """Return the PCI address, such as 0000:1b:00.0, of this process's GPU of that index.

    Raises `OSError` without a driver.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, address = ctypes.c_int(), ctypes.create_string_buffer(32)
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), gpu)
        or driver.cuDeviceGetPCIBusId(address, len(address), device)
    ):
        raise OSError(f"the driver does not know GPU {gpu}")
    return address.value.decode().lower()
