"""List the files below a folder, in the same order on every machine."""

from __future__ import annotations

import enum
import fcntl
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.cli import UserError
from pipeline.data.image_files import QUARANTINE, is_encoded, is_npy
from pipeline.data.image_headers import UNREAD_SUFFIXES, suffix_of, unread_note


class EntryKind(enum.Enum):
    """Role of a directory entry in a dataset."""

    NPY = enum.auto()
    ENCODED = enum.auto()
    MANIFEST = enum.auto()
    UNREAD = enum.auto()  # an image in a format that is not supported
    FOREIGN = enum.auto()  # everything else, including hidden files
    LINKED_FOLDER = enum.auto()  # not followed
    QUARANTINE = enum.auto()  # a folder with that name; skipped


# Control characters, line and paragraph separators, and surrogates, which stand for bytes that are
# not UTF-8. Spaces of every width are allowed: names in Japanese have wide ones.
_NOT_IN_NAMES = frozenset({"Cc", "Cs", "Zl", "Zp"})
IMAGES = frozenset({EntryKind.NPY, EntryKind.ENCODED})


@dataclass
class Files:
    """Files below `root`, as sorted POSIX paths relative to it."""

    root: Path
    npy: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # images in unsupported formats
    linked_folders: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[str]:
        """All images, sorted."""
        return sorted(self.npy + self.encoded)

    def links_note(self) -> str:
        """Note on linked folders and unsupported images, to append to a "no images found" error."""
        note = unread_note(self.unread)
        return links_note(self.linked_folders) + (f" ({note})" if note else "")


def links_note(linked_folders: list[str]) -> str:
    """Note on linked folders that were not searched; `""` if there are none."""
    if not linked_folders:
        return ""
    return f" (links to folders are not followed: {', '.join(linked_folders[:3])})"


def converted_note(
    profiles: Counter[str], what: str, done: str = "they were converted to sRGB"
) -> str:
    """One-line report on images with a colour profile other than sRGB, counted by profile name."""
    names = ", ".join(f"{count} {name}" for name, count in profiles.most_common(5))
    return f"{what} with a colour profile other than sRGB: {profiles.total()} ({names}); {done}"


def walk(root: Path, manifest_name: str) -> Files:
    """Collect everything below `root` by kind.

    Links to folders are not followed, `quarantine` is skipped. Hidden files and folders (`.git`,
    macOS's `._photo.jpg`, our own half-written files) count as foreign. Raises `UserError` as
    `scan` does.
    """
    files = Files(root)
    lists = {
        EntryKind.NPY: files.npy,
        EntryKind.ENCODED: files.encoded,
        EntryKind.MANIFEST: files.manifests,
        EntryKind.UNREAD: files.unread,
        EntryKind.LINKED_FOLDER: files.linked_folders,
    }
    for kind, name in scan(root, manifest_name):
        if kind in lists:
            lists[kind].append(name)
    for names in lists.values():
        names.sort()
    return files


def sampled(names: list[str], sample: int | None, seed: int) -> list[str]:
    """Return `sample` of the names, drawn with `seed` and sorted, and say so; None returns all."""
    if sample is None:
        return names
    if sample < 1:
        raise UserError(f"--sample {sample}: must be at least 1; omit it for all images")
    if sample >= len(names):
        return names
    print(f"a sample of {sample} of {len(names)} images (seed {seed})")
    return sorted(random.Random(seed).sample(names, sample))


def lock_output(file: IO[Any] | int, out: Path, tool: str) -> None:
    """Lock the output folder `out` by a file (or descriptor) of it, until that is closed.

    Raises `UserError` if another run of `tool` holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{out}: another {tool}.py is writing there; wait for it or stop it"
        ) from None


def scan(root: Path, manifest_name: str) -> Iterator[tuple[EntryKind, str]]:
    """Yield (kind, path) for each entry below `root`, sorted by name within each folder.

    Holds only the names of the folders that are open, so memory stays small for millions of files.
    Raises `UserError` if `root` is not a folder or a folder cannot be read.
    """
    if not root.is_dir():
        if root.exists():
            raise UserError(f"{root}: not a folder; give the folder of the images")
        raise UserError(
            f"{root}: no such folder; give the folder of the images, or make one with "
            f"`python tools/images_to_data.py PHOTOS {root}/NAME`"
        )
    open_folders = [iter(_entries(root, "", manifest_name))]
    while open_folders:
        for kind, name in open_folders[-1]:
            if kind is None:
                open_folders.append(iter(_entries(root, name + "/", manifest_name)))
                break
            yield kind, name
        else:
            open_folders.pop()


def _entries(root: Path, prefix: str, manifest_name: str) -> list[tuple[EntryKind | None, str]]:
    """(kind, path) of each entry in one folder, by name; kind `None`: a folder to enter."""
    try:
        with os.scandir(root / prefix) as entries:
            return sorted(
                ((_kind(entry, manifest_name), prefix + entry.name) for entry in entries),
                key=lambda entry: entry[1],
            )
    except PermissionError as error:
        raise UserError(
            f"{root / prefix}: this folder cannot be read ({error.strerror}); fix its permissions "
            "or move it out of the dataset"
        ) from None


def _kind(entry: os.DirEntry[str], manifest_name: str) -> EntryKind | None:
    """Kind of a directory entry; `None` for a folder to descend into."""
    if entry.is_dir(follow_symlinks=False):
        if entry.name == QUARANTINE:
            return EntryKind.QUARANTINE
        return EntryKind.FOREIGN if entry.name.startswith(".") else None
    if entry.is_symlink() and _leads_to_folder(entry):
        return EntryKind.LINKED_FOLDER
    if _is_special(entry):
        return EntryKind.FOREIGN
    if entry.name == manifest_name:
        return EntryKind.MANIFEST
    if entry.name.startswith("."):
        return EntryKind.FOREIGN
    if is_npy(entry.name):
        return EntryKind.NPY
    if is_encoded(entry.name):
        return EntryKind.ENCODED
    return EntryKind.UNREAD if suffix_of(entry.name) in UNREAD_SUFFIXES else EntryKind.FOREIGN


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is, or links to, a pipe, socket or device.

    Opening one of these could block forever.
    """
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def name_fault(name: str) -> str:
    """Return why no crops can be made of a file with this name; `""` if they can.

    Their folder has the same name, and file lists must be able to hold it.
    """
    if "\ufffd" in name or not (
        name.isprintable()
        or all(unicodedata.category(letter) not in _NOT_IN_NAMES for letter in name)
    ):
        return "the file name has control characters or is not UTF-8; rename it"
    return ""


def printable(name: str) -> str:
    """File name in a form that any terminal and any UTF-8 file can hold."""
    return (
        name.encode("utf-8", "backslashreplace").decode("utf-8")
        if name.isprintable()
        else ascii(name)
    )


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a link that points to itself
        return False
