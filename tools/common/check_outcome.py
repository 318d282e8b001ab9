"""What a check of a dataset found."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.crops.manifest import DatasetHash
from tools.dataset.judging import Judgement


@dataclass
class Outcome:
    """What a check found, good files only as numbers: a dataset may have millions."""

    good: int = 0
    bytes: int = 0
    seconds: float = 0
    bad: list[Judgement] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    recorded: DatasetHash = field(default_factory=DatasetHash)  # of the good files that a manifest knows

    def take_back(self, judgement: Judgement, sha256: str) -> None:
        """What was counted as good is not: somebody must count it anew."""
        self.good -= 1
        if sha256:
            self.recorded.remove(judgement.path, sha256)
