"""What the facts of a host (`probe.py`) mean: the doctor's checks, each against the first host. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.doctor.findings import FAIL, PASS, WARN, Finding

GIB = 1 << 30
MOST_SKEW_SECONDS = 2.0
LEAST_DISK_BYTES, LOW_DISK_BYTES = GIB // 2, 10 * GIB
LOW_MEMORY_BYTES_A_RANK = 2 * GIB
LEAST_OPEN_FILES = 1024
LEAST_SHM_BYTES = GIB
SYNC = "run launch/sync.sh"
Facts = Mapping[str, Any]


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
        yield ask.say("checkout", FAIL, "missing", f"there is no checkout where {ask.first} has its own; {SYNC}")
        return
    theirs, ours = facts["files"], first["files"]
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    commit = facts["commit"][:9] or "no commit known"
    if differing:
        at = f" (commit {commit}, there {first['commit'][:9]})" if facts["commit"] != first["commit"] else ""
        yield ask.say("checkout", FAIL, f"{_count(len(differing), 'file')} other",
                      f"{_some(differing)} differ from those of {ask.first}{at}; {SYNC}")
    else:
        same = "" if ask.is_first or facts["commit"] == first["commit"] else ", same files"
        yield ask.say("checkout", PASS, commit + same)


def python(ask: Question) -> Iterator[Finding]:
    facts, first = ask.facts["python"], ask.first_facts["python"]
    ours, theirs = first["version"], facts["version"]
    if facts["executable"] != ask.python:
        yield ask.say("python", FAIL, "not there", f"there is no {ask.python}; {SYNC}, which makes .venv there, or "
                      "make an environment at that path")
    elif ours.split(".")[:2] != theirs.split(".")[:2]:
        yield ask.say("python", FAIL, theirs, f"Python {theirs}, and {ask.first} has {ours}; make the environment anew "
                      f"with {ours.rpartition('.')[0]}: remove .venv there and {SYNC} with VASTSCALE_PYTHON")
    elif ours != theirs:
        yield ask.say("python", WARN, theirs, f"Python {theirs}, and {ask.first} has {ours}; likely harmless")
    else:
        yield ask.say("python", PASS, theirs)


def packages(ask: Question) -> Iterator[Finding]:
    if ask.facts["python"]["executable"] != ask.python:
        return
    ours, theirs = ask.first_facts["packages"], ask.facts["packages"]
    missing = sorted(name for name in ours if ours[name] and not theirs.get(name))
    other = sorted(f"{name} {theirs[name]} ({ours.get(name) or 'none'} on {ask.first})" for name in theirs
                   if theirs[name] and theirs[name] != ours.get(name))
    told = [text for text in (f"no {_some(missing)}" if missing else "", _some(other)) if text]
    if told:
        yield ask.say("packages", FAIL, _count(len(missing) + len(other), "package") + " other",
                      f"{'; '.join(told)}; {SYNC}, or `pip install -r requirements.txt` there")
    elif not theirs.get("torch"):
        yield ask.say("packages", FAIL, "no torch", "torch is not installed; run ./launch_local_train.sh --help once, "
                      "which makes the environment")
    else:
        yield ask.say("packages", PASS, f"torch {theirs['torch']}")


def cores(ask: Question) -> Iterator[Finding]:
    number, ranks = ask.facts["cores"], len(ask.slots)
    if number < ranks:
        yield ask.say("cores", WARN, f"{number} for {ranks} ranks", f"{_count(number, 'core')} for {ranks} ranks: they "
                      "will wait for each other; give fewer slots in the hostfile")
    else:
        yield ask.say("cores", PASS, f"{number} for {_count(ranks, 'rank')}")


def memory(ask: Question) -> Iterator[Finding]:
    free, ranks = ask.facts["memory"]["free"], len(ask.slots)
    told = f"{free / GIB:.0f} GiB free"
    if free < ranks * LOW_MEMORY_BYTES_A_RANK:
        yield ask.say("memory", WARN, told, f"{free / GIB:.1f} GiB of memory are free for {_count(ranks, 'rank')}, of "
                      f"about {LOW_MEMORY_BYTES_A_RANK / GIB:.0f} each; see what else runs there (`top`)")
    else:
        yield ask.say("memory", PASS, told)


def disk(ask: Question) -> Iterator[Finding]:
    output = ask.facts["output"]
    told, where = f"{output['free'] / GIB:.0f} GiB free", output["at"]
    if output["complaint"]:
        yield ask.say("disk", FAIL if ask.is_first else WARN, "not writable", f"{where} cannot be written to: "
                      f"{output['complaint']}; name another --output-dir, or change its owner (`chown`)")
    elif output["free"] < LEAST_DISK_BYTES and ask.is_first:
        yield ask.say("disk", FAIL, told, f"{output['free'] / 1e6:.0f} MB are free at {where}, where checkpoints go; "
                      "make room, or name another --output-dir")
    elif output["free"] < (LOW_DISK_BYTES if ask.is_first else LEAST_DISK_BYTES):
        yield ask.say("disk", WARN, told, f"{output['free'] / GIB:.1f} GiB are free at {where}; make room")
    else:
        yield ask.say("disk", PASS, told)


def limits(ask: Question) -> Iterator[Finding]:
    facts = ask.facts["limits"]
    wanted = max(LEAST_OPEN_FILES, 64 * ask.world_size)
    if facts["open_files"] < wanted:
        raise_it = (f"`ulimit -n {wanted}` in ~/.bashrc" if facts["most_open_files"] >= wanted else
                    f"`* - nofile {wanted}` in /etc/security/limits.conf")
        yield ask.say("limits", WARN, f"{facts['open_files']} open files", f"ulimit -n is {facts['open_files']}, and "
                      f"{ask.world_size} ranks may need {wanted} connections and files; say {raise_it} there")
    if facts["shm"] < LEAST_SHM_BYTES and len(ask.slots) > 1:
        told = f"/dev/shm {facts['shm'] / 1e6:.0f} MB"
        yield ask.say("limits", WARN, told, f"{told}, through which NCCL joins the GPUs of a host, is too small; in a "
                      "container: --shm-size=8g or --ipc=host")
    yield ask.say("limits", PASS, f"{facts['open_files']} open files")


def clock_skew(began: float, ended: float, facts: Facts) -> tuple[float, float]:
    """(Seconds that a host's clock is ahead of ours, how wrong that may be), after RFC 5905.

    `began` and `ended`: our clock when the question went out and the answer was there.
    """
    skew = ((facts["began"] - began) + (facts["ended"] - ended)) / 2
    return skew, ((ended - began) - (facts["ended"] - facts["began"])) / 2


def clock(host: str, first: str, skew: tuple[float, float], first_skew: tuple[float, float]) -> Finding:
    """The clock of a host against the first host's."""
    seconds, doubt = skew[0] - first_skew[0], skew[1] + first_skew[1]
    told = f"{seconds:+.1f} s" if abs(seconds) > doubt else f"within {doubt:.1f} s"
    if abs(seconds) - doubt > MOST_SKEW_SECONDS:
        return Finding(host, "clock", WARN, told, f"its clock is {abs(seconds):.0f} s "
                       f"{'ahead of' if seconds > 0 else 'behind'} that of {first}; switch time synchronisation on: "
                       "`timedatectl set-ntp true`")
    return Finding(host, "clock", PASS, told if host != first else "reference")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


CHECKS: dict[str, Check] = {"checkout": checkout, "python": python, "packages": packages, "cores": cores,
                            "memory": memory, "disk": disk, "limits": limits}
"""Those that need only the two hosts' facts."""
