"""Start and watch a short all-reduce between all hosts; `allreduce.py` is each host's part."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from launch.cluster import remote
from launch.cluster.hostfile import Slots
from launch.cluster.remote import ssh
from launch.doctor.findings import FAIL, PASS, Finding
from launch.doctor.network import Route
from launch.doctor.prediction import Network

JOIN_SECONDS = 40  # for every host to import torch and to meet the others
SECONDS = JOIN_SECONDS + 30  # for the whole measurement
GRACE_SECONDS = 4  # for the other hosts to end, once one has failed
_ENDED = "ended"


@dataclass
class AllReduce:
    """The measurement. If it failed, `network` is None and `findings` say why."""

    network: Network | None = None
    findings: list[Finding] = field(default_factory=list)


def all_reduce(
    slots: Slots, route: Route, addresses: Mapping[str, str], python: str, *, on_gpus: bool
) -> AllReduce:
    """Measure an all-reduce between the hosts of `slots`.

    On GPUs it has one rank per slot, over NCCL; else one rank per host, over Gloo. `addresses` maps
    IP addresses to hosts, to name hosts in the network library's error messages.
    """
    tasks = task_of(slots, route, on_gpus=on_gpus)
    answers = run_together(
        {host: remote.parcel("launch.doctor.allreduce", task) for host, task in tasks.items()},
        python,
    )
    measured = AllReduce()
    host_of = {rank: host for host, task in tasks.items() for rank in task["ranks"]}
    for host, answer in answers.items():
        complaint = answer if isinstance(answer, str) else _complaint(answer)
        if complaint and complaint != _ENDED:
            measured.findings.append(
                Finding(host, "all-reduce", FAIL, "failed", _readable(complaint, addresses))
            )
    lead = answers.get(next(iter(slots)))
    ranks = lead["ranks"] if isinstance(lead, dict) else {}
    absent = sorted({host_of[rank] for rank in ranks.get("0", {}).get("absent", [])})
    reported = {finding.host for finding in measured.findings}
    measured.findings += [
        Finding(
            host,
            "all-reduce",
            FAIL,
            "absent",
            f"did not join within {JOIN_SECONDS} s; check for a slow disk, or a firewall between "
            "it and the first host",
        )
        for host in absent
        if host not in reported
    ]
    seconds = ranks.get("0", {}).get("seconds")
    if seconds and not measured.findings:
        measured.network = Network(
            len(host_of),
            "NCCL" if on_gpus else "Gloo",
            {int(size): value for size, value in seconds.items()},
        )
        speeds = (
            f"{measured.network.latency * 1e6:.0f} us, {measured.network.best_known / 1e9:.2f} GB/s"
        )
        measured.findings = [
            Finding(host, "all-reduce", PASS, "sums correct" if position else speeds)
            for position, host in enumerate(slots)
        ]
    elif not measured.findings:
        measured.findings.append(
            Finding(
                next(iter(slots)),
                "all-reduce",
                FAIL,
                "failed",
                f"it did not end within {SECONDS} s; try again, or skip it with --no-allreduce",
            )
        )
    return measured


def task_of(slots: Slots, route: Route, *, on_gpus: bool) -> dict[str, dict[str, Any]]:
    """Return each host's task for `allreduce.answer`."""
    number_of = {host: len(numbers) if on_gpus else 1 for host, numbers in slots.items()}
    tasks, rank = {}, 0
    for host, number in number_of.items():
        name = route.interfaces[host]["name"]
        tasks[host] = {
            "ranks": list(range(rank, rank + number)),
            "devices": list(slots[host]) if on_gpus else None,
            "world_size": sum(number_of.values()),
            "address": route.address,
            "port": route.port,
            "seconds": SECONDS,
            "join_seconds": JOIN_SECONDS,
            "environment": {
                "GLOO_SOCKET_IFNAME": name,
                "NCCL_SOCKET_IFNAME": f"={name}",
                "OMP_NUM_THREADS": "1",
            },
        }
        rank += number
    return tasks


def run_together(parcels: Mapping[str, str], python: str) -> dict[str, Any]:
    """Run the parcels on all hosts at once; return each host's answer, or an error message.

    The message is "ended" for a host that was stopped because another one failed.
    """
    with ExitStack() as stack:
        outputs = {
            host: (
                stack.enter_context(tempfile.TemporaryFile()),
                stack.enter_context(tempfile.TemporaryFile()),
            )
            for host in parcels
        }
        processes = {
            host: subprocess.Popen(
                ssh(host, remote.command(python)),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=complaints,
            )
            for host, (out, complaints) in outputs.items()
        }
        try:
            for host, process in processes.items():
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(parcels[host].encode())
                    process.stdin.flush()
            stopped = _wait(processes, outputs)
        finally:
            _end(processes.values())
        return {
            host: _ENDED if host in stopped else _outcome(processes[host], *outputs[host])
            for host in parcels
        }


def _wait(
    processes: Mapping[str, subprocess.Popen[bytes]],
    outputs: Mapping[str, tuple[IO[bytes], IO[bytes]]],
) -> set[str]:
    """Wait until all have ended, at most `GRACE_SECONDS` after one has failed.

    Returns the hosts that have not ended.
    """
    deadline, failed = time.monotonic() + SECONDS, False
    while time.monotonic() < deadline:
        running = {host for host, process in processes.items() if process.poll() is None}
        if not running:
            return set()
        if not failed:
            ended = {
                host: _outcome(processes[host], *outputs[host])
                for host in processes.keys() - running
            }
            failed = any(
                isinstance(outcome, str) or _complaint(outcome) for outcome in ended.values()
            )
            if failed:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)
    return {host for host, process in processes.items() if process.poll() is None}


def _end(processes: Any) -> None:
    """End each ssh. That closes stdin on the other host, which ends the program there."""
    for process in processes:
        with suppress(OSError):
            process.stdin.close()
    for process in processes:
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(process: subprocess.Popen[bytes], out: IO[bytes], complaints: IO[bytes]) -> Any:
    texts = []
    for file in (out, complaints):
        file.seek(0)
        texts.append(file.read(remote.MOST_CHARACTERS).decode(errors="replace"))
    answer = remote.answer(texts[0])
    return (
        answer
        if answer is not None
        else remote.last_line(texts[1]) or f"ended with status {process.returncode}"
    )


def _complaint(answer: Mapping[str, Any]) -> str:
    """Return what is wrong with a host's answer, or ""."""
    for rank, said in answer["ranks"].items():
        if "error" in said:
            return f"rank {rank}: {said['error']}"
        if said.get("is_right") is False:
            return (
                f"rank {rank}: wrong sum: the network, its driver or memory corrupts data; do not "
                "train until this is repaired (find the host by trying --exclude)"
            )
    return ""


def _readable(complaint: str, addresses: Mapping[str, str]) -> str:
    """Add host names to the addresses in a network error, and what to do about it."""
    text = re.sub(
        r"\d+\.\d+\.\d+\.\d+",
        lambda match: f"{match[0]} ({addresses[match[0]]})" if match[0] in addresses else match[0],
        complaint,
    )
    if re.search(
        r"timed? ?out|refused|Connection (closed|reset)|unreachable|EADDRINUSE", text, re.IGNORECASE
    ):
        text += "; open all TCP ports between all hosts, not only to the first"
    return text


def hosts_of(interfaces: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return address -> host for the addresses that only one host has."""
    pairs = [(one["address"], host) for host, own in interfaces.items() for one in own]
    return {
        address: host for address, host in pairs if sum(other == address for other, _ in pairs) == 1
    }
