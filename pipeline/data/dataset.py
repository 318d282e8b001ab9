"""The dataset folders of a run: their file lists, where LR is stored, and a hash of it all."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

from pydantic_core import from_json

from pipeline.cli import UserError
from pipeline.data.depth import Depths
from pipeline.data.image_files import (
    MANIFEST,
    TRAINING_LIST,
    VALIDATION_LIST,
    is_encoded,
    is_npy,
    lists_hash,
    read_file_list,
    write_file_list,
)
from pipeline.data.pair_matching import match_pairs
from pipeline.files import parse_json

Item = TypeVar("Item")


@dataclass(frozen=True)
class Folder:
    """One dataset folder: its root, the names in its two lists and, if paired, the LR paths."""

    root: Path
    training: list[str]
    validation: list[str]
    lr_paths: dict[str, str] | None = None  # name in a list -> path of its LR file
    # The folder of the LR files, if they are not stored beside HR.
    lr_root: Path | None = None
    number: int = 0  # position among the folders of a run

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)


@dataclass(frozen=True)
class Image:
    """One file of a dataset."""

    name: str  # as written in its list
    path: str
    lr_path: str | None
    folder: int = 0  # position of its folder


class LazySequence(Sequence[Item]):
    """A sequence over the names in several folders' lists, with each item made on access.

    The lists may hold millions of names, while a run opens only a few files per second. Making
    items on access keeps a run from waiting until all of them are built.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        lists: Sequence[Sequence[str]],
        make: Callable[[Folder, str], Item],
    ) -> None:
        self._folders, self._lists, self._make = folders, lists, make
        self._starts = list(itertools.accumulate(map(len, lists), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(place)
        which = bisect.bisect_right(self._starts, number) - 1
        return self._make(self._folders[which], self._lists[which][number - self._starts[which]])

    def suffixes(self) -> set[str]:
        """Return the suffixes of all names, from the last dot on.

        A name without a dot contributes its last letter.
        """
        return {name[name.rfind(".") :] for names in self._lists for name in names}


@dataclass(frozen=True)
class Dataset:
    """All folders of a run, in the given order, which the numbers of samples depend on."""

    folders: tuple[Folder, ...]

    @property
    def training(self) -> Sequence[Image]:
        return LazySequence(self.folders, [folder.training for folder in self.folders], _image)

    @property
    def validation(self) -> Sequence[Image]:
        return LazySequence(self.folders, [folder.validation for folder in self.folders], _image)

    @property
    def training_paths(self) -> LazySequence[str]:
        """Paths of the training files."""
        return LazySequence(self.folders, [folder.training for folder in self.folders], Folder.path)

    @property
    def training_lr_paths(self) -> list[str]:
        """Paths of the LR files of the training files; "" in folders whose LR is not read."""
        return [
            "" if folder.lr_paths is None else folder.lr_paths[name]
            for folder in self.folders
            for name in folder.training
        ]

    @property
    def folder_sizes(self) -> list[int]:
        """Number of training files in each folder."""
        return [len(folder.training) for folder in self.folders]

    def identity(self) -> dict[str, str | int]:
        """Return hashes and counts that are equal on every node with the same data."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, str | int]:
        lists = [names for folder in self.folders for names in (folder.training, folder.validation)]
        roots = [root for folder in self.folders for root in (folder.root, folder.lr_root) if root]
        return {
            "lists_sha256": lists_hash(*lists),
            "contents_sha256": contents_hash(self.folders),
            # Swapped folders, or another LR folder, may hold exactly the same names.
            "folders": ", ".join(root.absolute().name for root in roots) if len(roots) > 1 else "",
            "training_files": sum(self.folder_sizes),
            "validation_files": sum(len(folder.validation) for folder in self.folders),
        }

    @cached_property
    def depths(self) -> Depths:
        """The depths of the files, of training and validation, HR and LR.

        Long lists are represented by some of their files. Only headers are read.
        """
        found = Depths()
        for folder in self.folders:
            for names in (folder.training, folder.validation):
                found.look_at(LazySequence((folder,), [names], Folder.path))
                if folder.lr_paths is not None:
                    found.look_at([folder.lr_paths[name] for name in names])
        return found

    def write_lists(self, directory: Path) -> None:
        """Copy the file lists into a run folder, so that `differences` can compare them later."""
        directory.mkdir(exist_ok=True)
        for number, folder in enumerate(self.folders):
            write_file_list(directory / f"{number}_{TRAINING_LIST}", folder.training)
            write_file_list(directory / f"{number}_{VALIDATION_LIST}", folder.validation)

    def differences(self, directory: Path) -> list[str]:
        """Compare with the lists that `write_lists` stored in `directory`.

        Returns one line per list that differs, e.g. `["training_file_list.txt of DIR: 1 new
        (a.npy), 2 gone (b.npy, …)"]`.
        """
        found, num_kept = [], len([*directory.glob(f"*_{TRAINING_LIST}")])
        if num_kept and num_kept != len(self.folders):
            found.append(
                f"number of dataset folders: {num_kept} in the run, {len(self.folders)} asked for"
            )
        for number, folder in enumerate(self.folders):
            for list_name, names in (
                (TRAINING_LIST, folder.training),
                (VALIDATION_LIST, folder.validation),
            ):
                kept = directory / f"{number}_{list_name}"
                if not kept.is_file():
                    continue
                before = set(read_file_list(kept, folder.root))
                changes = [(sorted({*names} - before), "new"), (sorted(before - {*names}), "gone")]
                parts = [
                    f"{len(some)} {what} ({some[0]}{', …' if some[1:] else ''})"
                    for some, what in changes
                    if some
                ]
                if parts:
                    found.append(f"{list_name} of {folder.root}: {', '.join(parts)}")
        return found


def _image(folder: Folder, name: str) -> Image:
    return Image(
        name,
        folder.path(name),
        folder.lr_paths[name] if folder.lr_paths is not None else None,
        folder.number,
    )


def read_dataset(
    roots: Sequence[Path],
    *,
    paired_scale: int | None = None,
    lr_roots: Sequence[Path] = (),
    paired_folders: Sequence[bool] = (True,),
) -> Dataset:
    """Read the file lists of every root and, with `paired_scale`, find the LR file of each image.

    LR files of scale `paired_scale` are stored beside HR (`NAME_lr<scale>.SUFFIX`, as
    tools/pairs_to_data.py writes them) or in the root's own folder in `lr_roots`, matched by name.
    `paired_folders` says which roots have LR files, one value for each or one for all; `lr_roots`
    has a folder for each root that has. Raises `UserError` for contradicting options, bad lists and
    missing LR files.
    """
    if len(paired_folders) not in (1, len(roots)):
        raise UserError(
            f"data.degradation lists {len(paired_folders)} degradations for {len(roots)} dataset "
            f"folder{'s' if len(roots) > 1 else ''}; give one for each --dataset-dir, in the same "
            "order, or a single one"
        )
    paired = list(paired_folders) * (len(roots) if len(paired_folders) == 1 else 1)
    if lr_roots and paired_scale is None:
        raise UserError(
            "--lr-dir has no effect unless LR is read; set data.degradation=paired, or omit it"
        )
    if lr_roots and len(lr_roots) != sum(paired):
        which = "" if all(paired) else " whose degradation is paired"
        raise UserError(
            f"{len(lr_roots)} --lr-dir for {sum(paired)} --dataset-dir{which}; give one for each, "
            "in the same order"
        )
    numbers = [number for number, is_paired in enumerate(paired) if is_paired]
    lr_root_of = dict(zip(numbers, lr_roots, strict=bool(lr_roots)))
    if len({root.resolve() for root in roots}) != len(roots):
        raise UserError(
            "--dataset-dir names a folder twice; to sample it more often, set data.weights"
        )
    folders = []
    for number, root in enumerate(roots):
        training, validation = (
            read_file_list(root / name, root) for name in (TRAINING_LIST, VALIDATION_LIST)
        )
        lr_paths = None
        lr_root = lr_root_of.get(number)
        if paired_scale is not None and paired[number]:
            names = list(dict.fromkeys([*training, *validation]))
            lr_paths = (
                _lr_in_folder(root, names, lr_root, paired_scale)
                if lr_root
                else _lr_beside_hr(root, names, paired_scale)
            )
        folders.append(Folder(root, training, validation, lr_paths, lr_root, number))
    return Dataset(tuple(folders))


def _lr_beside_hr(root: Path, names: Iterable[str], scale: int) -> dict[str, str]:
    paths = {}
    for name in names:
        stem, suffix = posixpath.splitext(name)
        paths[name] = os.path.join(root, f"{stem}_lr{scale}{suffix}")
    first = next(iter(paths.values()))
    if not os.path.exists(first):  # a later missing file is reported when it is read
        raise UserError(
            f"{first}: no such file, but data.degradation=paired needs it; make pairs with "
            f"`python tools/pairs_to_data.py HR_DIR LR_DIR --scale {scale} --out DIR`, or give the "
            "folder of the LR files with --lr-dir"
        )
    return paths


def _lr_in_folder(root: Path, names: list[str], lr_root: Path, scale: int) -> dict[str, str]:
    lr_names = sorted(_images_below(lr_root))
    if not lr_names:
        raise UserError(f"{lr_root}: no images in this folder, given with --lr-dir")
    pairs, _ = match_pairs(names, lr_names, scale)
    paths = {pair.hr: os.path.join(lr_root, pair.lr) for pair in pairs}
    unmatched = [name for name in names if name not in paths]
    if unmatched:
        raise UserError(
            f"{root}/{unmatched[0]}: no matching LR file in {lr_root} ({len(unmatched)} of "
            f"{len(names)} files have none); apart from marks such as x{scale}, _LR and _HR, the "
            "names must be equal"
        )
    return paths


def _images_below(folder: Path) -> Iterator[str]:
    def raise_user_error(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: {error.strerror}; --lr-dir must be a folder of LR images"
        )

    for directory, folders, files in os.walk(folder, onerror=raise_user_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if (is_npy(name) or is_encoded(name)) and not name.startswith("."):
                yield os.path.relpath(os.path.join(directory, name), folder).replace(os.sep, "/")


def contents_hash(folders: Iterable[Folder]) -> str:
    """Return the SHA-256 (hex) of the listed files' names and pixel hashes in the manifests.

    No image is read. Replacing a damaged file with a good copy does not change the hash; rebuilding
    the dataset does. Files that no manifest lists do not count.
    """
    digest = hashlib.sha256()
    for folder in folders:
        names = [*folder.training, *folder.validation]
        sides = [(folder.root, names)]
        if folder.lr_paths is not None:
            root = folder.lr_root or folder.root
            sides.append(
                (
                    root,
                    [
                        os.path.relpath(folder.lr_paths[name], root).replace(os.sep, "/")
                        for name in names
                    ],
                )
            )
        for root, side in sides:
            known = _recorded(root, side)
            if not known:
                continue
            pairs = (
                known.items()
                if len(known) == len(side)
                else ((name, known.get(name)) for name in side)
            )
            text = "".join([f"{name}\0{sha256}\n" for name, sha256 in pairs if sha256 is not None])
            digest.update(text.encode())
    return digest.hexdigest()


def _recorded(root: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Map each name to the SHA-256 of its pixels that a manifest records.

    Manifests are looked up in the folder and in the two levels of folders below it. The result is
    in the order of `names`, with None for names that no manifest lists; it is empty if there is no
    manifest.
    """
    places = {""}
    for parent in _parents(names):
        parts = [part for part in parent.split("/") if part not in ("", ".")]
        places |= {"/".join(parts[:depth]) for depth in (1, 2) if len(parts) >= depth}
    manifests = [(place, os.path.join(root, place, MANIFEST)) for place in sorted(places)]
    manifests = [(place, manifest) for place, manifest in manifests if os.path.isfile(manifest)]
    known: dict[str, str | None] = dict.fromkeys(names) if manifests else {}
    for place, manifest in manifests:
        before = f"{place}/" if place else ""
        with open(manifest, "rb") as lines:
            for line in lines:
                try:
                    values = from_json(line)  # three times as fast as json
                except ValueError:
                    values = _parse_leniently(line)
                try:
                    name, sha256 = str(values["path"]), str(values["sha256"])
                except (KeyError, TypeError, IndexError):  # the checker reports such lines
                    continue
                if before and name[:1] != "/":
                    name = before + name
                if name in known:
                    known[name] = sha256
    return known


def _parse_leniently(line: bytes) -> Any:
    """Parse a line with Python's own, more lenient JSON parser; None if that fails too."""
    try:
        return parse_json(line)
    except ValueError:
        return None


def _parents(names: Sequence[str]) -> set[str]:
    """Return the folders that contain the names."""
    text = "\n".join([*names, ""])
    # PurePosixPath drops a final "/" or "/.", so the parent of such a name is shorter than the text
    # before its last slash.
    if "/\n" in text or ".\n" in text:
        return {str(PurePosixPath(name).parent) for name in names}
    return {name.rpartition("/")[0] for name in names}
