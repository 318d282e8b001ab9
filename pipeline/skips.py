"""Files that training passed over because they are bad: counted over all ranks, named once."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.data.source import Skip

NUM_NAMED = 20  # bad files named in a report


class SkippedFiles:
    """What all ranks have passed over in this process, the same on every rank."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        """Path -> why it cannot be trained on."""

    def add(self, skips: Iterable[Skip]) -> tuple[dict[str, int], str]:
        """Count what all ranks have skipped since the last time: numbers for the log, and a line for people."""
        skips = list(skips)
        new = {skip.path: skip.reason for skip in skips if skip.path not in self.reasons}
        self.reasons |= new
        samples = len({skip.sample for skip in skips})  # what stands in may have been bad, too
        named = "".join(f"\n  {path}: {reason}" for path, reason in list(new.items())[:NUM_NAMED])
        return ({"samples": samples, "bad_files": len(self.reasons)},
                f"samples replaced since the last report, for files that are bad: {samples}; such files so far: "
                f"{len(self.reasons)}{named}")
