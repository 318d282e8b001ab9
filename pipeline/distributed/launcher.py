"""Where this process stands among those that train together, read from its launcher's environment.

torchrun, accelerate, deepspeed, Open MPI's mpirun and Slurm's srun each describe it with variables
of their own; `find_place` reads them all. `gpu_of` and `choose_interface` then give the process its
GPU and the network interface that leads to the other hosts. Linux; needs no torch.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
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

GUARDED = "VASTSCALE_GUARDED"
"""Environment variable of a rank whose output a guard keeps, and that ends with its guard."""
BY_HAND = "RANK and WORLD_SIZE"
"""The launcher's name where somebody set the variables himself."""
FIRST_PORT, NUM_PORTS = 20000, 10000  # below what Linux gives to outgoing connections
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm numbers batch scripts, salloc's shell etc. from here on
MAX_HOSTS, MAX_RANGES = 1 << 16, 256  # of one Slurm host list
SCONTROL_SECONDS = 20
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variable -> what goes before the interface's name: with "=" NCCL takes no longer name, too."""
ANY_PORT = 9  # nothing is sent
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Place:
    """A process among those that train together."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    launcher: str  # its name for people; empty: none
    master_addr: str = "127.0.0.1"  # of rank 0
    master_port: int = 0  # 0: any free one, for a process alone
    spans_hosts: bool | None = False  # None: not known
    hosts: tuple[str, ...] = ()  # in order of their ranks, where the launcher names them
    local_size: int | None = None  # processes of this host, where that is known

    def variables(self) -> dict[str, str]:
        """What torch.distributed and DeepSpeed read in the environment."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def find_place(variables: Mapping[str, str] = os.environ) -> Place:
    """The place that a launcher's environment variables describe; alone where there are none.

    RANK and WORLD_SIZE come first: torchrun, accelerate and deepspeed set them, also under Slurm.
    Open MPI comes before Slurm, for its mpirun may start processes as Slurm's. `UserError` for a
    partially set environment.
    """
    if "RANK" in variables:
        place = _by_rank(variables)
    else:
        place = _by_openmpi(variables) or _by_slurm(variables)
    # A batch script may export the size alone.
    size_is_set = "WORLD_SIZE" in variables
    if size_is_set and (place is None or place.world_size != _number(variables, "WORLD_SIZE")):
        raise UserError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, but RANK is not set; start the "
            "processes with torchrun, srun or mpirun, or unset WORLD_SIZE to train alone"
        )
    if place is not None:
        return place
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
    return Place(0, 1, 0, "accelerate launch" if is_from_accelerate(variables) else "")


def is_from_accelerate(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in variables


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent ends, so that no orphan is left."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


# --- One function per launcher ---


def _by_rank(variables: Mapping[str, str]) -> Place:
    """torchrun, accelerate, deepspeed, or somebody who sets the variables himself."""
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
        Place(
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


def _by_openmpi(variables: Mapping[str, str]) -> Place | None:
    """Open MPI's mpirun, by hand or under `deepspeed --launcher openmpi`."""
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
        Place(
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


def _by_slurm(variables: Mapping[str, str]) -> Place | None:
    """Slurm's srun, by hand or under `deepspeed --launcher slurm`.

    The shell of sbatch or salloc has SLURM_PROCID and SLURM_NTASKS, too, but is alone: it is no
    step, or one of the special ones.
    """
    step = variables.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in variables or not variables.get("SLURM_STEP_NODELIST"):
        return None
    if not re.fullmatch(r"[0-9]{1,10}", step) or int(step) >= FIRST_SPECIAL_STEP:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    hosts = tuple(expand_hosts(variables["SLURM_STEP_NODELIST"]))
    # Not SLURM_LAUNCH_NODE_IPADDR: it names where srun was typed, maybe a login node. Rank 0 runs
    # on the first host.
    address = variables.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else "127.0.0.1")
    job, world_size = _number(variables, "SLURM_JOB_ID"), _number(variables, tasks)
    local_size = world_size // len(hosts) if world_size % len(hosts) == 0 else None
    return _checked(
        Place(
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


def _checked(place: Place) -> Place:
    if place.rank >= place.world_size:
        raise UserError(
            f"rank {place.rank} of {place.world_size} ranks ({place.launcher}): ranks count from 0"
        )
    if place.local_rank >= place.world_size:
        raise UserError(
            f"rank {place.rank} cannot be number {place.local_rank} of its host: there are "
            f"{place.world_size} ranks in all ({place.launcher})"
        )
    if place.world_size > 1 and place.master_port == 0:
        raise UserError(
            "MASTER_PORT 0 does not say where the ranks meet; choose one from 1024 to 65535"
        )
    if place.master_port > 65535:
        raise UserError(
            f"MASTER_PORT {place.master_port} is not a port; choose one from 1024 to 65535"
        )
    return place


def _port(variables: Mapping[str, str], number: int) -> int:
    """MASTER_PORT, or the port that every rank of the job `number` derives from it."""
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
    """The hosts of a Slurm host list, in order: `n[01-03,07],login` -> n01, n02, n03, n07, login.

    Slurm's own `scontrol` expands it where it is installed. Containers rarely hold Slurm's client,
    while srun's variables reach into them, so without it the list is parsed here.
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
    """What `scontrol show hostnames` makes of a list; None where it is not installed or refuses it.

    It reads no configuration and asks no server. Only what could be a host list is handed to it.
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
    """The hosts of a part of the list `text` between two commas."""
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


def gpu_of(place: Place, num_gpus: int, variables: Mapping[str, str] = os.environ) -> int:
    """Which of the `num_gpus` GPUs that this process sees is its own."""
    if place.local_rank < num_gpus:
        return place.local_rank
    shows_one = place.hosts or variables.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
    if (
        num_gpus == 1 and shows_one
    ):  # srun --gpus-per-task=1 and MIG show each process its own alone
        return 0
    raise UserError(
        f"LOCAL_RANK is {place.local_rank}, but this process sees {num_gpus} GPUs; start at "
        "most one process per GPU on each host"
    )


def choose_interface(place: Place, variables: MutableMapping[str, str] = os.environ) -> str:
    """Tell Gloo and NCCL, unless the user has, which network interface leads to ranks on other
    hosts.

    Left alone, Gloo takes the address of the host's name, on Debian a loopback address; NCCL may
    take a bridge of Docker. Returns the interface; empty where nothing had to be set.
    """
    missing = [name for name in INTERFACE_VARIABLES if not variables.get(name)]
    if place.spans_hosts is False or not missing:
        return ""
    towards = place.master_addr
    if ipaddress.ip_address(address_towards(towards)).is_loopback:
        if place.spans_hosts is None:
            return ""
        # The first host's own name may lead to itself alone; the second host then shows the way
        # out.
        if place.rank != 0 or len(place.hosts) < 2:
            raise UserError(
                f"MASTER_ADDR {place.master_addr} is a loopback address on this host, where "
                "other hosts cannot connect; give the first host's address in the network, or "
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
        towards = place.hosts[1]
    interface = interface_towards(towards)
    variables.update({name: INTERFACE_VARIABLES[name] + interface for name in missing})
    return interface


def interface_towards(address: str) -> str:
    """The interface through which this host reaches `address`, an IP address or a host's name.

    For an address of this host's own it is the interface that has it. `UserError` where there is no
    way.
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
    """The IP address of this host on its route to `address`. Sends nothing. `UserError` without a
    route."""
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
    """(interface, IP address) of all interfaces that are up, IPv4 first."""
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
    """A TCP port of this host's loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_own(address: str) -> bool:
    """Whether `address`, an IP address or a host's name, is this host's, as far as it can resolve
    it."""
    own = {one for _, one in own_addresses()}
    return any(one in own or ipaddress.ip_address(one).is_loopback for one in _addresses(address))


def is_known(name: str) -> bool:
    """Whether this host's name service knows `name`."""
    return bool(_addresses(name))


def outer_addresses(name: str) -> list[str]:
    """The addresses behind `name` that other hosts can reach: all but loopback."""
    return sorted(one for one in _addresses(name) if not ipaddress.ip_address(one).is_loopback)


def _addresses(name: str) -> set[str]:
    """The IP addresses of a name; empty where it is not known."""
    try:
        found = socket.getaddrinfo(name, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # the latter for labels that no name has
        return set()
    return {_without_scope(str(target[0])) for *_, target in found}


def _without_scope(address: str) -> str:
    """fe80::1%eth0 -> fe80::1."""
    return address.partition("%")[0]
