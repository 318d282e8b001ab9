"""Collect facts about a host for the doctor: checkout, packages, network, GPUs and datasets.

This file is sent as source to every host, whatever is installed there, and runs in its python3. So
it uses only the standard library and imports nothing from the checkout. `checks.py` judges the
facts on the first host.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCES = (
    "*.py",
    "*.sh",
    "requirements*.txt",
    "*ds_config*.json",
    "launch/**/*.py",
    "launch/**/*.sh",
    "pipeline/**/*.py",
    "pipeline/**/*.cpp",
    "recipes/**/*.yaml",
    "recipes/**/*.yml",
    "recipes/**/*.json",
)
"""Files that a run depends on, tracked by git or not."""
MOST_SOURCES = 5000
LISTS = ("training_file_list.txt", "validation_file_list.txt")
LOOK_SECONDS = 6  # for checking that files exist: not enough for millions on a network disk
SAMPLE = 200  # files whose contents are compared
END_BYTES = 1 << 15  # compared at each end of a sampled file
NVIDIA_SECONDS = 15  # a GPU that fell off the bus can make nvidia-smi hang forever
TORCH_SECONDS = 40  # to import torch, even from a slow disk, and to compile a small kernel
GPU_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "pstate",
    "temperature.gpu",
    "power.limit",
    "power.default_limit",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",
    "mig.mode.current",
)
"""Fields of `nvidia-smi --help-query-gpu`, in MiB, degrees Celsius and W. Not every driver knows
all of them."""
_NO_GPUS = {"gpus": [], "complaint": ""}
_WHOLE = {
    "index",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
}
_REAL = {"power.limit", "power.default_limit"}
_MASK = {"clocks_event_reasons.active", "clocks_throttle_reasons.active"}
SLOWED_BY = {
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of nvml.h's nvmlClocksEventReasons that indicate a problem, unlike idle clocks or a reached
power cap."""


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Return the facts by name. A fact that could not be determined is {"error": why}."""
    facts: dict[str, Any] = {"began": time.time()}
    parts = {
        "python": lambda: {"version": platform.python_version(), "executable": sys.executable},
        "checkout": lambda: _checkout(Path(task["root"]), task["synced"]),
        "packages": lambda: _packages(task["packages"]),
        "cores": lambda: len(os.sched_getaffinity(0)),
        "memory": _memory,
        "output": lambda: _output(task["output_dir"]),
        "interfaces": _interfaces,
        "limits": _limits,
        "nvidia": lambda: _NO_GPUS if task.get("is_on_cpu") else probe_gpus(),
        "torch": lambda: _torch(Path(task["root"]), facts["nvidia"]),
        "datasets": lambda: [probe_dataset(directory) for directory in task["dataset_dirs"]],
    }
    for name, part in parts.items():
        try:
            facts[name] = part()
        except Exception as error:  # a failing part must not keep the others from answering
            facts[name] = {"error": f"{type(error).__name__}: {error}"}
    facts["hostname"] = socket.gethostname()
    facts["ended"] = time.time()
    return facts


def _checkout(root: Path, synced: str) -> dict[str, Any]:
    if not root.is_dir():
        return {"exists": False, "commit": "", "files": {}}
    paths = sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()})[
        :MOST_SOURCES
    ]
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in paths
    }
    return {"exists": True, "commit": _commit(root, synced), "files": files}


def _commit(root: Path, synced: str) -> str:
    """Return the commit that is checked out, or that the file `synced` names; "" if unknown."""
    if (root / ".git").exists():
        try:
            done = subprocess.run(
                ["git", "-c", "safe.directory=*", "-C", str(root), "rev-parse", "HEAD"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=5,
                check=False,
            )
            return done.stdout.decode().strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            return ""
    try:
        return str(json.loads((root / synced).read_text())["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _packages(names: list[str]) -> dict[str, str]:
    """Return the versions of the packages `names` ("" if missing), and of all builds of DALI and
    NCCL."""
    from importlib.metadata import PackageNotFoundError, distributions, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith(("nvidia-dali-cuda", "nvidia-nccl-")):
            found[name] = distribution.version
    return found


def _memory() -> dict[str, int]:
    """Return total and free memory in bytes, within a container's limit if that is lower."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, most), min(free, max(0, most - used))
    except (OSError, ValueError):  # no such limit
        pass
    return {"total": total, "free": free}


def _output(directory: str) -> dict[str, Any]:
    """Return the free bytes where the run folder is or would be, and whether it is writable."""
    path = Path(os.path.expanduser(directory))
    while not path.exists() and path != path.parent:
        path = path.parent
    found = {
        "at": str(path),
        "free": os.statvfs(str(path)).f_bavail * os.statvfs(str(path)).f_frsize,
        "complaint": "",
    }
    try:
        with tempfile.TemporaryFile(dir=str(path)) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        found["complaint"] = error.strerror or str(error)
    return found


def _interfaces() -> list[dict[str, Any]]:
    """Return the interfaces that are up and have an IPv4 address.

    `speed` is in Mb/s and `mtu` in bytes; 0 means unknown.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            # SIOCGIFADDR, SIOCGIFFLAGS
            address, flags = (_ask(any_socket, 0x8915, name), _ask(any_socket, 0x8913, name))
            # IFF_UP, IFF_RUNNING
            if address and flags and struct.unpack_from("<H", flags, 16)[0] & 0x41 == 0x41:
                found.append(
                    {
                        "name": name,
                        "address": socket.inet_ntoa(address[20:24]),
                        "speed": max(0, _number(f"/sys/class/net/{name}/speed")),
                        "mtu": _number(f"/sys/class/net/{name}/mtu"),
                    }
                )
    return found


def _ask(any_socket: socket.socket, request: int, name: str) -> bytes | None:
    try:
        return fcntl.ioctl(any_socket.fileno(), request, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None


def _number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0


def _limits() -> dict[str, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        disk = os.statvfs("/dev/shm")
        shm = disk.f_blocks * disk.f_frsize
    except OSError:
        shm = 0
    soft, hard = (
        1 << 20 if number == resource.RLIM_INFINITY else number for number in (soft, hard)
    )
    return {"open_files": soft, "most_open_files": hard, "shm": shm}


# --- GPUs, as nvidia-smi describes them ---


def probe_gpus() -> dict[str, Any]:
    """Return {"gpus": [...], "complaint": why nvidia-smi failed, or ""}."""
    if not shutil.which("nvidia-smi"):
        present = Path("/dev/nvidia0").exists()
        return {
            "gpus": [],
            "complaint": "/dev/nvidia0 exists, but nvidia-smi is missing" if present else "",
        }
    fields = list(GPU_FIELDS)
    while True:
        try:
            done = subprocess.run(
                ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=NVIDIA_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"gpus": [], "complaint": f"nvidia-smi did not answer within {NVIDIA_SECONDS} s"}
        output = done.stdout.decode(errors="replace")
        unknown = re.search(r'Field "([^"]+)" is not a valid field', output)
        if unknown and unknown.group(1) in fields:
            fields.remove(unknown.group(1))
            continue
        if done.returncode != 0:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            return {
                "gpus": [],
                "complaint": lines[0] if lines else f"nvidia-smi: status {done.returncode}",
            }
        return {"gpus": parse_gpus(output, fields), "complaint": ""}


def _torch(root: Path, nvidia: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report of `pipeline.engine.triton_check`: whether this Python's torch can use the
    GPUs. None without GPUs."""
    if not nvidia.get("gpus"):
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.engine.triton_check"],
            cwd=str(root),
            capture_output=True,
            timeout=TORCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not answer within {TORCH_SECONDS} s"}
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        said = [
            line.strip()
            for line in done.stderr.decode(errors="replace").splitlines()
            if line.strip()
        ]
        return {"error": said[-1] if said else f"ended with status {done.returncode}"}
    return json.loads(lines[-1])


def parse_gpus(output: str, fields: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    """Parse nvidia-smi's CSV into a dict per GPU; values that it does not report ([N/A], [Not
    Supported], [Unknown Error]) are `None`."""
    gpus = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(fields):
            gpu: dict[str, Any] = {field: _value(field, cell) for field, cell in zip(fields, cells)}  # noqa: B905 - Python 3.7
            if gpu["index"] is not None:
                gpu["slowed_by"] = _slowed_by(gpu)
                gpus.append(gpu)
    return gpus


def _value(field: str, cell: str) -> str | int | float | None:
    if re.fullmatch(
        r"\[?(N/A|Not Supported|Unknown Error|Insufficient Permissions|GPU requires reset|ERR!)\]?",
        cell,
    ):
        return None
    try:
        if field in _MASK:
            return int(cell, 16)
        return int(cell) if field in _WHOLE else float(cell) if field in _REAL else cell
    except ValueError:
        return None


def _slowed_by(gpu: dict[str, Any]) -> list[str]:
    active = (
        gpu.get("clocks_event_reasons.active") or gpu.get("clocks_throttle_reasons.active") or 0
    )
    return [reason for bit, reason in SLOWED_BY.items() if active & bit]


# --- Datasets ---


def probe_dataset(directory: str) -> dict[str, Any]:
    """Return facts about a dataset: its two lists, missing files, and digests of a sample.

    The sample depends only on the lists, so it is the same on every host.
    """
    root = os.path.expanduser(directory)
    found: dict[str, Any] = {
        "directory": directory,
        "lists": {},
        "files": 0,
        "missing": 0,
        "first_missing": "",
        "checked": 0,
        "sample": {},
    }
    listed: set[str] = set()
    for list_name in LISTS:
        try:
            with open(os.path.join(root, list_name), "rb") as file:
                own = {line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in file} - {""}
        except OSError as error:
            found["lists"][list_name] = {
                "count": 0,
                "sha256": "",
                "complaint": error.strerror or str(error),
            }
            continue
        listed |= own
        digest = hashlib.sha256("\n".join(sorted(own)).encode("utf-8", "replace")).hexdigest()
        found["lists"][list_name] = {"count": len(own), "sha256": digest, "complaint": ""}
    names = sorted(listed)
    found["files"] = len(names)
    found["sample"] = _sample(root, names)
    _look(root, names, found)
    return found


def _sample(root: str, names: list[str]) -> dict[str, str]:
    """Return digests of up to `SAMPLE` evenly spaced files; "" for a file that cannot be read."""
    apart = max(1, len(names) // SAMPLE)
    deadline = time.monotonic() + LOOK_SECONDS
    sample: dict[str, str] = {}
    for name in names[::apart][:SAMPLE]:
        if time.monotonic() > deadline:
            break
        sample[name] = _digest(os.path.join(root, name))
    return sample


def _digest(path: str) -> str:
    """Hash the size and both ends of a file."""
    try:
        # Non-blocking, so that a named pipe does not keep us waiting.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(END_BYTES)
            file.seek(max(0, size - END_BYTES))
            return hashlib.sha256(b"%d " % size + ends + file.read(END_BYTES)).hexdigest()[:12]
    except OSError:
        return ""


def _look(root: str, names: list[str], found: dict[str, Any]) -> None:
    """Count missing files within `LOOK_SECONDS`, in a random order that is the same on every
    host."""
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    deadline = time.monotonic() + LOOK_SECONDS
    for position, index in enumerate(order):
        if position % 256 == 0 and time.monotonic() > deadline:
            break
        found["checked"] += 1
        if not os.path.isfile(os.path.join(root, names[index])):
            found["missing"] += 1
            found["first_missing"] = min(found["first_missing"] or names[index], names[index])
