"""Bind a rank to its share of the cores beside its GPU, on machines with several NUMA nodes.

Left alone, the system moves the threads of eight ranks over both sockets, and a batch is decoded in
the memory of one and sent to a GPU at the other. A rank that is bound keeps to its GPU's node, with
as many cores there as each other rank of that node. Threads that start later inherit it. Nothing is
done on machines of one node, for a rank that is alone on its host and may need all cores to decode,
for a process that somebody (Slurm, taskset, a container) has bound to one node already, where the
GPU's node is not known, or with `VASTSCALE_BIND=0`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.distributed.launcher import Place

OPT_OUT = "VASTSCALE_BIND"
"""Environment variable: 0 leaves ranks where the system puts them."""
LEAST_CORES = 2  # of a share: with fewer, ranks of one node had better take turns
SYSTEM = Path("/sys")


def bind_to_cores(place: Place, gpu: int, num_gpus: int) -> list[int]:
    """Bind this process to its share of cores, where that makes sense; the cores, none where it
    stays free.

    `gpu`: torch's number of this rank's, of the `num_gpus` that it sees; the ranks of a host have
    them in their order.
    """
    size = place.local_size or 1  # where it is not known, nobody can say what a share is
    if os.environ.get(OPT_OUT) == "0" or size == 1:
        return []
    nodes, allowed = node_cores(), os.sched_getaffinity(0)
    if sum(bool(allowed & cores) for cores in nodes.values()) < 2:
        return []
    # A rank that sees its own GPU alone cannot tell at which nodes the others' are, and leaves room
    # for all of them.
    homes = (
        [_home_of(index) for index in range(size)] if num_gpus >= size else [_home_of(gpu)] * size
    )
    cores = own_share(
        place.local_rank,
        homes,
        {node: cores & allowed for node, cores in nodes.items()},
        siblings(),
    )
    with suppress(OSError):  # a sandbox may forbid it; a rank without it is only slower
        if cores:
            os.sched_setaffinity(0, cores)
            return cores
    return []


def own_share(
    rank: int, homes: Sequence[int], nodes: Mapping[int, set[int]], sibling_of: Mapping[int, int]
) -> list[int]:
    """The cores of the rank number `rank` of a host; none where they would be too few.

    `homes`: the node of each rank's GPU, -1 where it is not known. `nodes`: node -> its cores.
    `sibling_of`: core -> the first thread of the same physical core, whose threads stay together.
    """
    sharing = [other for other, node in enumerate(homes) if node == homes[rank]]
    physical: dict[int, list[int]] = {}
    for core in sorted(nodes.get(homes[rank], ())):
        physical.setdefault(sibling_of.get(core, core), []).append(core)
    groups, place = list(physical.values()), sharing.index(rank)
    own = groups[place * len(groups) // len(sharing) : (place + 1) * len(groups) // len(sharing)]
    cores = sorted(core for group in own for core in group)
    return cores if len(cores) >= LEAST_CORES else []


def node_cores() -> dict[int, set[int]]:
    """NUMA node -> the numbers of its cores."""
    found = {}
    for folder in (SYSTEM / "devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(folder.name[4:])] = read_ranges((folder / "cpulist").read_text())
    return found


def siblings() -> dict[int, int]:
    """Core, as the system counts them -> the first one that is a thread of the same physical
    core."""
    found = {}
    for folder in (SYSTEM / "devices/system/cpu").glob("cpu[0-9]*"):
        with suppress(OSError, ValueError):
            found[int(folder.name[3:])] = min(
                read_ranges((folder / "topology/thread_siblings_list").read_text())
            )
    return found


def read_ranges(text: str) -> set[int]:
    """`0-3,8,10-11` -> {0, 1, 2, 3, 8, 10, 11}, as the files of /sys write sets of cores."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found


def _home_of(gpu: int) -> int:
    """The NUMA node that a GPU is connected to; -1 where that is not known."""
    try:
        return int((SYSTEM / "bus/pci/devices" / pci_address(gpu) / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def pci_address(gpu: int) -> str:
    """Where the GPU that this process knows by that number is, such as 0000:1b:00.0. `OSError`
    without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, address = ctypes.c_int(), ctypes.create_string_buffer(32)
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), gpu)
        or driver.cuDeviceGetPCIBusId(address, len(address), device)
    ):
        raise OSError(f"the driver knows no GPU {gpu}")
    return address.value.decode().lower()
