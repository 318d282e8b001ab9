"""Mixing of samples: mixup, CutMix, ResizeMix and CutBlur, for networks whose LR is smaller.

The kinds, each with probability `kinds[kind]` / sum(kinds):

- mixup (Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412): LR and HR become weighted means
  with the partner's. A share that is uniform in [0, 1] is the paper's Beta(1, 1).
- cutmix (Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899): a square of LR and HR becomes
  the partner's at the same place.
- resizemix (Qin et al., 2020, https://arxiv.org/abs/2012.11101): the square becomes the partner's
  whole crop, reduced to it, in LR and HR by the same factor.
- cutblur (Yoo et al., CVPR 2020, https://arxiv.org/abs/2004.00448): of LR alone, the square, or for
  half of the samples all but the square, becomes HR. The paper's networks get LR enlarged to HR's
  size; others get LR itself, so HR is first reduced to LR's size (antialiased bicubic), which
  neosr and traiNNer do by enlarging LR and reducing the result again. The network learns where the
  degradation is, and to leave what is not degraded as it is. At x1 it is the paper's form.

The partner of sample k is the sample k ^ 1: samples 2 j and 2 j + 1 are each other's partners. The
order of an epoch is random, so this is as good as any other choice, and both are in the same
micro-batch if its size is even. Together with words drawn from (seed, k), a mixed sample is
therefore a pure function of the seed and k, as every other sample is: it does not depend on ranks,
micro-batches, accumulation or history.

The draws are made on the host. They become sizes of slices, so that nothing has to be copied to the
device and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.sampling import MIXING, WORDS, random_words, uniforms
from pipeline.data.spec import MIXES, MixingSpec
from pipeline.images import cubic_resize, depth_of, to_pixels, unit_range


class Mix(NamedTuple):
    """How one sample is mixed. The box is a square of LR; HR's is `scale` times as large."""

    kind: str
    share: float  # of the partner, in mixup
    top: int  # first row of the box, in LR pixels
    left: int
    side: int
    is_inside: bool  # cutblur: whether HR is inside or outside the box


def partner(sample: int) -> int:
    """Return the number of the sample that this one is mixed with."""
    return sample ^ 1


def draw(spec: MixingSpec, seed: int, first: int, count: int, side: int) -> list[Mix | None]:
    """Return how samples first .. first + count - 1 are mixed; None for those that are not.

    `side` is that of LR, in pixels.
    """
    kinds = [kind for kind in MIXES if kind in spec.kinds]  # the order in a recipe has no effect
    bounds = np.cumsum([spec.kinds[kind] for kind in kinds])
    mixes: list[Mix | None] = []
    for numbers in uniforms(random_words(seed, MIXING, first, count, WORDS)).tolist():
        chance, which, size, vertical, horizontal, inside, *_ = numbers
        if chance >= spec.probability:
            mixes.append(None)
            continue
        low, high = spec.side
        box = min(side, max(1, round((low + (high - low) * size) * side)))
        mixes.append(
            Mix(
                kinds[int(np.searchsorted(bounds, which * bounds[-1], side="right"))],
                spec.share[0] + (spec.share[1] - spec.share[0]) * size,
                int(vertical * (side - box + 1)),
                int(horizontal * (side - box + 1)),
                box,
                inside < 0.5,
            )
        )
    return mixes


def mix(lr: Tensor, hr: Tensor, mixes: Sequence[Mix | None]) -> tuple[Tensor, Tensor]:
    """Return LR and HR of a micro-batch, mixed as drawn, in new tensors.

    `lr`, `hr`: NCHW, uint8 or uint16, on any device. The first sample's number is even, and so is
    their count, unless every mix is a cutblur. Results are rounded to pixels once.
    """
    mixed_lr, mixed_hr = lr.clone(), hr.clone()
    scale = hr.shape[-1] // lr.shape[-1]
    for own, drawn in enumerate(mixes):
        if drawn is None:
            continue
        other = partner(own)
        for source, target, factor in ((lr, mixed_lr, 1), (hr, mixed_hr, scale)):
            top, left, side = (factor * n for n in (drawn.top, drawn.left, drawn.side))
            rows, columns = slice(top, top + side), slice(left, left + side)
            if drawn.kind == "mixup":
                ours, theirs = (unit_range(source[n], torch.float32) for n in (own, other))
                target[own] = to_pixels(ours.lerp(theirs, drawn.share), depth_of(source))
            elif drawn.kind == "cutmix":
                target[own, :, rows, columns] = source[other, :, rows, columns]
            elif drawn.kind == "resizemix":
                target[own, :, rows, columns] = _resized(source[other], side)
            elif source is lr:
                sharp = _resized(hr[own], lr.shape[-1])
                if drawn.is_inside:
                    target[own, :, rows, columns] = sharp[:, rows, columns]
                else:
                    sharp[:, rows, columns] = source[own, :, rows, columns]
                    target[own] = sharp
    return mixed_lr, mixed_hr


def _resized(image: Tensor, side: int) -> Tensor:
    """Return a square CHW image resized to `side` pixels, as pixels of the same type, in a copy."""
    if image.shape[-1] == side:
        return image.clone()
    floats = unit_range(image[None], torch.float32)
    return to_pixels(cubic_resize(floats, (side, side)), depth_of(image))[0]
