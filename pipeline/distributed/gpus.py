"""Which GPUs a machine has, which of them its processes may use, and why they cannot where they
cannot.

A process that was to have a GPU and has none would train on the CPU for days without a word. So
everything that chooses a device asks here: `count_gpus` before processes are started, `torch_gpus`
in the process itself. Both raise `UserError` for a GPU that driver or torch make useless, unless
the CPU is insisted on: `--device cpu`, `VASTSCALE_CPU=1` or an empty `CUDA_VISIBLE_DEVICES`. Torch
is imported only where there are signs of a GPU.

`CUDA_VISIBLE_DEVICES` names GPUs by index or by UUID (`GPU-…`), and slices of GPUs (MIG) by UUID
alone (`MIG-…`). A process can use one slice at most, so that each of several must be shown its own:
`show_own_slice`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import UserError
from pipeline.distributed.launcher import find_place

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "VASTSCALE_CPU"
"""Environment variable: 1 insists on the CPU."""
SLICES = "VASTSCALE_MIG"
"""Environment variable with the MIG devices of the ranks of this host, in their order, by their
UUIDs."""
NVIDIA_SECONDS = 15  # a GPU that fell off the bus can keep nvidia-smi waiting for ever
FIRST_DRIVER = {13: 580, 12: 525, 11: 450}
"""CUDA's major version -> the first driver that runs all of its minor versions."""
_NO_GPU = ("", "-1", "none", "void", "nodevfiles")
_LISTED = re.compile(r"GPU (?P<index>\d+): (?P<name>.*?) \(UUID: (?P<uuid>GPU-[^)\s]+)\)")
_SLICE = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[^)\s]+)\)")
_REMEDY = (
    "install driver {first} or newer, or a torch for an older CUDA (cu126 or cu128 of "
    "download.pytorch.org/whl, with nvidia-dali-cuda120), or say --device cpu to use the CPU all "
    "the same"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU as `nvidia-smi -L` lists it."""

    index: int
    name: str
    uuid: str
    slices: tuple[str, ...] = ()
    """UUIDs of its MIG devices."""


# --- What there is ---


def may_have_gpu() -> bool:
    """Whether there are signs of a GPU on this machine."""
    return bool(shutil.which("nvidia-smi")) or _has_device_file() or Path("/dev/kfd").exists()


def is_cpu_wanted(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody insists on the CPU: `VASTSCALE_CPU`, or a `CUDA_VISIBLE_DEVICES` that names
    no GPU."""
    return (
        variables.get(CPU, "0") not in ("", "0")
        or variables.get(VISIBLE, "0").strip().lower() in _NO_GPU
    )


def list_gpus() -> list[Gpu]:
    """What `nvidia-smi -L` lists; nothing where it is missing, fails or does not answer."""
    return parse_list(_ask_nvidia_smi("-L"))


def parse_list(output: str) -> list[Gpu]:
    """The GPUs in the output of `nvidia-smi -L`, with their MIG devices."""
    found: list[Gpu] = []
    for line in output.splitlines():
        if match := _LISTED.match(line):
            found.append(Gpu(int(match["index"]), match["name"], match["uuid"]))
        elif (match := _SLICE.match(line)) and found:
            last = found[-1]
            found[-1] = Gpu(last.index, last.name, last.uuid, (*last.slices, match["uuid"]))
    return found


def driver_version() -> str:
    """NVIDIA's driver, such as 580.65.06; empty where it does not say."""
    told = _ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    if told and re.fullmatch(r"\d+(\.\d+)+", told[0].strip()):
        return told[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"Kernel Module\D*?(\d+(?:\.\d+)+)", text)
    return match[1] if match else ""


def _ask_nvidia_smi(*arguments: str) -> str:
    """What it prints; empty where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=NVIDIA_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


# --- What torch can use ---


def count_gpus() -> int:
    """How many processes can have a GPU, or a MIG device, of their own on this machine; 0: train on
    the CPU.

    `UserError` for GPUs that cannot be used, and for a `CUDA_VISIBLE_DEVICES` that names one twice
    or one that is not there.
    """
    if is_cpu_wanted() or not (
        may_have_gpu() or "torch" in sys.modules
    ):  # torch's import takes seconds
        return 0
    gpus = list_gpus()
    names = visible_devices(
        os.environ, gpus
    )  # an unknown one would end CUDA's list there, without a word
    seen = torch_gpus()
    if not seen:
        return 0
    slices = _slices(names, gpus)
    return len(slices) if slices else seen


def torch_gpus() -> int:
    """GPUs that torch can use in this process; 0 where there is none, or the CPU is insisted on.

    `UserError`, naming the driver's and torch's versions and the ways out, where the machine has a
    GPU that torch cannot use.
    """
    if is_cpu_wanted():
        return 0
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # says of an old driver what the error below says in one line
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        return seen
    complaint = _why_not(torch) if may_have_gpu() else ""
    if complaint:
        raise UserError(complaint)
    return 0


def _why_not(torch: Any) -> str:
    """Why torch sees no GPU of this machine's; empty where the machine has none of NVIDIA's."""
    gpus = list_gpus()
    if not gpus and not _has_device():
        return ""
    driver = driver_version()
    has = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''} ({gpus[0].name}" if gpus else "a GPU ("
    answer = f"NVIDIA driver {driver}" if driver else "its driver does not answer"
    has += f"{', ' if gpus else ''}{answer})"
    if torch.version.cuda is None:
        return (
            f"this machine has {has}, and torch {torch.__version__} is built for CPUs alone; "
            "install torch "
            f"{torch.__version__.partition('+')[0]} from PyPI (CUDA 13: driver {FIRST_DRIVER[13]} "
            "or newer), or "
            "say --device cpu to use the CPU all the same"
        )
    first = FIRST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), FIRST_DRIVER[13])
    wanted = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if driver and int(driver.partition(".")[0]) < first:
        return (
            f"this machine has {has}, which is too old for {wanted}: that needs driver {first} or "
            "newer; "
            f"{_REMEDY.format(first=first)}"
        )
    return (
        f"this machine has {has}, and {wanted} cannot use it: {_complaint_of(torch)}; see what "
        "`nvidia-smi` says, "
        "and reboot after an update of the driver; or say --device cpu to use the CPU all the same"
    )


def _has_device() -> bool:
    """Whether there is a device of NVIDIA's whose driver does not answer: its file, or hardware
    beside its tools."""
    if _has_device_file():
        return True
    return bool(shutil.which("nvidia-smi")) and any(
        _read(device / "vendor") == "0x10de" and _read(device / "class").startswith("0x03")
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


def _has_device_file() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))  # a container may have been given the third alone


def _complaint_of(torch: Any) -> str:
    """What torch says when it is made to use a GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(". ")
    return "it sees none"


def refuse_old_gpu(number: int) -> None:
    """`UserError` for a GPU older than the oldest that torch has kernels for. Starts CUDA in this
    process."""
    import torch

    names = [re.fullmatch(r"sm_(\d+)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    known = [int(match[1]) for match in names if match]
    major, minor = torch.cuda.get_device_capability(number)
    if known and major * 10 + minor < min(known):
        oldest = min(known)
        raise UserError(
            f"GPU {number} ({torch.cuda.get_device_name(number)}) has compute capability "
            f"{major}.{minor}, "
            f"and torch {torch.__version__} for CUDA {torch.version.cuda} needs "
            f"{oldest // 10}.{oldest % 10} or more; install a torch for an older CUDA (cu126 of "
            "download.pytorch.org/whl, with nvidia-dali-cuda120), leave the GPU out with "
            f"{VISIBLE}, or "
            "say --device cpu"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# --- CUDA_VISIBLE_DEVICES ---


def visible_devices(variables: Mapping[str, str], gpus: Sequence[Gpu]) -> list[str] | None:
    """The names in `CUDA_VISIBLE_DEVICES`: indexes and UUIDs in full; None where it is not set.

    `UserError` for a name that occurs twice, one that is none of `gpus` (unless those are not
    known), and for GPUs beside MIG devices. CUDA itself would leave out all that follows, or
    everything, and say nothing.
    """
    text = variables.get(VISIBLE)
    if text is None:
        return None
    names = [_whole_name(name.strip(), gpus, text) for name in text.split(",") if name.strip()]
    places = [_place_of(name, gpus) for name in names]
    for position, name in enumerate(names):
        if places[position] in places[:position]:
            raise UserError(
                f"{VISIBLE}={text} names {name} twice; a GPU takes one process, so name each once"
            )
    sliced = [name for name in names if name.startswith("MIG-")]
    if sliced and len(sliced) < len(names):
        raise UserError(
            f"{VISIBLE}={text} mixes whole GPUs and MIG devices, of which CUDA uses one kind at a "
            "time; "
            "name one kind"
        )
    return names


def _whole_name(name: str, gpus: Sequence[Gpu], text: str) -> str:
    """`name`, an index or the beginning of a UUID, in full."""
    known = "; ".join(
        f"{gpu.index}: {gpu.uuid}{''.join(f', {one}' for one in gpu.slices)}" for gpu in gpus
    )
    if name.isdecimal():
        if gpus and int(name) not in [gpu.index for gpu in gpus]:
            raise UserError(
                f"{VISIBLE}={text}: there is no GPU {name}; this machine has {known} (nvidia-smi "
                "-L)"
            )
        return str(int(name))
    if not name.startswith(("GPU-", "MIG-")):
        raise UserError(
            f"{VISIBLE}={text}: {name!r} is neither an index nor a UUID; write numbers from 0, or "
            "names as "
            "`nvidia-smi -L` has them"
        )
    if not gpus:
        return name
    found = [uuid for gpu in gpus for uuid in (gpu.uuid, *gpu.slices) if uuid.startswith(name)]
    if len(found) != 1:
        what = (
            "there is no such device"
            if not found
            else f"{name} is the beginning of {len(found)} names"
        )
        raise UserError(f"{VISIBLE}={text}: {what}; this machine has {known} (nvidia-smi -L)")
    return found[0]


def _place_of(name: str, gpus: Sequence[Gpu]) -> str:
    """The same for each name of a device."""
    return next((str(gpu.index) for gpu in gpus if gpu.uuid == name), name)


def _slices(names: Sequence[str] | None, gpus: Sequence[Gpu]) -> list[str]:
    """The MIG devices among `names`; where none are given, all that there are, for then CUDA shows
    nothing else."""
    if names is None:
        return [one for gpu in gpus for one in gpu.slices]
    return [name for name in names if name.startswith("MIG-")]


def device_names(variables: Mapping[str, str] = os.environ) -> list[str]:
    """The names of GPUs or MIG devices in `CUDA_VISIBLE_DEVICES`, or all MIG devices; empty: GPUs
    by their numbers."""
    gpus = list_gpus()
    names = visible_devices(variables, gpus)
    return names or _slices(names, gpus)


def share_out(variables: MutableMapping[str, str], processes: int) -> bool:
    """Prepare the environment of a launcher that starts `processes` and knows GPUs by their indexes
    alone.

    Returns whether it must be told how many processes there are, for it is not told which GPUs. MIG
    devices are kept from it; each rank finds its own by `show_own_slice`. `UserError` where a UUID
    has no index here.
    """
    gpus = list_gpus()
    names = visible_devices(variables, gpus)
    slices = _slices(names, gpus)[:processes]
    if slices:
        variables.pop(VISIBLE, None)
        variables[SLICES] = ",".join(slices)
        return True
    if names is None:
        return True
    indexes = [_place_of(name, gpus) for name in names[:processes]]
    unknown = [index for index in indexes if not index.isdecimal()]
    if unknown:
        raise UserError(
            f"{VISIBLE} names {unknown[0]}, whose index only nvidia-smi could tell, and it is "
            "missing or "
            f"does not answer; name GPUs by number, or use one: {VISIBLE}={unknown[0]} and --procs "
            "1"
        )
    if any(not name.isdecimal() for name in names):
        variables["CUDA_DEVICE_ORDER"] = (
            "PCI_BUS_ID"  # nvidia-smi's order, which the indexes are of
        )
    variables[VISIBLE] = ",".join(indexes)
    return False


def take_slice(rank: int, variables: MutableMapping[str, str]) -> None:
    """In the environment of process `rank` of this host, show the MIG device that is its own, where
    there are some."""
    gpus = list_gpus() if may_have_gpu() and not is_cpu_wanted(variables) else []
    slices = _slices(visible_devices(variables, gpus), gpus) if gpus else []
    if rank < len(slices):
        variables[VISIBLE] = slices[rank]


def show_own_slice(local_rank: int, variables: MutableMapping[str, str] = os.environ) -> None:
    """Where the ranks of this host have MIG devices, let this process see its own alone. Call it
    before CUDA starts."""
    slices = (
        variables.get(SLICES, "").split(",")
        if variables.get(SLICES)
        else _slices([name.strip() for name in variables.get(VISIBLE, "").split(",")], ())
    )
    if len(slices) > 1 or variables.get(SLICES):
        if local_rank >= len(slices):
            raise UserError(
                f"LOCAL_RANK is {local_rank}, and this host has {len(slices)} MIG devices for its "
                "ranks; "
                "start at most one process per device"
            )
        variables[VISIBLE] = slices[local_rank]


def has_slice(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process's GPU is a MIG device."""
    return variables.get(VISIBLE, "").startswith("MIG-")


def settle(device: str, variables: MutableMapping[str, str] = os.environ) -> None:
    """Make the environment of a rank say what `--device` ("auto" or "cpu") and its launcher do,
    before torch starts."""
    if device == "cpu":
        variables[CPU] = "1"
    if is_cpu_wanted(variables):
        variables[VISIBLE] = ""  # for DALI and DeepSpeed, too
        variables[CPU] = "1"
    elif variables.get(SLICES) or has_slice(variables):
        show_own_slice(find_place(variables).local_rank, variables)
