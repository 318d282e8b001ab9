"""Copies within a dataset: files that are the same as an earlier one, or nearly so."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tools.crops.duplicates import NearDuplicates
from tools.dataset.judging import Judgement, Verdict
from tools.files import shown


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

    def verdicts(self, names: Iterable[str]) -> tuple[list[Judgement], list[Judgement]]:
        """(Judgements on the twins, judgements on earlier files that were called good and are not).

        The latter are links to a twin: the file stays, not the link. `names` are those of all files, in the same order
        as before.
        """
        wanted = {earlier for _, earlier in self._found}
        named = {number: name for number, name in enumerate(names) if number in wanted} if wanted else {}
        targets: dict[int, str] = {}  # the file that stays in place of an earlier link to it
        for judgement, earlier in self._found:
            if earlier not in targets and self._is_link_to(named[earlier], judgement.path):
                targets[earlier] = judgement.path
        twins, links = [], []
        for judgement, earlier in self._found:
            if targets.get(earlier) == judgement.path:
                twins.append(judgement)
                links.append(self._verdict(replace(judgement, path=named[earlier], bytes=0), judgement.path))
            else:
                twins.append(self._verdict(judgement, targets.get(earlier, named[earlier])))
        return twins, links

    def _is_link_to(self, name: str, other: str) -> bool:
        """Whether `name` is a symbolic link that leads to the file `other`, and that one is none."""
        try:
            return ((self._root / name).is_symlink() and not (self._root / other).is_symlink()
                    and os.path.samefile(self._root / name, self._root / other))
        except OSError:  # one of them went while we looked
            return False

    def _verdict(self, judgement: Judgement, earlier: str) -> Judgement:
        path, other = self._root / judgement.path, self._root / earlier
        what, gate = "nearly the same image as", "near-duplicate"
        try:
            if os.path.samefile(path, other):
                what, gate = ("a link to" if path.is_symlink() or other.is_symlink() else "a hard link of"), "duplicate"
            elif filecmp.cmp(path, other, shallow=False):
                what, gate = "the same file as", "duplicate"
        except OSError:  # one of them went while we looked
            pass
        return replace(judgement, verdict=Verdict.BAD, gate=gate, reason=f"{what} {shown(earlier)} (--keep-duplicates)")
