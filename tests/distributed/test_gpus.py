"""A GPU that cannot be used is an error and never a silent run on the CPU; how GPUs are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, SMALL, assert_one_line, environment
from pipeline.cli import UserError
from pipeline.distributed import gpus, ranks
from pipeline.distributed.gpus import (
    apply_device,
    count_gpus,
    is_cpu_wanted,
    parse_list,
    share_out,
    show_own_slice,
    take_slice,
    torch_gpus,
    visible_devices,
)
from pipeline.distributed.launcher import RankInfo, find_rank_info, gpu_of
from pipeline.inference.devices import choose_device

WHOLE = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-5c89852c-aaaa-c3f3-1b07-005d5ae1dc3f)
GPU 2: NVIDIA GeForce RTX 4090 (UUID: GPU-11111111-2222-3333-4444-555555555555)
"""
SLICED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaaaaaa-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 7g.40gb     Device  0: (UUID: MIG-11111111-9bed-5b25-b243-5985ef7c9beb)
    """  # the format of drivers of 2025
FIRST, SECOND, OTHER = (gpu.uuid for gpu in parse_list(WHOLE))
MIG = [one for gpu in parse_list(SLICED) for one in gpu.slices]


def put_nvidia_smi(folder: Path, listed: str, driver: str = "580.65.06") -> str:
    """Write an nvidia-smi that lists `listed`; return the PATH on which it comes first."""
    (folder / "list").write_text(listed)
    (folder / "nvidia-smi").write_text(f"""#!/bin/sh
case "$1" in
    -L) cat '{folder}/list' ;;
    --query-gpu=driver_version) while read -r line; do echo {driver}; done < '{folder}/list' ;;
    *) exit 2 ;;
esac
""")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(listed, driver) gives this machine those GPUs, without any choice of device made."""

    def make(listed: str = WHOLE, driver: str = "580.65.06", sees: int | None = None) -> None:
        monkeypatch.setenv("PATH", put_nvidia_smi(tmp_path, listed, driver))
        for name in (gpus.VISIBLE, gpus.CPU, gpus.SLICES):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(gpus, "_has_device", lambda: False)
        if sees is not None:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: sees > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: sees)

    return make


def complaint(action: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- A GPU that cannot be used ---


@pytest.mark.parametrize("ask", [count_gpus, torch_gpus, lambda: choose_device("auto")])
def test_a_driver_that_is_too_old_is_an_error(
    machine: Any, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    machine(driver="550.54.15", sees=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert complaint(ask) == (
        "this machine has 3 GPUs (NVIDIA H100 80GB HBM3, NVIDIA driver 550.54.15), which is too "
        "old for torch 2.13.0 "
        "for CUDA 13.0: that needs driver 580 or newer; install driver 580 or newer, or a torch "
        "build for an older CUDA "
        "(cu126 or cu128 from download.pytorch.org/whl, with nvidia-dali-cuda120), or use the CPU "
        "with --device cpu"
    )


def test_a_torch_without_cuda_is_an_error(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(sees=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    said = complaint(torch_gpus)
    assert (
        "3 GPUs (NVIDIA H100 80GB HBM3, NVIDIA driver 580.65.06), but torch 2.13.0+cpu is a "
        "CPU build"
    ) in said
    assert (
        "install torch 2.13.0 from PyPI (CUDA 13: driver 580 or newer), or use the CPU with "
        "--device cpu" in said
    )


def test_a_driver_that_fails_otherwise_is_told_in_torchs_words(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(sees=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def fail() -> None:
        raise RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet "
            "initialized\nmore"
        )

    monkeypatch.setattr(torch.cuda, "init", fail)
    said = complaint(torch_gpus)
    assert (
        "cannot use it: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet "
        "initialized; "
    ) in said
    assert said.endswith("or use the CPU with --device cpu")


def test_a_driver_that_is_silent_beside_its_hardware_is_an_error(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(listed="", sees=0)
    assert torch_gpus() == count_gpus() == 0  # nvidia-smi without hardware is no GPU
    monkeypatch.setattr(gpus, "_has_device", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "this machine has a GPU (its driver does not answer), but torch" in complaint(torch_gpus)


@pytest.mark.parametrize(
    "variables",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"VASTSCALE_CPU": "1"},
    ],
)
def test_who_insists_on_the_cpu_gets_it(
    machine: Any, monkeypatch: pytest.MonkeyPatch, variables: dict
) -> None:
    machine(driver="550.54.15", sees=0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_cpu_wanted()
    assert (count_gpus(), torch_gpus(), str(choose_device("auto"))) == (0, 0, "cpu")
    assert ranks._device(RankInfo(0, 1, 0, "")) == torch.device("cpu")


def test_a_gpu_older_than_torchs_kernels_is_an_error(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(sees=2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"]
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda number: [(7, 5), (7, 0)][number]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks._device(RankInfo(0, 2, 0, "torchrun")) == torch.device("cuda", 0)
    # the rank itself reports it: others may be fine
    said = complaint(ranks._device, RankInfo(1, 2, 1, "torchrun"))
    assert said.startswith("GPU 1 (Tesla V100-SXM2-16GB) has compute capability 7.0, but torch ")
    assert "needs 7.5 or higher" in said


def test_one_rank_of_a_host_says_it(machine: Any) -> None:
    machine(driver="550.54.15", sees=0)
    assert "--device cpu" in complaint(ranks._device, RankInfo(4, 8, 0, "torchrun"))
    with pytest.raises(SystemExit) as stop:
        ranks._device(RankInfo(5, 8, 1, "torchrun"))
    assert stop.value.code == 2


@pytest.mark.parametrize("script", ["launch/local.py", "train.py"])
def test_training_ends_with_one_line_before_anything_is_written(
    script: str, dataset: Path, tmp_path: Path
) -> None:
    """The installed torch has no GPU here, while nvidia-smi lists three."""
    if gpus.list_gpus() or gpus._has_device():
        pytest.skip("there is a GPU here")
    (tmp_path / "bin").mkdir()
    variables = environment() | {"PATH": put_nvidia_smi(tmp_path / "bin", WHOLE, "470.1")}
    variables = {
        name: value
        for name, value in variables.items()
        if name not in (gpus.VISIBLE, "DS_ACCELERATOR")
    }
    words = [
        sys.executable,
        str(ROOT / script),
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(tmp_path / "run"),
        *SMALL,
    ]
    done = subprocess.run(
        words, env=variables, capture_output=True, text=True, timeout=100, check=False
    )
    assert_one_line(
        done, "this machine has 3 GPUs (NVIDIA H100 80GB HBM3, NVIDIA driver 470.1)", "--device cpu"
    )
    assert not (tmp_path / "run").exists()


# --- Names of GPUs ---


def test_nvidia_smis_list_is_read() -> None:
    assert [(gpu.index, gpu.name, gpu.slices) for gpu in parse_list(WHOLE)] == [
        (0, "NVIDIA H100 80GB HBM3", ()),
        (1, "NVIDIA H100 80GB HBM3", ()),
        (2, "NVIDIA GeForce RTX 4090", ()),
    ]
    assert [(gpu.index, gpu.slices) for gpu in parse_list(SLICED)] == [
        (0, tuple(MIG[:2])),
        (1, tuple(MIG[2:])),
    ]
    assert parse_list("No devices found.\n") == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, None),
        ("2,0", ["2", "0"]),
        (" 1 , 2,", ["1", "2"]),
        (SECOND, [SECOND]),
        (f"{OTHER},0", [OTHER, "0"]),
        ("GPU-1111", [OTHER]),
    ],
)
def test_visible_devices_are_read(text: str | None, names: list[str] | None) -> None:
    variables = {} if text is None else {gpus.VISIBLE: text}
    assert visible_devices(variables, parse_list(WHOLE)) == names


@pytest.mark.parametrize(
    ("text", "listed", "part"),
    [
        ("0,0", WHOLE, "names 0 twice; each GPU takes one process"),
        (f"0,{FIRST}", WHOLE, f"names {FIRST} twice"),
        (
            "0,3",
            WHOLE,
            f": no GPU 3; this machine has 0: {FIRST}; 1: {SECOND}; 2: {OTHER} (nvidia-smi -L)",
        ),
        ("GPU-77777777", WHOLE, "no such device; this machine has 0: GPU-"),
        ("GPU-5c89852c", WHOLE, "GPU-5c89852c is the beginning of 2 UUIDs"),
        ("cuda:1", WHOLE, "'cuda:1' is neither an index nor a UUID"),
        ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", WHOLE, "no such device"),
        (f"{MIG[0]},{MIG[0]}", SLICED, f"names {MIG[0]} twice"),
        (f"{MIG[0]},1", SLICED, "mixes whole GPUs and MIG devices"),
    ],
)
def test_names_that_lead_nowhere_are_refused(
    machine: Any, monkeypatch: pytest.MonkeyPatch, text: str, listed: str, part: str
) -> None:
    machine(listed, sees=1)
    monkeypatch.setenv(gpus.VISIBLE, text)
    said = complaint(count_gpus)
    assert said.startswith(f"CUDA_VISIBLE_DEVICES={text}")
    assert part in said


@pytest.mark.parametrize(
    ("listed", "text", "sees", "count"),
    [
        (WHOLE, None, 3, 3),
        (WHOLE, f"{OTHER},{FIRST}", 2, 2),
        (SLICED, None, 2, 3),
        (SLICED, ",".join(MIG[1:]), 1, 2),
    ],
)
def test_gpus_and_slices_are_counted(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
    text: str | None,
    sees: int,
    count: int,
) -> None:
    """torch sees only one MIG device, however many there are."""
    machine(listed, sees=sees)
    if text is not None:
        monkeypatch.setenv(gpus.VISIBLE, text)
    assert count_gpus() == count


def test_uuids_become_indexes_for_deepspeeds_launcher(machine: Any) -> None:
    machine()
    variables = {gpus.VISIBLE: f"{OTHER},{FIRST},1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert not share_out(variables, 2)
    assert variables == {gpus.VISIBLE: "2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    variables = {gpus.VISIBLE: "2,1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert not share_out(variables, 2)
    assert variables == {gpus.VISIBLE: "2,1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert share_out(variables := {}, 3)
    assert variables == {}
    machine(listed="")
    assert "name GPUs by index, or use one" in complaint(
        share_out, {gpus.VISIBLE: f"{FIRST},{SECOND}"}, 2
    )


def test_each_rank_sees_its_own_slice_alone(machine: Any) -> None:
    machine(SLICED)
    for given in ({}, {gpus.VISIBLE: ",".join(MIG)}):
        variables = dict(given)
        assert share_out(variables, 2)
        assert variables == {gpus.SLICES: ",".join(MIG[:2])}
        for rank in range(2):  # DeepSpeed's launcher numbers devices that it does not know
            own = {
                **variables,
                gpus.VISIBLE: "0,1",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            }
            apply_device("auto", own)
            assert own[gpus.VISIBLE] == MIG[rank]
            assert gpu_of(find_rank_info(own), 1, own) == 0
    assert "this host has 2 MIG devices for its ranks" in complaint(show_own_slice, 2, variables)


def test_a_slice_of_slurms_is_kept_and_torchruns_are_shared() -> None:
    own = {gpus.VISIBLE: MIG[1]}
    show_own_slice(3, own)
    assert own == {gpus.VISIBLE: MIG[1]}
    several = {gpus.VISIBLE: ",".join(MIG)}
    show_own_slice(2, several)
    assert several == {gpus.VISIBLE: MIG[2]}
    whole = {gpus.VISIBLE: "0,1"}
    show_own_slice(1, whole)
    assert whole == {gpus.VISIBLE: "0,1"}


def test_processes_of_an_evaluation_get_slices_too(machine: Any) -> None:
    machine(SLICED)
    seen = []
    for rank in range(4):
        take_slice(rank, variables := {})
        seen.append(variables.get(gpus.VISIBLE))
    assert seen == [*MIG, None]
    machine(WHOLE)
    take_slice(0, variables := {gpus.VISIBLE: "2,1"})
    assert variables == {gpus.VISIBLE: "2,1"}


def test_device_cpu_hides_gpus_from_all_libraries() -> None:
    variables = {gpus.VISIBLE: "0,1"}
    apply_device("cpu", variables)
    assert variables == {gpus.VISIBLE: "", gpus.CPU: "1"}
    variables = {gpus.CPU: "1"}
    apply_device("auto", variables)
    assert variables == {gpus.VISIBLE: "", gpus.CPU: "1"}
    apply_device("auto", variables := {gpus.VISIBLE: "0,1"})
    assert variables == {gpus.VISIBLE: "0,1"}


# --- The process group ---


@pytest.mark.parametrize(
    ("world_size", "visible", "backend", "is_bound", "interface"),
    [
        (1, "0", "nccl", False, "lo"),
        (2, "0,1", "nccl", True, None),
        (2, MIG[0], "gloo", False, None),
        (1, MIG[0], "nccl", False, "lo"),
    ],
)
def test_ranks_with_gpus_meet(
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    visible: str,
    backend: str,
    is_bound: bool,
    interface: str | None,
) -> None:
    """A single rank needs no network, and NCCL takes two slices of a GPU for the same GPU."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    place = RankInfo(
        0, world_size, 0, "torchrun" if world_size > 1 else "", spans_hosts=False, master_port=1
    )
    for name, value in {**place.variables(), gpus.VISIBLE: visible}.items():
        monkeypatch.setenv(name, value)
    asked = {}
    monkeypatch.setattr(ranks, "find_rank_info", lambda: place)
    monkeypatch.setattr(ranks, "end_with_parent", lambda number: None)
    monkeypatch.setattr(ranks, "_device", lambda place: torch.device("cuda", 0))
    monkeypatch.setattr(ranks, "bind_to_cores", lambda place, gpu, seen: asked.update(gpu=gpu))
    monkeypatch.setattr(
        dist, "init_process_group", lambda name, **more: asked.update(more, backend=name)
    )
    monkeypatch.setattr(dist, "new_group", lambda **more: None)
    assert ranks.start_distributed().device == torch.device("cuda", 0)
    assert (asked["backend"], asked["device_id"], asked["gpu"]) == (
        backend,
        torch.device("cuda", 0) if is_bound else None,
        0,
    )
    assert os.environ.get("NCCL_SOCKET_IFNAME") == interface
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
