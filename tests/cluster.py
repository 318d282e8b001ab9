"""Several hosts on one machine: Linux namespaces, each with an sshd.

Each host has its own namespaces for network, processes, mounts and host name; an eth0 on a common
bridge; a `docker0` that leads nowhere and has the same address on every host; its own name in
/etc/hosts as a loopback address, as on Debian; and a disk of its own at `Cluster.disk`. The rest of
the file system is shared. Nothing listens on the machine's own addresses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import environment

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "rsync": "rsync",
    "unshare": "util-linux",
}
_NETWORK = "10.89.7"

_SETUP = """
set -e
mount --make-rprivate /
hostname {name}
mount --bind {folder}/hosts.{name} /etc/hosts
mount --bind {folder}/ssh /etc/ssh
mount -t tmpfs -o size=512m disk {disk}
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip link add docker0 type veth peer name container
ip link set container up
ip addr add 172.17.0.1/16 dev docker0
ip link set docker0 up
mkdir -p /run/sshd
exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
"""

_SSHD = """
Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/client_key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
"""

_SSH = """
Host *
    IdentityFile /etc/ssh/client_key
    UserKnownHostsFile /etc/ssh/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


def why_not() -> str:
    """Say why hosts cannot be created here; "" if they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [
        package
        for program, package in PROGRAMS.items()
        if not shutil.which(program) and not Path("/usr/sbin", program).exists()
    ]
    return f"needs {' '.join(missing)} (apt install)" if missing else ""


@dataclass(frozen=True)
class Host:
    """One host; `pid` is its first process, as seen from outside."""

    name: str
    address: str
    pid: int
    link: str  # the bridge's end of its virtual cable


class Cluster:
    """`count` hosts node1, node2, … whose keys and files are in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.disk = folder, folder / "disk"
        self._tag = f"vs{os.getpid() % 100000}"
        self._processes: list[subprocess.Popen[bytes]] = []
        names = self._names = [f"node{number}" for number in range(1, count + 1)]
        (folder / "ssh").mkdir(parents=True)
        self.disk.mkdir()
        self._write_files(names)
        self.hosts: dict[str, Host] = {}
        try:
            _do("ip", "link", "add", self._bridge, "type", "bridge")
            _do("ip", "link", "set", self._bridge, "up")
            for number, name in enumerate(names, 1):
                self.hosts[name] = self._start(name, number)
            for name in names:
                self._wait_for(name)
        except BaseException:
            self.close()
            raise

    @property
    def _bridge(self) -> str:
        return f"{self._tag}b"

    def _write_files(self, names: Sequence[str]) -> None:
        ssh = self.folder / "ssh"
        for key in ("host_key", "client_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key))
        public = (ssh / "host_key.pub").read_text().split()[:2]
        (ssh / "known_hosts").write_text(f"{','.join(names)},{_NETWORK}.* {' '.join(public)}\n")
        (ssh / "sshd_config").write_text(_SSHD)
        (ssh / "ssh_config").write_text(_SSH)
        for own in names:
            lines = [
                "127.0.0.1 localhost",
                f"127.0.1.1 {own}",
                *(
                    f"{_NETWORK}.{number} {name}"
                    for number, name in enumerate(names, 1)
                    if name != own
                ),
            ]
            (self.folder / f"hosts.{own}").write_text("\n".join(lines) + "\n")

    def _start(self, name: str, number: int) -> Host:
        netns, link, address = f"{self._tag}{name}", f"{self._tag}v{number}", f"{_NETWORK}.{number}"
        _do("ip", "netns", "add", netns)
        _do("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns)
        _do("ip", "link", "set", link, "master", self._bridge, "up")
        script = _SETUP.format(name=name, folder=self.folder, disk=self.disk, address=address)
        log = open(self.folder / f"sshd.{name}.log", "wb")  # noqa: SIM115 - the process's
        process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                netns,
                "unshare",
                "--uts",
                "--pid",
                "--mount",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                script,
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        self._processes.append(process)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                return Host(name, address, int(children[0]), link)
            time.sleep(0.02)
        raise AssertionError(
            f"{name} did not start: {(self.folder / f'sshd.{name}.log').read_text()}"
        )

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 15
        while self.run(name, ["ssh", "-o", "BatchMode=yes", name, "true"]).returncode:
            log = self.folder / f"sshd.{name}.log"
            assert time.monotonic() < deadline, f"no sshd on {name}: {log.read_text()}"
            time.sleep(0.1)

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` on a host, from outside."""
        return [
            "nsenter",
            "--target",
            str(self.hosts[name].pid),
            "--net",
            "--uts",
            "--pid",
            "--mount",
            "--",
            *command,
        ]

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        cwd: Path,
        variables: Mapping[str, str] | None = None,
        output: Path,
    ) -> subprocess.Popen[bytes]:
        """Start `command` on a host in a session of its own, with stdout and stderr in a file."""
        with open(output, "wb") as file:
            return subprocess.Popen(
                self.inside(name, ["env", "-C", str(cwd), *command]),
                stdout=file,
                stderr=file,
                env=_variables(variables),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        timeout: float = 60,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on a host to its end."""
        return subprocess.run(
            self.inside(name, command),
            env=_variables(variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def cut(self, name: str) -> None:
        """Pull the cable of a host."""
        _do("ip", "link", "set", self.hosts[name].link, "down")

    def reconnect(self, name: str) -> None:
        """Plug the cable of a host in again."""
        _do("ip", "link", "set", self.hosts[name].link, "up")

    def processes(self, name: str, containing: str) -> dict[int, str]:
        """Return a host's processes whose command line contains `containing`: pid, as seen from
        outside -> command line."""
        space = os.readlink(f"/proc/{self.hosts[name].pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (
                    (folder / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                    .strip()
                )
                if os.readlink(folder / "ns" / "pid") == space and containing in command:
                    found[int(folder.name)] = command
            except OSError:  # it has ended
                continue
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # --kill-child also kills all processes of the host
        for process in self._processes:
            process.wait()
        for name in self._names:  # including one that was only partly created
            subprocess.run(
                ["ip", "netns", "delete", f"{self._tag}{name}"], capture_output=True, check=False
            )
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _variables(more: Mapping[str, str] | None) -> dict[str, str]:
    variables = {
        name: value
        for name, value in environment().items()
        if name not in ("PYTHONPATH", "DS_ACCELERATOR")
    }
    return {**variables, **(more or {})}
