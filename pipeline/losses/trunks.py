"""The pretrained trunks of perceptual losses: where their files are looked for, and how they are read.

A trunk is the convolutional part ("features") of a network trained on ImageNet, in torchvision's layout. Nothing is
ever downloaded, and nothing in a file is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.cli import UserError, nearest

SOURCE = "https://download.pytorch.org/models"
TRUNK_FILES = {  # torchvision's names, within torch's cache too
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
FEATURES, CLASSIFIER = "features.", "classifier."


def find_trunk(name: str, file: str | None = None) -> Path:
    """The file with the weights of the trunk `name` (of `TRUNK_FILES`): `file`, or else torchvision's in torch's cache.

    `file` may begin with `~`; a relative path starts at the working directory. The cache is
    `$TORCH_HOME/hub/checkpoints` (`~/.cache/torch/hub/checkpoints` by default). `UserError` where there is no such
    file, which tells what to download, from where and to where.
    """
    if name not in TRUNK_FILES:
        raise UserError(f"no trunk named {name!r}{nearest(name, TRUNK_FILES)}")
    if file is not None and not isinstance(file, str | os.PathLike):
        raise UserError(f"the weights of the trunk {name!r} are {file!r}, which is not the path of a file")
    cached = Path(torch.hub.get_dir(), "checkpoints", TRUNK_FILES[name])
    path = cached if file is None else Path(file).expanduser()
    if path.is_file():
        return path
    way_out = (f"download {SOURCE}/{TRUNK_FILES[name]} to {cached}, or name a .pth or .safetensors file with 'weights' "
               "(nothing is downloaded here)")
    if file is None:
        raise UserError(f"the weights of the trunk {name!r} are missing: {way_out}")
    raise UserError(f"no weights file {file!r} for the trunk {name!r}: {way_out}")


def load_trunk(name: str, file: str | None, layers: nn.Module) -> None:
    """Fill `layers`, an `nn.Sequential` in torchvision's numbering (tensors "0.weight", "0.bias"…), from `find_trunk`.

    The file is a whole network's state dict as torchvision has it, or the features' alone, with or without "features."
    before the number; it must hold exactly the tensors of `layers`, in their shapes and finite. They become float32
    on the CPU. `UserError` otherwise.
    """
    path = find_trunk(name, file)
    found = {key.removeprefix(FEATURES): tensor for key, tensor in _read_tensors(path).items()
             if not key.startswith(CLASSIFIER)}
    wanted = layers.state_dict()
    title = f"{str(path)!r} is not the trunk {name!r} in torchvision's layout"
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found:
            raise UserError(f"{title}: it lacks the tensor {FEATURES}{key}")
        if key not in wanted:
            raise UserError(f"{title}: it holds a tensor {key!r} too many")
        if found[key].shape != wanted[key].shape:
            raise UserError(f"{title}: {FEATURES}{key} is {tuple(found[key].shape)} but must be "
                            f"{tuple(wanted[key].shape)}")
        if not torch.isfinite(found[key]).all():
            raise UserError(f"{str(path)!r}: the tensor {FEATURES}{key} holds NaN or infinity; is the file damaged?")
    layers.load_state_dict({key: tensor.detach().float() for key, tensor in found.items()}, strict=True, assign=True)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a broken file torch.load raises nearly anything
        raise UserError(f"{str(path)!r} is not a readable file of weights ({type(error).__name__}); is it cut short, "
                        "or does it hold more than tensors?") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{str(path)!r} is not a state dict; save the network's state_dict() alone")
    return {str(key): tensor for key, tensor in content.items()}
