"""Which LR image belongs to which HR image, and reading them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.cli import UserError
from pipeline.image_reading import SUFFIXES, read_image
from pipeline.images import crop_to_multiple, cubic_resize, to_bytes, unit_range

COMMON_MULTIPLE = 12
"""HR images are often cut to multiples of it, for x2, x3 and x4 at once."""


@dataclass(frozen=True)
class Pair:
    """An HR image and its LR image, on the disk."""

    name: str
    hr: Path
    lr: Path | None
    """None: it is made from the HR image."""

    def load(self, scale: int) -> tuple[Tensor, Tensor]:
        """HR and LR, uint8 RGB 1 x 3 x H x W; the HR cut at the bottom and the right to a multiple of `scale`.

        An LR image that has to be made is MATLAB's bicubic one, rounded to bytes. One that is there may be of the HR
        image cut to a multiple of another number (as `GTmod12` of every x2, x3 and x4): HR is then cut as it was. It
        may also be of the whole HR image, and so have a part of a pixel more than the cut one.
        """
        whole = _read(self.hr)
        hr = crop_to_multiple(whole, scale)
        height, width = hr.shape[-2:]
        if self.lr is None:
            if min(height, width) < scale:
                raise UserError(f"HR image {str(self.hr)!r} is smaller than one LR pixel at scale {scale}; remove it")
            return hr, to_bytes(cubic_resize(unit_range(hr, torch.float32), (height // scale, width // scale)))
        lr = _read(self.lr)
        if not all(_fits(large, small, scale) for large, small in zip(whole.shape[-2:], lr.shape[-2:], strict=True)):
            raise UserError(f"LR image {str(self.lr)!r} is {lr.shape[-1]}x{lr.shape[-2]} (width x height), so at scale "
                            f"{scale} its HR image must be {lr.shape[-1] * scale}x{lr.shape[-2] * scale}, but "
                            f"{str(self.hr)!r} is {width}x{height}; is it another scale's?")
        return hr[..., : lr.shape[-2] * scale, : lr.shape[-1] * scale], lr


def _fits(large: int, small: int, scale: int) -> bool:
    """Whether a side of an LR image may come from that of an HR image, whole or cut to a multiple of something."""
    return small == -(-large // scale) or 0 <= large - small * scale < math.lcm(COMMON_MULTIPLE, scale)


def find_pairs(hr: str | Path, lr: str | Path | None, scale: int) -> list[Pair]:
    """Pair the images of folder `hr` with those of `lr`, sorted by name; `UserError` naming what does not pair.

    Without `lr`: `NAME_HR.png` beside `NAME_LR.png` where the folder holds such (other files there are left alone),
    otherwise every image is HR and its LR image is made. With `lr`: equal names, or the LR one's with `_LR`, `xS` or
    `_xS` behind, S being the scale. Where `NAME_SRF_S_HR.png` lie there for several scales, only this one's count.
    """
    images = _images_by_stem(Path(hr), "HR")
    marked = {stem[:-3]: path for stem, path in images.items() if stem.lower().endswith("_hr")}
    marked = {name: path for name, path in marked.items() if name.lower().endswith(f"_srf_{scale}")} or marked
    if lr is not None:
        return _pair_folders(marked or images, Path(lr), scale)
    if not marked:
        return [Pair(name, path, None) for name, path in sorted(images.items())]
    partners = {name: images.get(f"{name}_LR", images.get(f"{name}_lr")) for name in marked}
    missing = [name for name, partner in partners.items() if partner is None]
    if missing and len(missing) < len(marked):
        raise UserError(f"{len(missing)} of {len(marked)} HR images in {str(hr)!r} have no LR image beside them, the "
                        f"first being {marked[missing[0]].name!r}; add it or give the LR images with --lr")
    return [Pair(name, marked[name], partners[name]) for name in sorted(marked)]


def _pair_folders(hr_images: dict[str, Path], lr: Path, scale: int) -> list[Pair]:
    lr_images = _images_by_stem(lr, "LR")
    pairs, missing = [], []
    for name, path in sorted(hr_images.items()):
        wanted = (name, f"{name}_LR", f"{name}x{scale}", f"{name}_x{scale}", f"{name}X{scale}", f"{name}_X{scale}")
        found = [lr_images[stem] for stem in wanted if stem in lr_images]
        if found:
            pairs.append(Pair(name, path, found[0]))
        else:
            missing.append(path)
    if missing:
        raise UserError(f"{len(missing)} of {len(hr_images)} HR images have no LR image in {str(lr)!r}, the first "
                        f"being {missing[0].name!r} (looked for {missing[0].stem} and {missing[0].stem}x{scale})")
    return pairs


def _images_by_stem(folder: Path, title: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"no folder of {title} images {str(folder)!r}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"folder {str(folder)!r} holds no {title} images ({' '.join(sorted(SUFFIXES))})")
    images: dict[str, Path] = {}
    for path in paths:
        if path.stem in images:
            raise UserError(f"folder {str(folder)!r} holds both {images[path.stem].name!r} and {path.name!r}; "
                            "image names must differ before the dot")
        images[path.stem] = path
    return images


def _read(path: Path) -> Tensor:
    """`read_image`, but for colours of 16 bits, which Pillow would cut off to 8 bits and not round."""
    try:
        with Image.open(path) as image:
            is_float, is_deep = image.mode == "F", ";16" in str(image.tile) and not image.mode.startswith("I")
    except Exception:  # decoders raise whatever they like; `read_image` then says what is wrong
        is_float = is_deep = False
    if is_float:
        raise UserError(f"image {str(path)!r} holds floating point numbers, whose white is not known; save it with 8 "
                        "or 16 bits")
    if not is_deep:
        return read_image(path)
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
    if pixels is None or pixels.dtype != np.uint16:
        raise UserError(f"image {str(path)!r} of 16 bits cannot be read; save it as PNG of 8 bits")
    rounded = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return torch.from_numpy(rounded).permute(2, 0, 1)[None].contiguous()
