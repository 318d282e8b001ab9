"""What ssh's complaints mean, and what to do about each."""

from __future__ import annotations

import re
from pathlib import Path

from launch.cluster.remote import Done

_KEYS = ("id_ed25519", "id_rsa", "id_ecdsa", "id_ed25519_sk", "id_ecdsa_sk")
_CAUSES = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed", "another host key than known",
     "if the machine was set up anew: `ssh-keygen -R {host}`, then `ssh-keyscan -H {host} >> ~/.ssh/known_hosts`"),
    (r"Host key verification failed|host key is known for", "unknown host key",
     "`ssh-keyscan -H {host} >> ~/.ssh/known_hosts`, on a network that you trust"),
    (r"UNPROTECTED PRIVATE KEY FILE", "private key readable by others", "`chmod 600` on the key that ssh names"),
    (r"Bad owner or permissions|Bad configuration option|bad configuration options", "~/.ssh/config is refused",
     "mend what `ssh {host}` complains about"),
    (r"Permission denied|Too many authentication failures", "permission denied", "{copy_key}"),
    (r"Could not resolve hostname", "name does not resolve",
     "write `ADDRESS {host}` into /etc/hosts on every host, or a HostName into ~/.ssh/config"),
    (r"Connection refused", "connection refused",
     "start sshd there: `apt install openssh-server; systemctl enable --now ssh`; if on another port: Port in "
     "~/.ssh/config"),
    (r"No route to host|Network is unreachable|Host is down", "no route",
     "is the machine on, its cable in, its address right? try `ping {host}`"),
    (r"timed out|not responding", "no answer",
     "is the machine on? does a firewall drop port 22? try `ping {host}`"),
    (r"kex_exchange_identification|Connection (closed|reset) by|Exceeded MaxStartups", "connection closed by its sshd",
     "see MaxStartups and AllowUsers in its /etc/ssh/sshd_config, and its log: `journalctl -u ssh`"),
)


def explain(done: Done) -> tuple[str, str]:
    """(what is wrong, in a few words; what to do) of an ssh that failed: status 255, or 124 if it took too long."""
    if done.status == 124:  # to connect it would have had only a few seconds: it did
        return "too slow", (f"{done.complaint}: a disk that hangs (`ssh {done.host} df`), a slow login script? or "
                            "allow more with --timeout")
    for pattern, cause, remedy in _CAUSES:
        if re.search(pattern, done.stderr):
            return cause, remedy.format(host=done.host, copy_key=_copy_key(done.host))
    return "ssh failed", f"ssh says: {done.complaint}; try `ssh {done.host} true`"


def _copy_key(host: str) -> str:
    has_key = any((Path.home() / ".ssh" / name).is_file() for name in _KEYS)
    return ("" if has_key else "`ssh-keygen -t ed25519 -N ''`, then ") + f"`ssh-copy-id {host}`"
