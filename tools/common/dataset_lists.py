"""The training and the validation list of a dataset, as a set of keys: 8 bytes a line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from tools.dataset.sampling import KeySet, bytes_key


@dataclass
class FileList:
    """A list that was read: which files it names, how many of them are on disk."""

    keys: KeySet = field(default_factory=KeySet)
    found: int = 0         # named files that are on disk; whoever looks there counts
    digest: bytes | None = None  # SHA-256 of the file; `None` where it is not as select_training_files.py writes it


def read_list(path: Path) -> FileList | None:
    """The list `path`, `None` where there is none. What is wrong with its lines training says, see `read_file_list`."""
    names, digest, last, is_ours = FileList(), hashlib.sha256(), b"", True
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                name = line.rstrip(b"\r\n")
                is_ours &= line == name + b"\n" and last < name
                last = name
                if name:
                    names.keys.add(bytes_key(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); write the lists with "
                        "`python tools/select_training_files.py`") from None
    names.digest = digest.digest() if is_ours else None
    return names


def hash_of_lists(training: FileList | None, validation: FileList | None) -> str | None:
    """The hash that select_training_files.py printed; `None` where a list is missing or was changed by hand."""
    if training is None or validation is None or training.digest is None or validation.digest is None:
        return None
    return hashlib.sha256(training.digest + validation.digest).hexdigest()
