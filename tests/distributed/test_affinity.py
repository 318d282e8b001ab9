"""Ranks are bound to cores next to their GPUs, on emulated machines with several NUMA nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.distributed import affinity
from pipeline.distributed.affinity import bind_to_cores, own_share, read_ranges
from pipeline.distributed.launcher import RankInfo

NODES = {0: {*range(8), *range(16, 24)}, 1: {*range(8, 16), *range(24, 32)}}
"""Two sockets of eight cores with two threads each, as Linux numbers them."""
SIBLINGS = {core: core % 16 for core in range(32)}


def shares(homes: list[int]) -> list[list[int]]:
    return [own_share(rank, homes, NODES, SIBLINGS) for rank in range(len(homes))]


def test_ranges_are_read() -> None:
    assert read_ranges("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert read_ranges("\n") == set()


def test_ranks_of_a_node_share_its_cores_and_threads_of_a_core_stay_together() -> None:
    found = shares([0, 0, 1, 1])
    assert found == [
        [0, 1, 2, 3, 16, 17, 18, 19],
        [4, 5, 6, 7, 20, 21, 22, 23],
        [8, 9, 10, 11, 24, 25, 26, 27],
        [12, 13, 14, 15, 28, 29, 30, 31],
    ]
    for homes in ([0, 1], [1, 0, 1], [0] * 8, [0, 0, 0, 1]):
        for node, cores in NODES.items():
            own = [share for share, home in zip(shares(homes), homes, strict=True) if home == node]
            together = [core for share in own for core in share]
            assert sorted(together) == (sorted(cores) if own else [])


def test_shares_that_are_too_small_or_unknown_bind_nobody() -> None:
    assert own_share(0, [0] * 16, {0: {0, 1, 2, 3}}, {}) == []
    assert own_share(1, [0, -1], NODES, SIBLINGS) == []


@pytest.fixture
def two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Emulate /sys of a machine with two nodes and a GPU at each; return the cores this process was
    bound to."""
    for node, cores in NODES.items():
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, sorted(cores))) + "\n")
        device = tmp_path / f"bus/pci/devices/0000:{node}b:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{1 - node}\n")
    for core, first in SIBLINGS.items():
        folder = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{first},{first + 16}\n")
    bound: list[set[int]] = []
    monkeypatch.setattr(affinity, "SYSTEM", tmp_path)
    monkeypatch.setattr(affinity, "pci_address", lambda gpu: f"0000:{gpu}b:00.0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append(set(cores)))
    monkeypatch.delenv(affinity.OPT_OUT, raising=False)
    return bound


def test_a_rank_is_bound_beside_its_gpu(two_sockets: list[set[int]]) -> None:
    place = RankInfo(0, 2, 0, "deepspeed", local_size=2)
    assert bind_to_cores(place, 0, 2) == sorted(NODES[1])
    assert bind_to_cores(RankInfo(1, 2, 1, "deepspeed", local_size=2), 1, 2) == sorted(NODES[0])
    assert two_sockets == [NODES[1], NODES[0]]


def test_a_rank_that_sees_one_gpu_leaves_room_for_all(two_sockets: list[set[int]]) -> None:
    found = [
        bind_to_cores(RankInfo(rank, 4, rank, "srun of Slurm", local_size=4), 0, 1)
        for rank in range(4)
    ]
    assert sorted(core for share in found for core in share) == sorted(NODES[1])


def test_nobody_is_bound_against_his_will(
    two_sockets: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RankInfo(0, 2, 0, "deepspeed", local_size=2)
    monkeypatch.setenv(affinity.OPT_OUT, "0")
    assert bind_to_cores(place, 0, 2) == []
    monkeypatch.delenv(affinity.OPT_OUT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 3})  # set by Slurm, taskset
    assert bind_to_cores(place, 0, 2) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    for alone in (
        RankInfo(0, 1, 0, ""),
        RankInfo(0, 2, 0, "torchrun", local_size=1),
        RankInfo(0, 2, 0, "RANK and WORLD_SIZE"),
    ):
        assert bind_to_cores(alone, 0, 2) == []
    assert two_sockets == []
