"""Trunks: pretrained ImageNet networks, frozen, whose features losses and metrics compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.cli import UserError, nearest
from pipeline.images import unit_range

# Where the files of the pretrained trunks are looked for, and how they are read.
#
# A trunk is the convolutional part ("features") of a network trained on ImageNet, in torchvision's
# layout. Nothing is downloaded, and no code in a file is executed.


SOURCE = "https://download.pytorch.org/models"
TRUNK_FILES = {  # torchvision's file names, also in torch's cache
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
_LPIPS = "lpips_weights=FILE in training, --lpips-weights FILE in evaluate.py"
NAMED_WITH = {  # trunk -> what names its file, for messages
    "alex": f"{_LPIPS}, or a loss's weights",
    "squeeze": f"{_LPIPS}, or a loss's weights",
    "vgg": f"{_LPIPS} (for DISTS --dists-weights FILE), or a loss's weights",
    "vgg19": "--vgg-weights FILE in training, or a loss's weights",
}
FEATURES, CLASSIFIER = "features.", "classifier."


def find_trunk(name: str, file: str | None = None) -> Path:
    """Return the path of the weights of the trunk `name` (in `TRUNK_FILES`).

    This is `file` if given, otherwise torchvision's file in torch's cache,
    `$TORCH_HOME/hub/checkpoints` (by default `~/.cache/torch/hub/checkpoints`). `file` may start
    with `~`; a relative path starts at the working directory. If the file is missing, raises a
    `UserError` that says what to download, and to which path.
    """
    if name not in TRUNK_FILES:
        raise UserError(f"no trunk named {name!r}{nearest(name, TRUNK_FILES)}")
    if file is not None and not isinstance(file, str | os.PathLike):
        raise UserError(f"the weights of the trunk {name!r} are {file!r}, which is not a path")
    cached = Path(torch.hub.get_dir(), "checkpoints", TRUNK_FILES[name])
    path = cached if file is None else Path(file).expanduser()
    if path.is_file():
        return path
    way_out = (
        f"download {SOURCE}/{TRUNK_FILES[name]} to {cached}, or name a .pth or .safetensors file: "
        f"{NAMED_WITH[name]} (nothing is downloaded automatically)"
    )
    if file is None:
        raise UserError(f"the weights of the trunk {name!r} are missing: {way_out}")
    raise UserError(f"no weights file {file!r} for the trunk {name!r}: {way_out}")


def load_trunk(name: str, file: str | None, layers: nn.Module) -> None:
    """Fill `layers` with the weights from `find_trunk`, as float32 on the CPU.

    `layers` is an `nn.Sequential` in torchvision's numbering (tensors "0.weight", "0.bias", …). The
    file is the state dict of torchvision's whole network or only of its features, with or without
    "features." before the numbers. It must hold exactly the tensors of `layers`, with the same
    shapes and finite values; otherwise a `UserError` is raised.
    """
    path = find_trunk(name, file)
    found = {
        key.removeprefix(FEATURES): tensor
        for key, tensor in _read_tensors(path).items()
        if not key.startswith(CLASSIFIER)
    }
    expected = layers.state_dict()
    title = f"{str(path)!r} is not the trunk {name!r} in torchvision's layout"
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            raise UserError(f"{title}: the tensor {FEATURES}{key} is missing")
        if key not in expected:
            raise UserError(f"{title}: unexpected tensor {key!r}")
        if found[key].shape != expected[key].shape:
            raise UserError(
                f"{title}: {FEATURES}{key} is {tuple(found[key].shape)} but must be "
                f"{tuple(expected[key].shape)}"
            )
        if not torch.isfinite(found[key]).all():
            raise UserError(
                f"{str(path)!r}: the tensor {FEATURES}{key} contains NaN or infinity; is the file "
                "damaged?"
            )
    layers.load_state_dict(
        {key: tensor.detach().float() for key, tensor in found.items()}, strict=True, assign=True
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly any exception for a broken file
        raise UserError(
            f"{str(path)!r} is not a readable weights file ({type(error).__name__}); is it "
            "truncated, or does it hold more than tensors?"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise UserError(f"{str(path)!r} is not a state dict; save only the network's state_dict()")
    return {str(key): tensor for key, tensor in content.items()}


# Mean and standard deviation of ImageNet's RGB, for torchvision's networks.
MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)
# (channels, number of convolutions) of each block; pooling follows each block.
VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
VGG19_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
PRECISIONS = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a trunk's convolutions; "auto" is float16 on a GPU, float32 elsewhere.

    In float32, VGG19 alone takes a GPU as long as the generator. Of the two 16-bit types, float16
    is more accurate. For VGG19 with random weights, five layers, and bicubic x4 against HR, its
    gradient has a cosine of 0.98 with that of float32 and its value an error of 0.1 %. With
    bfloat16, the cosine is 0.87 to 0.91, and near HR the value is 7 % too large.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return PRECISIONS[precision]


def trunk_layout(device: torch.device) -> torch.memory_format:
    """Return the memory format of a trunk's weights and input.

    16-bit convolutions on GPUs are made for channels_last. On CPUs it would only change the
    rounding.
    """
    return torch.channels_last if device.type == "cuda" else torch.preserve_format


def in_precision(
    precision: str, loss: Callable[[Tensor, Tensor], Tensor], sr: Tensor, hr: Tensor
) -> Tensor:
    """Return `loss(sr, hr)`, a scalar or vector, with a trunk's convolutions in `trunk_dtype`.

    The gradient of a mean over millions of features is too small for float16, and the factor by
    which training multiplies the loss is unknown here. Therefore the trunk's backward pass always
    starts from the same number, which the largest incoming gradient replaces in its result, in
    float32.
    """
    dtype = trunk_dtype(precision, sr.device)
    sr, hr = (images.to(memory_format=trunk_layout(sr.device)) for images in (sr, hr))
    if dtype == torch.float32:
        return loss(sr, hr)
    with torch.autocast(sr.device.type, dtype):
        if not (sr.requires_grad and torch.is_grad_enabled()):
            return loss(sr, hr)
        sr_copy, incoming, initial = sr.clone(), [], sr.numel() / 64
        value = loss(sr_copy, hr)

    def start_backward(gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
        incoming.append(largest)
        return gradient / largest * initial

    value.register_hook(start_backward)
    sr_copy.register_hook(lambda gradient: gradient * (incoming.pop() / initial))
    return value


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def vgg_features(blocks: Sequence[tuple[int, int]]) -> nn.Sequential:
    """Return a VGG's layers before its classifier, in torchvision's numbering.

    Simonyan and Zisserman, ICLR 2015; `blocks` is `VGG16_BLOCKS` or `VGG19_BLOCKS`.
    """
    layers: list[nn.Module] = []
    before = 3
    for channels, depth in blocks:
        for _ in range(depth):
            # Not in place, which would overwrite the features before the activation.
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VggTrunk(nn.Module):
    """A VGG with the weights of a file, and the normalisation of its input.

    Args:
        name: "vgg" (VGG16) or "vgg19".
        weights: a file with its weights, see `load_trunk`; `None` uses torch's cache.

    Raises:
        UserError: the weights are missing or not this trunk's.
    """

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        # Values come from the file, so skip allocation and initialisation.
        with torch.device("meta"):
            self.features = vgg_features(VGG19_BLOCKS if name == "vgg19" else VGG16_BLOCKS)
        load_trunk(name, weights, self.features)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        """Return RGB NCHW images, pixels or floats in [0, 1], as VGG takes them."""
        return (unit_range(images, self.mean.dtype) - self.mean) / self.std


def vgg_layer_indices(blocks: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Return the index in `vgg_features` of every convolution, e.g. "conv1_1" to "conv5_4".

    The activation of each layer directly follows it.
    """
    indices, index = {}, 0
    for block, (_, depth) in enumerate(blocks, start=1):
        for number in range(1, depth + 1):
            indices[f"conv{block}_{number}"] = index
            index += 2
        index += 1
    return indices


def check_side(loss: str, images: Tensor, smallest: int) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise UserError(
            f"{loss!r} needs images of at least {smallest}x{smallest} pixels, but they are "
            f"{height}x{width} (height x width); use a larger data.crop"
        )
