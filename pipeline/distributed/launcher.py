"""Read this process's rank from its launcher's environment, and choose its GPU and network.

torchrun, accelerate, deepspeed, Open MPI's mpirun and Slurm's srun each describe a rank with their
own variables; `find_rank_info` reads them all. `gpu_of` and `choose_interface` then give the
process its GPU and the network interface that leads to the other hosts. Linux only; imports no
torch.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from pipeline.cli import UserError

LAUNCHER = "VASTSCALE_LAUNCHER_PID"
"""Environment variable: PID of the process that started the ranks, which stop when it is gone."""
GUARDED = "VASTSCALE_GUARDED"
"""Environment variable of a rank whose output a guard logs, and which ends with its guard."""
BY_HAND = "RANK and WORLD_SIZE"
"""The launcher's name if the user set the variables directly."""
FIRST_PORT, NUM_PORTS = 20000, 10000  # below the ports that Linux gives to outgoing connections
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm's numbers of batch scripts, salloc shells etc. start here
MAX_HOSTS, MAX_RANGES = 1 << 16, 256  # of one Slurm host list
SCONTROL_SECONDS = 20
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variable -> prefix of the interface's name: "=" makes NCCL match the name exactly."""
ANY_PORT = 9  # no packet is sent
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RankInfo:
    """This process's rank, as its launcher describes it."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    launcher: str  # its name for messages; empty without a launcher
    master_addr: str = "127.0.0.1"  # rank 0's address
    master_port: int = 0  # 0: any free port, for a process alone
    spans_hosts: bool | None = False  # whether ranks run on several hosts; None if unknown
    hosts: tuple[str, ...] = ()  # in rank order, if the launcher names them
    local_size: int | None = None  # processes on this host, if known

    def variables(self) -> dict[str, str]:
        """Return the environment variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def find_rank_info(variables: Mapping[str, str] = os.environ) -> RankInfo:
    """Read the rank that a launcher's environment variables describe.

    Without such variables, the process is alone.
    RANK and WORLD_SIZE come first: torchrun, accelerate and deepspeed set them, also under Slurm.
    Open MPI comes before Slurm, because its mpirun may start processes through Slurm. Raises
    `UserError` for a partially set environment.
    """
    if "RANK" in variables:
        info = _by_rank(variables)
    else:
        info = _by_openmpi(variables) or _by_slurm(variables)
    # A batch script may export WORLD_SIZE without RANK.
    size_is_set = "WORLD_SIZE" in variables
    if size_is_set and (info is None or info.world_size != _number(variables, "WORLD_SIZE")):
        raise UserError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, but RANK is not set; start the "
            "processes with torchrun, srun or mpirun, or unset WORLD_SIZE to train alone"
        )
    if info is not None:
        return info
    if "LOCAL_RANK" in variables:
        raise UserError(
            "LOCAL_RANK is set, but RANK and WORLD_SIZE are not; set all three, or none to "
            "train alone"
        )
    if is_from_accelerate(variables) and "MASTER_PORT" in variables:
        raise UserError(
            "`accelerate launch` was asked for several processes and started one: without "
            "GPUs it leaves that to mpirun; add --mpirun_hostfile FILE, or use `torchrun "
            "--nproc_per_node N train.py --runtime accelerate`, or ask for --num_processes 1 "
            "(and unset MASTER_PORT)"
        )
    return RankInfo(0, 1, 0, "accelerate launch" if is_from_accelerate(variables) else "")


def is_from_accelerate(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in variables


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent ends, so that it is not orphaned."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def raise_file_limit() -> None:
    """Let this process open as many files as it is allowed to: many ranks need many connections."""
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# --- One function per launcher ---


def _by_rank(variables: Mapping[str, str]) -> RankInfo:
    """Read the variables of torchrun, accelerate, deepspeed, or a user who sets them directly."""
    if "WORLD_SIZE" not in variables:
        raise UserError("RANK is set, but WORLD_SIZE is not; set both, or neither to train alone")
    rank, world_size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if world_size > 1:
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not variables.get(name):
                raise UserError(
                    f"RANK and WORLD_SIZE {world_size} are set, but {name} is not; set it, or "
                    "use torchrun"
                )
    launcher = BY_HAND
    if is_from_accelerate(variables):
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in variables:
        launcher = "torchrun"
    elif "CROSS_SIZE" in variables:
        launcher = "deepspeed"
    sizes = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if variables.get(name)]
    local_size = _number(variables, sizes[0]) if sizes else None
    spans_hosts = (
        local_size < world_size if local_size is not None else None if world_size > 1 else False
    )
    local_rank = _number(variables, "LOCAL_RANK") if "LOCAL_RANK" in variables else 0
    port = _number(variables, "MASTER_PORT") if variables.get("MASTER_PORT") else 0
    return _checked(
        RankInfo(
            rank,
            world_size,
            local_rank,
            launcher,
            variables.get("MASTER_ADDR") or "127.0.0.1",
            port,
            spans_hosts,
            local_size=local_size,
        )
    )


def _by_openmpi(variables: Mapping[str, str]) -> RankInfo | None:
    """Read the variables of Open MPI's mpirun, also used by `deepspeed --launcher openmpi`."""
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    rank, world_size, local_rank, local_size = (
        _number(variables, f"OMPI_COMM_WORLD_{name}")
        for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    address = variables.get("MASTER_ADDR") or ("" if local_size < world_size else "127.0.0.1")
    if not address:
        raise UserError(
            "mpirun started ranks on several hosts, but MASTER_ADDR is not set; add `-x "
            "MASTER_ADDR=` and the first host's address"
        )
    # The job's name is the same on all ranks.
    job = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid") or ""
    return _checked(
        RankInfo(
            rank,
            world_size,
            local_rank,
            "mpirun of Open MPI",
            address,
            _port(variables, zlib.crc32(job.encode())),
            local_size < world_size,
            local_size=local_size,
        )
    )


def _by_slurm(variables: Mapping[str, str]) -> RankInfo | None:
    """Read the variables of Slurm's srun, used directly or by `deepspeed --launcher slurm`.

    The shell of sbatch or salloc also has SLURM_PROCID and SLURM_NTASKS but is alone: it is not a
    job step, or a special one.
    """
    step = variables.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in variables or not variables.get("SLURM_STEP_NODELIST"):
        return None
    if not re.fullmatch(r"[0-9]{1,10}", step) or int(step) >= FIRST_SPECIAL_STEP:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    hosts = tuple(expand_hosts(variables["SLURM_STEP_NODELIST"]))
    # Not SLURM_LAUNCH_NODE_IPADDR: it names the host on which srun was typed, perhaps a login node.
    # Rank 0 runs on the first host.
    address = variables.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else "127.0.0.1")
    job, world_size = _number(variables, "SLURM_JOB_ID"), _number(variables, tasks)
    local_size = world_size // len(hosts) if world_size % len(hosts) == 0 else None
    return _checked(
        RankInfo(
            _number(variables, "SLURM_PROCID"),
            world_size,
            _number(variables, "SLURM_LOCALID"),
            f"srun of Slurm (job {job})",
            address,
            _port(variables, job + 1009 * int(step)),
            len(hosts) > 1,
            hosts,
            local_size,
        )
    )


def _checked(info: RankInfo) -> RankInfo:
    if info.rank >= info.world_size:
        raise UserError(
            f"rank {info.rank} of {info.world_size} ranks ({info.launcher}): ranks count from 0"
        )
    if info.local_rank >= info.world_size:
        raise UserError(
            f"rank {info.rank} cannot be number {info.local_rank} of its host: there are "
            f"{info.world_size} ranks in all ({info.launcher})"
        )
    if info.world_size > 1 and info.master_port == 0:
        raise UserError(
            "MASTER_PORT 0 does not say where the ranks meet; choose one from 1024 to 65535"
        )
    if info.master_port > 65535:
        raise UserError(
            f"MASTER_PORT {info.master_port} is not a port; choose one from 1024 to 65535"
        )
    return info


def _port(variables: Mapping[str, str], number: int) -> int:
    """Return MASTER_PORT, or the port that every rank derives from the job's `number`."""
    if variables.get("MASTER_PORT"):
        return _number(variables, "MASTER_PORT")
    return FIRST_PORT + number % NUM_PORTS


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "")
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise UserError(f"the environment variable {name} must be a whole number, not {text!r}")
    return int(text)


# --- Slurm's host lists ---


def expand_hosts(text: str) -> list[str]:
    """Expand a Slurm host list, in order: `n[01-03,07],login` -> n01, n02, n03, n07, login.

    Uses Slurm's `scontrol` if it is installed. Containers rarely contain Slurm's client, though
    srun's variables reach into them; then the list is parsed here. Raises `UserError`.
    """
    if text.count("[") > MAX_RANGES:
        raise UserError(
            f"Slurm's host list {text[:80]!r}… has more than {MAX_RANGES} ranges; expected e.g. "
            "node[01-03,07]"
        )
    hosts = _by_scontrol(text)
    if hosts is None:
        hosts = []
        items = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text)
        for host in (host for item in items for host in _expand(item, text)):
            hosts.append(host)
            if len(hosts) > MAX_HOSTS:
                break
        if len(hosts) <= MAX_HOSTS and ",".join(items) != text:
            raise _no_host_list(text)
    if len(hosts) > MAX_HOSTS:
        raise UserError(f"Slurm's host list {text!r} names more than {MAX_HOSTS} hosts")
    if not all(_HOST.fullmatch(host) for host in hosts):
        raise _no_host_list(text)
    return hosts


def _by_scontrol(text: str) -> list[str] | None:
    """Expand a host list with `scontrol show hostnames`; None if it is missing or refuses the list.

    The command reads no configuration and contacts no server. Only text that could be a host list
    is passed to it.
    """
    if not shutil.which("scontrol") or not re.fullmatch(r"[A-Za-z0-9][\w.,\[\]-]*", text, re.ASCII):
        return None
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", text],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split() or None if done.returncode == 0 else None


def _expand(item: str, text: str) -> Iterator[str]:
    """Expand one item of the list `text`, the part between two commas."""
    head, bracket, rest = item.partition("[")
    if not bracket:
        yield head
        return
    ranges, _, tail = rest.partition("]")
    for one in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", one)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"{text!r} is not a valid Slurm host list: {one!r} is not a number or a range"
            )
        low, high = match[1], match[2] or match[1]
        for number in range(int(low), int(high) + 1):
            yield from (f"{head}{number:0{len(low)}d}{end}" for end in _expand(tail, text))


def _no_host_list(text: str) -> UserError:
    return UserError(f"{text!r} is not a valid Slurm host list; expected e.g. node[01-03,07]")


# --- This process's GPU, and its network ---


def gpu_of(info: RankInfo, num_gpus: int, variables: Mapping[str, str] = os.environ) -> int:
    """Return the index of this process's GPU among the `num_gpus` that it sees."""
    if info.local_rank < num_gpus:
        return info.local_rank
    shows_one = info.hosts or variables.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
    # srun --gpus-per-task=1 and MIG show each process only its own device.
    if num_gpus == 1 and shows_one:
        return 0
    raise UserError(
        f"LOCAL_RANK is {info.local_rank}, but this process sees {num_gpus} "
        f"GPU{'' if num_gpus == 1 else 's'}; start at most one process per GPU on each host"
    )


def choose_interface(info: RankInfo, variables: MutableMapping[str, str] = os.environ) -> str:
    """Set the network interface to other hosts for Gloo and NCCL, unless the user has set it.

    By default Gloo uses the address of the host's name, which on Debian is a loopback address, and
    NCCL may use a Docker bridge. Returns the interface, or "" if nothing had to be set. Raises
    `UserError`.
    """
    missing = [name for name in INTERFACE_VARIABLES if not variables.get(name)]
    if info.spans_hosts is False or not missing:
        return ""
    towards = info.master_addr
    if ipaddress.ip_address(address_towards(towards)).is_loopback:
        if info.spans_hosts is None:
            return ""
        # The first host's own name may resolve to loopback only; then the route to the second host
        # shows the interface.
        if info.rank != 0 or len(info.hosts) < 2:
            raise UserError(
                f"MASTER_ADDR {info.master_addr} is a loopback address on this host, where "
                "other hosts cannot connect; give the first host's address in the network, or "
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
        towards = info.hosts[1]
    interface = interface_towards(towards)
    variables.update({name: INTERFACE_VARIABLES[name] + interface for name in missing})
    return interface


def interface_towards(address: str) -> str:
    """Return the interface through which this host reaches `address`, an IP address or host name.

    For one of this host's own addresses, that is the interface which has it. Raises `UserError` if
    there is no route.
    """
    own = address_towards(address)
    for name, one in own_addresses():
        if one == own:
            return name
    raise UserError(
        f"no network interface of this host has the address {own}, from which it reaches "
        f"{address}; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )


def address_towards(address: str) -> str:
    """Return this host's IP address on its route to `address`, without sending anything.

    Raises `UserError` without a route.
    """
    try:
        found = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "invalid host name"
        raise UserError(
            f"this host cannot resolve {address!r} ({why}); give its IP address, or name it in "
            "/etc/hosts"
        ) from error
    failure: OSError | None = None
    for family, kind, protocol, _, target in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)
            except OSError as error:
                failure = error
                continue
            return str(ipaddress.ip_address(_without_scope(probe.getsockname()[0])))
    raise UserError(
        f"this host has no route to {address} ({failure and failure.strerror}); connect it to "
        "the network of the others"
    )


def own_addresses() -> Iterator[tuple[str, str]]:
    """Yield (interface, IP address) for all interfaces that are up, IPv4 first."""
    states = psutil.net_if_stats()
    addresses = psutil.net_if_addrs()
    for family in (socket.AF_INET, socket.AF_INET6):
        for label, found in addresses.items():
            name = label.partition(":")[0]  # eth0:1 is a second address of eth0
            if name in states and states[name].isup:
                yield from (
                    (name, _without_scope(one.address)) for one in found if one.family == family
                )


def free_port() -> int:
    """Return a TCP port of the loopback interface on which nothing is listening now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_own(address: str) -> bool:
    """Whether `address`, an IP address or host name, resolves to this host."""
    own = {one for _, one in own_addresses()}
    return any(one in own or ipaddress.ip_address(one).is_loopback for one in _addresses(address))


def is_known(name: str) -> bool:
    """Whether this host can resolve `name`."""
    return bool(_addresses(name))


def outer_addresses(name: str) -> list[str]:
    """Return the addresses of `name` that other hosts can reach: all except loopback."""
    return sorted(one for one in _addresses(name) if not ipaddress.ip_address(one).is_loopback)


def _addresses(name: str) -> set[str]:
    """Return the IP addresses of a name; empty if it cannot be resolved."""
    try:
        found = socket.getaddrinfo(name, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # UnicodeError: labels that are invalid in any name
        return set()
    return {_without_scope(str(target[0])) for *_, target in found}


def _without_scope(address: str) -> str:
    """Strip an IPv6 scope: fe80::1%eth0 -> fe80::1."""
    return address.partition("%")[0]
