"""Places in README and docs for a GPU's numbers: `not measured <!-- selfcheck: loader.npy -->`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from launch.selfcheck.report import ROOT, Check

PLACE = re.compile(r"(?P<said>[^|<;:,(.]*?)\s*<!-- selfcheck: (?P<id>[a-z0-9_.-]+) -->")
"""The text about a number, followed by the comment with the id of its check."""


class DocumentPlace(NamedTuple):
    """A place in a document where a number belongs: the line, and the id of the check in it."""

    document: str
    line: str
    id: str


def documents() -> list[Path]:
    """Return README and all pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def places() -> Iterator[DocumentPlace]:
    """Yield every place for a number in README and docs."""
    for path in documents():
        for line in path.read_text(encoding="utf-8").splitlines():
            for match in PLACE.finditer(line):
                yield DocumentPlace(path.relative_to(ROOT).as_posix(), line, match["id"])


def filled_in(checks: Mapping[str, Check]) -> list[str]:
    """Return the lines of README and docs for which `checks` has numbers, with these filled in.

    Each line follows the name of its document.
    """
    lines: dict[tuple[str, str], str] = {}
    for place in places():
        check = checks.get(place.id)
        if check is None or check.value is None:
            continue
        key = place.document, place.line
        lines[key] = PLACE.sub(
            lambda match, check=check, wanted=place.id: (
                _with_value(match, check) if match["id"] == wanted else match[0]
            ),
            lines.get(key, place.line),
        )
    return [f"{document}: {line}" for (document, _), line in lines.items()]


def _with_value(match: re.Match[str], check: Check) -> str:
    lead = match["said"][: len(match["said"]) - len(match["said"].lstrip())]
    return f"{lead}{text_of(check)} <!-- selfcheck: {match['id']} -->"


def text_of(check: Check) -> str:
    """Format a check's value and unit: `1,234 images/s`."""
    value = check.value
    text = value if isinstance(value, str) else "-" if value is None else _digits(value)
    return f"{text} {check.unit}".strip()


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
