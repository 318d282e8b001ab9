"""What the doctor wants to know of a host. Of the standard library alone: it is sent to every host, and runs there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.doctor import nvidia, probe_dataset

SOURCES = ("*.py", "*.sh", "requirements*.txt", "*ds_config*.json", "launch/**/*.py", "launch/**/*.sh",
           "pipeline/**/*.py", "recipes/**/*.yaml", "recipes/**/*.yml", "recipes/**/*.json")
"""What a run depends on, whether git knows of it or not."""
MOST_SOURCES = 5000
SYNCED = ".synced_from.json"
"""Where `launch/sync.sh`, which copies no .git, leaves the commit."""


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Facts by name. What could not be found out is {"error": why} in place of its value."""
    facts: dict[str, Any] = {"began": time.time()}
    parts = {"python": _python, "checkout": lambda: _checkout(Path(task["root"])),
             "packages": lambda: _packages(task["packages"]), "cores": lambda: len(os.sched_getaffinity(0)),
             "memory": _memory, "output": lambda: _output(task["output_dir"]), "interfaces": _interfaces,
             "limits": _limits, "nvidia": nvidia.probe,
             "datasets": lambda: [probe_dataset.probe(directory) for directory in task["dataset_dirs"]]}
    for name, part in parts.items():
        try:
            facts[name] = part()
        except Exception as error:  # whatever one part meets, the others shall tell what they can
            facts[name] = {"error": f"{type(error).__name__}: {error}"}
    facts["hostname"] = socket.gethostname()
    facts["ended"] = time.time()
    return facts


def _python() -> dict[str, str]:
    return {"version": platform.python_version(), "executable": sys.executable}


def _checkout(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        return {"exists": False, "commit": "", "files": {}}
    paths = sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()})[:MOST_SOURCES]
    files = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}
    return {"exists": True, "commit": _commit(root), "files": files}


def _commit(root: Path) -> str:
    """The commit that is checked out, or that the files came from; "" where nothing tells."""
    if (root / ".git").exists():
        try:
            done = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(root), "rev-parse", "HEAD"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=False)
            return done.stdout.decode().strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            return ""
    try:
        return str(json.loads((root / SYNCED).read_text())["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _packages(names: list[str]) -> dict[str, str]:
    """Versions of the packages `names`, and of every build of DALI and NCCL that is there."""
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
    """Bytes: of the machine, and free of them; a container's limit counts where it is lower."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, most), min(free, max(0, most - used))
    except (OSError, ValueError):  # no such limit
        pass
    return {"total": total, "free": free}


def _output(directory: str) -> dict[str, Any]:
    """Free bytes where the run folder is or would be made, and whether something can be written there."""
    path = Path(os.path.expanduser(directory))
    while not path.exists() and path != path.parent:
        path = path.parent
    found = {"at": str(path), "free": os.statvfs(str(path)).f_bavail * os.statvfs(str(path)).f_frsize, "complaint": ""}
    try:
        with tempfile.TemporaryFile(dir=str(path)) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        found["complaint"] = error.strerror or str(error)
    return found


def _interfaces() -> list[dict[str, Any]]:
    """Those that are up and have an IPv4 address. `speed` in Mb/s and `mtu` in bytes, 0 where they are not told."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            address, flags = _ask(any_socket, 0x8915, name), _ask(any_socket, 0x8913, name)  # SIOCGIFADDR, SIOCGIFFLAGS
            if address and flags and struct.unpack_from("<H", flags, 16)[0] & 0x41 == 0x41:  # IFF_UP, IFF_RUNNING
                found.append({"name": name, "address": socket.inet_ntoa(address[20:24]),
                              "speed": max(0, _number(f"/sys/class/net/{name}/speed")),
                              "mtu": _number(f"/sys/class/net/{name}/mtu")})
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
    soft, hard = (1 << 20 if number == resource.RLIM_INFINITY else number for number in (soft, hard))
    return {"open_files": soft, "most_open_files": hard, "shm": shm}
