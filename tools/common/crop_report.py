"""What a run of a cutting tool did, and how it is said."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tools.common.dataset_files import FINAL_GATES, REJECTS, shown
from tools.crops.cutting import Reject, Unit

NUM_SHOWN = 20


@dataclass
class Totals:
    """What a run did, for its report."""

    units: int = 0
    already: int = 0
    crops: int = 0
    pixels: int = 0
    bad: int = 0  # units that could not be decoded or read, in part or as a whole
    rejects: Counter[str] = field(default_factory=Counter)
    # The first ones of pictures (not of single crops): damage, and what is merely not fit.
    reasons: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    num_reasons: int = 0

    def count(self, unit: Unit, rejects: list[Reject], crops: int) -> None:
        """Take in what became of a unit."""
        self.crops += crops
        self.units += crops > 0
        self.bad += any(reject.gate not in FINAL_GATES for reject in rejects)
        for reject in rejects:
            self.rejects[reject.gate] += 1
            if reject.top is not None:
                continue
            self.num_reasons += 1
            reasons = self.reasons[reject.gate in FINAL_GATES]
            if len(reasons) < NUM_SHOWN:
                at = f" at {reject.time:.3f} s" if reject.time is not None else ""
                reasons.append(f"{shown(unit.photo)}{at}: {reject.reason}")


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def report(self, totals: Totals, out: Path, name: str) -> None:
        """Say what was done, how fast, and what was turned away."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        print(f"{totals.units} {name} cut into {totals.crops} crops in {out}; {totals.already} {name} were there "
              "already")
        if totals.crops:
            megapixels = totals.pixels / 1e6
            print(f"{megapixels:.1f} megapixels in {wall:.1f} s: {totals.crops / wall:.0f} crops/s, "
                  f"{megapixels / cpu:.1f} MPix and {totals.crops / cpu:.0f} crops per core-second")
        if totals.rejects:
            print(f"turned away: {', '.join(f'{count} {gate}' for gate, count in sorted(totals.rejects.items()))}; "
                  f"{out / REJECTS} says what and why")
        for line in [*totals.reasons[0], *totals.reasons[1]][:NUM_SHOWN]:
            print(f"rejected {line}")
        if totals.num_reasons > NUM_SHOWN:
            print(f"... and {totals.num_reasons - NUM_SHOWN} more in {out / REJECTS}")
