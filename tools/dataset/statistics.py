"""Statistics of a whole dataset: manifests, files, lists and rejects.

Each is read once and never held in memory as a whole.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST, TRAINING_LIST, VALIDATION_LIST
from pipeline.installation import as_typed
from tools.crops.cutting import REJECTS
from tools.crops.manifest import DatasetHash
from tools.dataset.rejects import Rejects, hash_of_lists, read_list, read_quarantine, read_rejects
from tools.dataset.sampling import Tally, path_key
from tools.dataset.sources import (
    Lists,
    ManifestReader,
    PlainReader,
    SampledImage,
    SampledImages,
    Source,
)
from tools.files import IMAGES, EntryKind, links_note, printable, scan
from tools.parallel import progress


@dataclass
class Statistics:
    """Statistics of a dataset."""

    root: Path
    lists: Lists
    samples: SampledImages
    sources: list[Source] = field(default_factory=list)
    hash: DatasetHash = field(default_factory=DatasetHash)  # of all crops in manifests
    rejects: Rejects = field(default_factory=Rejects)
    quarantine: Rejects = field(default_factory=Rejects)
    linked_folders: list[str] = field(default_factory=list)

    @property
    def recorded(self) -> list[Source]:
        """Sources with a manifest."""
        return [source for source in self.sources if source.is_recorded]

    @property
    def plain(self) -> list[Source]:
        """Folders with images in no manifest."""
        return [source for source in self.sources if not source.is_recorded]

    @property
    def lists_hash(self) -> str | None:
        """The hash that select_training_files.py printed.

        `None` if a list is missing or was changed by hand.
        """
        return hash_of_lists(self.lists.training, self.lists.validation)


def total(sources: list[Source], name: str) -> int:
    """Sum a number (a field of `Source` or of its `photos`) over sources."""
    return sum(
        getattr(source if hasattr(source, name) else source.photos, name) for source in sources
    )


def tally(sources: list[Source], name: str) -> Tally:
    """Sum a tally (a field of `Source`) over sources."""
    result = Tally()
    for source in sources:
        result.merge(getattr(source, name))
    return result


def gather(root: Path, samples: int = 0, seed: int = 0) -> Statistics:
    """Read the manifests, lists and rejects below `root`, and check which files exist.

    Recorded images are not opened. `samples` images are drawn for a report. Needs about 50 bytes of
    memory per crop. Raises `UserError` for a missing or empty dataset, or a broken manifest.
    """
    survey = _survey(root)
    lists = Lists(read_list(root / TRAINING_LIST), read_list(root / VALIDATION_LIST))
    statistics = Statistics(
        root, lists, SampledImages(samples, seed), linked_folders=survey.linked_folders
    )
    readers = _read_manifests(statistics, survey.manifests)
    plain = _find_files(statistics, readers, survey.images)
    statistics.sources = [*(reader.source for reader in readers.values()), *plain]
    statistics.sources.sort(key=lambda source: (source.folder, not source.is_recorded))
    _read_rejects(statistics, survey, seed)
    return statistics


@dataclass
class _Survey:
    """Contents of the dataset folder apart from the images themselves."""

    images: int = 0
    manifests: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    quarantines: list[str] = field(default_factory=list)
    linked_folders: list[str] = field(default_factory=list)


def _survey(root: Path) -> _Survey:
    survey = _Survey()
    names = {
        EntryKind.MANIFEST: survey.manifests,
        EntryKind.QUARANTINE: survey.quarantines,
        EntryKind.LINKED_FOLDER: survey.linked_folders,
    }
    for kind, name in scan(root, MANIFEST):
        survey.images += kind in IMAGES
        if kind in names:
            names[kind].append(name)
        elif kind is EntryKind.FOREIGN and posixpath.basename(name) == REJECTS:
            survey.rejects.append(name)
    if not (survey.images or survey.manifests):
        raise UserError(
            f"{root}: no images below this folder{links_note(survey.linked_folders)}; make crops "
            "with "
            "`python tools/images_to_data.py`, or give another --data-dir"
        )
    return survey


def _read_manifests(statistics: Statistics, manifests: list[str]) -> dict[str, ManifestReader]:
    """Map each folder to the reader of its manifest."""
    readers = {}
    sizes = {name: (statistics.root / name).stat().st_size for name in sorted(manifests)}
    with progress(sum(sizes.values()), "B") as bar:
        bar.unit_scale = True
        for name, size in sizes.items():
            reader = ManifestReader(
                statistics.root, name, statistics.lists, statistics.samples, statistics.hash
            )
            readers[reader.source.folder] = reader
            read = 0
            for offset in reader.read():
                bar.update(offset - read)
                read = offset
            bar.update(size - read)
    return readers


def _find_files(
    statistics: Statistics, readers: Mapping[str, ManifestReader], images: int
) -> list[Source]:
    """Check which recorded files exist; return the sources of files in no manifest."""
    found, plain = dict.fromkeys(readers, 0), {}
    with progress(images, "file") as bar:
        for kind, name in scan(statistics.root, MANIFEST):
            if kind not in IMAGES:
                continue
            bar.update()
            key = path_key(name)
            named = statistics.lists.find(key)
            owner = next(
                (
                    folder
                    for folder in _folders_above(name)
                    if folder in readers and key in readers[folder].files
                ),
                None,
            )
            if owner is not None:
                found[owner] += 1
                continue
            folder = name.partition("/")[0] if "/" in name else "."
            if folder not in plain:
                plain[folder] = PlainReader(statistics.root, folder, statistics.samples.seed)
            plain[folder].add(name, named)
            statistics.samples.plain.add(name, SampledImage(name, name, None))
    for folder, reader in readers.items():
        reader.source.missing = len(reader.files) - found[folder]
    return [reader.finish() for reader in plain.values()]


def _folders_above(name: str) -> Iterator[str]:
    """Yield the folders that contain a file, innermost first; the last is ".", the dataset."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
    yield "."


def _read_rejects(statistics: Statistics, survey: _Survey, seed: int) -> None:
    """Read the rejects of the cutting tools and of the quarantines."""
    by_folder = {source.folder: source for source in statistics.recorded}
    for name in sorted(survey.rejects):
        folder = posixpath.dirname(name)
        rejects = read_rejects(statistics.root / name, folder, seed)
        statistics.rejects.merge(rejects, seed)
        if (folder or ".") in by_folder:
            by_folder[folder or "."].rejects = rejects
    for name in sorted(survey.quarantines):
        statistics.quarantine.merge(
            read_quarantine(statistics.root / name, posixpath.dirname(name), seed), seed
        )


def warnings(statistics: Statistics) -> list[str]:
    """One line for each problem that will affect training or leave data unused."""
    lines = [
        f"{printable(source.folder)}: missing files: {source.missing}; rerun the tool that made "
        "them"
        for source in statistics.recorded
        if source.missing
    ]
    lists = statistics.lists
    if lists.training is None or lists.validation is None:
        names = [
            name
            for name, names in (
                (TRAINING_LIST, lists.training),
                (VALIDATION_LIST, lists.validation),
            )
            if names is None
        ]
        return [
            *lines,
            f"no {' and no '.join(names)}; write both with "
            + as_typed(f"`python tools/select_training_files.py --data-dir {statistics.root}`"),
        ]
    lines += [
        f"{printable(source.folder)}: images in neither list: {source.unlisted} of {source.images}"
        for source in statistics.sources
        if source.unlisted
    ]
    for name, names in ((TRAINING_LIST, lists.training), (VALIDATION_LIST, lists.validation)):
        if len(names.keys) > names.found:
            lines.append(
                f"{name}: missing files: {len(names.keys) - names.found}; write the lists again "
                "with "
                + as_typed(f"`python tools/select_training_files.py --data-dir {statistics.root}`")
            )
    in_both = total(statistics.sources, "in_both")
    if in_both:
        lines.append(f"photographs in both lists: {in_both}; validation would see training data")
    return lines
