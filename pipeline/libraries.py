"""Libraries that must be imported in a certain way: torchvision, with those that import it, and ONNX Runtime.

torchvision's wheel is built against the CUDA build of torch. With the CPU build of torch its compiled operators
cannot load, and torchvision 0.28.0 then fails while it is imported: it gives two of these operators ("nms", "qnms") a
shape function without asking first whether they exist. Declaring the two lets the import pass. What needs the
compiled operators (`torchvision.ops.nms`, `torchvision.io.read_image`) still raises torchvision's own clear error;
the networks and the transforms, all that is used here, are plain PyTorch.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # a torch.library.Library; what it declares is gone once it is collected


def import_torchvision() -> ModuleType:
    """Import torchvision, whichever build of torch there is; changes nothing where torchvision imports by itself.

    To be called before any import of a library that imports torchvision, in every process. It costs about a second
    the first time: call it where torchvision is needed, not at the top of a module.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return torchvision
    _declare_operators()
    import torchvision
    return torchvision


def _declare_operators() -> None:
    """Declare the two operators, and forget what the failed import has left behind."""
    global _library
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    if _library is None:
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(_SCHEMA.format(operator))

def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without its telemetry.

    Since 1.31 an import gives the machine an id and keeps events in the user's cache, unless `ORT_DISABLE_TELEMETRY`
    is set in the environment.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime
