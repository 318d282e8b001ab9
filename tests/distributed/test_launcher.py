"""Every launcher's ranks find their number in the environment, their GPU, and the network to the
others."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pipeline.cli import UserError
from pipeline.distributed.launcher import (
    MAX_HOSTS,
    RankInfo,
    choose_interface,
    expand_hosts,
    find_rank_info,
    gpu_of,
    own_addresses,
)

# As printed by `env` in processes that these launchers started.
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "3",
    "ROLE_WORLD_SIZE": "4",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
ACCELERATE_ALONE = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "OMP_NUM_THREADS": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
}
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.99",
}


def srun(rank: int, world_size: int = 4, hosts: int = 2, **more: str) -> dict[str, str]:
    """Return the variables of rank `rank` of a step on node07, node08, …"""
    each = world_size // hosts
    names = "node07" if hosts == 1 else f"node[07-{6 + hosts:02d}]"
    return {
        **SBATCH,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_NUM_NODES": str(hosts),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % each),
        "SLURM_NODEID": str(rank // each),
        **more,
    }


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def complaint(action: Callable[..., Any], *arguments: Any) -> str:
    """Return the message of the `UserError` that `action` raises, which is one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Ranks ---


def test_nobody_is_alone() -> None:
    assert find_rank_info({}) == RankInfo(0, 1, 0, "")
    assert find_rank_info(
        {"PATH": "/bin", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    ) == RankInfo(0, 1, 0, "")


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        (without(DEEPSPEED, "CROSS_SIZE", "CROSS_RANK"), "RANK and WORLD_SIZE"),
    ],
    ids=["torchrun", "deepspeed", "accelerate", "by hand"],
)
def test_rank_and_world_size_say_the_place(variables: dict[str, str], launcher: str) -> None:
    assert find_rank_info(variables) == RankInfo(
        3,
        4,
        1,
        launcher,
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
        spans_hosts=True,
        local_size=2,
    )


@pytest.mark.parametrize("size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_one_host_span_none(size: str) -> None:
    hands = without(TORCHRUN, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    assert find_rank_info({**hands, size: "4"}).spans_hosts is False
    assert find_rank_info({**hands, size: "3"}).spans_hosts is True
    assert find_rank_info(hands).spans_hosts is None
    assert find_rank_info({"RANK": "0", "WORLD_SIZE": "1"}) == RankInfo(
        0, 1, 0, "RANK and WORLD_SIZE"
    )


def test_accelerate_launch_of_one_process_is_named() -> None:
    assert find_rank_info(ACCELERATE_ALONE) == RankInfo(0, 1, 0, "accelerate launch")


def test_mpirun_says_the_place() -> None:
    place = find_rank_info({**OPENMPI, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert place == RankInfo(
        3, 4, 1, "mpirun of Open MPI", "10.0.0.1", 29500, spans_hosts=True, local_size=2
    )
    # On one host neither needs to be set, and the port is derived from the job's name, the same on
    # all ranks.
    one_host = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    places = [
        find_rank_info(
            {**one_host, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
        )
        for rank in range(4)
    ]
    assert {(place.master_addr, place.master_port, place.spans_hosts) for place in places} == {
        ("127.0.0.1", places[0].master_port, False)
    }
    assert [(place.rank, place.local_rank) for place in places] == [
        (rank, rank) for rank in range(4)
    ]
    other = find_rank_info({**one_host, "PMIX_NAMESPACE": "prterun-node1-78@1"})
    assert 20000 <= other.master_port < 30000
    assert other.master_port != places[0].master_port
    older = find_rank_info(
        {**without(one_host, "PMIX_NAMESPACE"), "OMPI_MCA_ess_base_jobid": "123"}
    )
    assert 20000 <= older.master_port < 30000


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_srun_gives_all_ranks_the_same_address_and_port(hosts: int) -> None:
    places = [find_rank_info(srun(rank, 8, hosts)) for rank in range(8)]
    assert [place.rank for place in places] == list(range(8))
    assert [place.local_rank for place in places] == [rank % (8 // hosts) for rank in range(8)]
    shared = {
        (
            place.world_size,
            place.master_addr,
            place.master_port,
            place.spans_hosts,
            place.hosts,
            place.local_size,
            place.launcher,
        )
        for place in places
    }
    names = tuple(f"node{7 + number:02d}" for number in range(hosts))
    # Not where srun was typed, which is SLURM_LAUNCH_NODE_IPADDR.
    assert shared == {
        (
            8,
            "node07" if hosts > 1 else "127.0.0.1",
            24711,
            hosts > 1,
            names,
            8 // hosts,
            "srun of Slurm (job 4711)",
        )
    }


def test_two_steps_of_a_job_have_two_ports() -> None:
    ports = [find_rank_info(srun(0, SLURM_STEP_ID=str(step))).master_port for step in range(5)]
    assert len(set(ports)) == 5
    assert all(20000 <= port < 30000 for port in ports)
    own = find_rank_info(srun(0, MASTER_ADDR="10.0.0.5", MASTER_PORT="29501"))
    assert (own.master_addr, own.master_port) == ("10.0.0.5", 29501)


def test_hosts_with_unlike_numbers_of_ranks_have_no_common_one() -> None:
    assert find_rank_info(srun(2, 3, 2, SLURM_LOCALID="0")).local_size is None


def test_an_older_slurm_tells_the_size_by_another_name() -> None:
    assert find_rank_info(without(srun(1), "SLURM_STEP_NUM_TASKS")).world_size == 4


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NODELIST": "node07"},  # the batch script
        {
            "SLURM_STEP_ID": "4294967290",
            "SLURM_STEP_NODELIST": "node07",
        },  # salloc's shell, an interactive step
        {"SLURM_STEP_ID": "", "SLURM_STEP_NODELIST": "node07"},
        {"SLURM_STEP_ID": "batch", "SLURM_STEP_NODELIST": "node07"},
    ],
    ids=["no-step", "batch", "interactive", "empty", "word"],
)
def test_the_shell_of_sbatch_or_salloc_is_no_step(more: dict[str, str]) -> None:
    assert find_rank_info({**SBATCH, **more}) == RankInfo(0, 1, 0, "")


def test_torchrun_under_slurm_is_torchruns() -> None:
    assert find_rank_info({**srun(1), **TORCHRUN}).launcher == "torchrun"
    assert (
        find_rank_info({**srun(1), **OPENMPI, "MASTER_ADDR": "10.0.0.1"}).launcher
        == "mpirun of Open MPI"
    )
    assert (
        find_rank_info({**srun(0, 1, 1), **ACCELERATE_ALONE}).launcher == "srun of Slurm (job 4711)"
    )


def test_a_size_that_a_batch_script_exports_may_stand_beside_slurms() -> None:
    assert find_rank_info(srun(3, WORLD_SIZE="4")).rank == 3
    assert find_rank_info({**OPENMPI, "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "4"}).rank == 3


def test_a_place_goes_through_the_environment_unchanged() -> None:
    place = find_rank_info(srun(3))
    again = find_rank_info(place.variables())
    assert (
        again.rank,
        again.world_size,
        again.local_rank,
        again.master_addr,
        again.master_port,
    ) == (3, 4, 1, "node07", 24711)


# --- Partially set environments ---

ALONE = "or neither to train alone"


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), ["RANK is set, but WORLD_SIZE is not", ALONE]),
        (
            without(TORCHRUN, "RANK"),
            [
                "WORLD_SIZE is 4, but RANK is not set",
                "torchrun, srun or mpirun",
                "unset WORLD_SIZE to train alone",
            ],
        ),
        (without(TORCHRUN, "LOCAL_RANK"), ["but LOCAL_RANK is not", "set it, or use torchrun"]),
        (without(TORCHRUN, "MASTER_ADDR"), ["but MASTER_ADDR is not", "set it, or use torchrun"]),
        (without(TORCHRUN, "MASTER_PORT"), ["but MASTER_PORT is not", "set it, or use torchrun"]),
        ({**TORCHRUN, "MASTER_ADDR": ""}, ["but MASTER_ADDR is not", "set it, or use torchrun"]),
        (
            {"LOCAL_RANK": "0"},
            ["LOCAL_RANK is set, but RANK and WORLD_SIZE are not", "or none to train alone"],
        ),
        ({**SBATCH, "WORLD_SIZE": "4"}, ["WORLD_SIZE is 4, but RANK is not set", "srun"]),
        (srun(0, WORLD_SIZE="8"), ["WORLD_SIZE is 8, but RANK is not set", "unset WORLD_SIZE"]),
        (OPENMPI, ["several hosts, but MASTER_ADDR is not set", "`-x MASTER_ADDR=`"]),
        (
            without(OPENMPI, "OMPI_COMM_WORLD_SIZE"),
            ["OMPI_COMM_WORLD_SIZE must be a whole number, not ''"],
        ),
        (without(srun(0), "SLURM_LOCALID"), ["SLURM_LOCALID must be a whole number, not ''"]),
        (without(srun(0), "SLURM_JOB_ID"), ["SLURM_JOB_ID must be a whole number, not ''"]),
        (
            {**ACCELERATE_ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            [
                "`accelerate launch` was asked for several processes and started one",
                "--mpirun_hostfile",
                "torchrun",
                "--num_processes 1",
            ],
        ),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK must be a whole number, not '-1'"]),
        ({**TORCHRUN, "RANK": ""}, ["RANK must be a whole number, not ''"]),
        ({**TORCHRUN, "WORLD_SIZE": "4.0"}, ["WORLD_SIZE must be a whole number, not '4.0'"]),
        ({**TORCHRUN, "LOCAL_RANK": "first"}, ["LOCAL_RANK must be a whole number, not 'first'"]),
        ({**TORCHRUN, "WORLD_SIZE": "4\n"}, ["WORLD_SIZE must be a whole number, not '4\\n'"]),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE must be a whole number"]),
        ({**TORCHRUN, "MASTER_PORT": "tcp"}, ["MASTER_PORT must be a whole number, not 'tcp'"]),
        (
            {**TORCHRUN, "MASTER_PORT": "65536"},
            ["MASTER_PORT 65536 is not a port", "1024 to 65535"],
        ),
        ({**TORCHRUN, "RANK": "4"}, ["rank 4 of 4 ranks (torchrun)", "count from 0"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["rank 0 of 0 ranks", "count from 0"]),
        (
            {**TORCHRUN, "LOCAL_RANK": "4"},
            ["rank 3 cannot be number 4 of its host", "4 ranks in all"],
        ),
    ],
)
def test_what_is_partially_set_is_named_with_the_way_out(
    variables: dict[str, str], parts: list[str]
) -> None:
    said = complaint(find_rank_info, variables)
    for part in parts:
        assert part in said


# --- Slurm's host lists ---


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("a,b.example.org,10.0.0.7", ["a", "b.example.org", "10.0.0.7"]),
        ("n[01-03,07],login", ["n01", "n02", "n03", "n07", "login"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[5]", ["n5"]),
        ("n[3,1,2]", ["n3", "n1", "n2"]),
        ("gpu[1-2]-ib", ["gpu1-ib", "gpu2-ib"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
    ],
)
def test_host_lists_are_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "a,",
        ",a",
        "a,,b",
        "n[1-3",
        "n1-3]",
        "n[1-3]]",
        "n[[1]]",
        "n[]",
        "n[1,]",
        "n[-3]",
        "n[1-]",
        "n[1-2-3]",
        "n[0x1]",
        "n[a-c]",
        "n[1;2]",
        "n[1 ]",
        "n[1]\n",
        "n\n[1]",
        "a b",
        "-n",
        "--help",
        "$(id)",
        "`id`",
        "a;b",
        "a/b",
        "n\x00",
        "Ünode",
        "n[1234567890]",
        "n[" + "1," * 5000 + "]",
        "[" * 5000,
        "]" * 50000,
    ],
    ids=range(32),
)
def test_what_is_no_host_list_is_refused_at_once(text: str) -> None:
    began = time.monotonic()
    said = complaint(expand_hosts, text)
    assert re.search("valid Slurm host list|Slurm's host list .* has more than 256 ranges", said)
    assert re.search(r"expected e\.g\. node\[01-03,07\]|is not a number or a range", said)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "n[1-65537]",
        "n[0-999999999]",
        "n[1-999999][1-999999][1-999999]",
        "n[1-40000],m[1-40000]",
        ",".join(["n"] * (MAX_HOSTS + 1)),
    ],
    ids=["one-more", "range", "product", "sum", "names"],
)
def test_a_host_list_without_end_is_refused_at_once(text: str) -> None:
    began = time.monotonic()
    assert complaint(expand_hosts, text).endswith("names more than 65536 hosts")
    assert time.monotonic() - began < 2


def test_as_many_hosts_as_allowed_are_taken() -> None:
    hosts = expand_hosts("n[00001-65536]")
    assert (len(hosts), hosts[0], hosts[-1]) == (MAX_HOSTS, "n00001", "n65536")


@pytest.mark.parametrize(
    "text", ["n[3-1]", "n[3-1],n[9-8]", "n" + "[1]" * 3000], ids=["backwards", "twice", "deep"]
)
def test_a_list_that_names_no_host_or_never_ends_is_refused(text: str) -> None:
    assert re.search(
        "Slurm('s)? host list", complaint(find_rank_info, srun(0, SLURM_STEP_NODELIST=text))
    )


SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && [ $# = 3 ] || exit 1
echo "$3" >> "$0.asked"
case "$3" in refused*) exit 1;; many) seq -f n%.0f 65537;; *) printf 'a1\na2\n';; esac
"""


def test_slurms_own_scontrol_expands_host_lists_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert expand_hosts("anything[1-2]") == ["a1", "a2"]
    assert expand_hosts("refused[1-2]") == ["refused1", "refused2"], "then the list is parsed here"
    assert complaint(expand_hosts, "many").endswith("names more than 65536 hosts")
    for text in ("--help", "a b", "$(id)"):
        assert "not a valid Slurm host list" in complaint(expand_hosts, text)
    assert (tmp_path / "scontrol.asked").read_text().split() == [
        "anything[1-2]",
        "refused[1-2]",
        "many",
    ]


# --- GPUs ---


def test_each_rank_of_a_host_has_a_gpu() -> None:
    assert [gpu_of(RankInfo(rank, 8, rank % 4, "torchrun"), 4) for rank in range(8)] == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
    ]
    assert gpu_of(RankInfo(0, 1, 0, ""), 1) == 0


def test_a_gpu_that_slurm_shows_to_one_process_alone_is_its_own() -> None:
    assert [gpu_of(find_rank_info(srun(rank)), 1) for rank in range(4)] == [0, 0, 0, 0]


def test_more_processes_than_gpus_are_refused() -> None:
    for place, gpus in (
        (find_rank_info(TORCHRUN), 1),
        (find_rank_info(srun(3, 4, 1)), 2),
        (find_rank_info(srun(1)), 0),
    ):
        said = complaint(gpu_of, place, gpus)
        seen = f"{gpus} GPU{'s' * (gpus != 1)}"
        assert f"LOCAL_RANK is {place.local_rank}, but this process sees {seen};" in said
        assert "at most one process per GPU" in said


# --- The network interface ---

BOTH = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def outward() -> tuple[str, str]:
    """Return (interface, IPv4 address) of an interface of this host that is not loopback."""
    found = [
        (name, one)
        for name, one in own_addresses()
        if not ipaddress.ip_address(one).is_loopback and ":" not in one
    ]
    if not found:
        pytest.skip("this host has no network")
    return found[0]


def towards(address: str, **more: Any) -> RankInfo:
    return RankInfo(
        **{
            "rank": 1,
            "world_size": 2,
            "local_rank": 0,
            "launcher": "",
            "master_addr": address,
            "master_port": 29500,
            "spans_hosts": True,
            **more,
        }
    )


def test_loopback_has_all_its_addresses() -> None:
    assert ("lo", "127.0.0.1") in list(own_addresses())


def test_a_second_address_is_its_interfaces_and_what_is_down_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def address(family: int, text: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=text)

    monkeypatch.setattr(
        psutil,
        "net_if_stats",
        lambda: {"eth0": SimpleNamespace(isup=True), "eth1": SimpleNamespace(isup=False)},
    )
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "eth0": [
                address(socket.AF_INET6, "fe80::1%eth0"),
                address(socket.AF_INET, "10.0.0.1"),
                address(socket.AF_PACKET, "02:00:00:00:00:01"),
            ],
            "eth0:1": [address(socket.AF_INET, "10.0.0.2")],
            "eth1": [address(socket.AF_INET, "10.1.0.1")],
        },
    )
    assert list(own_addresses()) == [
        ("eth0", "10.0.0.1"),
        ("eth0", "10.0.0.2"),
        ("eth0", "fe80::1"),
    ]


def test_both_libraries_are_told_the_interface(outward: tuple[str, str]) -> None:
    interface, address = outward
    variables: dict[str, str] = {"PATH": "/bin"}
    assert choose_interface(towards(address), variables) == interface
    assert variables == {
        "PATH": "/bin",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",
    }
    not_known: dict[str, str] = {}
    assert choose_interface(towards(address, spans_hosts=None), not_known) == interface
    assert not_known["NCCL_SOCKET_IFNAME"] == f"={interface}"


def test_the_users_own_setting_wins(outward: tuple[str, str]) -> None:
    interface, address = outward
    theirs = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "^docker0"}
    kept = dict(theirs)
    assert choose_interface(towards(address), kept) == ""
    assert choose_interface(towards("nowhere.invalid"), kept) == "", "no look-up, so no failure"
    assert kept == theirs
    for one, other in (BOTH, BOTH[::-1]):
        half = {one: "ib0"}
        assert choose_interface(towards(address), half) == interface
        assert half[one] == "ib0"
        assert half[other].lstrip("=") == interface
    empty = dict.fromkeys(BOTH, "")
    assert choose_interface(towards(address), empty) == interface
    assert empty["GLOO_SOCKET_IFNAME"] == interface


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_on_one_host_nothing_is_told(address: str) -> None:
    for spans_hosts in (False, None):
        variables: dict[str, str] = {}
        assert choose_interface(towards(address, spans_hosts=spans_hosts), variables) == ""
        assert variables == {}
    variables = {}
    assert choose_interface(RankInfo(0, 1, 0, ""), variables) == ""
    assert choose_interface(towards("nowhere.invalid", spans_hosts=False), variables) == ""
    assert variables == {}


def test_a_first_host_whose_name_is_loopback_asks_for_the_second(outward: tuple[str, str]) -> None:
    """As on Debian: a host's own name resolves to 127.0.1.1 there, and to its address elsewhere."""
    interface, address = outward
    variables: dict[str, str] = {}
    place = find_rank_info(srun(0, 2, SLURM_STEP_NODELIST=f"localhost,{address}"))
    assert (place.master_addr, place.hosts) == ("localhost", ("localhost", address))
    assert choose_interface(place, variables) == interface
    assert variables["GLOO_SOCKET_IFNAME"] == interface


@pytest.mark.parametrize(
    "more",
    [
        {"rank": 1, "hosts": ("localhost", "10.0.0.2")},
        {"rank": 0, "hosts": ("localhost",)},
        {"rank": 0},
    ],
    ids=["not-first", "no-second", "not-known"],
)
def test_a_loopback_address_for_other_hosts_is_refused(more: dict[str, Any]) -> None:
    said = complaint(choose_interface, towards("127.0.0.1", **more), {})
    assert "MASTER_ADDR 127.0.0.1 is a loopback address on this host" in said
    assert "give the first host's address" in said
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in said


@pytest.mark.parametrize("address", ["nowhere.invalid", "-x"])
def test_a_name_that_leads_nowhere_is_refused(address: str) -> None:
    variables: dict[str, str] = {}
    said = complaint(choose_interface, towards(address), variables)
    assert f"cannot resolve '{address}'" in said
    assert "give its IP address, or name it in /etc/hosts" in said
    assert variables == {}


@pytest.mark.parametrize("address", ["node..7", "n" * 64])
def test_an_invalid_host_name_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="cannot resolve"):
        choose_interface(towards(address), {})
