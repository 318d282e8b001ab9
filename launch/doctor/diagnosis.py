"""The doctor's diagnosis of all hosts, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from launch.cluster.hostfile import Slots, world_size
from launch.doctor.findings import FAIL, WARN, Finding, format_table
from launch.doctor.network import Route
from launch.doctor.prediction import Network
from pipeline.cli import counted

ROWS = (
    "ssh",
    "checkout",
    "python",
    "packages",
    "GPUs",
    "cores",
    "memory",
    "disk",
    "clock",
    "dataset",
    "limits",
    "network",
    "all-reduce",
)


@dataclass
class Diagnosis:
    """What the doctor found, and the addresses and speeds that a run can use."""

    slots: Slots
    findings: list[Finding] = field(default_factory=list)
    route: Route = field(default_factory=Route)
    network: Network | None = None
    prediction: str = ""
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """One line per failed check: host, what is wrong, how to fix it."""
        return [finding.line for finding in self.findings if finding.verdict == FAIL]

    @property
    def warnings(self) -> list[str]:
        return [finding.line for finding in self.findings if finding.verdict == WARN]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def master_address(self) -> str:
        """The first host's address as the others reach it; "" if unknown."""
        return self.route.address

    @property
    def interfaces(self) -> dict[str, str]:
        """Host -> name of the interface that leads to the first host."""
        return {host: str(interface["name"]) for host, interface in self.route.interfaces.items()}

    def table(self) -> str:
        """Format everything for people: table, advice, network speeds and prediction."""
        lines = [
            f"{verdict}  {text}"
            for verdict, texts in ((FAIL, self.failures), (WARN, self.warnings))
            for text in texts
        ]
        end = (
            f"{counted(len(self.slots), 'host')}, {counted(world_size(self.slots), 'rank')}, "
            f"{self.seconds:.1f} s: {len(self.failures) or 'no'} failed, "
            f"{counted(len(self.warnings), 'warning') if self.warnings else 'no warnings'}"
        )
        network = self.network.text() if self.network else ""
        parts = [
            format_table(list(self.slots), ROWS, self.findings),
            "\n".join(lines),
            network,
            self.prediction,
            end,
        ]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values: times in seconds, `all_reduce` by size in bytes."""
        network = self.network and {
            "backend": self.network.backend,
            "ranks": self.network.ranks,
            "seconds": dict(self.network.seconds),
            "bus_bandwidth": self.network.best_known,
            "latency": self.network.latency,
        }
        return {
            "ok": self.ok,
            "slots": self.slots,
            # "told" is the former name of "summary"
            "findings": [{**asdict(finding), "told": finding.summary} for finding in self.findings],
            "master_address": self.master_address,
            "interfaces": self.interfaces,
            "all_reduce": network,
            "prediction": self.expected,
            "seconds": round(self.seconds, 3),
        }
