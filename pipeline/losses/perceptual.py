"""Perceptual losses: distances between features of ImageNet networks, whose weights are frozen."""

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
        f"download {SOURCE}/{TRUNK_FILES[name]} to {cached}, or name a .pth or .safetensors file "
        "with 'weights' (nothing is downloaded automatically)"
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
VGG19_BLOCKS = (
    (64, 2),
    (128, 2),
    (256, 4),
    (512, 4),
    (512, 4),
)
# Smallest side in pixels for which the deepest features are not empty.
LPIPS_SMALLEST_SIDES = {
    "alex": 31,
    "squeeze": 17,
    "vgg": 16,
}


class VggFeature(nn.Module):
    """Distance between VGG19 features: the content loss of SRGAN and ESRGAN.

    Ledig et al. 2017 and Wang et al. 2018. Published settings: ESRGAN {"conv5_4": 1} before the
    activation, "l1"; SRGAN the same layer after it, "l2", weight 0.006; Real-ESRGAN {"conv1_2":
    0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1} before it, "l1". Several layers
    combine low-level features (texture, colour) with high-level ones (shapes).

    Args:
        layers: name ("conv1_1" to "conv5_4") -> weight above 0. The weighted distances are summed.
        before_activation: use the output of the convolution, or with False that of the ReLU after
            it.
        distance: "l1" (mean absolute) or "l2" (mean squared) difference of the features.
        weights: a file with VGG19's weights, see `load_trunk`; `None` uses torch's cache.
        precision: of the trunk's convolutions, see `trunk_dtype`. Images, features and distances
            are float32.

    Raises:
        ValueError: an argument has an unsupported value.
        UserError: the weights are missing or not this trunk's, or, when called, the crop is too
            small.
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
        indices = vgg19_layer_indices()
        _check_layers(layers, indices)
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance {distance!r} is neither 'l1' nor 'l2'")
        if not isinstance(before_activation, bool):
            raise ValueError(f"before_activation {before_activation!r} is neither true nor false")
        self.distance = F.l1_loss if distance == "l1" else F.mse_loss
        self.taps = {
            indices[name] + (0 if before_activation else 1): float(weight)
            for name, weight in layers.items()
        }
        # Values come from the file, so skip allocation and initialisation
        with torch.device("meta"):
            whole = vgg19_features()
        load_trunk("vgg19", weights, whole)
        self.features = whole[: max(self.taps) + 1].requires_grad_(False).eval()
        self.smallest_side = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.features)
        self.precision = precision
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a float32 scalar for two RGB NCHW tensors, uint8 or float in [0, 1].

        Gradients flow only to `sr`.
        """
        _check_side("vgg_feature", sr, self.smallest_side)
        return in_precision(self.precision, self._distance_of_features, sr, hr)

    def _distance_of_features(self, sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            of_hr = self.extract(hr)
        of_sr = self.extract(sr)
        return torch.stack(
            [
                weight * self.distance(of_sr[index], of_hr[index])
                for index, weight in self.taps.items()
            ]
        ).sum()

    def extract(self, images: Tensor) -> dict[int, Tensor]:
        """Return layer index in the trunk -> features, for every layer that has a weight."""
        features = (unit_range(images, torch.float32) - self.mean) / self.std
        found = {}
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in self.taps:
                found[index] = features.float()
        return found


class LpipsDistance(nn.Module):
    """LPIPS 0.1 of every image of a batch.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
    2018. Network, learned channel weights and distance are those of the package lpips (0.1.4).

    Args:
        network: "alex" (the usual metric), "squeeze" (the smallest) or "vgg" (VGG16, for losses).
        weights: a file with the trunk's weights, see `load_trunk`; `None` uses torch's cache.

    Raises:
        ValueError: an unknown `network`.
        UserError: the weights are missing or not this trunk's, or, when called, the images are
            too small.
    """

    def __init__(self, network: str = "alex", weights: str | None = None) -> None:
        super().__init__()
        if not isinstance(network, str) or network not in LPIPS_SMALLEST_SIDES:
            raise ValueError(f"network {network!r} is not one of {', '.join(LPIPS_SMALLEST_SIDES)}")
        self.smallest_side = LPIPS_SMALLEST_SIDES[network]
        self.lpips = _random_lpips(network)
        trunk = nn.Sequential()
        # These are slices of the trunk; their layers keep torchvision's numbers.
        for part in self.lpips.net.children():
            for number, layer in part.named_children():
                trunk.add_module(number, layer)
        load_trunk(network, weights, trunk)
        self.requires_grad_(False).eval()

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return float32 (N,), 0 for equal images, for RGB NCHW tensors, uint8 or float in [0, 1].

        Gradients flow only to `sr`.
        """
        _check_side("lpips", sr, self.smallest_side)
        # lpips expects [-1, 1].
        sr, hr = (2 * unit_range(images, torch.float32) - 1 for images in (sr, hr.detach()))
        return self.lpips(sr, hr).flatten()


class Lpips(nn.Module):
    """Mean LPIPS of a batch as a loss; arguments and errors are those of `LpipsDistance`.

    `precision` is that of the network's convolutions, see `trunk_dtype`. The LPIPS metric is always
    computed in float32.
    """

    def __init__(
        self, network: str = "alex", weights: str | None = None, precision: str = "auto"
    ) -> None:
        super().__init__()
        _check_precision(precision)
        self.measure, self.precision = LpipsDistance(network, weights), precision

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a float32 scalar for two RGB NCHW tensors, uint8 or float in [0, 1].

        Gradients flow only to `sr`.
        """
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
    """Return the dtype of a trunk's convolutions; "auto" is float16 on a GPU, float32 elsewhere.

    In float32, VGG19 alone takes a GPU as long as the generator. Of the two 16-bit types, float16
    is more accurate. For VGG19 with random weights, five layers, and bicubic x4 against HR, its
    gradient has a cosine of 0.98 with that of float32 and its value an error of 0.1 %. With
    bfloat16, the cosine is 0.87 to 0.91, and near HR the value is 7 % too large.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return PRECISIONS[precision]


def in_precision(
    precision: str, loss: Callable[[Tensor, Tensor], Tensor], sr: Tensor, hr: Tensor
) -> Tensor:
    """Return `loss(sr, hr)`, a scalar, with a trunk's convolutions in `trunk_dtype`.

    The gradient of a mean over millions of features is too small for float16, and the factor by
    which training multiplies the loss is unknown here. Therefore the trunk's backward pass always
    starts from the same number, and the incoming gradient multiplies its result, in float32.
    """
    dtype = trunk_dtype(precision, sr.device)
    # 16-bit convolutions on GPUs are made for channels_last; on CPUs it would only change the
    # rounding.
    if sr.device.type == "cuda":
        sr, hr = (images.contiguous(memory_format=torch.channels_last) for images in (sr, hr))
    if dtype == torch.float32:
        return loss(sr, hr)
    with torch.autocast(sr.device.type, dtype):
        if not (sr.requires_grad and torch.is_grad_enabled()):
            return loss(sr, hr)
        sr_copy, incoming, initial = sr.clone(), [], sr.numel() / 64
        value = loss(sr_copy, hr)

    def start_backward(gradient: Tensor) -> Tensor:
        incoming.append(gradient)
        return torch.full_like(gradient, initial)

    value.register_hook(start_backward)
    sr_copy.register_hook(lambda gradient: gradient * (incoming.pop() / initial))
    return value


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def vgg19_features() -> nn.Sequential:
    """Return VGG19's layers before its classifier, in torchvision's numbering.

    Simonyan and Zisserman, ICLR 2015.
    """
    layers: list[nn.Module] = []
    before = 3
    for channels, depth in VGG19_BLOCKS:
        for _ in range(depth):
            # Not in place, which would overwrite the features before the activation.
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg19_layer_indices() -> dict[str, int]:
    """Return the index in `vgg19_features` of "conv1_1" to "conv5_4".

    The activation of each layer directly follows it.
    """
    indices, index = {}, 0
    for block, (_, depth) in enumerate(VGG19_BLOCKS, start=1):
        for number in range(1, depth + 1):
            indices[f"conv{block}_{number}"] = index
            index += 2
        index += 1
    return indices


def _check_layers(layers: Mapping[str, float], indices: Mapping[str, int]) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"layers {layers!r} is not a table of layer: weight, e.g. {{conv5_4: 1.0}}"
        )
    for name, weight in layers.items():
        if name not in indices:
            raise ValueError(f"VGG19 has no layer {name!r}{nearest(str(name), indices)}")
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
            f"{height}x{width} (height x width); use a larger data.crop"
        )


def _random_lpips(network: str) -> nn.Module:
    """Return lpips' module with a random trunk and the published channel weights."""
    import_torchvision()
    with warnings.catch_warnings():
        # torchvision has renamed arguments since lpips was written, and warns about it.
        warnings.simplefilter("ignore")
        import lpips

        # The random trunk is overwritten later; creating it must not advance the trainer's RNG.
        with torch.random.fork_rng(devices=[]):
            return lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
