"""The hostfile: which machines, and how many ranks on each. Nothing in it can run anything.

    node1 slots=8     # DeepSpeed's own format: a host's name and its GPUs (on a CPU: its ranks)
    node2 slots=8

DeepSpeed's parser takes `-oProxyCommand=…` for a host and `slots=2extra` for a number, and trains
on this machine alone where the file is missing; here each of these is an error.
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
PORTS = range(20000, 32000)  # below those that kernels give out by themselves
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,4})(?:\s*#.*)?")
_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}")
_EXAMPLE = "write lines like `node1 slots=8`"

Slots = dict[str, tuple[int, ...]]
"""For each host, in the hostfile's order, the numbers of the slots that are used."""


def find_hostfile(path: Path) -> Path:
    """`path`; for the default name, where there is none in the current folder, the checkout's."""
    path, own = path.expanduser(), ROOT / HOSTFILE
    return own if path == Path(HOSTFILE) and not path.is_file() and own.is_file() else path


def read_hostfile(path: Path) -> Slots:
    """The hosts of a hostfile with all their slots. `UserError` names the line that is not one."""
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
            f"{where}: {host!r} is not a host's name (letters, digits, dot, dash; user and port go "
            "into "
            "~/.ssh/config)"
        )
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(
            f"{where}: slots={slots} must be between 1 and {MOST_SLOTS}: the GPUs of {host}"
        )
    return host, slots


def is_host(name: str) -> bool:
    """Whether `name` can only be a host's name or IPv4 address: nothing that ssh or a shell would
    interpret."""
    return _HOST.fullmatch(name) is not None


def choose(hosts: Mapping[str, Sequence[int]], include: str = "", exclude: str = "") -> Slots:
    """The part of `hosts` that --include names, or that --exclude leaves: `node1@node2:0,2`,
    DeepSpeed's syntax."""
    if include and exclude:
        raise UserError("--include and --exclude exclude each other; give one of them")
    named = _filter(include or exclude, "--include" if include else "--exclude", hosts)
    if include and not named:
        raise UserError(
            f"--include {include} names no host; write {next(iter(hosts))}@... or leave it out"
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
                f"{flag} {text}: {host} has the slots {', '.join(map(str, hosts[host]))}, and not "
                f"{', '.join(map(str, sorted(slots - set(hosts[host]))))}"
            )
        named[host] = named.get(host, set()) | slots
    return named


def world_size(slots: Mapping[str, Sequence[int]]) -> int:
    return sum(len(numbers) for numbers in slots.values())


def as_filter(slots: Mapping[str, Sequence[int]]) -> str:
    """`slots` in the syntax of --include."""
    return "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
