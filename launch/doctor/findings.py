"""The doctor's findings, one or more per host and check, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
_WORST_FIRST = (FAIL, WARN, PASS)
WIDTH = 118  # of the table, in characters
LEAST_CELL = 22
NOT_CHECKED = "-"


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host."""

    host: str
    check: str
    verdict: str  # PASS, WARN or FAIL
    summary: str  # a few words for the table
    advice: str = ""  # what is wrong and how to fix it, in one line; empty for PASS

    @property
    def line(self) -> str:
        return f"{self.host}: {self.check}: {self.advice or self.summary}"


def worst(findings: Iterable[Finding]) -> Finding | None:
    """Return the finding that represents several of them in one cell of the table."""
    return min(findings, key=lambda finding: _WORST_FIRST.index(finding.verdict), default=None)


def format_table(hosts: Sequence[str], checks: Sequence[str], findings: Sequence[Finding]) -> str:
    """Format a table with a row per check and a column per host.

    If there are too many hosts for one block, those with the same verdicts share a column.
    """
    cells = {host: [_cell(findings, host, check) for check in checks] for host in hosts}
    label = max(map(len, checks)) + 2
    per_block = max(1, (WIDTH - label) // (LEAST_CELL + 2))
    columns = [(host, cells[host]) for host in hosts]
    if len(hosts) > per_block:
        columns = _grouped(columns)
    blocks = [columns[i : i + per_block] for i in range(0, len(columns), per_block)]
    return "\n\n".join(_block(block, checks, label) for block in blocks)


def _cell(findings: Iterable[Finding], host: str, check: str) -> str:
    finding = worst(
        finding for finding in findings if (finding.host, finding.check) == (host, check)
    )
    return f"{finding.verdict} {finding.summary}" if finding else NOT_CHECKED


def _grouped(columns: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Merge the columns of hosts with the same verdicts into the first one's."""
    groups: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for host, cells in columns:
        groups.setdefault(tuple(cell.partition(" ")[0] for cell in cells), []).append((host, cells))
    return [
        (group[0][0] + (f" and {len(group) - 1} like it" if group[1:] else ""), group[0][1])
        for group in groups.values()
    ]


def _shortened(text: str, width: int) -> str:
    """Cut `text` to `width` characters, ending in an ellipsis."""
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _block(columns: Sequence[tuple[str, Sequence[str]]], checks: Sequence[str], label: int) -> str:
    room = (WIDTH - label) // len(columns) - 2
    wanted = [max(map(len, (head, *cells))) for head, cells in columns]
    widths = [min(room, width) for width in wanted]
    rows = [
        ("", *(head for head, _ in columns)),
        *((check, *(cells[i] for _, cells in columns)) for i, check in enumerate(checks)),
    ]
    return "\n".join(
        (
            row[0].ljust(label)
            + "  ".join(
                _shortened(cell, width).ljust(width)
                for cell, width in zip(row[1:], widths, strict=True)
            )
        ).rstrip()
        for row in rows
    )
