"""What one host has of a dataset. Of the standard library alone: the doctor sends it to every host."""

from __future__ import annotations

import hashlib
import os
import random
import time
from typing import Any

LISTS = ("training_file_list.txt", "validation_file_list.txt")
SECONDS = 6  # for looking whether files are there: a list of millions on a network disk is not looked through
SAMPLE = 200
END_BYTES = 1 << 15  # at both ends of each file of the sample, that are compared


def probe(directory: str) -> dict[str, Any]:
    """The two lists, how many of their files are missing, and digests of a sample that is the same everywhere."""
    root = os.path.expanduser(directory)
    found: dict[str, Any] = {"directory": directory, "lists": {}, "files": 0, "missing": 0, "first_missing": "",
                             "checked": 0, "sample": {}}
    listed: set[str] = set()
    for list_name in LISTS:
        try:
            with open(os.path.join(root, list_name), "rb") as file:
                own = {line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in file} - {""}
        except OSError as error:
            found["lists"][list_name] = {"count": 0, "sha256": "", "complaint": error.strerror or str(error)}
            continue
        listed |= own
        digest = hashlib.sha256("\n".join(sorted(own)).encode("utf-8", "replace")).hexdigest()
        found["lists"][list_name] = {"count": len(own), "sha256": digest, "complaint": ""}
    names = sorted(listed)
    found["files"] = len(names)
    found["sample"] = _sample(root, names)
    _look(root, names, found)
    return found


def _sample(root: str, names: list[str]) -> dict[str, str]:
    """`SAMPLE` names, evenly apart -> a digest of size and first bytes; "" for a file that cannot be read."""
    apart = max(1, len(names) // SAMPLE)
    deadline = time.monotonic() + SECONDS
    sample: dict[str, str] = {}
    for name in names[::apart][:SAMPLE]:
        if time.monotonic() > deadline:
            break
        sample[name] = _digest(os.path.join(root, name))
    return sample


def _digest(path: str) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a named pipe must not keep us waiting
            size = os.fstat(file.fileno()).st_size
            ends = file.read(END_BYTES)
            file.seek(max(0, size - END_BYTES))
            return hashlib.sha256(b"%d " % size + ends + file.read(END_BYTES)).hexdigest()[:12]
    except OSError:
        return ""


def _look(root: str, names: list[str], found: dict[str, Any]) -> None:
    """Count the files that are not there, in an order that is the same on every host, as far as the time allows."""
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    deadline = time.monotonic() + SECONDS
    for position, index in enumerate(order):
        if position % 256 == 0 and time.monotonic() > deadline:
            break
        found["checked"] += 1
        if not os.path.isfile(os.path.join(root, names[index])):
            found["missing"] += 1
            found["first_missing"] = min(found["first_missing"] or names[index], names[index])
