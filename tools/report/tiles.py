"""Thumbnails for a report: small copies of dataset images, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.cli import UserError
from pipeline.data.image_headers import BadImageError
from pipeline.libraries import cv2
from tools.crops.quality import crop_gates, picture_gates
from tools.dataset.sources import SampledImage
from tools.images import decode_file
from tools.parallel import ordered_map, progress, quiet_libraries

SIDE = 176  # pixels of a thumbnail's longer side, and per side of a detail shown at full resolution
_MAX_MEGAPIXELS = 300
_LEAST_SIDE = 8  # smaller images cannot be measured


@dataclass(frozen=True)
class Thumbnail:
    """An image as shown in a report; without pictures if `problem` gives the reason."""

    path: str
    photo: str
    # Scale, position and time within the photograph; for a file in no manifest, its size.
    where: str = ""
    gates: Mapping[str, float] = field(default_factory=dict)
    whole: str = ""  # data URI: the whole image, reduced
    detail: str = ""  # data URI: its centre at full resolution
    problem: str = ""


def make_tiles(root: Path, images: Iterable[SampledImage], threads: int) -> Iterator[Thumbnail]:
    """Decode the images and yield their thumbnails in order.

    Images in no manifest are measured as well.
    """
    images = list({image.path: image for image in images}.values())
    with quiet_libraries(), progress(len(images), "image") as bar:
        for tile in ordered_map(lambda image: _tile(root, image), images, threads):
            bar.update()
            yield tile


def _tile(root: Path, image: SampledImage) -> Thumbnail:
    record = image.record
    known = {} if record is None else _numbers(record.gates)
    tile = Thumbnail(image.path, image.photo, _where(image), known)
    try:
        pixels = _decode(root, image.path)
    except FileNotFoundError:
        return replace(tile, problem="missing")
    except OSError as error:
        return replace(tile, problem=error.strerror or str(error))
    except (BadImageError, UserError) as error:
        return replace(tile, problem=getattr(error, "reason", str(error)))
    tile = replace(
        tile,
        where=tile.where or f"{pixels.shape[0]}x{pixels.shape[1]}",
        whole=_data_uri(_smaller(pixels), 80),
        detail=_data_uri(_centre(pixels), 90),
    )
    if record is None and min(pixels.shape[:2]) >= _LEAST_SIDE:
        return replace(tile, gates=_numbers({**crop_gates(pixels), **picture_gates(pixels)}))
    return tile


def _decode(root: Path, path: str) -> np.ndarray:
    if path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path:
        raise BadImageError("its path leads outside the dataset")
    return decode_file(root / path, max_megapixels=_MAX_MEGAPIXELS)


def _numbers(gates: Mapping[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in gates.items() if isinstance(value, (int, float))}


def _where(image: SampledImage) -> str:
    """Position of a crop within its photograph."""
    record = image.record
    if record is None:
        return ""
    time = "" if record.time is None else f" at {record.time:.2f} s"
    return f"1/{record.scale}, at ({record.top}, {record.left}){time}"


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """Reduce to at most `SIDE` pixels per side, uint8 RGB."""
    height, width = pixels.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _centre(pixels: np.ndarray) -> np.ndarray:
    """Cut out the centre, at most `SIDE` pixels per side, with unchanged pixels."""
    top, left = (max(side - SIDE, 0) // 2 for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])


def _data_uri(pixels: np.ndarray, quality: int) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "webp", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
