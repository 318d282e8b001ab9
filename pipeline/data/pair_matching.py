"""Match HR and LR files by their names."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.cli import UserError

_HR_MARK = re.compile(r"[_-]?(hr|gt)$", re.IGNORECASE)


@dataclass(frozen=True)
class NamePair:
    """Matching HR and LR files, as paths relative to their folders."""

    hr: str
    lr: str


def lr_mark(scale: int) -> re.Pattern[str]:
    """Return a pattern of the endings of LR names.

    These are `x4` (`_x4`, and `x4m`, `x4w`, `x4d` of DIV2K's tracks) for the scale, `_LR` and
    `_LQ`.
    """
    return re.compile(rf"[_-]?(x{scale}[mwd]?|{scale}x|lr|lq|lrbicx{scale})$", re.IGNORECASE)


def split_marked(names: list[str], scale: int) -> tuple[list[str], list[str]]:
    """Split the names of a folder with both sides into (HR names, LR names).

    Names without a mark belong to neither.
    """
    mark = lr_mark(scale)
    return (
        [name for name in names if _HR_MARK.search(_stem(name))],
        [name for name in names if mark.search(_stem(name))],
    )


def outside(names: list[str], folder: str) -> list[str]:
    """Return the names not below `folder`, for a side whose folder contains the other side's."""
    return [name for name in names if not name.startswith(f"{folder}/")]


def match_pairs(
    hr_names: list[str], lr_names: list[str], scale: int
) -> tuple[list[NamePair], list[str]]:
    """Return (pairs in the order of their HR names, names without a partner).

    Names match, in order of preference, if they have: the same path apart from the suffix; the same
    path apart from the marks of their side (`lr_mark`, `_HR`, `_GT`) too; the same file name in any
    folder; the same file name apart from the marks. Raises `UserError` if several files could be a
    name's partner.
    """
    mark = lr_mark(scale)
    stages: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (_path, _path),
        (lambda name: _HR_MARK.sub("", _path(name)), lambda name: mark.sub("", _path(name))),
        (_stem, _stem),
        (lambda name: _HR_MARK.sub("", _stem(name)), lambda name: mark.sub("", _stem(name))),
    ]
    partners: dict[str, str] = {}
    taken: set[str] = set()
    for number, (hr_key, lr_key) in enumerate(stages):
        hr_files, lr_files = _by_key(hr_names, hr_key), _by_key(lr_names, lr_key)
        for key, hr_group in hr_files.items():
            lr_group = lr_files.get(key, [])
            if (
                not lr_group
                or any(name in partners for name in hr_group)
                or any(name in taken for name in lr_group)
            ):
                continue  # its partner already belongs to a file of the same name in another folder
            if len(hr_group) == len(lr_group) == 1:
                partners[hr_group[0]] = lr_group[0]
                taken.add(lr_group[0])
            elif number == len(stages) - 1:
                _raise_ambiguous(key, hr_group if len(hr_group) > 1 else lr_group)
    unmatched = [name for name in hr_names if name not in partners] + [
        name for name in lr_names if name not in taken
    ]
    return [NamePair(name, partners[name]) for name in sorted(partners)], unmatched


def _raise_ambiguous(key: str, names: list[str]) -> None:
    raise UserError(
        f"{names[0]} and {names[1]}: both have the name {key!r}, so their partner is ambiguous; "
        "give folders in which each name occurs once, or use the same subfolders on both sides"
    )


def _by_key(names: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    files: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        files[key(name)].append(name)
    return files


def _path(name: str) -> str:
    return posixpath.splitext(name)[0]


def _stem(name: str) -> str:
    return posixpath.basename(_path(name))
