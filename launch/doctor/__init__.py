"""Check every host before a run: what would break there, and how to fix it. See `diagnose`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.cluster import remote
from launch.cluster.hostfile import Slots, world_size
from launch.cluster.remote import run_on
from launch.doctor import measure
from launch.doctor.checks import (
    CHECKS,
    Check,
    Comparison,
    clock,
    clock_skew,
    datasets,
    explain,
    gpus,
)
from launch.doctor.diagnosis import ROWS, Diagnosis
from launch.doctor.findings import FAIL, PASS, Finding
from launch.doctor.network import find_route
from launch.doctor.prediction import Network, all_reduce_seconds, efficiency, prediction
from launch.requirements_missing import pins
from pipeline.cli import UserError

_FACT_CHECKS: dict[str, tuple[str, Check]] = {
    **{name: (name, check) for name, check in CHECKS.items()},
    "disk": ("output", CHECKS["disk"]),
    "GPUs": ("nvidia", gpus),
    "dataset": ("datasets", datasets),
}
"""Row of the table -> the fact that the check needs, and the check."""


def diagnose(
    slots: Slots,
    *,
    dataset_dirs: Sequence[Path],
    output_dir: Path,
    interface: str = "",
    timeout: float = 90,
    parameters: Callable[[], int] | None = None,
    step_seconds: float | None = None,
    say: Callable[[str], None] = print,
    master_address: str = "",
    ports: Sequence[int] = (),
    with_all_reduce: bool = True,
    is_on_cpu: bool = False,
) -> Diagnosis:
    """Check all hosts of `slots` at once.

    Hosts that do not answer cost `timeout` seconds altogether, not each.

    Args:
        dataset_dirs: must be the same on every host; `~` is each host's own home.
        output_dir: the run folder, which need not exist yet.
        interface: name of the network interface to use; default: the one to the first host.
        parameters: returns the number of trained parameters, for the prediction; it is called
            while the hosts answer.
        step_seconds: seconds of work of one rank per step, for the prediction.
        master_address: the first host's address; default: one that all hosts reach.
        ports: must be free on the first host.
        is_on_cpu: the run does not use GPUs, so they are not checked.

    Raises `UserError` if ssh is not installed here.
    """
    if not shutil.which("ssh"):
        raise UserError("ssh is not installed on this machine; run `apt install openssh-client`")
    began, python = time.monotonic(), sys.executable
    found = Diagnosis(slots)
    say(f"doctor: asking {', '.join(slots)}")
    task = {
        "root": str(remote.ROOT),
        "synced": remote.SYNCED,
        "dataset_dirs": [str(path) for path in dataset_dirs],
        "output_dir": str(output_dir),
        "is_on_cpu": is_on_cpu,
        "packages": [name for name, _ in pins(remote.ROOT / "requirements.txt")],
    }
    with ThreadPoolExecutor(1) as counting:
        counted = counting.submit(parameters) if parameters else None
        facts = _ask(found, task, timeout, python)
    _check_facts(found, facts, python)
    _check_network(found, facts, python, interface, master_address, ports)
    if with_all_reduce:
        _check_all_reduce(found, facts, python, say)
    if found.network and counted:
        _predict(found, found.network, counted.result(), step_seconds)
    order = {check: position for position, check in enumerate(ROWS)}
    hosts = {host: position for position, host in enumerate(slots)}
    found.findings.sort(key=lambda finding: (hosts[finding.host], order[finding.check]))
    found.seconds = time.monotonic() - began
    return found


def _ask(found: Diagnosis, task: Mapping[str, Any], timeout: float, python: str) -> dict[str, Any]:
    """Return the facts of every host that answers, with its clock's `skew` against ours."""
    stdin = remote.parcel("launch.doctor.probe", task)

    def ask(host: str) -> tuple[Finding, Any]:
        began = time.time()
        done = run_on([host], remote.command(python, "python3"), timeout=timeout, stdin=stdin)[host]
        ended, answer = time.time(), remote.answer(done.stdout)
        if done.status in (255, 124):
            cause, remedy = explain(done)
            return Finding(host, "ssh", FAIL, cause, f"{cause}; {remedy}"), None
        if not isinstance(answer, dict):
            why = (
                "python3 is not installed; run `apt install python3-venv`"
                if done.status == 127
                else f"its Python failed: {done.complaint}; Python 3.10 or newer is needed"
            )
            return Finding(
                host, "python", FAIL, "none" if done.status == 127 else "broken", why
            ), None
        answer["skew"] = clock_skew(began, ended, answer)
        return Finding(host, "ssh", PASS, f"{ended - began:.1f} s"), answer

    with ThreadPoolExecutor(len(found.slots)) as pool:
        answers = dict(zip(found.slots, pool.map(ask, found.slots), strict=True))
    found.findings += [finding for finding, _ in answers.values()]
    return {host: answer for host, (_, answer) in answers.items() if answer is not None}


def _check_facts(found: Diagnosis, facts: Mapping[str, Any], python: str) -> None:
    if not facts:
        return
    first = next(iter(facts))  # of the hosts that have answered
    for host, own in facts.items():
        pair = Comparison(
            host, found.slots[host], own, first, facts[first], world_size(found.slots), python
        )
        for row, (fact, check) in _FACT_CHECKS.items():
            if _is_unknown(own[fact]):
                why = f"could not be determined: {own[fact]['error']}"
                found.findings.append(Finding(host, row, FAIL, "unknown", why))
            elif not _is_unknown(facts[first][fact]):
                found.findings += check(pair)
        found.findings.append(clock(host, first, own["skew"], facts[first]["skew"]))


def _is_unknown(fact: Any) -> bool:
    return isinstance(fact, dict) and set(fact) == {"error"}


def _check_network(
    found: Diagnosis,
    facts: Mapping[str, Any],
    python: str,
    interface: str,
    master_address: str,
    ports: Sequence[int],
) -> None:
    hosts = [host for host in facts if not _is_unknown(facts[host]["interfaces"])]
    if hosts[:1] != list(found.slots)[:1]:  # every connection is tested against the first host
        return
    found.route = find_route(
        hosts,
        {host: facts[host]["interfaces"] for host in hosts},
        python,
        interface=interface,
        master_address=master_address,
        ports=ports,
    )
    found.findings += found.route.findings


def _check_all_reduce(
    found: Diagnosis, facts: Mapping[str, Any], python: str, say: Callable[[str], None]
) -> None:
    """Run an all-reduce between the hosts that can take part; the others have failed already."""
    failed = {
        finding.host
        for finding in found.findings
        if finding.verdict == FAIL
        and finding.check in ("ssh", "python", "packages", "GPUs", "network")
    }
    slots = {
        host: numbers
        for host, numbers in found.slots.items()
        if host not in failed and host in found.interfaces
    }
    on_gpus = bool(slots) and all(facts[host]["nvidia"]["gpus"] for host in slots)
    if (
        next(iter(slots), "") != next(iter(found.slots))
        or (world_size(slots) if on_gpus else len(slots)) < 2
    ):
        return
    say(f"doctor: all-reduce between {', '.join(slots)}")
    measured = measure.all_reduce(
        slots,
        found.route,
        measure.hosts_of({host: facts[host]["interfaces"] for host in slots}),
        python,
        on_gpus=on_gpus,
    )
    found.findings += measured.findings
    found.network = measured.network


def _predict(
    found: Diagnosis, network: Network, parameters: int, step_seconds: float | None
) -> None:
    ranks = world_size(found.slots)
    if ranks < 2:
        return
    found.prediction = prediction(network, ranks, parameters, step_seconds)
    for name, size in (("fp16", 2), ("fp32", 4)):
        seconds = all_reduce_seconds(parameters * size, ranks, network)
        kept = None if step_seconds is None else efficiency(step_seconds, seconds)
        found.expected[name] = {
            "all_reduce_seconds": seconds,
            "step_seconds": step_seconds,
            "efficiency": kept,
        }
