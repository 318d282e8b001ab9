"""Whether every host has the same dataset: the doctor's check of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.doctor.checks import SYNC, Question
from launch.doctor.findings import FAIL, PASS, WARN, Finding


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
            return ask.say("dataset", FAIL, "no list", f"{directory}/{name}: {found['complaint']}; "
                           f"{select if wanted['complaint'] else sync}")
        if found["sha256"] != wanted["sha256"]:
            return ask.say("dataset", FAIL, "other list", f"{directory}/{name} names {found['count']} files, and that "
                           f"of {ask.first} {wanted['count']}, or others; {sync}")
    if own["missing"]:
        way_out = "write the lists anew, or bring the files back" if ask.is_first else sync
        return ask.say("dataset", FAIL, f"{own['missing']} missing", f"{own['missing']} of the {own['checked']} files "
                       f"looked for in {directory} are not there ({own['first_missing']}); {way_out}")
    other = sorted(name for name, digest in own["sample"].items() if first["sample"].get(name, digest) != digest)
    if other:
        return ask.say("dataset", FAIL, "other files", f"{len(other)} of {len(own['sample'])} sampled files of "
                       f"{directory} are not those of {ask.first} ({other[0]}); {sync}")
    if own["checked"] < own["files"]:
        seen = f"{own['checked']} of {own['files']}"
        return ask.say("dataset", WARN, f"{seen} seen", f"only {seen} files of {directory} could be looked for in "
                       "time: its disk is slow")
    return ask.say("dataset", PASS, f"{own['files']} files")
