"""The network interfaces of this host, and the one that leads to another. Linux; needs no torch."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from pipeline.cli import UserError

SIOCGIFCONF = 0x8912  # netdevice(7): all IPv4 addresses, also an interface's second
SIZEOF_IFREQ = 40  # on 64 bits
ANY_PORT = 9  # nothing is sent


def interface_towards(address: str) -> str:
    """The interface through which this host reaches `address`, an IP address or a host's name.

    For an address of this host's own it is the interface that has it. `UserError` where there is no way.
    """
    own = address_towards(address)
    for name, one in own_addresses():
        if one == own:
            return name
    raise UserError(f"no network interface of this host has the address {own}, from which it reaches {address}; set "
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")


def address_towards(address: str) -> str:
    """The IP address with which this host speaks to `address`: its own on the route there. Sends nothing."""
    try:
        found = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no name is like that"
        raise UserError(f"this host cannot resolve {address!r} ({why}); give its IP address, or name it in "
                        "/etc/hosts") from error
    failure: OSError | None = None
    for family, kind, protocol, _, target in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)
            except OSError as error:
                failure = error
                continue
            return str(ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]))
    raise UserError(f"this host has no route to {address} ({failure and failure.strerror}); connect it to the network "
                    "of the others")


def is_own(address: str) -> bool:
    """Whether `address`, an IP address or a host's name, is this host's, as far as its name service knows."""
    own = {one for _, one in own_addresses()}
    return any(one in own or ipaddress.ip_address(one).is_loopback for one in _addresses(address))


def is_known(name: str) -> bool:
    """Whether this host's name service knows `name`."""
    return bool(_addresses(name))


def outer_addresses(name: str) -> list[str]:
    """Those of the addresses behind `name` that other hosts can reach: all but loopback."""
    return sorted(one for one in _addresses(name) if not ipaddress.ip_address(one).is_loopback)


def _addresses(name: str) -> set[str]:
    """The IP addresses of a name; none where it is not known."""
    try:
        found = socket.getaddrinfo(name, ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # the latter for labels that no name has
        return set()
    return {str(target[0]).partition("%")[0] for *_, target in found}


def own_addresses() -> Iterator[tuple[str, str]]:
    """(interface, IP address) of all that are up, IPv4 first."""
    size = 64 * SIZEOF_IFREQ
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        while True:
            buffer = array.array("B", bytes(size))
            request = struct.pack("iP", size, buffer.buffer_info()[0])
            filled = struct.unpack("iP", fcntl.ioctl(handle, SIOCGIFCONF, request))[0]
            if filled < size:
                break
            size *= 2
    for start in range(0, filled, SIZEOF_IFREQ):
        label, _, address = struct.unpack_from("16sI4s", buffer, start)  # the address's family and port between
        yield label.partition(b"\0")[0].decode().partition(":")[0], socket.inet_ntoa(address)  # eth0:1 is eth0's
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        yield name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))
