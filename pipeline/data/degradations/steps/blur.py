"""Blur with a kernel of `pipeline.data.degradations.kernels`, or a median filter.

The kernels `gaussian` to `sinc`, and the distributions of their parameters, are those of
Real-ESRGAN. Kernels mirror the borders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.data.degradations.base import OnDevice, filtered
from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    Size,
    StepNodes,
    StepSpec,
    shares_of,
)
from pipeline.spec import Angle, Exponent, Radius, Range, Sigma, within

LARGEST = 21  # largest side of kernels with long tails, if `size` is not given
Cutoff = Annotated[Range, within(0.1, 3.1416)]  # in radians per pixel


class BlurSpec(StepSpec):
    """Blur with a kernel or a median filter."""

    kind: shares_of(  # type: ignore[valid-type]
        "gaussian",
        "anisotropic",
        "generalized",
        "generalized_anisotropic",
        "plateau",
        "plateau_anisotropic",
        "sinc",
        "box",
        "lens",
        "motion",
        "median",
    ) = Field(
        {"gaussian": 2.0, "anisotropic": 1.0},
        description="relative probability of each kind: gaussian, generalized and plateau, "
        "isotropic or anisotropic; sinc, which causes ringing; box; lens (the disc of a lens out "
        "of focus); motion (a line); median",
    )
    sigma: Sigma = Field(
        (0.2, 3.0),
        description="range of the standard deviation in pixels, uniform; anisotropic kinds draw "
        "one for each axis",
    )
    angle: Angle = Field(
        (-180.0, 180.0),
        description="range of the angle of anisotropic kinds and motion in degrees, from the x "
        "axis (right) towards the y axis (down)",
    )
    size: int | None = Field(
        None,
        ge=7,
        le=31,
        description="largest side of the kernel, odd; odd sides from 7 to it are drawn. None: 21 "
        "for generalized, plateau and sinc kinds, while Gaussians reach 4 sigma on each side",
    )
    beta_generalized: Exponent = Field(
        (0.5, 4.0),
        description="range of the exponent of generalized kinds; half of them are below 1",
    )
    beta_plateau: Exponent = Field(
        (1.0, 2.0), description="range of the exponent of plateau kinds; half of them are below 1"
    )
    cutoff: Cutoff | None = Field(
        None,
        description="range of the cutoff of sinc kernels in radians per pixel, at most pi. None: "
        "pi / 3 to pi for sides below 13, otherwise pi / 5 to pi",
    )
    radius: Radius = Field(
        (1.0, 4.0),
        description="range of the radius in pixels, for lens and for box (whose side is twice the "
        "radius plus 1)",
    )
    length: Annotated[Range, within(1, 101)] = Field(
        (3.0, 15.0), description="range of the length of the motion in pixels"
    )
    median_radius: Annotated[Range, within(1, 2)] = Field(
        (1.0, 1.0), description="range of the radius of the median: 1 (3x3 pixels) or 2 (5x5)"
    )

    @field_validator("size")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError(f"{value} must be odd; use {value + 1}")
        return value


def draw(spec: BlurSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    if kind == "median":
        return {"kind": kind, "radius": draws.integer(spec.median_radius)}
    if kind in ("box", "lens"):
        return {"kind": kind, "radius": draws.between(spec.radius)}
    if kind == "motion":
        length, angle = draws.between(spec.length), draws.between(spec.angle)
        return {"kind": kind, "length": length, "angle": angle}
    drawn: Parameters = {"kind": kind}
    base = kind.removesuffix("_anisotropic")
    if spec.size or base not in ("gaussian", "anisotropic"):
        drawn["side"] = 7 + 2 * draws.integer((0, ((spec.size or LARGEST) - 7) // 2))
    if kind == "sinc":
        low, high = spec.cutoff or (math.pi / (3 if drawn["side"] < 13 else 5), math.pi)
        return {**drawn, "cutoff": min(draws.between((low, high)), math.pi)}
    if kind.endswith("anisotropic"):
        drawn["sigma_x"], drawn["sigma_y"] = (draws.between(spec.sigma) for _ in range(2))
        drawn["angle"] = draws.between(spec.angle)
    else:
        drawn["sigma"] = draws.between(spec.sigma)
    if base in ("generalized", "plateau"):
        low, high = spec.beta_generalized if base == "generalized" else spec.beta_plateau
        # Half of the exponents are below 1, whatever the range.
        is_below = draws.chance(0.5)
        drawn["beta"] = draws.between((min(low, 1.0), 1.0) if is_below else (1.0, max(high, 1.0)))
    return drawn


def kernel(drawn: Parameters) -> NDArray[np.float32]:
    """Return the kernel for drawn parameters other than a median's: (side, side), sum 1.

    `box` is the ratio (size before / size after) of a linear resize that follows. The kernel is
    then widened, so that both together average areas.
    """
    from pipeline.data.degradations import kernels

    if "box" in drawn:
        plain = {name: value for name, value in drawn.items() if name != "box"}
        return kernels.with_box(kernel(plain), drawn["box"])
    kind = drawn["kind"]
    if kind == "sinc":
        return kernels.sinc_kernel(drawn["side"], drawn["cutoff"])
    if kind == "box":
        return kernels.box_kernel(2 * drawn["radius"] + 1)
    if kind == "lens":
        return kernels.disc_kernel(drawn["radius"])
    if kind == "motion":
        return kernels.motion_kernel(drawn["length"], math.radians(drawn["angle"]))
    sigmas = (drawn["sigma_x"], drawn["sigma_y"]) if "sigma_x" in drawn else (drawn["sigma"],) * 2
    side = drawn.get("side") or 2 * math.ceil(4 * max(sigmas)) + 1
    theta = math.radians(drawn.get("angle", 0.0))
    if "beta" not in drawn:
        return kernels.gaussian_kernel(side, *sigmas, theta)
    make = kernels.plateau_kernel if kind.startswith("plateau") else kernels.generalized_kernel
    return make(side, *sigmas, theta, drawn["beta"])


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    from pipeline.data.degradations import host
    from pipeline.libraries import cv2

    if drawn["kind"] == "median":
        out = workspace.array("median", image.shape, image.dtype, apart_from=image)
        return cv2.medianBlur(image, 2 * drawn["radius"] + 1, dst=out)
    return host.filtered(image, kernel(drawn), workspace)


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    from pipeline.data.degradations import host

    return (host.trimmed(kernel(drawn)),)


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    return filtered(image, on_device(nodes["kernel"]))


NODES = StepNodes(
    columns=("kernel",),
    arrays=_arrays,
    idle={"kind": "box", "radius": 0.0},
    add=_add,
    covers=lambda spec: not spec.kind.get("median"),
    fits=lambda drawn: drawn["kind"] != "median",
)
