"""Find an address of the first host that all others reach, and the interface each one uses."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from launch.cluster import remote
from launch.cluster.hostfile import PORTS
from launch.cluster.remote import run_on
from launch.doctor.findings import FAIL, PASS, WARN, Finding

SECONDS = 8  # after which a host that cannot connect gives up
VIRTUAL = (
    "docker*",
    "br-*",
    "virbr*",
    "veth*",
    "cni*",
    "flannel*",
    "cali*",
    "lxc*",
    "lxdbr*",
    "podman*",
)
SLOW_MEGABITS = 1000

Interface = Mapping[str, Any]  # from probe.py: name, address, speed in Mb/s, mtu in bytes


@dataclass
class Route:
    """How the hosts reach the first one. `address` is "" if it has no usable interface."""

    address: str = ""
    port: int = 0  # was free on the first host a moment ago
    interfaces: dict[str, Interface] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def usable(interfaces: Sequence[Interface]) -> list[Interface]:
    """Return the interfaces that may lead to other hosts, the fastest first.

    Loopback and the bridges of containers are used only if there is nothing else.
    """
    outer = [interface for interface in interfaces if interface["name"] != "lo"]
    real = [interface for interface in outer if not is_virtual(interface["name"])]
    return sorted(real or outer or interfaces, key=lambda interface: -interface["speed"])


def is_virtual(name: str) -> bool:
    """Whether an interface of this name belongs to containers or virtual machines."""
    return any(fnmatch(name, pattern) for pattern in VIRTUAL)


def find_route(
    hosts: Sequence[str],
    interfaces: Mapping[str, Sequence[Interface]],
    python: str,
    *,
    interface: str = "",
    master_address: str = "",
    ports: Sequence[int] = (),
) -> Route:
    """Let every host connect to the first, and choose the address that most of them reach.

    `interface` and `master_address`, if given, are the only ones tried. `ports` must be free on the
    first host. Failures are added to the route's findings.
    """
    route = Route()
    own = {host: _own(host, interfaces[host], interface, route.findings) for host in hosts}
    if not own[hosts[0]]:
        return route
    first, *others = (host for host in hosts if own[host])
    addresses = [master_address] if master_address else [one["address"] for one in own[first]]
    answers, spare = _meet(
        first,
        others,
        addresses,
        {host: own[host][0]["address"] if interface else "" for host in (first, *others)},
        ports,
        python,
    )
    _judge_ports(route, first, answers.get(first), ports, spare)
    reached = {host: (answers.get(host) or {}).get("reached", {}) for host in others}
    route.address = max(
        addresses, key=lambda address: sum(address in found for found in reached.values())
    )
    by_address = {host: {one["address"]: one for one in interfaces[host]} for host in hosts}
    route.interfaces[first] = by_address[first].get(route.address, own[first][0])
    for host in others:
        if route.address in reached[host]:
            route.interfaces[host] = by_address[host].get(
                reached[host][route.address][0], own[host][0]
            )
        else:
            route.findings.append(_cut_off(host, first, route.address, answers.get(host)))
    route.findings += [
        _judge(host, found, first, route.interfaces[first])
        for host, found in route.interfaces.items()
    ]
    return route


def _own(
    host: str, interfaces: Sequence[Interface], wanted: str, findings: list[Finding]
) -> list[Interface]:
    """Return the interfaces of a host to try; without any, add a finding."""
    found = [one for one in interfaces if one["name"] == wanted] if wanted else usable(interfaces)
    if not found:
        has = (
            ", ".join(f"{one['name']} ({one['address']})" for one in interfaces)
            or "none that is up"
        )
        what = f"no interface {wanted}".rstrip() + " that is up with an IPv4 address"
        findings.append(
            Finding(
                host,
                "network",
                FAIL,
                "no interface",
                f"{what}; it has {has}; give --interface a name that all hosts have, or omit it",
            )
        )
    return found


def _meet(
    first: str,
    others: Sequence[str],
    addresses: Sequence[str],
    sources: Mapping[str, str],
    wanted_ports: Sequence[int],
    python: str,
) -> tuple[dict[str, Any], list[int]]:
    """Run `reach.py` on all hosts; return the answers by host, and ports that no host tries."""
    drawn = random.SystemRandom().sample(PORTS, 6)
    tried, spare = drawn[:3], drawn[3:]
    common = {
        "token": secrets.token_hex(8),
        "seconds": SECONDS,
        "others": len(others),
        "addresses": list(addresses),
    }

    def ask(host: str) -> Any:
        is_first = host == first
        task = {
            **common,
            "is_first": is_first,
            "name": host,
            "source": sources[host],
            "ports": [*tried, *spare, *wanted_ports] if is_first else tried,
        }
        done = run_on(
            [host],
            remote.command(python, "python3"),
            timeout=SECONDS + 10,
            stdin=remote.parcel("launch.doctor.reach", task),
        )[host]
        return remote.answer(done.stdout)

    with ThreadPoolExecutor(len(others) + 1) as pool:
        return dict(zip((first, *others), pool.map(ask, (first, *others)), strict=True)), spare


def _judge_ports(
    route: Route, first: str, answer: Any, wanted: Sequence[int], spare: Sequence[int]
) -> None:
    busy = answer["busy"] if answer else []
    route.port = next((port for port in spare if port not in busy), 0)
    for port in wanted:
        if port in busy:
            advice = (
                f"port {port} is in use by another program (`ss -ltnp` names it); choose another "
                "with --master-port"
            )
            route.findings.append(Finding(first, "network", FAIL, f"port {port} taken", advice))


def _cut_off(host: str, first: str, address: str, answer: Any) -> Finding:
    why = (answer or {}).get("refused", {}).get(address, "the test did not run")
    return Finding(
        host,
        "network",
        FAIL,
        "cut off",
        f"cannot connect to {first} at {address}: {why}; open all TCP ports between the hosts "
        "(`ufw allow from NETWORK` on each), or choose the network with --interface",
    )


def _judge(host: str, own: Interface, first: str, of_first: Interface) -> Finding:
    summary = f"{own['name']} {_speed(own['speed'])}".rstrip()
    if own["name"] == "lo" and host != first:
        return Finding(
            host,
            "network",
            WARN,
            summary,
            f"it reaches {first} through loopback; are both names the same machine?",
        )
    if is_virtual(own["name"]):
        return Finding(
            host,
            "network",
            WARN,
            summary,
            f"{own['name']} is a container bridge; give your network's interface with --interface",
        )
    if 0 < own["speed"] < SLOW_MEGABITS:
        return Finding(
            host, "network", WARN, summary, f"{summary}, which is slow; check cable and switch"
        )
    for what, unit in (("speed", "Mb/s"), ("mtu", "bytes of MTU")):
        if own[what] and of_first[what] and own[what] != of_first[what]:
            return Finding(
                host,
                "network",
                WARN,
                summary,
                f"{own['name']} has {own[what]} {unit}, but {of_first['name']} of {first} has "
                f"{of_first[what]}; set both to the same",
            )
    return Finding(host, "network", PASS, summary)


def _speed(megabits: int) -> str:
    return (
        ""
        if not megabits
        else f"{megabits / 1000:g} Gb/s"
        if megabits >= 1000
        else f"{megabits} Mb/s"
    )
