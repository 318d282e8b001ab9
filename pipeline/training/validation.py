"""Validation during training: mean scores that are equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config.recipe import BestSpec, Recipe
from pipeline.data.dataset import Image
from pipeline.data.decoding import BadFileError, HostDecoder
from pipeline.data.image_files import is_npy, load_npy
from pipeline.data.image_pixels import in_depth
from pipeline.data.reader import low_resolution
from pipeline.distributed.ranks import Ranks
from pipeline.images import (
    border_of,
    cubic_resize,
    depth_of,
    to_pixels,
    to_tensor,
    unit_range,
    without_tf32,
)
from pipeline.metrics import METRICS, Measure, Trunk, load_measures, means, measure, metric_of

KEPT_BYTES = 1 << 29  # of images kept in memory per rank; the rest is read again each time


class ValidationPair(NamedTuple):
    """A validation image: tensors (1, 3, height, width) in host memory, both uint8 or uint16."""

    name: str
    hr: Tensor
    lr: Tensor


def validation_measures(recipe: Recipe, device: torch.device | str = "cpu") -> list[Measure]:
    """Load the measures of validation: PSNR-Y, metrics whose trunk the recipe names, and `best`'s.

    Raises `UserError` if a trunk's weights are missing or do not fit.
    """
    trunks = (
        {}
        if recipe.validation_lpips == "off"
        else {"lpips": Trunk(recipe.validation_lpips, recipe.lpips_weights)}
    )
    wanted = {"psnr_y", *trunks, metric_of(recipe.best.metric).name}
    return load_measures(
        [metric for name, metric in METRICS.items() if name in wanted], trunks, device
    )


def is_better(new: Mapping[str, float], best: Mapping[str, float] | None, spec: BestSpec) -> bool:
    """Whether the scores `new` beat the `best` so far, by the recipe's rule."""
    if best is None:
        return True
    metric, psnr_y = metric_of(spec.metric), METRICS["psnr_y"]
    if metric.name not in new or metric.name not in best:
        metric = psnr_y
    floor = -math.inf if spec.psnr_floor is None else spec.psnr_floor
    is_above, was_above = (scores["psnr_y"] >= floor for scores in (new, best))
    if is_above != was_above:
        return is_above
    metric = metric if is_above else psnr_y  # both are below the floor: prefer the nearer one
    return metric.is_better(new[metric.name], best[metric.name])


class ValidationSet:
    """This rank's share of the validation images: every `world_size`-th, uncropped.

    LR is made or read as in training. Raises `UserError` naming a file that cannot be read or is
    too small.
    """

    def __init__(
        self,
        images: Sequence[Image],
        recipe: Recipe,
        ranks: Ranks,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        limit = recipe.validation_images
        numbers = (
            range(len(images))
            if len(images) <= limit
            else [i * len(images) // limit for i in range(limit)]
        )
        self.count, self.recipe, self.border = len(numbers), recipe, border_of(recipe.scale)
        self.ranks, self.memory_format = ranks, memory_format
        self._images = [
            (number, images[number]) for number in numbers[ranks.rank :: ranks.world_size]
        ]
        self._measures = validation_measures(recipe, ranks.device)
        self._kept: dict[int, ValidationPair] = {}
        room = KEPT_BYTES
        # Read all of them now, so that a bad file fails the run at its start and not hours later.
        for place in range(len(self._images)):
            pair = self.pair(place)
            room -= pair.hr.nbytes + pair.lr.nbytes
            if room > 0:
                self._kept[place] = pair

    def __len__(self) -> int:
        """Number of images in this rank's share."""
        return len(self._images)

    def pair(self, place: int) -> ValidationPair:
        """Return the image at index `place` of this rank's share."""
        number, image = self._images[place]
        return self._kept.get(place) or self._checked_pair(image, number)

    def _checked_pair(self, image: Image, number: int) -> ValidationPair:
        pair = read_pair(image, number, self.recipe)
        height, width = pair.hr.shape[-2:]
        for metric, _, smallest in self._measures:
            if min(height, width) < smallest + 2 * self.border:
                trunk = getattr(self.recipe, f"validation_{metric.name}", "")
                option = (
                    f"validation_{metric.name}: {trunk}" if trunk else f"best.metric: {metric.key}"
                )
                raise UserError(
                    f"{image.path}: {height}x{width} is too small for {option}, which needs "
                    f"{smallest} pixels inside borders of {self.border}; remove it from the "
                    "validation list, or set "
                    f"{f'validation_{metric.name}=off' if trunk else 'best.metric=psnr'}"
                )
        return pair

    @torch.inference_mode()
    def measure(
        self, network: nn.Module, go_on: Callable[[int, int], bool] = lambda done, share: True
    ) -> dict[str, float] | None:
        """Return the mean scores of `network` over all ranks' images, by metric.

        Borders (`images.border_of`) are cut off. `go_on(images done, share)` is called before each
        image of this rank's share; if it returns False on any rank, the result is None. All ranks
        call it together.
        """
        scores: list[dict[str, float]] | None = []
        for place in range(len(self)):
            if not go_on(place, len(self)):
                scores = None
                break
            pair = self.pair(place)
            scores.append(self.score(self.upscale(network, pair), pair))
        shares = self.ranks.gather(scores)
        if any(share is None for share in shares):
            return None
        # Sum in the order of the list, so that rounding does not depend on the number of ranks.
        return means([shares[i % len(shares)][i // len(shares)] for i in range(self.count)])

    def score(self, sr: Tensor, pair: ValidationPair) -> dict[str, float]:
        """Return the scores of one image, infinite ones limited so that the mean stays finite."""
        scores = measure(sr, pair.hr.to(sr.device), self.border, self._measures)
        return {name: METRICS[name].limited(value) for name, value in scores.items()}

    @torch.inference_mode()
    def upscale(self, network: nn.Module, pair: ValidationPair) -> Tensor:
        """Return the network's output for a pair: pixels of its type, on the device."""
        lr = pair.lr.to(self.ranks.device).contiguous(memory_format=self.memory_format)
        with without_tf32():
            return to_pixels(network(lr), depth_of(pair.hr)).contiguous()


def enlarged_input(pair: ValidationPair) -> Tensor:
    """Upscale a pair's LR bicubically to the size of HR: pixels of its type, on the host.

    At x1, it is LR.
    """
    size = (pair.hr.shape[-2], pair.hr.shape[-1])
    return to_pixels(cubic_resize(unit_range(pair.lr, torch.float32), size), depth_of(pair.hr))


def read_pair(image: Image, number: int, recipe: Recipe, way_out: str = "") -> ValidationPair:
    """Read HR and LR of an image, or make its LR.

    `number`, its index in the list, seeds what is random in the LR. Raises `UserError` naming a
    file that cannot be read or is too small; `way_out` replaces the advice.
    """
    depth = recipe.data.bits
    pixels, scale = _read(image.path, depth), recipe.scale
    height, width = (side - side % scale for side in pixels.shape[:2])
    if min(height, width) < 16 * scale:
        way_out = way_out or (
            "run `python tools/check_training_data.py --clean`, then select the training files "
            "again"
        )
        raise UserError(
            f"{image.path}: {pixels.shape[0]}x{pixels.shape[1]} is too small to validate at scale "
            f"{scale}; {way_out}"
        )
    pixels = np.ascontiguousarray(pixels[:height, :width])
    if image.lr_path is None:
        degradation = recipe.data.degradation.of_folder(image.folder)
        lr = low_resolution(pixels, degradation, scale, seed=recipe.seed, number=number)
    else:
        lr = _read(image.lr_path, depth)
        if lr.shape[:2] != (height // scale, width // scale):
            raise UserError(
                f"{image.lr_path}: {lr.shape[0]}x{lr.shape[1]} is not 1/{scale} of "
                f"{height}x{width}, the size of {image.path}; make the pairs again with "
                "`python tools/pairs_to_data.py`"
            )
    return ValidationPair(image.name, to_tensor(pixels), to_tensor(lr))


def _read(path: str, depth: int) -> np.ndarray:
    """Read pixels of `depth` bits, (height, width, 3), with the decoder that training uses."""
    if is_npy(path):
        return in_depth(load_npy(path), depth)
    decoder = HostDecoder(threads=1, batch=1, depth=depth)
    try:
        (image,) = decoder.decode([path])
    finally:
        decoder.close()
    if isinstance(image, BadFileError):
        raise image
    return image
