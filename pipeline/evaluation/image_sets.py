"""The images to evaluate on: pairs of HR and LR images in any folder, and the usual benchmarks.

`find_folder` pairs the images of a folder by name. `find_benchmark` looks for a benchmark in the
folder layouts in common use. Both return an `ImageSet` of `ImagePair`s, which are read when they
are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cli import UserError
from pipeline.data.image_headers import IMAGE_SUFFIXES, suffix_of, unread_note
from pipeline.data.image_pixels import read_depth, read_profile, read_rgb, read_size
from pipeline.data.pair_matching import match_pairs
from pipeline.images import crop_to_multiple, cubic_resize, to_pixels, to_tensor, unit_range

COMMON_MULTIPLE = 12
"""HR images are often cropped to multiples of 12, which suit x2, x3 and x4."""


@dataclass(frozen=True)
class ImagePair:
    """The files of an HR image and its LR image."""

    name: str
    hr: Path
    lr: Path | None
    """`None`: made from the HR image."""

    @property
    def depth(self) -> int:
        """Bits per value in which the pair is measured: 16 if a file has more than 8, else 8.

        Raises the errors of `load`.
        """
        return max(read_depth(path) for path in (self.hr, self.lr) if path is not None)

    def load(self, scale: int) -> tuple[Tensor, Tensor]:
        """Read HR and LR as RGB 1 x 3 x H x W, the HR cropped to a multiple of `scale`.

        They are uint8, or uint16 if the pair's `depth` is 16. The HR image loses pixels at the
        bottom and the right. A missing LR image is made by MATLAB's bicubic downscaling, rounded to
        that type. An existing one may have been made from an HR image cropped to another multiple
        (`GTmod12` serves x2, x3 and x4); HR is then cropped in the same way. It may also have been
        made from the whole HR image; its last row or column then covers less than `scale` HR
        pixels.

        Raises:
            UserError: an image cannot be read, is too small, or does not fit its partner's size.
        """
        depth = self.depth
        whole = to_tensor(read_rgb(self.hr, depth))
        hr = crop_to_multiple(whole, scale)
        height, width = hr.shape[-2:]
        if self.lr is None:
            if min(height, width) < scale:
                raise UserError(
                    f"HR image {str(self.hr)!r} is smaller than one LR pixel at scale {scale}; "
                    "remove it"
                )
            size = height // scale, width // scale
            return hr, to_pixels(cubic_resize(unit_range(hr, torch.float32), size), depth)
        lr = to_tensor(read_rgb(self.lr, depth))
        if not all(
            _fits(large, small, scale)
            for large, small in zip(whole.shape[-2:], lr.shape[-2:], strict=True)
        ):
            raise UserError(
                f"LR image {str(self.lr)!r} is {lr.shape[-1]}x{lr.shape[-2]} (width x height), so "
                f"at scale {scale} its HR image must be {lr.shape[-1] * scale}x"
                f"{lr.shape[-2] * scale}, but {str(self.hr)!r} is {width}x{height}; was it made "
                "for another scale?"
            )
        return hr[..., : lr.shape[-2] * scale, : lr.shape[-1] * scale], lr


def _fits(large: int, small: int, scale: int) -> bool:
    """Whether an LR side length fits an HR one, whole or cropped to a usual multiple.

    At x1 they must be equal.
    """
    if scale == 1:
        return small == large
    return small == -(-large // scale) or 0 <= large - small * scale < math.lcm(
        COMMON_MULTIPLE, scale
    )


def find_pairs(hr: str | Path, lr: str | Path | None, scale: int) -> list[ImagePair]:
    """Pair the images of folder `hr` with those of `lr`; return the pairs sorted by name.

    Without `lr`, a folder that contains `NAME_HR.png` files is searched for `NAME_LR.png` beside
    them, and other files are ignored; in any other folder every image is an HR image and its LR
    image is made. With `lr`, names match by the rules of `match_pairs`: the LR name may end with
    `_LR`, `xS` or `_xS`, where S is the scale. If the folder contains `NAME_SRF_S_HR.png` for
    several scales, only those of this scale are used.

    Raises:
        UserError: a folder has no images, two names are equal, or an HR image has no LR image.
    """
    images = _images_by_stem(Path(hr), "HR")
    marked = {stem: path for stem, path in images.items() if stem.lower().endswith("_hr")}
    marked = {
        stem: path for stem, path in marked.items() if stem.lower().endswith(f"_srf_{scale}_hr")
    } or marked
    if lr is not None:
        lr_images = _images_by_stem(Path(lr), "LR")
    else:
        lr_images = {
            stem: path for stem, path in images.items() if marked and stem.lower().endswith("_lr")
        }
    lr_files = {path.name: path for path in lr_images.values()}
    matched, _ = match_pairs(
        [path.name for path in (marked or images).values()], list(lr_files), scale
    )
    partners = {pair.hr: lr_files[pair.lr] for pair in matched}
    pairs = [
        ImagePair(stem[:-3] if marked else stem, path, partners.get(path.name))
        for stem, path in (marked or images).items()
    ]
    missing = [pair.hr for pair in pairs if pair.lr is None]
    if missing and lr is not None:
        raise UserError(
            f"{len(missing)} of {len(pairs)} HR images have no LR image in {str(lr)!r}; the first "
            f"is {missing[0].name!r} (looked for {missing[0].stem} and {missing[0].stem}x{scale})"
        )
    if missing and partners:
        raise UserError(
            f"{len(missing)} of {len(pairs)} HR images in {str(hr)!r} have no LR image beside "
            f"them; the first is {missing[0].name!r}; add it or give the LR images with --lr"
        )
    return sorted(pairs, key=lambda pair: pair.name)


def _images_by_stem(folder: Path, title: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"the folder of {title} images {str(folder)!r} does not exist")
    paths = sorted(
        path for path in folder.iterdir() if suffix_of(path) in IMAGE_SUFFIXES and path.is_file()
    )
    if not paths:
        raise UserError(
            f"folder {str(folder)!r} contains no {title} images "
            f"({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    images: dict[str, Path] = {}
    for path in paths:
        if path.stem in images:
            raise UserError(
                f"folder {str(folder)!r} contains both {images[path.stem].name!r} and "
                f"{path.name!r}; image names must differ before the suffix"
            )
        images[path.stem] = path
    return images


@dataclass(frozen=True)
class Preset:
    """A benchmark: its name in papers, its number of images, and its possible folder names."""

    title: str
    num_images: int
    folders: tuple[str, ...]


@dataclass(frozen=True)
class ImageSet:
    """A named set of images to measure on."""

    name: str
    pairs: list[ImagePair]
    hr: Path
    lr: Path | None = None
    """Folder of the LR images; `None` if they are beside the HR images or are made."""
    note: str = ""
    """What makes its mean differ from published ones."""

    @property
    def lr_made_by(self) -> str | None:
        """How the LR images are made; `None` if they are read."""
        return "bicubic" if self.pairs[0].lr is None else None


PRESETS = {
    "set5": Preset("Set5", 5, ("Set5",)),
    "set14": Preset("Set14", 14, ("Set14",)),
    "b100": Preset("B100", 100, ("B100", "BSD100", "BSDS100")),
    "urban100": Preset("Urban100", 100, ("Urban100",)),
    "div2k": Preset("DIV2K", 100, ("DIV2K", "DIV2K_valid", "DIV2K100", "DIV2K_val")),
    "pirm": Preset(
        "PIRM",
        100,
        (
            "PIRM",
            "PIRM_valset",
            "PIRM_valset_100",
            "PIRM_val",
            "PIRM_dataset/Validation",
            "PIRM/Validation",
            "PIRM_testset",
            "PIRM_dataset/Test",
            "PIRM/Test",
        ),
    ),
}
# Where the HR images are in a benchmark's folder. {s} is the scale, case is ignored, and the first
# match is used. SIDE_BY_SIDE is SelfExSR's layout: NAME_SRF_4_HR.png beside NAME_SRF_4_LR.png.
SIDE_BY_SIDE = ("image_SRF_{s}", "SRF_{s}", "x{s}", ".")
HR_FOLDERS = (
    "DIV2K_valid_HR",
    "HR",
    "GTmod12",
    "GTmod{s}",
    "GT",
    "original",
    "HR/x{s}",
    "x{s}/HR",
    ".",
)
LR_FOLDERS = (
    "LR_bicubic/x{s}",
    "LRbicx{s}",
    "LR_bicubic_x{s}",
    "DIV2K_valid_LR_bicubic/x{s}",
    "LR/x{s}",
    "LRx{s}",
    "LR_x{s}",
    "x{s}/LR",
    "{s}x_downsampled",
)
LR_BESIDE = ("{name}_LR_bicubic/x{s}", "{name}_LR_x{s}")
LR_OF_ANY_SCALE = ("LR_bicubic", "LR")  # used only if the image sizes confirm the scale


def find_benchmark(root: Path, key: str, scale: int) -> ImageSet:
    """Find the benchmark `key` of `PRESETS` under `root`; LR images are made if it has none.

    Raises:
        UserError: there is no such benchmark; the message names the folders that were looked for.
    """
    preset = PRESETS[key]
    if not root.is_dir():
        raise UserError(
            f"the folder of benchmarks {str(root)!r} does not exist; give it with --benchmarks DIR"
        )
    try:
        for folder in _folders(root, preset):
            found = _side_by_side(folder, scale) or _two_folders(folder, scale)
            if found is not None:
                hr, lr, pairs = found
                return ImageSet(preset.title, pairs, hr, lr, _note(preset, pairs, hr))
    except OSError as error:
        raise UserError(
            f"folder {error.filename!r} cannot be read ({error.strerror}); fix its permissions"
        ) from error
    raise UserError(
        f"no benchmark {key} in {str(root)!r} (looked for a folder {' or '.join(preset.folders)} "
        f"with images in it, in HR, GTmod12 or image_SRF_{scale}); see docs/evaluation.md"
    )


def find_folder(hr: Path, lr: Path | None, scale: int) -> ImageSet:
    """Return any folder of images as a set, paired by the rules of `find_pairs`."""
    pairs = find_pairs(hr, lr, scale)
    return ImageSet(hr.resolve().name or str(hr), pairs, hr, lr, _note(None, pairs, hr))


def _folders(root: Path, preset: Preset) -> Iterator[Path]:
    """Yield the folders that may be the benchmark's.

    These are Set5, set5, Set5_HR (as the download recipes unpack it) and benchmark/Set5 below
    `root`, and `root` itself if it has such a name.
    """
    if root.resolve().name.lower() in {name.lower() for name in preset.folders}:
        yield root
    for place in (root, *_inside(root, "benchmark"), *_inside(root, "benchmarks")):
        for name in preset.folders:
            yield from _inside(place, name)
            yield from _inside(place, f"{name}_HR")


def _inside(folder: Path, relative: str) -> list[Path]:
    """Return the folder at a relative path, ignoring case, as a list with at most one element."""
    for part in relative.split("/"):
        if part == ".":
            continue
        found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
        exact = folder / part
        if exact.is_dir():
            folder = exact
        elif part.lower() in found:
            folder = found[part.lower()]
        else:
            return []
    return [folder]


def _side_by_side(folder: Path, scale: int) -> tuple[Path, Path | None, list[ImagePair]] | None:
    """Look for SelfExSR's layout: `*_SRF_4_HR.png`, with LR images beside them or made."""
    for pattern in SIDE_BY_SIDE:
        for place in _inside(folder, pattern.format(s=scale)):
            if any(path.stem.lower().endswith(f"_srf_{scale}_hr") for path in place.iterdir()):
                return place, None, find_pairs(place, None, scale)
    return None


def _two_folders(folder: Path, scale: int) -> tuple[Path, Path | None, list[ImagePair]] | None:
    """Look for HR images in one folder, with LR images in another folder or made."""
    for pattern in HR_FOLDERS:
        for hr in _inside(folder, pattern.format(s=scale)):
            if any(suffix_of(path) in IMAGE_SUFFIXES and path.is_file() for path in hr.iterdir()):
                return _with_lr(folder, hr, find_pairs(hr, None, scale), scale)
    return None


def _with_lr(
    folder: Path, hr: Path, pairs: list[ImagePair], scale: int
) -> tuple[Path, Path | None, list[ImagePair]]:
    """Return the pairs with the benchmark's LR images if it has any of this scale."""
    for lr in _lr_folders(folder, hr, scale):
        return hr, lr, find_pairs(hr, lr, scale)
    for pattern in LR_OF_ANY_SCALE:
        for lr in _inside(folder, pattern):
            paired = _of_this_scale(hr, lr, scale)
            if paired:
                return hr, lr, paired
    return hr, None, pairs


def _lr_folders(folder: Path, hr: Path, scale: int) -> Iterator[Path]:
    """Yield the LR folders whose names give the scale.

    They are inside the benchmark's folder, or beside it if that is named NAME_HR.
    """
    for pattern in LR_FOLDERS:
        yield from _inside(folder, pattern.format(s=scale))
    if hr == folder and folder.name.lower().endswith("_hr"):
        for pattern in LR_BESIDE:
            yield from _inside(folder.parent, pattern.format(name=folder.name[:-3], s=scale))


def _of_this_scale(hr: Path, lr: Path, scale: int) -> list[ImagePair]:
    """Return the pairs of two folders, or none if they do not pair or do not fit the scale.

    The sizes of the first pair decide.
    """
    try:
        pairs = find_pairs(hr, lr, scale)
        sizes = zip(read_size(pairs[0].hr), read_size(pairs[0].lr), strict=True)
        fits = all(whole // scale == part for whole, part in sizes)
    except UserError:
        return []
    return pairs if fits else []


def _note(preset: Preset | None, pairs: list[ImagePair], hr: Path) -> str:
    """Say what differs from the published benchmark and how unusual images were treated."""
    notes = []
    if preset is not None and len(pairs) != preset.num_images:
        notes.append(
            f"{len(pairs)} images in {str(hr)!r}, but {preset.title} has {preset.num_images}: "
            "the means are not comparable with published ones"
        )
    profiles = {
        path: profile
        for pair in pairs
        for path in (pair.hr, pair.lr)
        if path is not None and (profile := read_profile(path))
    }
    if profiles:
        path, profile = next(iter(profiles.items()))
        notes.append(
            f"images with a colour profile other than sRGB: {len(profiles)} (such as "
            f"{path.name!r}: {profile}); they are converted to sRGB"
        )
    deep = []
    for pair in pairs:
        with suppress(UserError):  # reported when it is measured
            deep += [pair.hr] if pair.depth == 16 else []
    if deep:
        notes.append(
            f"images of 16 bits: {len(deep)} of {len(pairs)} (such as {deep[0].name!r}); they are "
            "upscaled and measured in 16 bits, with Y rounded to uint16"
        )
    if unread := unread_note(sorted(path.name for path in hr.iterdir())):
        notes.append(unread)
    return "; ".join(notes)
