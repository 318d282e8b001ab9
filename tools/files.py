"""Which files lie below a folder, in the same order on every machine."""

from __future__ import annotations

import enum
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_files import QUARANTINE, is_encoded, is_npy
from pipeline.data.image_headers import UNREAD_SUFFIXES, suffix_of, unread_note


class EntryKind(enum.Enum):
    """What a directory entry is to a dataset."""

    NPY = enum.auto()
    ENCODED = enum.auto()
    MANIFEST = enum.auto()
    UNREAD = enum.auto()  # an image of a format that is not read
    FOREIGN = enum.auto()  # everything else, hidden files included
    LINKED_FOLDER = enum.auto()  # not followed
    QUARANTINE = enum.auto()  # a folder of that name, passed by


IMAGES = frozenset({EntryKind.NPY, EntryKind.ENCODED})


@dataclass
class Files:
    """The files below `root`, as sorted POSIX paths relative to it."""

    root: Path
    npy: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # images of formats that are not read
    linked_folders: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[str]:
        """All images, sorted."""
        return sorted(self.npy + self.encoded)

    def links_note(self) -> str:
        """A half-sentence on linked folders, and on images of other formats, for an error about
        missing files."""
        note = unread_note(self.unread)
        return links_note(self.linked_folders) + (f" ({note})" if note else "")


def links_note(linked_folders: list[str]) -> str:
    """A half-sentence on folders that were not looked into, `""` where there are none."""
    if not linked_folders:
        return ""
    return f" (links to folders are not followed: {', '.join(linked_folders[:3])})"


def converted_note(
    profiles: Counter[str], what: str, done: str = "they were converted to sRGB"
) -> str:
    """A line on images whose colours are not sRGB's, by the names of their profiles."""
    names = ", ".join(f"{count} {name}" for name, count in profiles.most_common(5))
    return f"{profiles.total()} {what} have another colour profile than sRGB ({names}); {done}"


def walk(root: Path, manifest_name: str) -> Files:
    """Sort everything below `root` into its kinds. Links to folders are not followed, `quarantine`
    is passed by.

    Hidden files and folders (`.git`, macOS's `._photo.jpg`, half-written files of our own) count as
    foreign.
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


def scan(root: Path, manifest_name: str) -> Iterator[tuple[EntryKind, str]]:
    """`walk` one by one, in the order of the names within each folder; holds no more than the open
    folders' names."""
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
    """(kind, path) of what lies in one folder, by name; the kind of a folder to look into is
    `None`."""
    try:
        with os.scandir(root / prefix) as entries:
            return sorted(
                ((_kind(entry, manifest_name), prefix + entry.name) for entry in entries),
                key=lambda entry: entry[1],
            )
    except PermissionError as error:
        raise UserError(
            f"{root / prefix}: this folder cannot be read ({error.strerror}); mend its permissions "
            "or move it out of the dataset"
        ) from None


def _kind(entry: os.DirEntry[str], manifest_name: str) -> EntryKind | None:
    """What a directory entry is; `None` for a folder that is looked into."""
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
    """Whether an entry is, or leads to, a pipe, a socket or a device: opening it could wait for
    ever."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def printable(name: str) -> str:
    """A file name that any terminal and any UTF-8 file can hold."""
    return (
        name.encode("utf-8", "backslashreplace").decode("utf-8")
        if name.isprintable()
        else ascii(name)
    )


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a link that leads back to itself
        return False
