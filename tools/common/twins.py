"""Copies within a dataset: files that are the same as an earlier one, or nearly so."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tools.common.image_judging import Judgement, Verdict
from tools.common.near_duplicates import NearDuplicates


class Twins:
    """Takes the judgements on all files of a dataset, in order, and finds the good ones that repeat an earlier one.

    Files are remembered by their number in that order, not by name, so that millions need little memory.
    """

    def __init__(self, root: Path, max_distance: int) -> None:
        """`max_distance` is of perceptual hashes, in bits: up to it two images count as the same."""
        self._root = root
        self._hashes = NearDuplicates(max_distance)
        self._count = 0
        self._found: list[tuple[Judgement, int]] = []

    def is_twin(self, judgement: Judgement) -> bool:
        """Whether an earlier file shows the same; every judgement must be asked for, in order."""
        number, self._count = self._count, self._count + 1
        if judgement.verdict is not Verdict.GOOD or not judgement.perceptual_hash:
            return False
        earlier = self._hashes.add(number, bytes.fromhex(judgement.perceptual_hash))
        if earlier is None:
            return False
        self._found.append((judgement, int(earlier)))
        return True

    def verdicts(self, names: Iterable[str]) -> list[Judgement]:
        """The judgements on the twins; `names` are those of all files, in the same order as before."""
        wanted = {earlier for _, earlier in self._found}
        named = {number: name for number, name in enumerate(names) if number in wanted} if wanted else {}
        return [self._verdict(judgement, named[earlier]) for judgement, earlier in self._found]

    def _verdict(self, judgement: Judgement, earlier: str) -> Judgement:
        try:
            is_same = filecmp.cmp(self._root / judgement.path, self._root / earlier, shallow=False)
        except OSError:  # one of them went while we looked
            is_same = False
        what, gate = ("the same file as", "duplicate") if is_same else ("nearly the same image as", "near-duplicate")
        return replace(judgement, verdict=Verdict.BAD, gate=gate, reason=f"{what} {earlier} (--keep-duplicates)")
