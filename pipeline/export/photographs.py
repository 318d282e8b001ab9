"""The photographs that a converted network is compared, calibrated and measured on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.cli import UserError
from pipeline.image_reading import SUFFIXES, read_image


@dataclass(frozen=True)
class Photograph:
    """An image and its name for people."""

    name: str
    pixels: Tensor
    """uint8 RGB 1 x 3 x H x W."""


def read_photographs(folder: Path | None, option: str, most: int, shipped: Sequence[str]) -> list[Photograph]:
    """Every image in `folder`, or an even spread of `most` of them; `None`: `shipped`, files within packages.

    `UserError`, which names `option`, for a folder that is missing or holds no images.
    """
    if folder is None:
        return [Photograph(path.name, read_image(path)) for path in _paths_within_packages(shipped, option)]
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} of {option}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"no images in {str(folder)!r} of {option}; their names end in {', '.join(sorted(SUFFIXES))}")
    count = min(len(paths), most)
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    return [Photograph(str(path.relative_to(folder)), read_image(path)) for path in chosen]


def _paths_within_packages(names: Sequence[str], option: str) -> list[Path]:
    found = []
    for name in names:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the photographs that stand in for {option} are of the package {package!r}, which is not "
                            f"installed; install requirements.txt, or give a folder with {option}")
        path = Path(spec.submodule_search_locations[0]) / rest
        if not path.is_file():
            raise UserError(f"the installed package {package!r} lacks {rest}; give a folder of photographs with "
                            f"{option}")
        found.append(path)
    return found
