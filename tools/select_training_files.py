"""Write the lists of training and validation files, split by photograph.

The lists are the same on every machine.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from pipeline.cli import UserError, counted, nearest, run
from pipeline.data.image_files import (
    MANIFEST,
    TRAINING_LIST,
    VALIDATION_LIST,
    BadNpyError,
    is_listable,
    is_npy,
    lists_hash,
    npy_layout,
    write_file_list,
)
from pipeline.data.image_headers import BadImageError, read_header, unread_note
from tools.crops.manifest import iterate_records
from tools.files import printable, walk


@dataclass(frozen=True)
class Options:
    """Split the images of a dataset into training and validation files, by photograph.

    All crops of one photograph go to the same side, so validation never sees training data.
    Manifests tell which crops belong together; a file in no manifest counts as a photograph of its
    own. The split depends only on the seed and the photographs' names. Every node gets the same
    lists (compare the printed hash), and adding photographs moves almost none of the others.

    Writes DATA_DIR/training_file_list.txt and DATA_DIR/validation_file_list.txt, one path per line,
    relative to DATA_DIR.

    Example: python tools/select_training_files.py --data-dir ~/dataset --validation-count 20
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: all images below this folder are used, except those in quarantine."""
    validation_fraction: float = 0.05
    """Fraction of the photographs used for validation, at least one photograph."""
    validation_count: int | None = None
    """Number of photographs used for validation, instead of a fraction."""
    validation_photo: tuple[str, ...] = ()
    """Photographs to use for validation, by name relative to DATA_DIR, with wildcards
    ('*chelsea*'), instead of drawing them."""
    seed: int = 0
    """Seed of the draw; another one selects other photographs for validation."""
    min_size: int = 0
    """Omit files with a side shorter than this many pixels; 0 opens no file."""


def main(options: Options) -> int:
    """Write both lists and print what they contain."""
    root = options.data_dir.expanduser()
    _check_options(options)
    files = walk(root, MANIFEST)
    if not files.images:
        raise UserError(
            f"{root}: no images below this folder{files.links_note()}; make crops with "
            "`python tools/images_to_data.py`, or give another --data-dir"
        )
    photo_of, lr_sides = _read_manifests(root, files.manifests)
    images = [name for name in files.images if name not in lr_sides]
    images = _without_strays(images, photo_of, files.manifests)
    names = [
        name for name in images if options.min_size == 0 or _is_large(root / name, options.min_size)
    ]
    if len(names) < len(images):
        print(
            f"omitted {counted(len(images) - len(names), 'file')} smaller than "
            f"{options.min_size} pixels"
        )
    names = _without_unlistable(names)
    photos = group_by_photo(names, photo_of)
    validation = choose_validation(photos, options)
    lists = {
        TRAINING_LIST: sorted(
            name for photo in photos.keys() - validation for name in photos[photo]
        ),
        VALIDATION_LIST: sorted(name for photo in validation for name in photos[photo]),
    }
    for file_name, chosen in lists.items():
        try:
            write_file_list(root / file_name, chosen)
        except OSError as error:
            raise UserError(
                f"{root / file_name}: cannot be written: {error.strerror}; free disk space or fix "
                "its permissions"
            ) from error
    print(
        f"training:   {counted(len(photos) - len(validation), 'photograph')}, "
        f"{counted(len(lists[TRAINING_LIST]), 'file')} in "
        f"{root / TRAINING_LIST}"
    )
    print(
        f"validation: {counted(len(validation), 'photograph')}, "
        f"{counted(len(lists[VALIDATION_LIST]), 'file')} in "
        f"{root / VALIDATION_LIST}"
    )
    if files.unread:
        print(unread_note(files.unread))
    if files.linked_folders:
        print(f"links to folders were not followed: {', '.join(files.linked_folders)}")
    print(
        "hash of the lists (the same on every node): "
        f"{lists_hash(lists[TRAINING_LIST], lists[VALIDATION_LIST])}"
    )
    return 0


def _check_options(options: Options) -> None:
    """Raise `UserError` for options that are out of range or in conflict."""
    if not 0 < options.validation_fraction < 1:
        raise UserError(
            f"--validation-fraction {options.validation_fraction:g}: must be between 0 and 1, "
            "e.g. 0.05"
        )
    if options.validation_count is not None and options.validation_count < 1:
        raise UserError(
            f"--validation-count {options.validation_count}: must be at least 1 photograph"
        )
    if options.validation_count is not None and options.validation_photo:
        raise UserError(
            "--validation-count and --validation-photo: the first draws photographs, the second "
            "names them; use only one of them"
        )
    if options.min_size < 0:
        raise UserError(f"--min-size {options.min_size}: must be 0 or more pixels")


def _read_manifests(root: Path, manifests: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return (crop -> photograph, LR sides of pairs).

    LR sides are in no list, because their HR sides lead to them.
    """
    photo_of, lr_sides = {}, set()
    for record in iterate_records(root, manifests):
        if record.role == "lr":
            lr_sides.add(record.path)
        else:
            photo_of[record.path] = sys.intern(record.photo)
    return photo_of, lr_sides


def _without_strays(
    images: list[str], photo_of: Mapping[str, str], manifests: Iterable[str]
) -> list[str]:
    """Drop images that the manifest of their folder does not list.

    Their source is unknown, so they could end up on both sides of the split.
    """
    folders = {name.rpartition("/")[0] for name in manifests}
    if "" in folders:
        kept = [name for name in images if name in photo_of]
    else:
        prefixes = tuple(f"{folder}/" for folder in folders)
        kept = [name for name in images if name in photo_of or not name.startswith(prefixes)]
    if len(kept) < len(images):
        known = set(kept)
        stray = next(name for name in images if name not in known)
        print(
            f"omitted {len(images) - len(kept)} files that the manifest of their folder does not "
            f"list, such as {printable(stray)}: the tool that made them was stopped; run it again"
        )
    return kept


def _without_unlistable(names: list[str]) -> list[str]:
    """Drop names that a file list cannot hold, and print how many there are."""
    kept = [name for name in names if is_listable(name)]
    if len(kept) < len(names):
        example = next(name for name in names if not is_listable(name))
        print(
            f"omitted {counted(len(names) - len(kept), 'file')} whose names a file list cannot "
            f"hold, because they have line breaks or are not UTF-8, such as {printable(example)}; "
            "rename them"
        )
    return kept


def group_by_photo(names: Iterable[str], photo_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Map each photograph to its files; a file in no manifest is its own photograph."""
    photos: dict[str, list[str]] = {}
    for name in names:
        photos.setdefault(photo_of.get(name, name), []).append(name)
    return photos


def choose_validation(photos: Iterable[str], options: Options) -> set[str]:
    """Choose the named photographs, or those with the lowest hash of name and seed."""
    photos = sorted(photos)
    if options.validation_photo:
        chosen = _named(photos, options.validation_photo)
    else:
        count = options.validation_count or max(1, round(options.validation_fraction * len(photos)))
        # A photograph's rank depends only on itself and the seed, so new photographs move almost
        # none of the others.
        chosen = set(sorted(photos, key=lambda photo: _rank(options.seed, photo))[:count])
    if len(chosen) >= len(photos):
        raise UserError(
            f"{len(chosen)} of {len(photos)} photographs would be used for validation, leaving "
            "none for training; add photographs, or use fewer for validation"
        )
    return chosen


def _named(photos: list[str], patterns: Iterable[str]) -> set[str]:
    """Photographs that match any pattern; each pattern must match at least one."""
    chosen = set()
    for pattern in patterns:
        matches = {photo for photo in photos if fnmatchcase(photo, pattern)}
        if not matches:
            raise UserError(
                f"--validation-photo {pattern!r} matches none of the {len(photos)} photographs"
                f"{nearest(pattern, photos[:1000])}"
            )
        chosen |= matches
    return chosen


def _rank(seed: int, photo: str) -> bytes:
    """Pseudo-random rank of a photograph, the same on every machine."""
    return hashlib.sha256(f"{seed}\0{photo}".encode("utf-8", "surrogateescape")).digest()


def _is_large(path: Path, min_size: int) -> bool:
    """Whether both sides of an image have at least `min_size` pixels."""
    try:
        if is_npy(path):
            layout = npy_layout(path)
            return min(layout.height, layout.width) >= min_size
        with open(path, "rb") as file:
            header = read_header(file)
        return min(header.height, header.width) >= min_size
    except BadNpyError:
        raise
    except (BadImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: {reason}; run `python tools/check_training_data.py --clean` first"
        ) from error


if __name__ == "__main__":
    run(Options, main)
