"""The photographs within packages on which converted networks are compared and measured, and in
which sizes.

Needs no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import UserError

SIZES = ((1, 64, 64), (3, 47, 61), (2, 90, 33), (1, 97, 120), (1, 19, 13))
"""(batch, height, width) of the LR images that a converted network is compared on."""
SHIPPED = tuple(
    f"skimage/data/{name}" for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
)
"""Photographs within scikit-image's package."""


def paths_within_packages(names: Sequence[str], option: str) -> list[Path]:
    """The files of `names` (package/path within it), which stand in for the folder of `option`.

    `UserError` where a package is not installed, or lacks the file.
    """
    found = []
    for name in names:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the photographs that stand in for {option} are of the package {package!r}, which "
                "is not "
                f"installed; install requirements.txt, or give a folder with {option}"
            )
        path = Path(spec.submodule_search_locations[0]) / rest
        if not path.is_file():
            raise UserError(
                f"the installed package {package!r} lacks {rest}; give a folder of photographs "
                "with "
                f"{option}"
            )
        found.append(path)
    return found
