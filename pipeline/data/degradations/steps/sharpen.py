"""Sharpening by an unsharp mask: the difference from a blurred image is amplified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations import kernels
from pipeline.data.degradations.base import OnDevice, filtered
from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    Size,
    StepNodes,
    StepSpec,
    levels,
    shares_of,
)
from pipeline.spec import Levels, Range, Sigma, within

HR_SIDE, HR_SIGMA, HR_AMOUNT, HR_THRESHOLD = 51, 8.0, 0.5, 10.0  # published; OpenCV's sigma
HR_REACH = HR_SIDE - 1
"""Pixels around a crop on which its sharpened pixels depend, because HR is filtered twice."""


class SharpenSpec(StepSpec):
    """Sharpening by an unsharp mask."""

    kind: shares_of("unsharp", "usm") = Field(  # type: ignore[valid-type]
        {"unsharp": 1.0},
        description="relative probability of each kind: unsharp, as in image editors; usm, "
        "Real-ESRGAN's, whose mask is blurred and whose sharpened image is clipped to 0..255",
    )
    sigma: Sigma = Field(
        (0.5, 2.0), description="range of the standard deviation of the blur in pixels, uniform"
    )
    amount: Annotated[Range, within(0, 20)] = Field(
        (0.3, 1.5), description="range of the factor of the difference, uniform; 1 doubles edges"
    )
    threshold: Levels = Field(
        (0.0, 3.0),
        description="range of the difference in levels (0..255) up to which pixels stay unchanged",
    )


def draw(spec: SharpenSpec, draws: Draws, canvas: Canvas) -> Parameters:
    return {
        "kind": draws.choose(spec.kind),
        "sigma": draws.between(spec.sigma),
        "amount": draws.between(spec.amount),
        "threshold": draws.between(spec.threshold),
    }


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    sharpened = _by_soft_mask if drawn["kind"] == "usm" else _by_hard_mask
    return sharpened(levels(image), drawn["sigma"], drawn["amount"], drawn["threshold"], workspace)


def sharpened_hr(image: Image, workspace: object) -> NDArray[np.float32]:
    """Return HR as Real-ESRGAN sharpens it for training: float32 levels in 0..255, unrounded.

    `image` is (height, width, 3), uint8 or float32 in 0..255, and is not changed. BasicSR's
    USMSharp(radius=50), weight 0.5, threshold 10: the kernel is OpenCV's of side 51.
    """
    return _by_soft_mask(levels(image), HR_SIGMA, HR_AMOUNT, HR_THRESHOLD, workspace)


def _by_hard_mask(
    image: NDArray[np.float32], sigma: float, amount: float, threshold: float, workspace: object
) -> NDArray[np.float32]:
    """Return image + amount d where |d| > threshold; d is the image minus its blur."""
    from pipeline.libraries import cv2

    detail = _detail(image, sigma, _side("unsharp", sigma), workspace)
    if threshold:
        cv2.multiply(detail, _above(detail, threshold, image, workspace), dst=detail)
    return cv2.scaleAdd(detail, amount, image, dst=detail)


def _by_soft_mask(
    image: NDArray[np.float32], sigma: float, amount: float, threshold: float, workspace: object
) -> NDArray[np.float32]:
    """Return m clip(image + amount d) + (1 - m) image; m is the blur of |d| > threshold."""
    from pipeline.data.degradations import host
    from pipeline.libraries import cv2

    side = _side("usm", sigma)
    detail = _detail(image, sigma, side, workspace)
    mask = _above(detail, threshold, image, workspace)
    sharper = cv2.scaleAdd(detail, amount, image, dst=detail)
    np.clip(sharper, 0, 255, out=sharper)
    change = cv2.subtract(sharper, image, dst=detail)
    # Blurring the mask may overwrite the image, which may lie in the buffer of an earlier blur.
    result = workspace.array("sharpened", image.shape, apart_from=image)
    result[...] = image
    soft = host.filtered(mask, _kernel(sigma, side), workspace)
    return cv2.add(result, cv2.multiply(change, soft, dst=change), dst=result)


def _side(kind: str, sigma: float) -> int:
    """Return the side of the kernel of the blur."""
    if kind == "unsharp":
        return 2 * math.ceil(4 * sigma) + 1
    # OpenCV's rule: sigma = 0.3 (side / 2 - 1.5) + 0.8.
    return 2 * max(round((sigma - 0.8) / 0.3 + 1), math.ceil(2 * sigma)) + 1


def _kernel(sigma: float, side: int) -> NDArray[np.float32]:
    return kernels.gaussian_kernel(side, sigma, sigma, 0)


def _detail(
    image: NDArray[np.float32], sigma: float, side: int, workspace: object
) -> NDArray[np.float32]:
    """Return the image minus its blur, in other memory than the image."""
    from pipeline.data.degradations import host
    from pipeline.libraries import cv2

    blurred = host.filtered(image, _kernel(sigma, side), workspace)
    out = workspace.array("detail", image.shape, apart_from=image)
    return cv2.subtract(image, blurred, dst=out)


def _above(
    detail: NDArray[np.float32], threshold: float, image: NDArray[np.float32], workspace: object
) -> NDArray[np.float32]:
    """Return 1 where |detail| > threshold, otherwise 0, in other memory than the image."""
    from pipeline.libraries import cv2

    mask = workspace.array("mask", detail.shape, apart_from=image)
    np.abs(detail, out=mask)
    return cv2.threshold(mask, threshold, 1, cv2.THRESH_BINARY, dst=mask)[1]


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    sigma, kind = drawn["sigma"], drawn["kind"]
    line = _kernel(sigma, _side(kind, sigma)).sum(axis=0)
    return (
        np.array(kind == "usm"),
        line[None],
        line[:, None],
        np.array(drawn["amount"], np.float32),
        np.array(drawn["threshold"], np.float32),
    )


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    row, column = on_device(nodes["row"]), on_device(nodes["column"])
    is_soft, amount, threshold = nodes["is_soft"], nodes["amount"], nodes["threshold"]
    if is_soft:
        sharper = by_soft_mask(image, row, column, amount, threshold)
    else:
        detail = image - filtered(filtered(image, row), column)
        sharper = image + detail * _is_above(detail, threshold) * amount
    return sharper


def by_soft_mask(levels: Any, row: Any, column: Any, amount: Any, threshold: Any) -> Any:
    """Return a node of FP32 `levels`, sharpened like `_by_soft_mask`.

    row, column: nodes of the blur's kernel along a row, (1, side), and along a column, (side, 1).
    """
    from nvidia.dali import math as dali_math

    detail = levels - filtered(filtered(levels, row), column)
    mask = filtered(filtered(_is_above(detail, threshold), row), column)
    return levels + mask * (dali_math.clamp(levels + detail * amount, 0.0, 255.0) - levels)


def sharpened_hr_in_graph(levels: Any, on_device: OnDevice) -> Any:
    """Return a node of FP32 `levels` of HR, sharpened like `sharpened_hr`."""
    from nvidia.dali import types

    line = _kernel(HR_SIGMA, HR_SIDE).sum(axis=0)
    row, column = (on_device(types.Constant(one)) for one in (line[None], line[:, None]))
    return by_soft_mask(levels, row, column, HR_AMOUNT, HR_THRESHOLD)


def _is_above(detail: Any, threshold: Any) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    return fn.cast(dali_math.abs(detail) > threshold, dtype=types.FLOAT)


NODES = StepNodes(
    columns=("is_soft", "row", "column", "amount", "threshold"),
    arrays=_arrays,
    idle={"kind": "usm", "sigma": 0.5, "amount": 0.0, "threshold": 0.0},
    add=_add,
)
