"""The command `vastscale`, and access from your own programs to networks trained with it.

The wheel holds the files of a checkout in the folder `checkout` of this package. They import each
other as `pipeline`, `tools` and `launch`, names that other packages may have too, so they are not
in site-packages themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.models.weights import SavedNetwork

__version__ = "0.1.0"
_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "checkout" if (_HERE / "checkout").is_dir() else _HERE.parent
"""The packed copy of the checkout's files; in a checkout, the checkout itself."""


def read_network(path: str | Path) -> SavedNetwork:
    """Return the network in a weights file (.safetensors or .pth): name, scale and parameters.

    `read_network(path).build()` is the `torch.nn.Module`: it takes and returns float RGB images
    in [0, 1], (batch, 3, height, width). A bad file raises `ValueError`, whose message says what is
    wrong with it.
    """
    sys.path.insert(0, str(ROOT))
    try:
        from pipeline.models import weights
    finally:
        sys.path.remove(str(ROOT))
    return weights.read_network(Path(path))
