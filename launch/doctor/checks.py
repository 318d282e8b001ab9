"""What the facts of a host (`probe.py`) mean for a run: the doctor's checks, each against the first
host. Pure.

Most checks are in `CHECKS`, by their row of the table. GPUs and datasets have checks of their own,
the clock is judged by when the answers came, and `explain` says what ssh's complaints mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.remote import Done
from launch.doctor.findings import FAIL, PASS, WARN, Finding

Facts = Mapping[str, Any]
Gpu = Mapping[str, Any]
GIB = 1 << 30
MOST_SKEW_SECONDS = 2.0
LEAST_DISK_BYTES, LOW_DISK_BYTES = GIB // 2, 10 * GIB
LOW_MEMORY_BYTES_A_RANK = 2 * GIB
LEAST_OPEN_FILES = 1024
LEAST_SHM_BYTES = GIB
SYNC = "run launch/sync.sh"
USED_MIB = 1024  # more than this, and others are at work on a GPU
POWER_SHARE = 0.95  # of the power that the GPU has by default
_KEYS = ("id_ed25519", "id_rsa", "id_ecdsa", "id_ed25519_sk", "id_ecdsa_sk")
_CAUSES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "another host key than known",
        "if the machine was reinstalled: `ssh-keygen -R {host}`, then `ssh-keyscan -H {host} >> "
        "~/.ssh/known_hosts`",
    ),
    (
        r"Host key verification failed|host key is known for",
        "unknown host key",
        "`ssh-keyscan -H {host} >> ~/.ssh/known_hosts`, on a network that you trust",
    ),
    (
        r"UNPROTECTED PRIVATE KEY FILE",
        "private key readable by others",
        "`chmod 600` on the key that ssh names",
    ),
    (
        r"Bad owner or permissions|Bad configuration option|bad configuration options",
        "~/.ssh/config is refused",
        "repair what `ssh {host}` complains about",
    ),
    (r"Permission denied|Too many authentication failures", "permission denied", "{copy_key}"),
    (
        r"Could not resolve hostname",
        "name does not resolve",
        "write `ADDRESS {host}` into /etc/hosts on every host, or a HostName into ~/.ssh/config",
    ),
    (
        r"Connection refused",
        "connection refused",
        "start sshd there: `apt install openssh-server; systemctl enable --now ssh`; if on another "
        "port: Port in ~/.ssh/config",
    ),
    (
        r"No route to host|Network is unreachable|Host is down",
        "no route",
        "is the machine on, its cable in, its address right? try `ping {host}`",
    ),
    (
        r"timed out|not responding",
        "no answer",
        "is the machine on? does a firewall drop port 22? try `ping {host}`",
    ),
    (
        r"kex_exchange_identification|Connection (closed|reset) by|Exceeded MaxStartups",
        "connection closed by its sshd",
        "see MaxStartups and AllowUsers in its /etc/ssh/sshd_config, and its log: `journalctl -u "
        "ssh`",
    ),
)


@dataclass(frozen=True)
class Question:
    """One host against the first."""

    host: str
    slots: Sequence[int]
    facts: Facts
    first: str
    first_facts: Facts
    world_size: int
    python: str  # the interpreter that all hosts shall have

    @property
    def is_first(self) -> bool:
        return self.host == self.first

    def say(self, check: str, verdict: str, told: str, advice: str = "") -> Finding:
        return Finding(self.host, check, verdict, told, advice)


Check = Callable[[Question], Iterator[Finding]]


def checkout(ask: Question) -> Iterator[Finding]:
    facts, first = ask.facts["checkout"], ask.first_facts["checkout"]
    if not facts["exists"]:
        yield ask.say(
            "checkout",
            FAIL,
            "missing",
            f"there is no checkout where {ask.first} has its own; {SYNC}",
        )
        return
    theirs, ours = facts["files"], first["files"]
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    commit = facts["commit"][:9] or "no commit known"
    if differing:
        at = (
            f" (commit {commit}, there {first['commit'][:9]})"
            if facts["commit"] != first["commit"]
            else ""
        )
        yield ask.say(
            "checkout",
            FAIL,
            f"{_count(len(differing), 'file')} other",
            f"{_some(differing)} differ from those of {ask.first}{at}; {SYNC}",
        )
    else:
        same = "" if ask.is_first or facts["commit"] == first["commit"] else ", same files"
        yield ask.say("checkout", PASS, commit + same)


def python(ask: Question) -> Iterator[Finding]:
    facts, first = ask.facts["python"], ask.first_facts["python"]
    ours, theirs = first["version"], facts["version"]
    if facts["executable"] != ask.python:
        yield ask.say(
            "python",
            FAIL,
            "not there",
            f"there is no {ask.python}; {SYNC}, which makes .venv there, or make an environment at "
            "that path",
        )
    elif ours.split(".")[:2] != theirs.split(".")[:2]:
        yield ask.say(
            "python",
            FAIL,
            theirs,
            f"Python {theirs}, and {ask.first} has {ours}; make the environment again with "
            f"{ours.rpartition('.')[0]}: remove .venv there and {SYNC} with VASTSCALE_PYTHON",
        )
    elif ours != theirs:
        yield ask.say(
            "python", WARN, theirs, f"Python {theirs}, and {ask.first} has {ours}; likely harmless"
        )
    else:
        yield ask.say("python", PASS, theirs)


def packages(ask: Question) -> Iterator[Finding]:
    if ask.facts["python"]["executable"] != ask.python:
        return
    ours, theirs = ask.first_facts["packages"], ask.facts["packages"]
    missing = sorted(name for name in ours if ours[name] and not theirs.get(name))
    other = sorted(
        f"{name} {theirs[name]} ({ours.get(name) or 'none'} on {ask.first})"
        for name in theirs
        if theirs[name] and theirs[name] != ours.get(name)
    )
    told = [text for text in (f"no {_some(missing)}" if missing else "", _some(other)) if text]
    if told:
        yield ask.say(
            "packages",
            FAIL,
            _count(len(missing) + len(other), "package") + " other",
            f"{'; '.join(told)}; {SYNC}, or `pip install -r requirements.txt` there",
        )
    elif not theirs.get("torch"):
        yield ask.say(
            "packages",
            FAIL,
            "no torch",
            "torch is not installed; run ./launch_local_train.sh --help once, which makes the "
            "environment",
        )
    else:
        yield ask.say("packages", PASS, f"torch {theirs['torch']}")


def cores(ask: Question) -> Iterator[Finding]:
    number, ranks = ask.facts["cores"], len(ask.slots)
    if number < ranks:
        yield ask.say(
            "cores",
            WARN,
            f"{number} for {ranks} ranks",
            f"{_count(number, 'core')} for {ranks} ranks: they will wait for each other; give "
            "fewer slots in the hostfile",
        )
    else:
        yield ask.say("cores", PASS, f"{number} for {_count(ranks, 'rank')}")


def memory(ask: Question) -> Iterator[Finding]:
    free, ranks = ask.facts["memory"]["free"], len(ask.slots)
    told = f"{free / GIB:.0f} GiB free"
    if free < ranks * LOW_MEMORY_BYTES_A_RANK:
        yield ask.say(
            "memory",
            WARN,
            told,
            f"{free / GIB:.1f} GiB of memory are free for {_count(ranks, 'rank')}, of about "
            f"{LOW_MEMORY_BYTES_A_RANK / GIB:.0f} each; see what else runs there (`top`)",
        )
    else:
        yield ask.say("memory", PASS, told)


def disk(ask: Question) -> Iterator[Finding]:
    output = ask.facts["output"]
    told, where = f"{output['free'] / GIB:.0f} GiB free", output["at"]
    if output["complaint"]:
        yield ask.say(
            "disk",
            FAIL if ask.is_first else WARN,
            "not writable",
            f"{where} cannot be written to: {output['complaint']}; name another --output-dir, or "
            "change its owner (`chown`)",
        )
    elif output["free"] < LEAST_DISK_BYTES and ask.is_first:
        yield ask.say(
            "disk",
            FAIL,
            told,
            f"{output['free'] / 1e6:.0f} MB are free at {where}, where checkpoints go; make room, "
            "or name another --output-dir",
        )
    elif output["free"] < (LOW_DISK_BYTES if ask.is_first else LEAST_DISK_BYTES):
        yield ask.say(
            "disk", WARN, told, f"{output['free'] / GIB:.1f} GiB are free at {where}; make room"
        )
    else:
        yield ask.say("disk", PASS, told)


def limits(ask: Question) -> Iterator[Finding]:
    facts = ask.facts["limits"]
    wanted = max(LEAST_OPEN_FILES, 64 * ask.world_size)
    if facts["open_files"] < wanted:
        raise_it = (
            f"`ulimit -n {wanted}` in ~/.bashrc"
            if facts["most_open_files"] >= wanted
            else f"`* - nofile {wanted}` in /etc/security/limits.conf"
        )
        yield ask.say(
            "limits",
            WARN,
            f"{facts['open_files']} open files",
            f"ulimit -n is {facts['open_files']}, and {ask.world_size} ranks may need {wanted} "
            f"connections and files; say {raise_it} there",
        )
    if facts["shm"] < LEAST_SHM_BYTES and len(ask.slots) > 1:
        told = f"/dev/shm {facts['shm'] / 1e6:.0f} MB"
        yield ask.say(
            "limits",
            WARN,
            told,
            f"{told}, through which NCCL joins the GPUs of a host, is too small; in a container: "
            "--shm-size=8g or --ipc=host",
        )
    yield ask.say("limits", PASS, f"{facts['open_files']} open files")


CHECKS: dict[str, Check] = {
    "checkout": checkout,
    "python": python,
    "packages": packages,
    "cores": cores,
    "memory": memory,
    "disk": disk,
    "limits": limits,
}
"""Those that need only the two hosts' facts."""


def clock_skew(began: float, ended: float, facts: Facts) -> tuple[float, float]:
    """(Seconds that a host's clock is ahead of ours, how wrong that may be), after RFC 5905.

    `began` and `ended`: our clock when the question went out and the answer was there.
    """
    skew = ((facts["began"] - began) + (facts["ended"] - ended)) / 2
    return skew, ((ended - began) - (facts["ended"] - facts["began"])) / 2


def clock(
    host: str, first: str, skew: tuple[float, float], first_skew: tuple[float, float]
) -> Finding:
    """The clock of a host against the first host's."""
    seconds, doubt = skew[0] - first_skew[0], skew[1] + first_skew[1]
    told = f"{seconds:+.1f} s" if abs(seconds) > doubt else f"within {doubt:.1f} s"
    if abs(seconds) - doubt > MOST_SKEW_SECONDS:
        return Finding(
            host,
            "clock",
            WARN,
            told,
            f"its clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of "
            f"{first}; switch time synchronisation on: `timedatectl set-ntp true`",
        )
    return Finding(host, "clock", PASS, told if host != first else "reference")


# --- GPUs ---


def gpus(ask: Question) -> Iterator[Finding]:
    """Enough GPUs of one kind, free, and neither slowed nor damaged."""
    told, first = ask.facts["nvidia"], ask.first_facts["nvidia"]
    if told["complaint"]:
        yield ask.say(
            "GPUs",
            FAIL,
            "driver silent",
            f"{told['complaint']}; reboot, or reinstall the NVIDIA driver",
        )
        return
    found: list[Gpu] = told["gpus"]
    if not found and not first["gpus"]:
        yield ask.say("GPUs", PASS, "no GPU: CPU ranks")
        return
    if bool(found) != bool(first["gpus"]):
        has, lacks = (ask.host, ask.first) if found else (ask.first, ask.host)
        yield ask.say(
            "GPUs",
            FAIL,
            f"{len(found)} GPUs",
            f"{has} has GPUs and {lacks} has none; leave one of them out with --exclude, or "
            "install the NVIDIA driver",
        )
        return
    missing = sorted({*ask.slots} - {gpu["index"] for gpu in found})
    if missing:
        numbers = ", ".join(map(str, missing))
        yield ask.say(
            "GPUs",
            FAIL,
            f"{len(found)} GPUs",
            f"it has {len(found)} GPUs, and the hostfile wants {numbers}, too (counted from 0); "
            f"write slots={len(found)}",
        )
    yield from _torch(ask)
    used = [gpu for gpu in found if gpu["index"] in ask.slots]
    yield from _differences(ask, used, first["gpus"])
    for gpu in used:
        for trouble in _troubles(gpu):
            number = f"GPU {gpu['index']}"
            yield ask.say(
                "GPUs", WARN, f"{number}: see below", f"{number} ({gpu['name']}) {trouble}"
            )
    yield ask.say("GPUs", PASS, _summary(used))


def _torch(ask: Question) -> Iterator[Finding]:
    """Whether torch can use what nvidia-smi has counted, and compile for it: the driver's word
    alone says neither."""
    told = ask.facts.get("torch")
    if (
        not told or ask.facts["python"]["executable"] != ask.python
    ):  # another Python's torch is not the run's
        return
    if "error" in told:
        yield ask.say(
            "GPUs",
            WARN,
            "torch silent",
            f"what torch makes of the GPUs could not be found out: {told['error']}",
        )
        return
    if told["complaint"]:
        yield ask.say("GPUs", FAIL, "not usable", told["complaint"])
    elif not told["gpus"]:
        yield ask.say(
            "GPUs",
            FAIL,
            "not usable",
            f"nvidia-smi lists GPUs, and torch {told['torch']} sees none; is CUDA_VISIBLE_DEVICES "
            "set in the login shell there?",
        )
    elif told["uncompiled"]:
        yield ask.say(
            "GPUs",
            WARN,
            "not compiled",
            f"torch.compile will not work, and training be slower: {told['uncompiled']}",
        )


def _differences(ask: Question, used: Sequence[Gpu], first: Sequence[Gpu]) -> Iterator[Finding]:
    names = {*(gpu["name"] for gpu in used), *(gpu["name"] for gpu in first)}
    if len(names) > 1:
        yield ask.say(
            "GPUs",
            WARN,
            "mixed GPUs",
            f"GPUs differ ({', '.join(sorted(map(str, names)))}): every step takes as long as on "
            "the slowest, and the batch must fit the smallest",
        )
    drivers = [{gpu["driver_version"] for gpu in gpus} for gpus in (used, first)]
    if used and drivers[0] != drivers[1]:
        theirs, ours = (", ".join(sorted(map(str, some))) for some in drivers)
        yield ask.say(
            "GPUs",
            WARN,
            f"driver {theirs}",
            f"NVIDIA driver {theirs}, and {ask.first} has {ours}; install the same on all hosts",
        )


def _troubles(gpu: Gpu) -> Iterator[str]:
    busy, total = gpu.get("memory.used"), gpu.get("memory.total")
    if busy is not None and busy > USED_MIB:
        yield (
            f"has {busy / 1024:.1f} of {(total or 0) / 1024:.0f} GiB in use by others; see "
            "`nvidia-smi` there, or leave it out with --exclude"
        )
    limit, usual = gpu.get("power.limit"), gpu.get("power.default_limit")
    if limit and usual and limit < POWER_SHARE * usual:
        yield (
            f"may take {limit:.0f} W of its usual {usual:.0f}; `nvidia-smi -pl {usual:.0f}` as "
            "root ends that"
        )
    if gpu.get("slowed_by"):
        warm = gpu.get("temperature.gpu")
        yield (
            f"is slowed by {', '.join(gpu['slowed_by'])}"
            + (f" at {warm} C" if warm else "")
            + "; look after cooling and power supply"
        )
    if gpu.get("ecc.errors.uncorrected.volatile.total"):
        yield (
            f"has had {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors "
            "since its driver started; reset it (`nvidia-smi -r`) and, if they come back, have it "
            "exchanged"
        )
    if gpu.get("mig.mode.current") == "Enabled":
        yield (
            "is cut into MIG slices, of which a rank sees one; `nvidia-smi -mig 0` as root ends "
            "that"
        )


def _summary(used: Sequence[Gpu]) -> str:
    kinds = Counter((gpu["name"], round((gpu.get("memory.total") or 0) / 1024)) for gpu in used)
    states = sorted({gpu["pstate"] for gpu in used if gpu.get("pstate")})
    told = ", ".join(
        f"{count} x {str(name).removeprefix('NVIDIA ')} {size} GiB"
        for (name, size), count in kinds.items()
    )
    return f"{told} {'/'.join(states)}".rstrip()


# --- Datasets ---


def datasets(ask: Question) -> Iterator[Finding]:
    """The lists, the files in them, and the sample, of each dataset folder."""
    for own, first in zip(ask.facts["datasets"], ask.first_facts["datasets"], strict=True):
        yield _dataset(ask, own, first)


def _dataset(ask: Question, own: dict[str, Any], first: dict[str, Any]) -> Finding:
    directory = own["directory"]
    sync = f"{SYNC} --dataset-dir {directory}"
    for name, found in own["lists"].items():
        wanted = first["lists"][name]
        if found["complaint"]:
            select = f"write it with `python tools/select_training_files.py --data-dir {directory}`"
            return ask.say(
                "dataset",
                FAIL,
                "no list",
                f"{directory}/{name}: {found['complaint']}; "
                f"{select if wanted['complaint'] else sync}",
            )
        if found["sha256"] != wanted["sha256"]:
            return ask.say(
                "dataset",
                FAIL,
                "other list",
                f"{directory}/{name} names {found['count']} files, and that of {ask.first} "
                f"{wanted['count']}, or others; {sync}",
            )
    if own["missing"]:
        way_out = "write the lists again, or bring the files back" if ask.is_first else sync
        return ask.say(
            "dataset",
            FAIL,
            f"{own['missing']} missing",
            f"{own['missing']} of the {own['checked']} files looked for in {directory} are not "
            f"there ({own['first_missing']}); {way_out}",
        )
    other = sorted(
        name
        for name, digest in own["sample"].items()
        if first["sample"].get(name, digest) != digest
    )
    if other:
        return ask.say(
            "dataset",
            FAIL,
            "other files",
            f"{len(other)} of {len(own['sample'])} sampled files of {directory} are not those of "
            f"{ask.first} ({other[0]}); {sync}",
        )
    if own["checked"] < own["files"]:
        seen = f"{own['checked']} of {own['files']}"
        return ask.say(
            "dataset",
            WARN,
            f"{seen} seen",
            f"only {seen} files of {directory} could be looked for in time: its disk is slow",
        )
    return ask.say("dataset", PASS, f"{own['files']} files")


# --- ssh ---


def explain(done: Done) -> tuple[str, str]:
    """(what is wrong, in a few words; what to do) of an ssh that failed: status 255, or 124 if it
    took too long."""
    if done.status == 124:  # to connect it would have had only a few seconds: it did
        return "too slow", (
            f"{done.complaint}: a disk that hangs (`ssh {done.host} df`), a slow login script? or "
            "allow more with --timeout"
        )
    for pattern, cause, remedy in _CAUSES:
        if re.search(pattern, done.stderr):
            return cause, remedy.format(host=done.host, copy_key=_copy_key(done.host))
    return "ssh failed", f"ssh says: {done.complaint}; try `ssh {done.host} true`"


def _copy_key(host: str) -> str:
    has_key = any((Path.home() / ".ssh" / name).is_file() for name in _KEYS)
    return ("" if has_key else "`ssh-keygen -t ed25519 -N ''`, then ") + f"`ssh-copy-id {host}`"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
