"""Photographs inside installed packages, and the sizes in which networks are compared on them.

Needs no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import UserError

SIZES = ((1, 64, 64), (3, 47, 61), (2, 90, 33), (1, 97, 120), (1, 19, 13))
"""(batch, height, width) of the LR images on which a converted network is compared."""
SHIPPED = tuple(
    f"skimage/data/{name}" for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
)
"""Photographs inside the package of scikit-image."""


def paths_within_packages(names: Sequence[str], option: str) -> list[Path]:
    """Return the paths of files inside packages, the default for the folder of `option`.

    `names` are package/path. `UserError` if a package is not installed or lacks the file.
    """
    found = []
    for name in names:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the default photographs of {option} are part of the package {package!r}, which "
                f"is not installed; install requirements.txt, or give a folder with {option}"
            )
        path = Path(spec.submodule_search_locations[0]) / rest
        if not path.is_file():
            raise UserError(
                f"the installed package {package!r} lacks {rest}; give a folder of photographs "
                f"with {option}"
            )
        found.append(path)
    return found
