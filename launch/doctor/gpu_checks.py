"""What nvidia-smi's answers mean for a run: the doctor's check of GPUs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.doctor.checks import Question
from launch.doctor.findings import FAIL, PASS, WARN, Finding

USED_MIB = 1024  # more than this, and others are at work on a GPU
POWER_SHARE = 0.95  # of the power that the GPU has by default
Gpu = Mapping[str, Any]


def gpus(ask: Question) -> Iterator[Finding]:
    """Enough, alike, free, and neither slowed nor damaged."""
    told, first = ask.facts["nvidia"], ask.first_facts["nvidia"]
    if told["complaint"]:
        yield ask.say("GPUs", FAIL, "driver silent", f"{told['complaint']}; reboot, or install the NVIDIA driver anew")
        return
    found: list[Gpu] = told["gpus"]
    if not found and not first["gpus"]:
        yield ask.say("GPUs", PASS, "no GPU: CPU ranks")
        return
    if bool(found) != bool(first["gpus"]):
        has, lacks = (ask.host, ask.first) if found else (ask.first, ask.host)
        yield ask.say("GPUs", FAIL, f"{len(found)} GPUs", f"{has} has GPUs and {lacks} has none; leave one of them out "
                      "with --exclude, or install the NVIDIA driver")
        return
    missing = sorted({*ask.slots} - {gpu["index"] for gpu in found})
    if missing:
        numbers = ", ".join(map(str, missing))
        yield ask.say("GPUs", FAIL, f"{len(found)} GPUs", f"it has {len(found)} GPUs, and the hostfile wants "
                      f"{numbers}, too (counted from 0); write slots={len(found)}")
    used = [gpu for gpu in found if gpu["index"] in ask.slots]
    yield from _differences(ask, used, first["gpus"])
    for gpu in used:
        for trouble in _troubles(gpu):
            number = f"GPU {gpu['index']}"
            yield ask.say("GPUs", WARN, f"{number}: see below", f"{number} ({gpu['name']}) {trouble}")
    yield ask.say("GPUs", PASS, _summary(used))


def _differences(ask: Question, used: Sequence[Gpu], first: Sequence[Gpu]) -> Iterator[Finding]:
    names = {*(gpu["name"] for gpu in used), *(gpu["name"] for gpu in first)}
    if len(names) > 1:
        yield ask.say("GPUs", WARN, "mixed GPUs", f"GPUs differ ({', '.join(sorted(map(str, names)))}): every step "
                      "takes as long as on the slowest, and the batch must fit the smallest")
    drivers = [{gpu["driver_version"] for gpu in gpus} for gpus in (used, first)]
    if used and drivers[0] != drivers[1]:
        theirs, ours = (", ".join(sorted(map(str, some))) for some in drivers)
        yield ask.say("GPUs", WARN, f"driver {theirs}", f"NVIDIA driver {theirs}, and {ask.first} has {ours}; install "
                      "the same on all hosts")


def _troubles(gpu: Gpu) -> Iterator[str]:
    busy, total = gpu.get("memory.used"), gpu.get("memory.total")
    if busy is not None and busy > USED_MIB:
        yield (f"has {busy / 1024:.1f} of {(total or 0) / 1024:.0f} GiB in use by others; see `nvidia-smi` there, or "
               "leave it out with --exclude")
    limit, usual = gpu.get("power.limit"), gpu.get("power.default_limit")
    if limit and usual and limit < POWER_SHARE * usual:
        yield f"may take {limit:.0f} W of its usual {usual:.0f}; `nvidia-smi -pl {usual:.0f}` as root ends that"
    if gpu.get("slowed_by"):
        warm = gpu.get("temperature.gpu")
        yield f"is slowed by {', '.join(gpu['slowed_by'])}" + (f" at {warm} C" if warm else "") + \
            "; look after cooling and power supply"
    if gpu.get("ecc.errors.uncorrected.volatile.total"):
        yield (f"has had {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors since its driver "
               "started; reset it (`nvidia-smi -r`) and, if they come back, have it exchanged")
    if gpu.get("mig.mode.current") == "Enabled":
        yield "is cut into MIG slices, of which a rank sees one; `nvidia-smi -mig 0` as root ends that"


def _summary(used: Sequence[Gpu]) -> str:
    kinds = Counter((gpu["name"], round((gpu.get("memory.total") or 0) / 1024)) for gpu in used)
    states = sorted({gpu["pstate"] for gpu in used if gpu.get("pstate")})
    told = ", ".join(f"{count} x {str(name).removeprefix('NVIDIA ')} {size} GiB"
                     for (name, size), count in kinds.items())
    return f"{told} {'/'.join(states)}".rstrip()
