"""The doctor's checks: judge the facts of a host (`probe.py`) against the first host's.

All functions are pure. `CHECKS` holds the checks that need only the two hosts' facts, by row of the
table. GPUs and datasets have their own checks, the clock is judged by the times of the answers, and
`explain` translates ssh's error messages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.remote import CommandResult
from launch.doctor.findings import FAIL, PASS, WARN, Finding
from pipeline.cli import counted
from pipeline.installation import INSTALLED, as_typed

Facts = Mapping[str, Any]
Gpu = Mapping[str, Any]
GIB = 1 << 30
MOST_SKEW_SECONDS = 2.0
LEAST_DISK_BYTES, LOW_DISK_BYTES = GIB // 2, 10 * GIB
LOW_MEMORY_BYTES_PER_RANK = 2 * GIB
LEAST_OPEN_FILES = 1024
LEAST_SHM_BYTES = GIB
SYNC = (
    "run launch/sync.sh"
    if not INSTALLED
    else "install the same version of Vastscale there, at the same path"
)
USED_MIB = 1024  # more memory in use than this means that other processes use the GPU
POWER_SHARE = 0.95  # of the GPU's default power limit; a lower limit is reported
_KEYS = ("id_ed25519", "id_rsa", "id_ecdsa", "id_ed25519_sk", "id_ecdsa_sk")
_CAUSES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "host key has changed",
        "if the machine was reinstalled: `ssh-keygen -R {host}`, then `ssh-keyscan -H {host} >> "
        "~/.ssh/known_hosts`",
    ),
    (
        r"Host key verification failed|host key is known for",
        "unknown host key",
        "`ssh-keyscan -H {host} >> ~/.ssh/known_hosts`, if you trust the network",
    ),
    (
        r"UNPROTECTED PRIVATE KEY FILE",
        "private key readable by others",
        "`chmod 600` on the key that ssh names",
    ),
    (
        r"Bad owner or permissions|Bad configuration option|bad configuration options",
        "~/.ssh/config is invalid",
        "fix what `ssh {host}` complains about",
    ),
    (r"Permission denied|Too many authentication failures", "permission denied", "{copy_key}"),
    (
        r"Could not resolve hostname",
        "name does not resolve",
        "add `ADDRESS {host}` to /etc/hosts on every host, or a HostName to ~/.ssh/config",
    ),
    (
        r"Connection refused",
        "connection refused",
        "start sshd there: `apt install openssh-server; systemctl enable --now ssh`; if it uses "
        "another port, set Port in ~/.ssh/config",
    ),
    (
        r"No route to host|Network is unreachable|Host is down",
        "no route",
        "check that the machine is on, its cable plugged in and its address right; try `ping "
        "{host}`",
    ),
    (
        r"timed out|not responding",
        "no answer",
        "check that the machine is on and that no firewall drops port 22; try `ping {host}`",
    ),
    (
        r"kex_exchange_identification|Connection (closed|reset) by|Exceeded MaxStartups",
        "connection closed by its sshd",
        "see MaxStartups and AllowUsers in its /etc/ssh/sshd_config, and its log: `journalctl -u "
        "ssh`",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """The facts of one host beside those of the first."""

    host: str
    slots: Sequence[int]
    facts: Facts
    first: str
    first_facts: Facts
    world_size: int
    python: str  # path of the interpreter, which must be the same on all hosts

    @property
    def is_first(self) -> bool:
        return self.host == self.first

    def finding(self, check: str, verdict: str, summary: str, advice: str = "") -> Finding:
        return Finding(self.host, check, verdict, summary, as_typed(advice))


Check = Callable[[Comparison], Iterator[Finding]]


def checkout(pair: Comparison) -> Iterator[Finding]:
    facts, first = pair.facts["checkout"], pair.first_facts["checkout"]
    if not facts["exists"]:
        yield pair.finding(
            "checkout",
            FAIL,
            "missing",
            f"there is no checkout at the path that {pair.first} uses; {SYNC}",
        )
        return
    theirs, ours = facts["files"], first["files"]
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    commit = facts["commit"][:9] or "no commit known"
    if differing:
        at = (
            f" (commit {commit}, not {first['commit'][:9]})"
            if facts["commit"] != first["commit"]
            else ""
        )
        yield pair.finding(
            "checkout",
            FAIL,
            counted(len(differing), "different file"),
            f"differs from {pair.first} in {_some(differing)}{at}; {SYNC}",
        )
    else:
        same = "" if pair.is_first or facts["commit"] == first["commit"] else ", same files"
        yield pair.finding("checkout", PASS, commit + same)


def python(pair: Comparison) -> Iterator[Finding]:
    facts, first = pair.facts["python"], pair.first_facts["python"]
    ours, theirs = first["version"], facts["version"]
    if facts["executable"] != pair.python:
        yield pair.finding(
            "python",
            FAIL,
            "missing",
            f"there is no {pair.python}; {SYNC}"
            + (
                ""
                if INSTALLED
                else ", which makes .venv there, or make an environment at that path"
            ),
        )
    elif ours.split(".")[:2] != theirs.split(".")[:2]:
        yield pair.finding(
            "python",
            FAIL,
            theirs,
            f"Python {theirs}, but {pair.first} has {ours}; make the environment again with "
            f"{ours.rpartition('.')[0]}: "
            + (SYNC if INSTALLED else f"remove .venv there and {SYNC} with VASTSCALE_PYTHON"),
        )
    elif ours != theirs:
        yield pair.finding(
            "python", WARN, theirs, f"Python {theirs}, but {pair.first} has {ours}; likely harmless"
        )
    else:
        yield pair.finding("python", PASS, theirs)


def packages(pair: Comparison) -> Iterator[Finding]:
    if pair.facts["python"]["executable"] != pair.python:
        return
    ours, theirs = pair.first_facts["packages"], pair.facts["packages"]
    missing = sorted(name for name in ours if ours[name] and not theirs.get(name))
    other = sorted(
        f"{name} {theirs[name]} ({ours.get(name) or 'none'} on {pair.first})"
        for name in theirs
        if theirs[name] and theirs[name] != ours.get(name)
    )
    problems = [text for text in (f"no {_some(missing)}" if missing else "", _some(other)) if text]
    if problems:
        yield pair.finding(
            "packages",
            FAIL,
            counted(len(missing) + len(other), "different package"),
            f"{'; '.join(problems)}; {SYNC}"
            + ("" if INSTALLED else ", or `pip install -r requirements.txt` there"),
        )
    elif not theirs.get("torch"):
        yield pair.finding(
            "packages",
            FAIL,
            "no torch",
            "torch is not installed; run ./launch_local_train.sh --help once to make the "
            "environment",
        )
    else:
        yield pair.finding("packages", PASS, f"torch {theirs['torch']}")


def cores(pair: Comparison) -> Iterator[Finding]:
    number, ranks = pair.facts["cores"], len(pair.slots)
    if number < ranks:
        yield pair.finding(
            "cores",
            WARN,
            f"{number} for {ranks} ranks",
            f"{counted(number, 'core')} for {ranks} ranks, which will wait for each other; set "
            "fewer slots in the hostfile",
        )
    else:
        yield pair.finding("cores", PASS, f"{number} for {counted(ranks, 'rank')}")


def memory(pair: Comparison) -> Iterator[Finding]:
    free, ranks = pair.facts["memory"]["free"], len(pair.slots)
    summary = f"{free / GIB:.0f} GiB free"
    if free < ranks * LOW_MEMORY_BYTES_PER_RANK:
        yield pair.finding(
            "memory",
            WARN,
            summary,
            f"{free / GIB:.1f} GiB of memory is free for {counted(ranks, 'rank')} that need about "
            f"{LOW_MEMORY_BYTES_PER_RANK / GIB:.0f} each; see what else runs there (`top`)",
        )
    else:
        yield pair.finding("memory", PASS, summary)


def disk(pair: Comparison) -> Iterator[Finding]:
    output = pair.facts["output"]
    summary, where = f"{output['free'] / GIB:.0f} GiB free", output["at"]
    if output["complaint"]:
        yield pair.finding(
            "disk",
            FAIL if pair.is_first else WARN,
            "not writable",
            f"cannot write to {where}: {output['complaint']}; give another --output-dir, or change "
            "its owner (`chown`)",
        )
    elif output["free"] < LEAST_DISK_BYTES and pair.is_first:
        yield pair.finding(
            "disk",
            FAIL,
            summary,
            f"{output['free'] / 1e6:.0f} MB is free at {where}, where checkpoints go; "
            "free disk space, or give another --output-dir",
        )
    elif output["free"] < (LOW_DISK_BYTES if pair.is_first else LEAST_DISK_BYTES):
        yield pair.finding(
            "disk",
            WARN,
            summary,
            f"{output['free'] / GIB:.1f} GiB is free at {where}; free disk space",
        )
    else:
        yield pair.finding("disk", PASS, summary)


def limits(pair: Comparison) -> Iterator[Finding]:
    facts = pair.facts["limits"]
    wanted = max(LEAST_OPEN_FILES, 64 * pair.world_size)
    if facts["open_files"] < wanted:
        remedy = (
            f"`ulimit -n {wanted}` in ~/.bashrc"
            if facts["most_open_files"] >= wanted
            else f"`* - nofile {wanted}` in /etc/security/limits.conf"
        )
        yield pair.finding(
            "limits",
            WARN,
            f"{facts['open_files']} open files",
            f"ulimit -n is {facts['open_files']}, and {pair.world_size} ranks may need {wanted} "
            f"connections and files; set {remedy} there",
        )
    if facts["shm"] < LEAST_SHM_BYTES and len(pair.slots) > 1:
        summary = f"/dev/shm {facts['shm'] / 1e6:.0f} MB"
        yield pair.finding(
            "limits",
            WARN,
            summary,
            f"{summary} is too small for NCCL, which connects the GPUs of a host through it; in a "
            "container use --shm-size=8g or --ipc=host",
        )
    yield pair.finding("limits", PASS, f"{facts['open_files']} open files")


CHECKS: dict[str, Check] = {
    "checkout": checkout,
    "python": python,
    "packages": packages,
    "cores": cores,
    "memory": memory,
    "disk": disk,
    "limits": limits,
}
"""Row of the table -> check, for checks that need only the two hosts' facts."""


def clock_skew(began: float, ended: float, facts: Facts) -> tuple[float, float]:
    """Return (seconds that a host's clock is ahead of ours, uncertainty in seconds), see RFC 5905.

    `began` and `ended` are our clock when the question was sent and when the answer arrived.
    """
    skew = ((facts["began"] - began) + (facts["ended"] - ended)) / 2
    return skew, ((ended - began) - (facts["ended"] - facts["began"])) / 2


def clock(
    host: str, first: str, skew: tuple[float, float], first_skew: tuple[float, float]
) -> Finding:
    """Judge the clock of a host against the first host's."""
    seconds, doubt = skew[0] - first_skew[0], skew[1] + first_skew[1]
    summary = f"{seconds:+.1f} s" if abs(seconds) > doubt else f"within {doubt:.1f} s"
    if abs(seconds) - doubt > MOST_SKEW_SECONDS:
        return Finding(
            host,
            "clock",
            WARN,
            summary,
            f"its clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of "
            f"{first}; turn on time synchronisation: `timedatectl set-ntp true`",
        )
    return Finding(host, "clock", PASS, summary if host != first else "reference")


# --- GPUs ---


def gpus(pair: Comparison) -> Iterator[Finding]:
    """Check that there are enough GPUs, all of one kind, free, and neither slowed nor damaged."""
    nvidia, first = pair.facts["nvidia"], pair.first_facts["nvidia"]
    if nvidia["complaint"]:
        yield pair.finding(
            "GPUs",
            FAIL,
            "driver not responding",
            f"{nvidia['complaint']}; reboot, or reinstall the NVIDIA driver",
        )
        return
    found: list[Gpu] = nvidia["gpus"]
    if not found and not first["gpus"]:
        yield pair.finding("GPUs", PASS, "no GPU: CPU ranks")
        return
    if bool(found) != bool(first["gpus"]):
        has, lacks = (pair.host, pair.first) if found else (pair.first, pair.host)
        yield pair.finding(
            "GPUs",
            FAIL,
            counted(len(found), "GPU"),
            f"{has} has GPUs and {lacks} has none; omit one of them with --exclude, or install the "
            "NVIDIA driver",
        )
        return
    missing = sorted({*pair.slots} - {gpu["index"] for gpu in found})
    if missing:
        numbers = ", ".join(map(str, missing))
        yield pair.finding(
            "GPUs",
            FAIL,
            counted(len(found), "GPU"),
            f"it has {counted(len(found), 'GPU')}, but the hostfile also uses slots {numbers} "
            f"(counted from 0); write slots={len(found)}",
        )
    yield from _torch(pair)
    used = [gpu for gpu in found if gpu["index"] in pair.slots]
    yield from _differences(pair, used, first["gpus"])
    for gpu in used:
        for trouble in _troubles(gpu):
            number = f"GPU {gpu['index']}"
            yield pair.finding(
                "GPUs", WARN, f"{number}: see below", f"{number} ({gpu['name']}) {trouble}"
            )
    yield pair.finding("GPUs", PASS, _summary(used))


def _torch(pair: Comparison) -> Iterator[Finding]:
    """Check that torch can use the GPUs that nvidia-smi lists, and compile for them.

    The driver's list alone shows neither.
    """
    facts = pair.facts.get("torch")
    # The torch of another Python is not the one that will train.
    if not facts or pair.facts["python"]["executable"] != pair.python:
        return
    if "error" in facts:
        yield pair.finding(
            "GPUs",
            WARN,
            "torch not responding",
            f"could not find out whether torch can use the GPUs: {facts['error']}",
        )
        return
    if facts["complaint"]:
        yield pair.finding("GPUs", FAIL, "not usable", facts["complaint"])
    elif not facts["gpus"]:
        yield pair.finding(
            "GPUs",
            FAIL,
            "not usable",
            f"nvidia-smi lists GPUs, but torch {facts['torch']} sees none; check whether "
            "CUDA_VISIBLE_DEVICES is set in the login shell there",
        )
    elif facts["uncompiled"]:
        yield pair.finding(
            "GPUs",
            WARN,
            "not compiled",
            f"torch.compile will not work, so training will be slower: {facts['uncompiled']}",
        )


def _differences(pair: Comparison, used: Sequence[Gpu], first: Sequence[Gpu]) -> Iterator[Finding]:
    names = {*(gpu["name"] for gpu in used), *(gpu["name"] for gpu in first)}
    if len(names) > 1:
        yield pair.finding(
            "GPUs",
            WARN,
            "mixed GPUs",
            f"GPUs differ ({', '.join(sorted(map(str, names)))}): every step takes as long as on "
            "the slowest, and the batch must fit the smallest",
        )
    drivers = [{gpu["driver_version"] for gpu in gpus} for gpus in (used, first)]
    if used and drivers[0] != drivers[1]:
        theirs, ours = (", ".join(sorted(map(str, some))) for some in drivers)
        yield pair.finding(
            "GPUs",
            WARN,
            f"driver {theirs}",
            f"NVIDIA driver {theirs}, but {pair.first} has {ours}; install the same on all hosts",
        )


def _troubles(gpu: Gpu) -> Iterator[str]:
    busy, total = gpu.get("memory.used"), gpu.get("memory.total")
    if busy is not None and busy > USED_MIB:
        yield (
            f"has {busy / 1024:.1f} of {(total or 0) / 1024:.0f} GiB in use by other processes; "
            "see `nvidia-smi` there, or omit the GPU with --exclude"
        )
    limit, usual = gpu.get("power.limit"), gpu.get("power.default_limit")
    if limit and usual and limit < POWER_SHARE * usual:
        yield (
            f"is limited to {limit:.0f} W instead of its default {usual:.0f} W; run `nvidia-smi "
            f"-pl {usual:.0f}` as root"
        )
    if gpu.get("slowed_by"):
        warm = gpu.get("temperature.gpu")
        yield (
            f"is slowed by {', '.join(gpu['slowed_by'])}"
            + (f" at {warm} C" if warm else "")
            + "; check cooling and power supply"
        )
    if gpu.get("ecc.errors.uncorrected.volatile.total"):
        yield (
            f"has had {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors "
            "since its driver was loaded; reset it (`nvidia-smi -r`) and have it replaced if they "
            "recur"
        )
    if gpu.get("mig.mode.current") == "Enabled":
        yield (
            "is split into MIG devices, and a rank can use only one of them; run "
            "`nvidia-smi -mig 0` as root to disable MIG"
        )


def _summary(used: Sequence[Gpu]) -> str:
    kinds = Counter((gpu["name"], round((gpu.get("memory.total") or 0) / 1024)) for gpu in used)
    states = sorted({gpu["pstate"] for gpu in used if gpu.get("pstate")})
    text = ", ".join(
        f"{count} x {str(name).removeprefix('NVIDIA ')} {size} GiB"
        for (name, size), count in kinds.items()
    )
    return f"{text} {'/'.join(states)}".rstrip()


# --- Datasets ---


def datasets(pair: Comparison) -> Iterator[Finding]:
    """Compare the file lists, the listed files and a sample of them, for each dataset folder."""
    for own, first in zip(pair.facts["datasets"], pair.first_facts["datasets"], strict=True):
        yield _dataset(pair, own, first)


def _dataset(pair: Comparison, own: dict[str, Any], first: dict[str, Any]) -> Finding:
    directory = own["directory"]
    sync = (
        f"copy the dataset there: rsync -a {directory}/ {pair.host}:{directory}/"
        if INSTALLED
        else f"{SYNC} --dataset-dir {directory}"
    )
    for name, found in own["lists"].items():
        wanted = first["lists"][name]
        if found["complaint"]:
            select = f"write it with `python tools/select_training_files.py --data-dir {directory}`"
            return pair.finding(
                "dataset",
                FAIL,
                "no list",
                f"{directory}/{name}: {found['complaint']}; "
                f"{select if wanted['complaint'] else sync}",
            )
        if found["sha256"] != wanted["sha256"]:
            return pair.finding(
                "dataset",
                FAIL,
                "list differs",
                f"{directory}/{name} ({found['count']} files) differs from that of {pair.first} "
                f"({wanted['count']} files); {sync}",
            )
    if own["missing"]:
        remedy = "write the lists again, or restore the files" if pair.is_first else sync
        return pair.finding(
            "dataset",
            FAIL,
            f"{own['missing']} missing",
            f"{own['missing']} of the {own['checked']} files looked for in {directory} are missing "
            f"({own['first_missing']}); {remedy}",
        )
    other = sorted(
        name
        for name, digest in own["sample"].items()
        if first["sample"].get(name, digest) != digest
    )
    if other:
        return pair.finding(
            "dataset",
            FAIL,
            "files differ",
            f"{len(other)} of {len(own['sample'])} sampled files of {directory} differ from those "
            f"of {pair.first} ({other[0]}); {sync}",
        )
    if own["checked"] < own["files"]:
        seen = f"{own['checked']} of {own['files']}"
        return pair.finding(
            "dataset",
            WARN,
            f"{seen} seen",
            f"only {seen} files of {directory} could be checked in time: its disk is slow",
        )
    return pair.finding("dataset", PASS, f"{own['files']} files")


# --- ssh ---


def explain(done: CommandResult) -> tuple[str, str]:
    """Return (what is wrong in a few words, what to do) for an ssh that failed.

    Its status is 255, or 124 if it took too long.
    """
    # ssh gives up connecting after a few seconds, so after 124 it was connected.
    if done.status == 124:
        return "too slow", (
            f"{done.complaint}; look for a disk that hangs (`ssh {done.host} df`) or a slow login "
            "script, or raise --timeout"
        )
    for pattern, cause, remedy in _CAUSES:
        if re.search(pattern, done.stderr):
            return cause, remedy.format(host=done.host, copy_key=_copy_key(done.host))
    return "ssh failed", f"ssh says: {done.complaint}; try `ssh {done.host} true`"


def _copy_key(host: str) -> str:
    has_key = any((Path.home() / ".ssh" / name).is_file() for name in _KEYS)
    return ("" if has_key else "`ssh-keygen -t ed25519 -N ''`, then ") + f"`ssh-copy-id {host}`"


def _some(names: Sequence[str], most: int = 3) -> str:
    """Join names like `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
