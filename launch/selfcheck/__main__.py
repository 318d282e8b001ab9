"""Command line of the self-check.

python -m launch.selfcheck
"""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import json
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch.cluster.remote import SYNCED
from launch.doctor.probe import answer, probe_gpus
from launch.requirements_missing import pins
from launch.selfcheck.child import FAIL, PASS, SKIPPED, SectionResult, run_section
from launch.selfcheck.documents import filled_in, text_of
from launch.selfcheck.report import ROOT, Check
from launch.selfcheck.table import SECTIONS, Section
from pipeline.cli import UserError, nearest, run
from pipeline.distributed.gpus import CPU, VISIBLE, driver_version, is_cpu_wanted, list_gpus
from pipeline.files import write_atomically
from pipeline.timing import processor

LEAST_SECONDS = 8.0  # a section needs this long for its imports alone
DEFAULT_MINUTES = 8.0
_GPU_FIELDS = ("name", "memory.total", "pstate", "power.limit", "slowed_by", "mig.mode.current")


@dataclass(frozen=True)
class Options:
    """Check whether this machine's first GPU, or its CPU, computes correctly, and how fast.

    The sections do this project's own work, one after the other, each in its own process, so a
    crash or hang is one line of the result. Whatever is missing is skipped with the reason. Prints
    a table and writes everything to selfcheck-<gpu>-<date>.json, without names of hosts, users or
    folders: attach that file to a report. Exit status 1 if a check failed.

    Example: python -m launch.selfcheck --minutes 4
    """

    minutes: float = DEFAULT_MINUTES
    """Time limit in minutes; if it is too short, the least important sections are skipped."""
    only: Annotated[str, tyro.conf.arg(metavar="A,B")] = ""
    """Run only these sections: machine, arithmetic, engine, speed, loader, resume, training,
    inference, several."""
    json: Path | None = None
    """Output file. Default: selfcheck-<gpu>-<date>.json in the current folder."""
    docs: bool = False
    """Also print the lines of README and docs with the measured numbers filled in."""
    small: bool = False
    """Use small networks, small images and few steps, as on a CPU, to see whether things run."""


def main(options: Options) -> int:
    """Run the sections, print the results and write them to a file. Return 1 if a check failed."""
    if not 0 < options.minutes < 24 * 60:
        raise UserError(f"--minutes {options.minutes:g} must be above 0")
    chosen = choose(options.only)
    gpus = [] if is_cpu_wanted() else [gpu.name for gpu in list_gpus()]
    is_small = options.small or not gpus
    where = gpus[0] if gpus else "the CPU (no GPU in use), small, so its speeds mean little"
    print(
        f"self-check of {where}; sections: {len(chosen)}, time limit: {options.minutes:g} min",
        flush=True,
    )
    found = check(chosen, options.minutes * 60, is_small=is_small)
    file = options.json or Path(
        f"selfcheck-{slug(gpus[0] if gpus else 'cpu')}-{time.strftime('%Y%m%d-%H%M')}.json"
    )
    content = {
        "environment": environment_facts(is_small),
        "sections": [one.as_json() for one in found],
    }
    try:
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; give another path with --json"
        ) from error
    failed = [one.name for one in found if one.status == FAIL]
    verdict = f"failed: {', '.join(failed)}" if failed else "nothing failed"
    print(f"\n{verdict}; everything is in {file}, which you can attach to a report")
    if options.docs:
        print(
            "\n"
            + "\n".join(filled_in({one.id: one for section in found for one in section.checks}))
        )
    return 1 if failed else 0


def choose(only: str) -> list[Section]:
    """Return the sections named in `only`, or all of them, in the table's order."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in SECTIONS:
            raise UserError(f"--only {name}: unknown section{nearest(name, SECTIONS)}")
    return [section for name, section in SECTIONS.items() if not names or name in names]


def check(chosen: list[Section], seconds: float, *, is_small: bool) -> list[SectionResult]:
    """Run the sections within `seconds` and print each one as it ends."""
    end, scale = time.monotonic() + seconds, seconds / (60 * DEFAULT_MINUTES)
    if len(chosen) < len(SECTIONS):  # fewer sections share the time
        scale *= min(
            4.0, sum(one.seconds for one in SECTIONS.values()) / sum(one.seconds for one in chosen)
        )
    found: list[SectionResult] = []
    for section in chosen:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            found.append(SectionResult(section.name, SKIPPED, "out of time; raise --minutes"))
        else:
            found.append(
                run_section(
                    section,
                    share=min(left, section.seconds * scale),
                    most=min(left, max(section.limit, section.limit * scale)),
                    is_small=is_small,
                )
            )
        print(table(found[-1]), flush=True)
    return found


def table(found: SectionResult) -> str:
    """Format the results of a section for people."""
    lines = [
        f"\n{found.name:<12}{found.status:<8}{found.seconds:6.1f} s  "
        f"{found.why or SECTIONS[found.name].about}"
    ]
    for one in found.checks:
        name = one.id.removeprefix(f"{found.name}.")
        lines.append(
            f"  {_verdict(one):<8}{name:<34} {text_of(one):<24} {one.limit:<12} {one.note}".rstrip()
        )
    return "\n".join(lines)


def _verdict(check: Check) -> str:
    if check.ok is None:
        return SKIPPED if check.note.startswith(SKIPPED) else "number"
    return PASS if check.ok else FAIL


def environment_facts(is_small: bool) -> dict[str, Any]:
    """Describe the machine and its packages, without names of hosts, users or folders."""
    names = [name for name, _ in pins(ROOT / "requirements.txt")]
    facts = answer(
        {
            "root": str(ROOT),
            "synced": SYNCED,
            "dataset_dirs": [],
            "output_dir": str(ROOT),
            "packages": [*names, "triton"],
            "is_on_cpu": True,
        }
    )
    gpus = probe_gpus()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "small": is_small,
        "commit": facts["checkout"].get("commit", ""),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": facts["cores"],
        "memory": facts["memory"].get("total"),
        "shm": facts["limits"].get("shm"),
        "driver": driver_version(),
        "gpus": [{key: gpu.get(key) for key in _GPU_FIELDS} for gpu in gpus["gpus"]],
        "nvidia_smi": gpus["complaint"],
        "packages": facts["packages"],
        "variables": {
            name: os.environ[name]
            for name in (CPU, "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
            if name in os.environ
        }
        | _kinds_of_names(),
    }


def _kinds_of_names() -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES with UUIDs shortened, since they identify a machine."""
    if VISIBLE not in os.environ:
        return {}
    return {VISIBLE: re.sub(r"(GPU|MIG)-[^,]*", r"\1-…", os.environ[VISIBLE])}


def slug(name: str) -> str:
    """Turn a GPU's name into part of a file name: `NVIDIA H100 80GB HBM3` -> `h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(Options, main)
