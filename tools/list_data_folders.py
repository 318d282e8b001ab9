"""List the contents of a dataset by source, with a hash to compare nodes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from pipeline.cli import run
from tools.dataset.sampling import Tally
from tools.dataset.sources import Source
from tools.dataset.statistics import Statistics, gather, tally, total, warnings
from tools.files import printable

_HEAD = (
    "source",
    "made by",
    "photos",
    "images",
    "by scale",
    "pixels per side",
    "GB",
    "format",
    "rejected",
    "training",
    "validation",
    "hash",
)
_RIGHT = {"photos", "images", "GB", "rejected", "training", "validation"}
_NUM_KINDS = 4  # scales and sizes per line; --json has all


@dataclass(frozen=True)
class Options:
    """List the sources of a dataset.

    Shows which tool made each one, how many photographs and crops it has, how many of these are in
    the training and validation lists, and how much space it takes. A source is a folder with a
    manifest, or a top-level folder of images that no manifest lists; the sizes of these are read
    from 16 files per folder. Equal hashes on two nodes mean equal crops, to the last pixel, as
    recorded in the manifests (`check_training_data.py` compares the files with them). No image is
    opened, nothing is changed.

    Example: python tools/list_data_folders.py --data-dir ~/dataset
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: the folder that contains the sources."""
    json: bool = False
    """Print one JSON object with all numbers and full hashes instead of the table."""


def main(options: Options) -> int:
    """Print the sources and the totals."""
    statistics = gather(options.data_dir.expanduser())
    if options.json:
        print(json.dumps(as_json(statistics), indent=1))
        return 0
    lines = [_line(source) for source in statistics.sources]
    print(_table([_HEAD, *lines, _total_line(statistics.sources)]))
    for sentence in _sentences(statistics):
        print(sentence)
    return 0


def _line(source: Source) -> tuple[str, ...]:
    """Cells of one source; "-" means unknown or not applicable."""
    rejects = str(source.rejects.total) if source.is_recorded else "-"
    digest = source.hash.hexdigest()[:12] if source.is_recorded else "-"
    return (
        printable(source.folder),
        printable(source.tool),
        str(source.photos.photographs),
        str(source.images),
        _kinds(source.scales, numeric=True),
        source.sides,
        f"{source.bytes / 1e9:.3f}",
        _names(source.formats),
        rejects,
        str(source.training),
        str(source.validation),
        digest,
    )


def _total_line(sources: list[Source]) -> tuple[str, ...]:
    recorded = [source for source in sources if source.is_recorded]
    return (
        "total",
        "",
        str(total(sources, "photographs")),
        str(total(sources, "images")),
        _kinds(tally(recorded, "scales"), numeric=True),
        "",
        f"{total(sources, 'bytes') / 1e9:.3f}",
        _names(tally(sources, "formats")),
        str(sum(source.rejects.total for source in recorded)),
        str(total(sources, "training")),
        str(total(sources, "validation")),
        "",
    )


def _kinds(counts: Tally, numeric: bool = False) -> str:
    """Number of images of each kind, as `1:300 2:70`."""
    if not counts:
        return "-"
    entries = counts.by_count()
    if numeric:
        entries.sort(
            key=lambda entry: (not entry[0].isdigit(), int(entry[0]) if entry[0].isdigit() else 0)
        )
    more = f" +{len(entries) - _NUM_KINDS}" if len(entries) > _NUM_KINDS else ""
    return " ".join(f"{kind}:{count}" for kind, count in entries[:_NUM_KINDS]) + more


def _names(counts: Tally) -> str:
    return "+".join(printable(kind) for kind, _ in counts.by_count()[:_NUM_KINDS]) or "-"


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for cell, width, name in zip(line, widths, _HEAD, strict=True)
        ).rstrip()
        for line in lines
    )


def _sentences(statistics: Statistics) -> list[str]:
    """The hashes, and anything that needs attention."""
    sentences = [
        f"LR images of the images in {printable(source.folder)}: {source.lr_images}"
        for source in statistics.sources
        if source.lr_images
    ]
    if statistics.linked_folders:
        sentences.append(
            "links to folders were not followed: "
            f"{', '.join(map(printable, statistics.linked_folders))}"
        )
    if statistics.quarantine.total:
        sentences.append(f"files in quarantine, not counted: {statistics.quarantine.total}")
    sentences += [f"warning: {warning}" for warning in warnings(statistics)]
    if statistics.lists_hash:
        sentences.append(f"hash of the lists (the same on every node): {statistics.lists_hash}")
    if statistics.hash.count:
        sentences.append(
            f"hash of the {statistics.hash.count} images listed in manifests (the same on every "
            f"node): {statistics.hash.hexdigest()}"
        )
    return sentences


def as_json(statistics: Statistics) -> dict[str, object]:
    """All numbers as JSON: sizes in bytes and pixels, hashes as 64 hexadecimal digits."""
    lists = {
        name: names and {"files": len(names.keys), "not_there": len(names.keys) - names.found}
        for name, names in (
            ("training", statistics.lists.training),
            ("validation", statistics.lists.validation),
        )
    }
    numbers = (
        "images",
        "lr_images",
        "bytes",
        "pixels",
        "missing",
        "training",
        "validation",
        "unlisted",
    )
    return {
        "data_dir": str(statistics.root),
        "sources": [
            {
                "folder": source.folder,
                "has_manifest": source.is_recorded,
                "tool": source.tool,
                "photographs": source.photos.photographs,
                "films": source.photos.films,
                **{name: getattr(source, name) for name in numbers},
                **{
                    name: dict(getattr(source, name))
                    for name in ("scales", "sizes", "formats", "decoders")
                },
                "rejects": {
                    gate: source.rejects.pictures.get(gate, 0) + source.rejects.crops.get(gate, 0)
                    for gate in source.rejects.gates()
                },
                "hash": source.hash.hexdigest() if source.is_recorded else None,
            }
            for source in statistics.sources
        ],
        "total": {
            "photographs": total(statistics.sources, "photographs"),
            "films": total(statistics.sources, "films"),
            "photographs_in_both_lists": total(statistics.sources, "in_both"),
            **{name: total(statistics.sources, name) for name in numbers},
            "rejects": statistics.rejects.total,
            "quarantine": statistics.quarantine.total,
        },
        "lists": lists,
        "lists_hash": statistics.lists_hash,
        "hash": statistics.hash.hexdigest() if statistics.hash.count else None,
        "warnings": warnings(statistics),
    }


if __name__ == "__main__":
    run(Options, main, ends_with_reader=True)
