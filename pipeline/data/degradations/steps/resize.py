"""Resizing with the kernels that programs commonly use.

Pixel centres are aligned, so nothing moves. When shrinking, only `area`, `cubic_antialiased`,
`hermite`, `lanczos` and `mitchell` are antialiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.data.degradations import kernels
from pipeline.data.degradations.base import OnDevice, filtered, interpolation, resized
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
from pipeline.spec import Probability, Range, Spec, within

KINDS = (
    "area",
    "linear",
    "cubic",
    "cubic_75",
    "cubic_antialiased",
    "lanczos",
    "mitchell",
    "hermite",
    "nearest",
)
LEAST = 8  # pixels; the shortest side that a factor can give
Enlargement = Annotated[Range, within(0.02, 8)]  # new size / size
Kinds = shares_of(*KINDS)


class Detour(Spec):
    """An intermediate size."""

    up: Probability = Field(0.0, description="probability of enlarging the image first")
    down: Probability = Field(0.0, description="probability of shrinking the image first")
    up_factor: Annotated[Range, within(1, 8)] = Field(
        (1.0, 2.0), description="range of the factor by which the image is enlarged first, uniform"
    )
    down_factor: Annotated[Range, within(0.02, 1)] = Field(
        (0.5, 1.0), description="range of the factor by which the image is shrunk first, uniform"
    )
    kind: Kinds | None = Field(  # type: ignore[valid-type]
        None, description="relative probability of each kernel to this size; none: as `kind`"
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> Detour:
        if self.up + self.down > 1:
            raise ValueError(
                f"up + down = {self.up + self.down:g}; the probabilities of enlarging and of "
                "shrinking first must not exceed 1 together"
            )
        return self


class ResizeSpec(StepSpec):
    """Resizing, to the size of LR or HR or by a factor."""

    kind: Kinds = Field(  # type: ignore[valid-type]
        {"area": 1.0, "linear": 1.0, "cubic": 1.0},
        description="relative probability of each kernel: area (a box filter and linear sampling), "
        "linear, cubic (Keys, a = -0.5), cubic_75 (OpenCV's, a = -0.75), cubic_antialiased "
        "(MATLAB's imresize), lanczos (three lobes, Pillow's), mitchell, hermite, nearest",
    )
    to: Literal["lr", "hr"] | None = Field(
        None, description="target: the size of LR or HR; none: by `factor`"
    )
    factor: Enlargement = Field(
        (0.5, 1.5),
        description="range of the factor, uniform; no side becomes shorter than 8 pixels",
    )
    direction: shares_of("up", "down", "keep") | None = Field(  # type: ignore[valid-type]
        None,
        description="relative probability of enlarging (factor from 1 to the high end), shrinking "
        "(from the low end to 1) and keeping the size of `of`; none: uniform over `factor`",
    )
    of: Literal["current", "hr", "lr"] = Field(
        "current", description="size that the factor multiplies: that of the image, HR or LR"
    )
    detour: Detour = Field(
        Detour(), description="an intermediate size: enlarge or shrink the image first"
    )

    @model_validator(mode="after")
    def _one_target(self) -> ResizeSpec:
        # Defaults may be written out, as in the recipe that a run keeps.
        by_factor = [
            name
            for name in ("factor", "direction", "of")
            if getattr(self, name) != ResizeSpec.model_fields[name].default
        ]
        if self.to and by_factor:
            raise ValueError(
                f"`to: {self.to}` leaves nothing to `{by_factor[0]}`; remove one of the two"
            )
        low, high = self.factor
        shares = self.direction or {}
        if shares.get("up") and high < 1:
            raise ValueError(f"direction `up` needs a factor above 1, but it ends at {high:g}")
        if shares.get("down") and low > 1:
            raise ValueError(f"direction `down` needs a factor below 1, but it begins at {low:g}")
        return self


def draw(spec: ResizeSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    direction = draws.choose(spec.direction) if spec.direction else ""
    low, high = {
        "": spec.factor,
        "up": (1.0, spec.factor[1]),
        "down": (spec.factor[0], 1.0),
        "keep": (1.0, 1.0),
    }[direction]
    factor = draws.between((low, high))
    full = {"current": canvas.size, "hr": canvas.hr, "lr": canvas.lr}
    size = full[spec.to] if spec.to else _scaled(full[spec.of], factor)
    way, detour = draws.uniform(), spec.detour
    if way >= detour.up + detour.down:
        return {"kind": kind, "size": list(size)}
    bounds = detour.up_factor if way < detour.up else detour.down_factor
    return {
        "kind": kind,
        "size": list(size),
        "through": list(_scaled(canvas.size, draws.between(bounds))),
        "through_kind": draws.choose(detour.kind or spec.kind),
    }


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(LEAST, int(size[0] * factor)), max(LEAST, int(size[1] * factor))


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    if "through" in drawn:
        image = _resized(image, drawn["through"], drawn["through_kind"], workspace)
    return _resized(image, drawn["size"], drawn["kind"], workspace)


def _resized(image: Image, sides: list[int], kind: str, workspace: object) -> Image:
    from pipeline.data.degradations import host
    from pipeline.libraries import cv2

    size = sides[0], sides[1]
    if size == image.shape[:2]:
        return image
    if kind == "cubic_antialiased" and image.dtype == np.uint8:
        return _as_matlab(image, size, workspace)
    if kind in host.RESAMPLING:
        return host.resampled(image, size, kind, workspace)
    if kind in ("nearest", "cubic_75"):
        how = {"nearest": cv2.INTER_NEAREST_EXACT, "cubic_75": cv2.INTER_CUBIC}[kind]
        source = image if kind == "nearest" else levels(image)
        out = workspace.array("resized", (*size, 3), source.dtype, apart_from=source)
        return cv2.resize(source, sides[::-1], dst=out, interpolation=how)
    if kind == "area":
        image = host.filtered(image, _box(kind, image.shape[0] / sides[0]), workspace)
    return host.resized(image, size, is_cubic=kind == "cubic", workspace=workspace)


def _box(kind: str, ratio: float) -> kernels.Kernel:
    """Return the filter before linear sampling; `ratio` is the size before / the size after."""
    kernel = kernels.delta_kernel()
    return kernels.with_box(kernel, ratio) if kind == "area" else kernel


def _as_matlab(image: Image, size: tuple[int, int], workspace: object) -> Image:
    """Resize bytes as MATLAB does: one direction after the other, each rounded, halves up.

    The result has the same pixels as the published LR of Set5, except at the borders: that LR was
    made with old releases of MATLAB, which repeat the last pixel instead of mirroring.
    """
    from pipeline.data.degradations import host

    height, width = image.shape[:2]
    rows_first = size[0] * width <= size[1] * height  # the direction that shrinks more
    for side in ((size[0], width) if rows_first else (height, size[1])), size:
        if side == image.shape[:2]:
            continue
        resized = host.resampled(image, side, "cubic_antialiased", workspace)
        out = workspace.array("matlab", resized.shape, np.uint8, apart_from=image)
        np.clip(np.add(resized, 0.5, out=resized), 0, 255, out=resized)
        out[...] = resized
        image = out
    return image


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    return (
        _box(drawn["kind"], size[0] / drawn["size"][0]),
        np.array(drawn["size"], np.float32),
        interpolation(drawn["kind"]),
    )


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    image = filtered(image, on_device(nodes["box"]))
    return resized(image, nodes["size"], nodes["interpolation"])


IN_GRAPH = ("area", "linear", "cubic")
NODES = StepNodes(
    columns=("box", "size", "interpolation"),
    arrays=_arrays,
    idle={"kind": "linear", "size": (1, 1)},
    add=_add,
    covers=lambda spec: (
        all(kind in IN_GRAPH for kind, share in spec.kind.items() if share)
        and not (spec.detour.up or spec.detour.down)
    ),
    fits=lambda drawn: drawn["kind"] in IN_GRAPH and "through" not in drawn,
)
