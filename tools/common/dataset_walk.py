"""Which files lie below a folder, in the same order on every machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_files import QUARANTINE, is_encoded, is_npy


@dataclass
class Files:
    """The files below `root`, as sorted POSIX paths relative to it."""

    root: Path
    npy: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    foreign: int = 0  # everything else, hidden files included
    linked_folders: list[str] = field(default_factory=list)  # not followed
    quarantined: int = 0  # folders of that name, passed by

    @property
    def images(self) -> list[str]:
        """All images, sorted."""
        return sorted(self.npy + self.encoded)

    def links_note(self) -> str:
        """A half-sentence on linked folders, for an error about files that were expected but not found."""
        if not self.linked_folders:
            return ""
        return f" (links to folders are not followed: {', '.join(self.linked_folders[:3])})"


def walk(root: Path, manifest_name: str) -> Files:
    """Sort everything below `root` into its kinds. Links to folders are not followed, `quarantine` is passed by.

    Hidden files and folders (`.git`, macOS's `._photo.jpg`, half-written files of our own) count as foreign.
    """
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}; give the folder of the images, or make one with "
                        f"`python tools/images_to_data.py PHOTOS {root}/NAME`")
    files = Files(root)
    folders = [""]
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    _sort_in(files, folders, entry, prefix + entry.name, manifest_name)
        except PermissionError as error:
            raise UserError(f"{root / prefix}: this folder cannot be read ({error.strerror}); mend its permissions "
                            "or move it out of the dataset") from None
    for names in (files.npy, files.encoded, files.manifests, files.linked_folders):
        names.sort()
    return files


def _sort_in(files: Files, folders: list[str], entry: os.DirEntry[str], name: str, manifest_name: str) -> None:
    """Put one directory entry where it belongs."""
    if entry.is_dir(follow_symlinks=False):
        if entry.name == QUARANTINE:
            files.quarantined += 1
        elif not entry.name.startswith("."):
            folders.append(name + "/")
    elif entry.is_symlink() and entry.is_dir():
        files.linked_folders.append(name)
    elif entry.name == manifest_name:
        files.manifests.append(name)
    elif entry.name.startswith("."):
        files.foreign += 1
    elif is_npy(entry.name):
        files.npy.append(name)
    elif is_encoded(entry.name):
        files.encoded.append(name)
    else:
        files.foreign += 1
