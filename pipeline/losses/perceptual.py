"""Perceptual losses: distances between features of ImageNet networks, whose weights are frozen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import nearest
from pipeline.images import unit_range
from pipeline.libraries import import_torchvision
from pipeline.losses.trunks import (
    VGG19_BLOCKS,
    VggTrunk,
    check_precision,
    check_side,
    in_precision,
    load_trunk,
    vgg_layer_indices,
)
from pipeline.spec import is_number

# Smallest side in pixels for which the deepest features are not empty.
LPIPS_SMALLEST_SIDES = {
    "alex": 31,
    "squeeze": 17,
    "vgg": 16,
}


class Vgg19Features(VggTrunk):
    """VGG19 up to the deepest of `places`.

    Args:
        places: numbers of the layers whose output is wanted, as in `vgg_layer_indices`.
        weights: a file with VGG19's weights, see `load_trunk`; `None` uses torch's cache.

    Raises:
        UserError: the weights are missing or not this trunk's.
    """

    def __init__(self, places: Iterable[int], weights: str | None) -> None:
        super().__init__("vgg19", weights)
        self.places = frozenset(places)
        self.features = self.features[: max(self.places) + 1].requires_grad_(False).eval()
        self.smallest_side = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.features)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return place -> features.

        `images` are RGB NCHW, pixels or floats in [0, 1]. The features are float32 under autocast
        too.
        """
        features, found = self.normalised(images), {}
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in self.places:
                found[index] = features.to(self.mean.dtype)
        return found


class VggLoss(nn.Module):
    """Weighted sum over layers of VGG19 of a distance between the features of SR and HR.

    A subclass has a `name`, for messages, and a `distance`.

    Args:
        layers: name ("conv1_1" to "conv5_4") -> weight above 0.
        before_activation: use the output of the convolution, or with False that of the ReLU after
            it.
        weights: a file with VGG19's weights, see `load_trunk`; `None` uses torch's cache.
        precision: of the trunk's convolutions, see `trunk_dtype`. Images, features and distances
            are float32.

    Raises:
        ValueError: an argument has an unsupported value.
        UserError: the weights are missing or not this trunk's, or, when called, the crop is too
            small.
    """

    name = ""

    def __init__(
        self,
        layers: Mapping[str, float],
        before_activation: bool,
        weights: str | None,
        precision: str,
    ) -> None:
        super().__init__()
        check_precision(precision)
        indices = vgg_layer_indices(VGG19_BLOCKS)
        _check_layers(layers, indices)
        if not isinstance(before_activation, bool):
            raise ValueError(f"before_activation {before_activation!r} is neither true nor false")
        self.places = {
            indices[name] + (0 if before_activation else 1): float(weight)
            for name, weight in layers.items()
        }
        self.trunk = Vgg19Features(self.places, weights)
        self.smallest_side, self.weights, self.precision = (
            self.trunk.smallest_side,
            weights,
            precision,
        )

    def distance(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar for two NCHW feature maps of one layer."""
        raise NotImplementedError

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a float32 scalar for two RGB NCHW tensors, pixels or floats in [0, 1].

        Gradients flow only to `sr`.
        """
        return vgg_losses([self], sr, hr)[self.name]


def share_trunks(losses: Iterable[Any]) -> list[list[VggLoss]]:
    """Let losses on the same VGG19 use one module; return them in groups for `vgg_losses`.

    The same means: the same file, and the same precision. Other losses are ignored.
    """
    groups: dict[tuple[str | None, str], list[VggLoss]] = {}
    for loss in losses:
        if isinstance(loss, VggLoss):
            groups.setdefault((loss.weights, loss.precision), []).append(loss)
    for group in groups.values():
        trunk = max((loss.trunk for loss in group), key=lambda trunk: len(trunk.features))
        trunk.places = frozenset().union(*(loss.places for loss in group))
        for loss in group:
            loss.trunk = trunk
    return list(groups.values())


def vgg_losses(losses: Sequence[VggLoss], sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """Return the float32 scalar of every loss, by name, for losses with one trunk.

    The features of SR and of HR are computed once for all of them.
    """
    for loss in losses:
        check_side(loss.name, sr, loss.smallest_side)
    trunk, precision = losses[0].trunk, losses[0].precision

    def distances(sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            of_hr = trunk(hr)
        of_sr = trunk(sr)
        with torch.autocast(sr.device.type, enabled=False):
            return torch.stack(
                [
                    torch.stack(
                        [
                            weight * loss.distance(of_sr[place], of_hr[place])
                            for place, weight in loss.places.items()
                        ]
                    ).sum()
                    for loss in losses
                ]
            )

    values = in_precision(precision, distances, sr, hr)
    return {loss.name: value for loss, value in zip(losses, values.unbind(), strict=True)}


class VggFeature(VggLoss):
    """Mean difference between VGG19 features: the content loss of SRGAN and ESRGAN.

    Ledig et al. 2017 and Wang et al. 2018. Published settings: ESRGAN {"conv5_4": 1} before the
    activation, "l1"; SRGAN the same layer after it, "l2", weight 0.006; Real-ESRGAN {"conv1_2":
    0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1} before it, "l1". Several layers
    combine low-level features (texture, colour) with high-level ones (shapes).

    Args:
        layers, before_activation, weights, precision: see `VggLoss`.
        distance: "l1" (mean absolute) or "l2" (mean squared) difference of the features.

    Raises:
        ValueError, UserError: see `VggLoss`; `distance` is neither of these.
    """

    name = "vgg_feature"

    def __init__(
        self,
        layers: Mapping[str, float] | None = None,
        before_activation: bool = True,
        distance: str = "l1",
        weights: str | None = None,
        precision: str = "auto",
    ) -> None:
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance {distance!r} is neither 'l1' nor 'l2'")
        layers = {"conv5_4": 1.0} if layers is None else layers
        super().__init__(layers, before_activation, weights, precision)
        self.difference = F.l1_loss if distance == "l1" else F.mse_loss

    def distance(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return the mean difference of two feature maps."""
        return self.difference(sr, hr)


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
        check_side("lpips", sr, self.smallest_side)
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
        check_precision(precision)
        self.measure, self.precision = LpipsDistance(network, weights), precision

    @property
    def trunk(self) -> nn.Module:
        """The part that is worth compiling."""
        return self.measure.lpips

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a float32 scalar for two RGB NCHW tensors, uint8 or float in [0, 1].

        Gradients flow only to `sr`.
        """
        return in_precision(
            self.precision, lambda sr, hr: self.measure(sr, hr).float().mean(), sr, hr
        )


def _check_layers(layers: Mapping[str, float], indices: Mapping[str, int]) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"layers {layers!r} is not a table of layer: weight, e.g. {{conv5_4: 1.0}}"
        )
    for name, weight in layers.items():
        if name not in indices:
            raise ValueError(f"VGG19 has no layer {name!r}{nearest(str(name), indices)}")
        if not is_number(weight) or weight <= 0:
            raise ValueError(f"the weight {weight!r} of layer {name!r} is not a number above 0")


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
