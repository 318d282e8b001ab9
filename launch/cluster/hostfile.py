"""The hostfile: which machines to train on, and how many ranks on each.

    node1 slots=8     # DeepSpeed's format: a host name and its number of GPUs (CPUs: of ranks)
    node2 slots=8

DeepSpeed's parser accepts `-oProxyCommand=…` as a host and `slots=2extra` as a number, and trains
on this machine alone if the file is missing. Here each of these is an error, so that nothing in a
hostfile can run a command.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.cli import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
HOSTFILE = "hostfile"
MOST_SLOTS = 64
PORTS = range(20000, 32000)  # below the kernel's ephemeral ports
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,4})(?:\s*#.*)?")
_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}")
_EXAMPLE = "write lines like `node1 slots=8`"

Slots = dict[str, tuple[int, ...]]
"""Host -> the slot numbers in use, in the hostfile's order."""


def find_hostfile(path: Path) -> Path:
    """Return `path`; for the default name, fall back from the current folder to the checkout."""
    path, own = path.expanduser(), ROOT / HOSTFILE
    return own if path == Path(HOSTFILE) and not path.is_file() and own.is_file() else path


def read_hostfile(path: Path) -> Slots:
    """Return the hosts of a hostfile with all their slots. `UserError` names an invalid line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"no hostfile {path}; {_EXAMPLE}, one per machine, or train on this one with "
            "./launch_local_train.sh"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found: Slots = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            host, slots = _parse(line, f"{path}:{number}")
            if host.lower() in {known.lower() for known in found}:
                raise UserError(
                    f"{path}:{number}: {host} occurs twice; give each host one line with all its "
                    "slots"
                )
            found[host] = tuple(range(slots))
    if not found:
        raise UserError(f"{path} names no host; {_EXAMPLE}, one per machine")
    return found


def _parse(line: str, where: str) -> tuple[str, int]:
    match = _LINE.fullmatch(line)
    if not match:
        raise UserError(f"{where}: {line!r} is not `HOST slots=N`; {_EXAMPLE}")
    host, slots = match["host"], int(match["slots"])
    if not is_host(host):
        raise UserError(
            f"{where}: {host!r} is not a valid host name (letters, digits, dot, dash; put user and "
            "port into ~/.ssh/config)"
        )
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(
            f"{where}: slots={slots} must be 1 to {MOST_SLOTS}: the number of GPUs of {host}"
        )
    return host, slots


def is_host(name: str) -> bool:
    """Whether `name` is a plain host name or IPv4 address, which neither ssh nor a shell would
    interpret as anything else."""
    return _HOST.fullmatch(name) is not None


def choose(hosts: Mapping[str, Sequence[int]], include: str = "", exclude: str = "") -> Slots:
    """Return the hosts and slots that --include names, or all but those that --exclude names.

    Both use DeepSpeed's syntax: `node1@node2:0,2`. The hostfile's order is kept.
    """
    if include and exclude:
        raise UserError("--include and --exclude are mutually exclusive; give one of them")
    named = _filter(include or exclude, "--include" if include else "--exclude", hosts)
    if include and not named:
        raise UserError(
            f"--include {include} names no host; write {next(iter(hosts))}@... or omit it"
        )
    if include:
        return {
            host: tuple(slot for slot in slots if slot in named[host])
            for host, slots in hosts.items()
            if host in named
        }
    left = {
        host: tuple(slot for slot in slots if slot not in named.get(host, ()))
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError(f"--exclude {exclude} leaves no host")
    return left


def _filter(text: str, flag: str, hosts: Mapping[str, Sequence[int]]) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for part in filter(None, text.split("@")):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            close = nearest(host, hosts) if difflib.get_close_matches(host, hosts, 1, 0.5) else ""
            raise UserError(
                f"{flag} {text}: no host {host!r} in the "
                f"hostfile{close or '; it has ' + ', '.join(hosts)}"
            )
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UserError(f"{flag} {text}: {numbers!r} is not a list of slots; write {host}:0,1")
        slots = {int(number) for number in numbers.split(",")} if colon else set(hosts[host])
        if not slots <= set(hosts[host]):
            raise UserError(
                f"{flag} {text}: {host} has slots {', '.join(map(str, hosts[host]))}, not "
                f"{', '.join(map(str, sorted(slots - set(hosts[host]))))}"
            )
        named[host] = named.get(host, set()) | slots
    return named


def world_size(slots: Mapping[str, Sequence[int]]) -> int:
    """Return the number of ranks on all hosts."""
    return sum(len(numbers) for numbers in slots.values())


def as_filter(slots: Mapping[str, Sequence[int]]) -> str:
    """Write `slots` in the syntax of --include."""
    return "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
