"""Find the GPUs that processes on this machine can use, or why they cannot use them.

A process that should have a GPU and has none would silently train on the CPU for days. So
everything that chooses a device asks here: `count_gpus` before processes are started, `torch_gpus`
in the process itself. Both raise `UserError` for a GPU that the driver or torch cannot use, unless
the CPU was requested: `--device cpu`, `VASTSCALE_CPU=1` or an empty `CUDA_VISIBLE_DEVICES`. torch
is imported only if there are signs of a GPU.

`CUDA_VISIBLE_DEVICES` names GPUs by index or by UUID (`GPU-…`), and slices of GPUs (MIG devices) by
UUID only (`MIG-…`). A process can use only one MIG device, so each process must be shown its own:
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

from pipeline.cli import UserError, counted
from pipeline.distributed.launcher import find_rank_info

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "VASTSCALE_CPU"
"""Environment variable: 1 requests the CPU."""
SLICES = "VASTSCALE_MIG"
"""Environment variable: UUIDs of the MIG devices of this host's ranks, in rank order."""
NVIDIA_SECONDS = 15  # a GPU that fell off the bus can block nvidia-smi forever
FIRST_DRIVER = {13: 580, 12: 525, 11: 450}
"""CUDA's major version -> the oldest driver that runs all of its minor versions."""
_NO_GPU = ("", "-1", "none", "void", "nodevfiles")
_LISTED = re.compile(r"GPU (?P<index>\d+): (?P<name>.*?) \(UUID: (?P<uuid>GPU-[^)\s]+)\)")
_SLICE = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[^)\s]+)\)")
_REMEDY = (
    "install driver {first} or newer, or a torch build for an older CUDA (cu126 or cu128 from "
    "download.pytorch.org/whl, with nvidia-dali-cuda120), or use the CPU with --device cpu"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU as listed by `nvidia-smi -L`."""

    index: int
    name: str
    uuid: str
    slices: tuple[str, ...] = ()
    """UUIDs of its MIG devices."""


# --- What the machine has ---


def may_have_gpu() -> bool:
    """Whether there are signs of a GPU on this machine."""
    return bool(shutil.which("nvidia-smi")) or _has_device_file() or Path("/dev/kfd").exists()


def is_cpu_wanted(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the CPU was requested, by `VASTSCALE_CPU` or by hiding all GPUs."""
    return (
        variables.get(CPU, "0") not in ("", "0")
        or variables.get(VISIBLE, "0").strip().lower() in _NO_GPU
    )


def list_gpus() -> list[Gpu]:
    """Return what `nvidia-smi -L` lists; nothing if it is missing, fails or does not answer."""
    return parse_list(_ask_nvidia_smi("-L"))


def parse_list(output: str) -> list[Gpu]:
    """Parse the output of `nvidia-smi -L`: GPUs with their MIG devices."""
    found: list[Gpu] = []
    for line in output.splitlines():
        if match := _LISTED.match(line):
            found.append(Gpu(int(match["index"]), match["name"], match["uuid"]))
        elif (match := _SLICE.match(line)) and found:
            last = found[-1]
            found[-1] = Gpu(last.index, last.name, last.uuid, (*last.slices, match["uuid"]))
    return found


def driver_version() -> str:
    """Return the version of NVIDIA's driver, such as 580.65.06; empty if unknown."""
    lines = _ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    if lines and re.fullmatch(r"\d+(\.\d+)+", lines[0].strip()):
        return lines[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"Kernel Module\D*?(\d+(?:\.\d+)+)", text)
    return match[1] if match else ""


def _ask_nvidia_smi(*arguments: str) -> str:
    """Return nvidia-smi's output; empty if it is missing, fails or does not answer."""
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
    """Return how many processes can have a GPU (or MIG device) of their own; 0: use the CPU.

    Raises `UserError` for GPUs that cannot be used, and for a `CUDA_VISIBLE_DEVICES` that names one
    twice or an unknown one.
    """
    # Importing torch takes seconds, so look for signs of a GPU first.
    if is_cpu_wanted() or not (may_have_gpu() or "torch" in sys.modules):
        return 0
    gpus = list_gpus()
    # Raises for unknown names; CUDA would silently end its list at the first of them.
    names = visible_devices(os.environ, gpus)
    seen = torch_gpus()
    if not seen:
        return 0
    slices = _slices(names, gpus)
    return len(slices) if slices else seen


def check_procs(procs: int, num_gpus: int) -> None:
    """Raise `UserError` if `--procs` is more than the machine's GPUs; without GPUs, any will do."""
    if num_gpus and procs > num_gpus:
        raise UserError(
            f"--procs {procs} is more than this machine's {counted(num_gpus, 'GPU')}; use at most "
            "one process per GPU"
        )


def torch_gpus() -> int:
    """Return the number of GPUs that torch can use here; 0 if the CPU was requested.

    Raises `UserError` with the driver's and torch's versions and the remedies if the machine has a
    GPU that torch cannot use.
    """
    if is_cpu_wanted():
        return 0
    import torch

    with warnings.catch_warnings():
        # torch warns about an old driver; the error below says the same in one line.
        warnings.simplefilter("ignore")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        return seen
    complaint = _why_not(torch) if may_have_gpu() else ""
    if complaint:
        raise UserError(complaint)
    return 0


def _why_not(torch: Any) -> str:
    """Return why torch sees no GPU; empty if the machine has no NVIDIA GPU."""
    gpus = list_gpus()
    if not gpus and not _has_device():
        return ""
    driver = driver_version()
    has = f"{counted(len(gpus), 'GPU')} ({gpus[0].name}" if gpus else "a GPU ("
    answer = f"NVIDIA driver {driver}" if driver else "its driver does not answer"
    has += f"{', ' if gpus else ''}{answer})"
    if torch.version.cuda is None:
        return (
            f"this machine has {has}, but torch {torch.__version__} is a CPU build; install torch "
            f"{torch.__version__.partition('+')[0]} from PyPI (CUDA 13: driver {FIRST_DRIVER[13]} "
            "or newer), or use the CPU with --device cpu"
        )
    first = FIRST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), FIRST_DRIVER[13])
    wanted = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if driver and int(driver.partition(".")[0]) < first:
        return (
            f"this machine has {has}, which is too old for {wanted}: that needs driver {first} or "
            f"newer; {_REMEDY.format(first=first)}"
        )
    return (
        f"this machine has {has}, but {wanted} cannot use it: {_complaint_of(torch)}; check "
        "`nvidia-smi`, reboot if the driver was updated, or use the CPU with --device cpu"
    )


def _has_device() -> bool:
    """Whether there is an NVIDIA device whose driver does not answer.

    Signs are a device file, or hardware together with nvidia-smi.
    """
    if _has_device_file():
        return True
    return bool(shutil.which("nvidia-smi")) and any(
        _read(device / "vendor") == "0x10de" and _read(device / "class").startswith("0x03")
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


def _has_device_file() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))  # a container may have only, say, nvidia2


def _complaint_of(torch: Any) -> str:
    """Return torch's error message when it is made to use a GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(". ")
    return "it sees none"


def refuse_old_gpu(number: int) -> None:
    """Raise `UserError` for a GPU that is older than torch's kernels support.

    Starts CUDA in this process.
    """
    import torch

    names = [re.fullmatch(r"sm_(\d+)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    known = [int(match[1]) for match in names if match]
    major, minor = torch.cuda.get_device_capability(number)
    if known and major * 10 + minor < min(known):
        oldest = min(known)
        raise UserError(
            f"GPU {number} ({torch.cuda.get_device_name(number)}) has compute capability "
            f"{major}.{minor}, but torch {torch.__version__} for CUDA {torch.version.cuda} needs "
            f"{oldest // 10}.{oldest % 10} or higher; install a torch build for an older CUDA "
            "(cu126 from download.pytorch.org/whl, with nvidia-dali-cuda120), exclude the GPU with "
            f"{VISIBLE}, or use --device cpu"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# --- CUDA_VISIBLE_DEVICES ---


def visible_devices(variables: Mapping[str, str], gpus: Sequence[Gpu]) -> list[str] | None:
    """Return the names in `CUDA_VISIBLE_DEVICES`: indexes, and UUIDs in full; None if unset.

    Raises `UserError` for a name that occurs twice, one that is not in `gpus` (if those are known),
    and for a mix of GPUs and MIG devices. CUDA would silently ignore such a name and all that
    follow, or everything.
    """
    text = variables.get(VISIBLE)
    if text is None:
        return None
    names = [_whole_name(name.strip(), gpus, text) for name in text.split(",") if name.strip()]
    places = [_place_of(name, gpus) for name in names]
    for position, name in enumerate(names):
        if places[position] in places[:position]:
            raise UserError(
                f"{VISIBLE}={text} names {name} twice; each GPU takes one process, so name each "
                "once"
            )
    sliced = [name for name in names if name.startswith("MIG-")]
    if sliced and len(sliced) < len(names):
        raise UserError(
            f"{VISIBLE}={text} mixes whole GPUs and MIG devices, but CUDA uses only one kind at a "
            "time; name one kind"
        )
    return names


def _whole_name(name: str, gpus: Sequence[Gpu], text: str) -> str:
    """Return `name`, an index or the beginning of a UUID, in full."""
    known = "; ".join(
        f"{gpu.index}: {gpu.uuid}{''.join(f', {one}' for one in gpu.slices)}" for gpu in gpus
    )
    if name.isdecimal():
        if gpus and int(name) not in [gpu.index for gpu in gpus]:
            raise UserError(
                f"{VISIBLE}={text}: no GPU {name}; this machine has {known} (nvidia-smi -L)"
            )
        return str(int(name))
    if not name.startswith(("GPU-", "MIG-")):
        raise UserError(
            f"{VISIBLE}={text}: {name!r} is neither an index nor a UUID; write indexes from 0, or "
            "UUIDs as listed by `nvidia-smi -L`"
        )
    if not gpus:
        return name
    found = [uuid for gpu in gpus for uuid in (gpu.uuid, *gpu.slices) if uuid.startswith(name)]
    if len(found) != 1:
        what = "no such device" if not found else f"{name} is the beginning of {len(found)} UUIDs"
        raise UserError(f"{VISIBLE}={text}: {what}; this machine has {known} (nvidia-smi -L)")
    return found[0]


def _place_of(name: str, gpus: Sequence[Gpu]) -> str:
    """Return the same string for all names of one device."""
    return next((str(gpu.index) for gpu in gpus if gpu.uuid == name), name)


def _slices(names: Sequence[str] | None, gpus: Sequence[Gpu]) -> list[str]:
    """Return the MIG devices among `names`.

    Without names, return all there are: where MIG devices exist, CUDA shows nothing else.
    """
    if names is None:
        return [one for gpu in gpus for one in gpu.slices]
    return [name for name in names if name.startswith("MIG-")]


def device_names(variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs or MIG devices named by `CUDA_VISIBLE_DEVICES`, or all MIG devices.

    Empty if GPUs are chosen by number.
    """
    gpus = list_gpus()
    names = visible_devices(variables, gpus)
    return names or _slices(names, gpus)


def share_out(variables: MutableMapping[str, str], processes: int) -> bool:
    """Prepare the environment of a launcher that starts `processes` and knows GPUs only by index.

    Returns whether the launcher needs the number of processes, because the environment does not
    name the GPUs. MIG devices are hidden from it; each rank finds its own by `show_own_slice`.
    Raises `UserError` if a UUID's index is unknown.
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
            f"{VISIBLE} names {unknown[0]}, but nvidia-smi, which knows its index, is missing or "
            f"does not answer; name GPUs by index, or use one: {VISIBLE}={unknown[0]} and --procs "
            "1"
        )
    if any(not name.isdecimal() for name in names):
        # The indexes are in nvidia-smi's order.
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    variables[VISIBLE] = ",".join(indexes)
    return False


def take_slice(rank: int, variables: MutableMapping[str, str]) -> None:
    """Show process `rank` of this host its own MIG device, if any, through its environment."""
    gpus = list_gpus() if may_have_gpu() and not is_cpu_wanted(variables) else []
    slices = _slices(visible_devices(variables, gpus), gpus) if gpus else []
    if rank < len(slices):
        variables[VISIBLE] = slices[rank]


def show_own_slice(local_rank: int, variables: MutableMapping[str, str] = os.environ) -> None:
    """Make this process see only its own MIG device, if this host's ranks use any.

    Call it before CUDA starts.
    """
    slices = (
        variables.get(SLICES, "").split(",")
        if variables.get(SLICES)
        else _slices([name.strip() for name in variables.get(VISIBLE, "").split(",")], ())
    )
    if len(slices) > 1 or variables.get(SLICES):
        if local_rank >= len(slices):
            raise UserError(
                f"LOCAL_RANK is {local_rank}, but this host has {len(slices)} MIG devices for its "
                "ranks; start at most one process per device"
            )
        variables[VISIBLE] = slices[local_rank]


def has_slice(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process uses a MIG device."""
    return variables.get(VISIBLE, "").startswith("MIG-")


def apply_device(device: str, variables: MutableMapping[str, str] = os.environ) -> None:
    """Apply `--device` ("auto" or "cpu") and the launcher's choice to a rank's environment.

    Call it before torch starts.
    """
    if device == "cpu":
        variables[CPU] = "1"
    if is_cpu_wanted(variables):
        variables[VISIBLE] = ""  # DALI and DeepSpeed read it, too
        variables[CPU] = "1"
    elif variables.get(SLICES) or has_slice(variables):
        show_own_slice(find_rank_info(variables).local_rank, variables)
