"""Inject faults into runs and tools by the hundred, and count what was lost."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from benchmarks.fault_families import FAMILIES
from benchmarks.fault_lives import Outcome, World
from pipeline.cli import RunError, UserError, counted, nearest, run

REPORT = re.compile("error|warning|stopped|Timeout|checkpoint|note")
LONGEST = 100  # characters of a report in the table


@dataclass(frozen=True)
class Options:
    """Inject seeded faults, continue each run with the same command, and compare its end with that
    of an undisturbed run, bit for bit.

    Results are appended to --results, one JSON line for each fault; an interrupted campaign
    continues where it stopped. Exit status 1 if a promise was broken.

    Example: python benchmarks/faults.py --family rank --count 200
    """

    family: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")
    ] = ()
    """Only this family (--list shows them); repeat it for several. Default: all."""
    count: int = 20
    """Faults of each family."""
    seed: int = 0
    """Seed of the faults."""
    results: Path = Path("faults.jsonl")
    """File of results."""
    list: bool = False
    """Only list the families."""
    table: bool = False
    """Only print the table of the results, in Markdown."""


def inject(world: World, family: str, seed: int, numbers: Iterable[int]) -> Iterator[dict]:
    """Inject these faults of a family; yield their records."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()  # empty without git
    for number in numbers:
        draw = random.Random(f"{family}/{seed}/{number}")
        name, began = f"{family}-{number}", time.monotonic()
        try:
            outcome = FAMILIES[family](world, draw, name)
        except RunError as error:
            outcome = Outcome(f"{family} {number}", wrong=[str(error)[-2000:]])
        if outcome.holds:
            shutil.rmtree(world.folder / name)
        yield {
            "family": family,
            "seed": seed,
            "number": number,
            **outcome.as_dict(),
            "took": round(time.monotonic() - began, 1),
            "commit": commit,
        }


def read(results: Path) -> list[dict[str, Any]]:
    """Return the records of earlier campaigns. A line that a kill has cut short is left out."""
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        results.write_text("\n".join(lines[:-1]) + "\n" if lines[:-1] else "", encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]


def table(records: list[dict[str, Any]]) -> str:
    """Return the table of results, in Markdown."""
    rows = [
        "| fault | count | held | steps lost: median, most | seconds lost: most | exit status "
        "(times) | reported most often |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(record["family"] for record in records):
        own = [record for record in records if record["family"] == family]
        steps = sorted(record["lost_steps"] for record in own)
        statuses = Counter(str(record["status"]) for record in own)
        reports = Counter(filter(None, (_report(record["reported"]) for record in own)))
        about = (FAMILIES[family].__doc__ or "").splitlines()[:1] if family in FAMILIES else []
        cells = [
            ": ".join([f"`{family}`", *about]).rstrip("."),
            _count(own),
            _count([record for record in own if record["holds"]]),
            f"{steps[len(steps) // 2]}, {steps[-1]}",
            f"{max(record['lost_seconds'] for record in own):.1f}",
            ", ".join(f"{status} ({number})" for status, number in statuses.most_common()),
            reports.most_common(1)[0][0] if reports else "-",
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    held = _count([record for record in records if record["holds"]])
    return "\n".join([*rows, "", f"{_count(records):,} faults; the promise held for {held:,}."])


def _count(records: list[dict[str, Any]]) -> int:
    return sum(record.get("count", 1) for record in records)


def _report(text: str) -> str:
    """Return a report as code, without the numbers and paths that differ from run to run.

    "" for a line that only shows progress.
    """
    if not REPORT.match(text):
        return ""
    text = re.sub(r"\d[\d.,]*", "N", re.sub(r"/\S+/", "…/", text))
    text = text.replace("|", "/").replace("`", "")
    return f"`{text if len(text) <= LONGEST else text[:LONGEST] + '…'}`"


def main(options: Options) -> int:
    """Inject the faults that the results lack. Returns 1 if a promise was broken."""
    unknown = [name for name in options.family if name not in FAMILIES]
    if unknown:
        raise UserError(f"--family {unknown[0]}: no such family{nearest(unknown[0], FAMILIES)}")
    if options.count < 1:
        raise UserError(f"--count {options.count} must be at least 1")
    names = options.family or tuple(FAMILIES)
    if options.list:
        for name in names:
            print(f"{name}: {(FAMILIES[name].__doc__ or '').splitlines()[0]}")
        return 0
    records = read(options.results)
    if options.table:
        print(table(records))
        return 0
    broken, done = 0, {(one["family"], one["seed"], one["number"]) for one in records}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        world = World(Path(folder))
        for family in names:
            left = [
                number
                for number in range(options.count)
                if (family, options.seed, number) not in done
            ]
            for record in inject(world, family, options.seed, left):
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                broken += not record["holds"]
                print(
                    f"{family} {record['number']}: {record['fault']} {record['moment']}: "
                    f"{'held' if record['holds'] else 'BROKEN'}, {record['lost_steps']} steps lost",
                    flush=True,
                )
    if broken:
        print(f"{counted(broken, 'fault')} broke the promise; see {options.results}")
    return 1 if broken else 0


if __name__ == "__main__":
    run(Options, main)
