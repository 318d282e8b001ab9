"""Losses between what a network trained on ImageNet sees in two images. Their trunks are frozen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError, nearest
from pipeline.images import unit_range
from pipeline.libraries import import_torchvision

# The pretrained trunks of perceptual losses: where their files are looked for, and how they are
# read.
#
# A trunk is the convolutional part ("features") of a network trained on ImageNet, in torchvision's
# layout. Nothing is ever downloaded, and nothing in a file is ever executed.


SOURCE = "https://download.pytorch.org/models"
TRUNK_FILES = {  # torchvision's names, within torch's cache too
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
FEATURES, CLASSIFIER = "features.", "classifier."


def find_trunk(name: str, file: str | None = None) -> Path:
    """The file with the weights of the trunk `name` (of `TRUNK_FILES`): `file`, or else
    torchvision's in torch's cache.

    `file` may begin with `~`; a relative path starts at the working directory. The cache is
    `$TORCH_HOME/hub/checkpoints` (`~/.cache/torch/hub/checkpoints` by default). `UserError` where
    there is no such file, which tells what to download, from where and to where.
    """
    if name not in TRUNK_FILES:
        raise UserError(f"no trunk named {name!r}{nearest(name, TRUNK_FILES)}")
    if file is not None and not isinstance(file, str | os.PathLike):
        raise UserError(
            f"the weights of the trunk {name!r} are {file!r}, which is not the path of a file"
        )
    cached = Path(torch.hub.get_dir(), "checkpoints", TRUNK_FILES[name])
    path = cached if file is None else Path(file).expanduser()
    if path.is_file():
        return path
    way_out = (
        f"download {SOURCE}/{TRUNK_FILES[name]} to {cached}, or name a .pth or .safetensors file "
        "with 'weights' "
        "(nothing is downloaded here)"
    )
    if file is None:
        raise UserError(f"the weights of the trunk {name!r} are missing: {way_out}")
    raise UserError(f"no weights file {file!r} for the trunk {name!r}: {way_out}")


def load_trunk(name: str, file: str | None, layers: nn.Module) -> None:
    """Fill `layers`, an `nn.Sequential` in torchvision's numbering (tensors "0.weight", "0.bias"…),
    from `find_trunk`.

    The file is a whole network's state dict as torchvision has it, or the features' alone, with or
    without "features." before the number; it must hold exactly the tensors of `layers`, in their
    shapes and finite. They become float32 on the CPU. `UserError` otherwise.
    """
    path = find_trunk(name, file)
    found = {
        key.removeprefix(FEATURES): tensor
        for key, tensor in _read_tensors(path).items()
        if not key.startswith(CLASSIFIER)
    }
    wanted = layers.state_dict()
    title = f"{str(path)!r} is not the trunk {name!r} in torchvision's layout"
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found:
            raise UserError(f"{title}: it lacks the tensor {FEATURES}{key}")
        if key not in wanted:
            raise UserError(f"{title}: it holds a tensor {key!r} too many")
        if found[key].shape != wanted[key].shape:
            raise UserError(
                f"{title}: {FEATURES}{key} is {tuple(found[key].shape)} but must be "
                f"{tuple(wanted[key].shape)}"
            )
        if not torch.isfinite(found[key]).all():
            raise UserError(
                f"{str(path)!r}: the tensor {FEATURES}{key} holds NaN or infinity; is the file "
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
    except Exception as error:  # of a broken file torch.load raises nearly anything
        raise UserError(
            f"{str(path)!r} is not a readable file of weights ({type(error).__name__}); is it cut "
            "short, "
            "or does it hold more than tensors?"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise UserError(f"{str(path)!r} is not a state dict; save the network's state_dict() alone")
    return {str(key): tensor for key, tensor in content.items()}


MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet's RGB, as torchvision's networks want it
VGG19_BLOCKS = (
    (64, 2),
    (128, 2),
    (256, 4),
    (512, 4),
    (512, 4),
)  # channels, convolutions; a pooling after each
LPIPS_SMALLEST = {
    "alex": 31,
    "squeeze": 17,
    "vgg": 16,
}  # pixels, below which nothing is left of the deepest features


class VggFeature(nn.Module):
    """Distance between the features of VGG19: SRGAN's (Ledig et al. 2017), ESRGAN's (Wang et al.
    2018) content loss.

    Published settings: ESRGAN {"conv5_4": 1} before the activation, "l1"; SRGAN the same layer
    after it, "l2", weighted 0.006; Real-ESRGAN {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1,
    "conv4_4": 1, "conv5_4": 1} before it, "l1". Several layers mix the low (texture, colour) with
    the high (shapes).

    Args: layers: name ("conv1_1" to "conv5_4") -> weight above 0. The weighted distances are added
        up. before_activation: take what the convolution gives, or with False what the ReLU after it
        leaves. distance: "l1" (mean absolute) or "l2" (mean squared) difference of the features.
        weights: a file with VGG19's weights, see `load_trunk`; `None` is torchvision's in torch's
        cache. precision: of the trunk's convolutions, see `trunk_dtype`. Images, features and
        distances are float32.

    Raises: ValueError: a value outside of these. UserError: weights that are missing or of another
        network; when called, a crop that is too small.
    """

    def __init__(
        self,
        layers: Mapping[str, float] | None = None,
        before_activation: bool = True,
        distance: str = "l1",
        weights: str | None = None,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        _check_precision(precision)
        layers = {"conv5_4": 1.0} if layers is None else layers
        places = vgg19_places()
        _check_layers(layers, places)
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance {distance!r} is neither 'l1' nor 'l2'")
        if not isinstance(before_activation, bool):
            raise ValueError(f"before_activation {before_activation!r} is neither true nor false")
        self.distance = F.l1_loss if distance == "l1" else F.mse_loss
        self.taps = {
            places[name] + (0 if before_activation else 1): float(weight)
            for name, weight in layers.items()
        }
        with torch.device("meta"):  # the values come from the file: no memory, no random numbers
            whole = vgg19_features()
        load_trunk("vgg19", weights, whole)
        self.features = whole[: max(self.taps) + 1].requires_grad_(False).eval()
        self.smallest_side = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.features)
        self.precision = precision
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A float32 scalar for two RGB NCHW tensors, bytes or floats in [0, 1]. Gradients reach
        `sr` only."""
        _check_side("vgg_feature", sr, self.smallest_side)
        return in_precision(self.precision, self._distance_of_features, sr, hr)

    def _distance_of_features(self, sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            of_hr = self.extract(hr)
        of_sr = self.extract(sr)
        return torch.stack(
            [
                weight * self.distance(of_sr[place], of_hr[place])
                for place, weight in self.taps.items()
            ]
        ).sum()

    def extract(self, images: Tensor) -> dict[int, Tensor]:
        """Place in the trunk -> features, for every place that counts."""
        features = (unit_range(images, torch.float32) - self.mean) / self.std
        found = {}
        for place, layer in enumerate(self.features):
            features = layer(features)
            if place in self.taps:
                found[place] = features.float()
        return found


class LpipsDistance(nn.Module):
    """LPIPS 0.1 of every image of a batch (Zhang et al., "The Unreasonable Effectiveness of Deep
    Features", CVPR 2018).

    The network, the learned weights of its channels and the distance are the package lpips'
    (0.1.4).

    Args: network: "alex" (the usual metric), "squeeze" (the smallest) or "vgg" (VGG16, the one for
        losses). weights: a file with the trunk's weights, see `load_trunk`; `None` is torchvision's
        in torch's cache.

    Raises: ValueError: another `network`. UserError: weights that are missing or of another
        network; when called, images that are too small.
    """

    def __init__(self, network: str = "alex", weights: str | None = None) -> None:
        super().__init__()
        if not isinstance(network, str) or network not in LPIPS_SMALLEST:
            raise ValueError(f"network {network!r} is none of {', '.join(LPIPS_SMALLEST)}")
        self.smallest_side = LPIPS_SMALLEST[network]
        self.lpips = _random_lpips(network)
        trunk = nn.Sequential()
        for part in (
            self.lpips.net.children()
        ):  # slices of the trunk, whose layers keep torchvision's numbers
            for number, layer in part.named_children():
                trunk.add_module(number, layer)
        load_trunk(network, weights, trunk)
        self.requires_grad_(False).eval()

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """float32 (N,), 0 for equal images, of two RGB NCHW tensors, bytes or floats in [0, 1].

        Gradients reach `sr` only.
        """
        _check_side("lpips", sr, self.smallest_side)
        sr, hr = (
            2 * unit_range(images, torch.float32) - 1 for images in (sr, hr.detach())
        )  # lpips' own range
        return self.lpips(sr, hr).flatten()


class Lpips(nn.Module):
    """The mean LPIPS of a batch, as a loss. Arguments and errors are those of `LpipsDistance`.

    `precision`: of the network's convolutions, see `trunk_dtype`. As a metric LPIPS is always in
    float32.
    """

    def __init__(
        self, network: str = "alex", weights: str | None = None, precision: str = "auto"
    ) -> None:
        super().__init__()
        _check_precision(precision)
        self.measure, self.precision = LpipsDistance(network, weights), precision

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A float32 scalar for two RGB NCHW tensors, bytes or floats in [0, 1]. Gradients reach
        `sr` only."""
        return in_precision(
            self.precision, lambda sr, hr: self.measure(sr, hr).float().mean(), sr, hr
        )


PRECISIONS = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a loss's trunk computes in: "auto" is float16 on a GPU and float32 elsewhere.

    In float32 VGG19 alone takes a GPU as long as the generator that it judges. Of the two types of
    16 bits float16 is the nearer: of VGG19 with random weights, five layers, bicubic x4 beside HR,
    its gradient has a cosine of 0.98 to float32's and its value is right to 0.1 %; bfloat16's has
    0.87 to 0.91, and near HR its value is 7 % too large.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return PRECISIONS[precision]


def in_precision(
    precision: str, loss: Callable[[Tensor, Tensor], Tensor], sr: Tensor, hr: Tensor
) -> Tensor:
    """`loss(sr, hr)`, a scalar, with a trunk's convolutions in `trunk_dtype`.

    The gradient of a mean over millions of features is too small for float16, and what training
    multiplies a loss by is not known here. So the trunk's backward pass always begins with the same
    number, whatever it is given; what it was given multiplies its result, in float32.
    """
    dtype = trunk_dtype(precision, sr.device)
    if (
        sr.device.type == "cuda"
    ):  # whose convolutions of 16 bits are made for it; a CPU's rounding stays as it was
        sr, hr = (images.contiguous(memory_format=torch.channels_last) for images in (sr, hr))
    if dtype == torch.float32:
        return loss(sr, hr)
    with torch.autocast(sr.device.type, dtype):
        if not (sr.requires_grad and torch.is_grad_enabled()):
            return loss(sr, hr)
        shown, given, begin = sr.clone(), [], sr.numel() / 64
        value = loss(shown, hr)

    def begin_backward(gradient: Tensor) -> Tensor:
        given.append(gradient)
        return torch.full_like(gradient, begin)

    value.register_hook(begin_backward)
    shown.register_hook(lambda gradient: gradient * (given.pop() / begin))
    return value


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")


def vgg19_features() -> nn.Sequential:
    """The layers of VGG19 before its classifier, numbered as torchvision's (Simonyan and Zisserman,
    2015)."""
    layers: list[nn.Module] = []
    before = 3
    for channels, depth in VGG19_BLOCKS:
        for _ in range(depth):
            # Not in place: that would overwrite the features before the activation.
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg19_places() -> dict[str, int]:
    """ "conv1_1" to "conv5_4" -> their numbers in `vgg19_features`; the activation of each is the
    next one."""
    places, place = {}, 0
    for block, (_, depth) in enumerate(VGG19_BLOCKS, start=1):
        for number in range(1, depth + 1):
            places[f"conv{block}_{number}"] = place
            place += 2
        place += 1
    return places


def _check_layers(layers: Mapping[str, float], places: Mapping[str, int]) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"layers {layers!r} is not a table of layer: weight, such as {{conv5_4: 1.0}}"
        )
    for name, weight in layers.items():
        if name not in places:
            raise ValueError(f"VGG19 has no layer {name!r}{nearest(str(name), places)}")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not 0 < weight < float("inf")
        ):
            raise ValueError(f"the weight {weight!r} of layer {name!r} is not a number above 0")


def _check_side(loss: str, images: Tensor, smallest: int) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise UserError(
            f"{loss!r} needs images of at least {smallest}x{smallest} pixels, but they are "
            f"{height}x{width} (height x width); take a larger data.crop"
        )


def _random_lpips(network: str) -> nn.Module:
    """lpips' module: its trunk random, the learned weights of the channels as published."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of torchvision, whose argument names have changed since lpips was written
        import lpips

        with torch.random.fork_rng(
            devices=[]
        ):  # the random trunk is overwritten; it must not shift a trainer's RNG
            return lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
