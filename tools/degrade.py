"""Degrade images and videos as training does, and record what was drawn for each LR image."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import UserError, counted, run
from pipeline.config.recipe import degradation_spec, load_recipe
from pipeline.data.degradations import KINDS, build_degradation
from pipeline.data.degradations.base import KEYS, WORDS, Degradation, Parameters
from pipeline.data.degradations.host import Workspace, in_depth, levels_of
from pipeline.data.image_files import MANIFEST, BadFileError, BadNpyError, is_encoded, is_npy
from pipeline.data.image_headers import FORMAT_TITLES, BadImageError, unread_note
from pipeline.data.image_pixels import prepare_decoders
from pipeline.data.sampling import FILES, random_words, uniforms
from pipeline.data.spec import PRESETS
from pipeline.files import VIDEO_SUFFIXES, AppendFile, parse_json, write_atomically
from pipeline.installation import find_file, recipe_names
from pipeline.libraries import cv2
from tools.crops.dataset import refuse_nested
from tools.files import IMAGES, EntryKind, links_note, lock_output, printable, scan
from tools.images import decode_file, parallel_encoder
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

RECORDS = "degradations.jsonl"
SMALLEST = 8  # pixels of a side of LR
NUM_SHOWN = 20  # files named in a report
MAX_VARIANTS = 1000
IDENTITY = ("settings", "seed", "number", "bytes", "mtime_ns")
"""Keys of a record that say whether a file that exists is the one to make."""


@dataclass(frozen=True)
class Options:
    """Make LR images from the images and videos in IN, with the degradations of training.

    OUT gets the same subfolders and names. OUT/degradations.jsonl has one line per LR image, with
    everything that was drawn for it. The draws depend only on the seed and the file's name. A video
    becomes a folder of frames with the same parameters, but each frame has its own noise. If a side
    is not a multiple of the scale, the last rows or columns are cropped. If the tool was stopped or
    killed, run the same command again to continue.

    Example: python tools/degrade.py ~/photos ~/photos_lr --degradation web_photo --scale 4
    """

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IN")] = None
    """Folder of images and videos (searched recursively; links to folders are not followed), one
    image, or one video."""
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """Folder for the LR images."""
    degradation: str | None = None
    """Name of a preset, path of a preset's YAML file, or bicubic, gaussian or realesrgan; --list
    shows all."""
    recipe: str | None = None
    """Take the degradation and the scale from this recipe (a name in recipes/ or a file)."""
    scale: int | None = None
    """HR is this many times as high and wide as LR, 1 to 8. Default: the scale of --recipe."""
    seed: int = 0
    """Seed of all random draws."""
    variants: int = 1
    """Number of different LR images per file, above 1 in OUT/variant-1, OUT/variant-2…"""
    per_frame: bool = False
    """Draw new parameters for every frame of a video."""
    format: Literal["png", "webp", "npy", "jp2"] = "png"
    """Format of the LR images; all are lossless."""
    threads: int = 0
    """Number of threads; 0 is one per core. The results do not depend on it."""
    list: bool = False
    """List the degradations, one line each, and exit."""


class Settings(NamedTuple):
    """Everything that determines the LR images, except the source images."""

    degradation: Degradation
    name: str  # for the records and messages
    scale: int
    seed: int
    per_frame: bool
    form: str

    @property
    def digest(self) -> str:
        """Hash of the settings that all images in one folder must share."""
        spec = self.degradation.spec.model_dump(mode="json", exclude={"preset"})
        known = json.dumps([spec, self.scale, self.per_frame, self.form], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """An LR image to make from an image, or from a video frame, whose `pixels` it holds."""

    source: str  # relative to the folder of sources
    target: str  # relative to OUT
    variant: int
    stamp: tuple[int, int]  # size and modification time of the source
    frame: int | None = None
    pixels: np.ndarray | None = None

    def number(self, *, of_frame: bool) -> int:
        """Return the number, below 2^48, that selects the draws; it is a hash of the name."""
        name = f"{self.variant}/{self.source}"
        if of_frame and self.frame is not None:
            name += f"/{self.frame}"
        return int.from_bytes(
            hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big"
        )


@dataclass
class Report:
    """Counts of the LR images, and the files that could not be degraded."""

    made: int = 0
    already: int = 0
    bad: dict[str, str] = field(default_factory=dict)  # source -> reason
    small: dict[str, str] = field(default_factory=dict)  # likewise, for images that are too small


def main(options: Options) -> int:
    """Make the LR images.

    Returns 0 if all were made, 1 if some files are too small or cannot be read.
    """
    if options.list:
        print("\n".join(listing()))
        return 0
    settings = _settings(options)
    if options.source is None or options.out is None:
        raise UserError("IN and OUT are missing; give the folder of the images and one for LR")
    if not 1 <= options.variants <= MAX_VARIANTS:
        raise UserError(f"--variants {options.variants}: must be 1 to {MAX_VARIANTS}")
    threads = thread_count(options.threads)
    source, out = options.source.expanduser(), options.out.expanduser()
    root, names, unread = _files(source)
    refuse_nested(source if source.is_dir() else source.parent / source.name, out, _NESTED)
    prepare_decoders()
    cv2.setNumThreads(1)  # one image per thread
    report = Report()
    with _opened(out, settings) as records, parallel_encoder(options.format, threads) as encoder:
        maker = Maker(root, out, settings, encoder, records)
        jobs = Jobs(root, names, options.variants, options.format, report)
        with quiet_libraries(), progress(jobs.count, "image") as bar:
            for job, made in ordered_map(maker, jobs, threads):
                if isinstance(made, Refusal):
                    (report.small if made.is_small else report.bad)[job.source] = made.reason
                elif made is None:
                    report.already += 1
                else:
                    records.add(made)
                    report.made += 1
                bar.update()
    return _tell(report, out, unread)


def _settings(options: Options) -> Settings:
    """Return the settings; raises `UserError` if options are missing or contradictory."""
    if (options.degradation is None) == (options.recipe is None):
        raise UserError(
            "give the degradation: either --degradation PRESET (--list shows them) or --recipe NAME"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: must be 0 to {2**63 - 1}")
    if options.recipe is not None:
        recipe = load_recipe(options.recipe)
        scale = recipe.scale if options.scale is None else options.scale
        where, given = f"--recipe {options.recipe}", recipe.data.degradation
        ignored = [
            name
            for name, is_set in (
                ("lr_noise", recipe.data.lr_noise.probability),
                ("sharpen_hr", recipe.data.sharpen_hr),
                ("brightness", recipe.data.brightness.probability),
            )
            if is_set
        ]
        if ignored:
            print(
                f"note: {' and '.join(ignored)} of the recipe are not part of its degradation and "
                "are not applied",
                file=sys.stderr,
            )
    else:
        if options.scale is None:
            raise UserError(
                f"--degradation {options.degradation} needs --scale N: how many times as high and "
                "wide as LR the images are, 1 to 8"
            )
        scale, where, given = options.scale, f"--degradation {options.degradation}", None
    if not 1 <= scale <= 8:
        raise UserError(f"--scale {scale}: must be 1 to 8")
    degradations = (given or degradation_spec(options.degradation, where)).by_folder
    if len(degradations) > 1:
        raise UserError(
            f"{where} has {len(degradations)} degradations, one per dataset folder; choose one "
            "with --degradation"
        )
    (spec,) = degradations
    if spec.reads_lr:
        raise UserError(
            f"{where}: {spec.name} reads LR from files and makes none; choose another degradation "
            "(--list shows them)"
        )
    return Settings(
        build_degradation(spec, scale),
        getattr(spec, "preset", "") or spec.name,
        scale,
        options.seed,
        options.per_frame,
        options.format,
    )


def listing() -> list[str]:
    """Return a line for each degradation: its name and a description."""
    descriptions = {
        kind.Spec.model_fields["name"].default: (kind.Spec.__doc__ or "").splitlines()[0]
        for kind in KINDS
        if not kind.Spec.reads_lr and "steps" not in kind.Spec.model_fields
    }
    for name in recipe_names(PRESETS):
        text = find_file(f"{PRESETS}/{name}.yaml").read_text(encoding="utf-8")
        lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
        comment = " ".join(line.strip("# ") for line in lines).partition(". ")[0]
        descriptions[name] = comment or "a chain of steps"
    width = max(map(len, descriptions))
    return [f"{name:<{width}}  {text}" for name, text in descriptions.items()]


_NESTED = (
    "neither may lie within the other, or a second run would degrade its own results; choose an "
    "OUT beside IN"
)


def _files(source: Path) -> tuple[Path, list[str], list[str]]:
    """Return (folder, images and videos, unsupported images), the names relative to the folder."""
    if source.is_file():
        if not (is_npy(source) or is_encoded(source) or _is_video(source)):
            raise UserError(
                f"{source}: neither an image ({FORMAT_TITLES}, npy) nor a video, judged by its "
                "suffix"
            )
        return source.parent, [source.name], []
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or file; give the folder of the images")
    names, unread, linked = [], [], []
    for kind, name in scan(source, MANIFEST):
        is_hidden = name.rpartition("/")[2].startswith(".")
        if kind in IMAGES or (kind is EntryKind.FOREIGN and _is_video(name) and not is_hidden):
            names.append(name)
        elif kind is EntryKind.UNREAD:
            unread.append(name)
        elif kind is EntryKind.LINKED_FOLDER:
            linked.append(name)
    if not names:
        note = unread_note(unread)
        raise UserError(
            f"{source}: no images or videos below this folder{links_note(linked)}"
            f"{f' ({note})' if note else ''}; give the folder of the images"
        )
    return source, names, unread


def _is_video(name: str | os.PathLike[str]) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


# --- What is done already ---


class Records:
    """The lines of degradations.jsonl, by file. Only the thread that created this adds lines."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._lines = path, {}
        self._is_sorted = True
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # the last line of a killed run may be torn
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = parse_json(line)
                file = str(record["file"])
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}: line {number} is not a record of a degraded image; restore the file, "
                    "or choose another OUT"
                ) from None
            for name, mine in (("seed", settings.seed), ("settings", settings.digest)):
                if record.get(name) != mine:
                    what = (
                        f"with seed {record.get('seed')}, not {mine}"
                        if name == "seed"
                        else f"from {record.get('degradation')} at scale {record.get('scale')}, "
                        "with other settings than these"
                    )
                    raise UserError(
                        f"{path.parent}: {file} was made {what}; use the same settings, or choose "
                        "another OUT"
                    )
            self._insert(file, line)
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        self._file = AppendFile(path)

    def holds(self, wanted: Mapping[str, Any]) -> bool:
        """Whether the file exists and its record matches `wanted` in all keys of `IDENTITY`."""
        line = self._lines.get(wanted["file"])
        if line is None or not (self._path.parent / wanted["file"]).is_file():
            return False
        record = parse_json(line)
        return all(record.get(name) == wanted[name] for name in IDENTITY)

    def add(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode()
        self._file.write(line + b"\n")
        self._insert(record["file"], line)

    def close(self) -> None:
        """Sort the lines, so that an interrupted run ends with the same file."""
        self._file.close()
        if not self._is_sorted:
            lines = [line for _, line in sorted(self._lines.items())]
            write_atomically(self._path, b"".join(line + b"\n" for line in lines))

    def _insert(self, file: str, line: bytes) -> None:
        self._is_sorted &= not self._lines or file > next(reversed(self._lines))
        self._lines[file] = line


@contextmanager
def _opened(out: Path, settings: Settings) -> Iterator[Records]:
    """Open OUT, locked for this process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another OUT"
        ) from error
    try:
        lock_output(folder, out, "degrade")
        if not (out / RECORDS).exists():
            if any(out.iterdir()):
                raise UserError(
                    f"{out}: has files but no {RECORDS}, so they are not from this tool; choose "
                    "another OUT"
                )
            (out / RECORDS).touch()
        records = Records(out / RECORDS, settings)
        try:
            yield records
        finally:
            records.close()
    finally:
        os.close(folder)


# --- Making LR ---


class Jobs:
    """Iterates over the LR images to make, in order, and decodes video frames on the way."""

    def __init__(
        self, root: Path, names: Sequence[str], variants: int, form: str, report: Report
    ) -> None:
        self._root, self._names, self._variants, self._report = root, names, variants, report
        self._targets = _targets(names, form)
        self._form = form

    @cached_property
    def count(self) -> int | None:
        """The number of jobs; `None` with videos, whose frames are not counted beforehand."""
        if any(_is_video(name) for name in self._names):
            return None
        return len(self._names) * self._variants

    def __iter__(self) -> Iterator[Job]:
        for variant in range(1, self._variants + 1):
            folder = f"variant-{variant}/" if self._variants > 1 else ""
            for name in self._names:
                target = folder + self._targets[name]
                try:
                    status = (self._root / name).stat()
                except OSError as error:
                    self._report.bad[name] = f"cannot be read: {error.strerror or error}"
                    continue
                stamp = status.st_size, status.st_mtime_ns
                if not _is_video(name):
                    yield Job(name, target, variant, stamp)
                    continue
                for index, pixels in self._frames(name):
                    file = f"{target}/{index + 1:06d}.{self._form}"
                    yield Job(name, file, variant, stamp, index, pixels)

    def _frames(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, pixels) of each frame of a video; adds its faults to the report."""
        from tools.video.frames import FrameCounts, all_frames
        from tools.video.probe import BadVideoError, probe

        tally, bad = FrameCounts(), self._report.bad
        try:
            info = probe(self._root / name)
            if info.refusals:
                bad[name] = "; ".join(info.refusals)
                return
            for frame in all_frames(self._root / name, info, tally):
                yield frame.index, frame.pixels
        except BadVideoError as error:
            bad[name] = str(error)
        except OSError as error:
            bad[name] = f"cannot be read: {error.strerror or error}"
        if name not in bad and (tally.errors or tally.lost or not tally.decoded):
            bad[name] = (
                f"damaged: {tally.errors} packets could not be decoded and {tally.lost} frames "
                f"were lost; {tally.decoded} frames were read"
            )


def _targets(names: Sequence[str], form: str) -> dict[str, str]:
    """Return the LR file of each image, or the folder of each video, relative to OUT.

    Images whose names differ only in the suffix keep their suffixes.
    """
    stems = [os.path.splitext(name)[0] for name in names if not _is_video(name)]
    twice = {stem for stem in stems if stems.count(stem) > 1} if len({*stems}) < len(stems) else ()
    targets = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        is_whole = _is_video(name) or stem in twice
        targets[name] = (name if is_whole else stem) + ("" if _is_video(name) else f".{form}")
    return targets


class Refusal(NamedTuple):
    """Why no LR can be made from an image."""

    reason: str
    is_small: bool = False


class Maker:
    """Makes and writes LR images; thread-safe."""

    def __init__(
        self, root: Path, out: Path, settings: Settings, encoder: Any, records: Records
    ) -> None:
        self._root, self._out, self._settings, self._encode = root, out, settings, encoder
        self._records, self._own = records, threading.local()

    def __call__(self, job: Job) -> tuple[Job, dict[str, Any] | Refusal | None]:
        """Return the job and the record of the written file, `None` if the file existed."""
        settings = self._settings
        record = {
            "file": job.target,
            "source": job.source,
            **({} if job.frame is None else {"frame": job.frame}),
            "variant": job.variant,
            "seed": settings.seed,
            "number": job.number(of_frame=settings.per_frame),
            "degradation": settings.name,
            "scale": settings.scale,
            "settings": settings.digest,
            "bytes": job.stamp[0],
            "mtime_ns": job.stamp[1],
        }
        named = (
            job if job.pixels is None else Job(*(job.source, job.target, job.variant, job.stamp))
        )
        if self._records.holds(record):
            return named, None
        try:
            # Images of 16 bits stay so, except as WebP, which has 8.
            depth = 8 if settings.form == "webp" else None
            pixels = (
                decode_file(self._root / job.source, depth=depth)
                if job.pixels is None
                else job.pixels
            )
        except (BadImageError, BadNpyError, BadFileError) as error:
            return named, Refusal(str(getattr(error, "reason", error)))
        except OSError as error:
            return named, Refusal(f"cannot be read: {error.strerror or error}")
        height, width = (side // settings.scale * settings.scale for side in pixels.shape[:2])
        if min(height, width) < SMALLEST * settings.scale:
            return named, Refusal(f"{pixels.shape[0]}x{pixels.shape[1]}", is_small=True)
        region = np.ascontiguousarray(pixels[:height, :width])
        parameters, keys = drawn(settings, job, (height, width))
        lr = degraded(settings.degradation, parameters, keys, region, self._workspace())
        target = self._out / job.target
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, self._encode(lr))
        record |= {"region": [height, width], **parameters}
        # Only chains have all their seeds among the parameters.
        return named, record if "steps" in parameters else {**record, "keys": keys}

    def _workspace(self) -> Workspace:
        """Return the calling thread's workspace."""
        if not hasattr(self._own, "workspace"):
            self._own.workspace = Workspace()
        workspace: Workspace = self._own.workspace
        return workspace


def drawn(settings: Settings, job: Job, size: tuple[int, int]) -> tuple[Parameters, list[int]]:
    """Return the parameters and the noise keys for an image of `size` (height, width).

    The frames of a video share the parameters, but have different noise.
    """
    number = job.number(of_frame=settings.per_frame)
    words = random_words(settings.seed, FILES, number, 1, WORDS)[0]
    parameters = settings.degradation.draw(iter(uniforms(words[:-KEYS]).tolist()), *size)
    if job.frame is not None and not settings.per_frame:
        words = random_words(settings.seed, FILES, job.number(of_frame=True), 1, WORDS)[0]
        for step in parameters.get("steps", ()):
            if "words" in step:
                change = words[:2].tolist()
                step["words"] = [a ^ b for a, b in zip(step["words"], change, strict=True)]
    return parameters, words[-KEYS:].tolist()


def degraded(
    degradation: Degradation,
    parameters: Parameters,
    keys: Sequence[int],
    region: np.ndarray,
    workspace: Workspace,
) -> np.ndarray:
    """Return LR of a whole image, uint8 or uint16 as the image, in the workspace's memory."""
    size = region.shape[0], region.shape[1]
    depth, levels = 8 * region.itemsize, levels_of(region, workspace)
    lr = degradation.lr_on_host(parameters, keys, levels, (0, 0), size, workspace)
    return in_depth(lr, depth, workspace)


def _tell(report: Report, out: Path, unread: Sequence[str]) -> int:
    """Print the report; return the exit status."""
    already = f", {report.already} existed already" if report.already else ""
    print(f"{counted(report.made, 'LR image')} written to {out}{already}")
    for what, files in (
        (f"too small for LR of {SMALLEST}x{SMALLEST} pixels", report.small),
        ("not degraded", report.bad),
    ):
        for name, reason in [*files.items()][:NUM_SHOWN]:
            print(f"{what}: {printable(name)}: {reason}", file=sys.stderr)
        if len(files) > NUM_SHOWN:
            print(f"{what}: {len(files) - NUM_SHOWN} more", file=sys.stderr)
    if report.small or report.bad:
        print(
            f"{counted(len(report.small), 'file')} too small, {len(report.bad)} not readable",
            file=sys.stderr,
        )
    if unread:
        print(unread_note(list(unread)))
    return 1 if report.small or report.bad else 0


if __name__ == "__main__":
    run(Options, main)
