"""The second-order degradation of Real-ESRGAN.

Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
ICCVW 2021. Names and defaults are the published ones (options/train_realesrnet_x4plus.yml).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.cli import nearest
from pipeline.data.degradations import kernels, noise
from pipeline.data.degradations.base import (
    DegradationSpec,
    Nodes,
    OnDevice,
    Parameters,
    PlacedAnywhere,
    between,
    filtered,
    interpolation,
    resized,
    through_jpeg,
)
from pipeline.data.degradations.chain import run
from pipeline.data.degradations.steps import blur
from pipeline.data.degradations.steps.base import Draws
from pipeline.spec import Exponent, Factor, Levels, Probability, Quality, Range, Sigma, Spec

MODES = ("area", "linear", "cubic")
KINDS_OF_BLUR = {
    "iso": "gaussian",
    "aniso": "anisotropic",
    "generalized_iso": "generalized",
    "generalized_aniso": "generalized_anisotropic",
    "plateau_iso": "plateau",
    "plateau_aniso": "plateau_anisotropic",
    "sinc": "sinc",
}
"""Published name of a kernel's shape -> its kind in the step `blur`."""
KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


class FirstRound(Spec):
    """One round of blur, resizing, noise and JPEG. Lists of probabilities need not sum to 1."""

    blur_prob: Probability = Field(1.0, description="probability of blurring")
    blur_kernel_size: int = Field(
        21, ge=7, le=31, description="largest side of the kernel, odd, at least 7"
    )
    kernel_prob: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        dict(zip(KERNELS, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True)),
        description="relative probability of each shape",
    )
    sinc_prob: Probability = Field(
        0.1, description="probability of a sinc kernel instead, which rings"
    )
    blur_sigma: Sigma = Field(
        (0.2, 3.0),
        description="range of the standard deviation along each axis of the kernel, in pixels",
    )
    betag_range: Exponent = Field(
        (0.5, 4.0),
        description="range of the exponent of generalized kernels; half of them are below 1",
    )
    betap_range: Exponent = Field(
        (1.0, 2.0), description="range of the exponent of plateau kernels; half of them are below 1"
    )
    resize_prob: tuple[float, float, float] = Field(
        (0.2, 0.7, 0.1),
        description="relative probabilities of enlarging, shrinking and keeping the size",
    )
    resize_range: Range = Field(
        (0.15, 1.5),
        description="range of the factor: from the low end to 1 for shrinking, from 1 to the high "
        "end for enlarging",
    )
    gaussian_noise_prob: Probability = Field(
        0.5, description="probability of Gaussian noise; otherwise Poisson noise"
    )
    noise_range: Levels = Field(
        (1.0, 30.0),
        description="range of the standard deviation of Gaussian noise, in levels (0..255)",
    )
    poisson_scale_range: Factor = Field(
        (0.05, 3.0), description="range of the factor of Poisson noise"
    )
    gray_noise_prob: Probability = Field(
        0.4, description="probability of the same noise in all channels"
    )
    jpeg_range: Quality = Field((30.0, 95.0), description="range of JPEG quality")

    @field_validator("blur_kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"{value} must be odd; use {value + 1}")
        return value

    @field_validator("kernel_prob")
    @classmethod
    def _know_kernels(cls, shares: dict[str, float]) -> dict[str, float]:
        for name in shares:
            if name not in KERNELS:
                raise ValueError(f"no kernel named {name!r}{nearest(name, KERNELS)}")
        if not sum(shares.values()) > 0:
            raise ValueError(f"at least one of {', '.join(KERNELS)} needs a share above 0")
        return {name: shares.get(name, 0.0) for name in KERNELS}

    @field_validator("resize_prob")
    @classmethod
    def _shares(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if not (min(shares) >= 0 and 0 < sum(shares) < math.inf):
            raise ValueError(
                f"{list(shares)} must be three shares (up, down, keep), none below 0, not all 0"
            )
        return shares

    @field_validator("resize_range")
    @classmethod
    def _around_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.05 <= value[0] <= 1 <= value[1] <= 4:
            raise ValueError(
                f"{list(value)} must be [low, high] with low in 0.05..1 and high in 1..4"
            )
        return value


class SecondRound(FirstRound):
    """The second round, with its published defaults."""

    blur_prob: Probability = 0.8
    blur_sigma: Sigma = (0.2, 1.5)
    resize_prob: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range: Range = (0.3, 1.2)
    noise_range: Levels = (1.0, 25.0)
    poisson_scale_range: Factor = (0.05, 2.5)


class RealEsrganSpec(DegradationSpec):
    """LR by the second-order degradation of Real-ESRGAN."""

    name: Literal["realesrgan"] = "realesrgan"
    first: FirstRound = FirstRound()
    second: SecondRound = SecondRound()
    final_sinc_prob: Probability = Field(
        0.8, description="probability of a sinc filter at the end, before or after the last JPEG"
    )
    surroundings: int = Field(
        144,
        ge=0,
        le=1024,
        description="HR pixels degraded beyond the crop, so that JPEG blocks and borders fall "
        "anywhere in it; published: 256 + 144 = 400",
    )


class RealEsrgan(PlacedAnywhere):
    """Second-order degradation: two rounds of blur, resize, noise and JPEG, then a sinc filter.

    It differs from the published code as follows: every sample draws all parameters independently
    (batches share no factor, and there is no pool of 180 pairs); area averaging is a box filter
    before linear sampling; the cubic is Keys' with a = -0.5 instead of -0.75; Poisson noise counts
    256 levels in every image; HR is sharpened only with `data.sharpen_hr`.
    """

    Spec = RealEsrganSpec
    has_host_chain = True
    spec: RealEsrganSpec

    def __init__(self, spec: RealEsrganSpec, scale: int) -> None:
        super().__init__(spec, scale)
        # The last resizing shrinks the image by at most this; below sqrt(3), averaging areas needs
        # no box.
        self.has_final_box = spec.second.resize_range[1] > math.sqrt(3)
        self.columns = (
            *(
                f"{part}_{name}"
                for part in ("first", "second")
                for name in (
                    "kernel",
                    "size",
                    "mode",
                    "poisson",
                    "gray",
                    *noise.NoiseKeys._fields,
                    "level",
                    "jpeg",
                )
            ),
            "final_kernel",
            "final_mode",
            "sinc_first",
            *(("final_box",) if self.has_final_box else ()),
        )

    def draw(self, randoms: Iterator[float], height: int, width: int) -> Parameters:
        low = height // self.scale, width // self.scale
        first = _draw_round(self.spec.first, randoms, (height, width), (height, width))
        second = _draw_round(self.spec.second, randoms, tuple(first["size"]), low)
        final = {
            "mode": Draws(randoms).choose(dict.fromkeys(MODES, 1)),
            "sinc_first": next(randoms) < 0.5,
        }
        sinc = _draw_sinc(self.spec.second.blur_kernel_size, randoms, low_cutoff=math.pi / 3)
        if next(randoms) < self.spec.final_sinc_prob:
            final |= {"sinc": sinc}
        return {"region": [height, width], "first": first, "second": second, "final": final}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        height = parameters["region"][0]
        arrays = _round_arrays("first", parameters["first"], keys[:2])
        arrays |= _round_arrays("second", parameters["second"], keys[2:4])
        final, sizes = parameters["final"], parameters["second"]["size"]
        arrays["final_kernel"] = (
            kernels.sinc_kernel(*final["sinc"]) if "sinc" in final else kernels.delta_kernel()
        )
        arrays["final_mode"] = interpolation(final["mode"])
        if self.has_final_box:
            arrays["final_box"] = _area_box(final["mode"], sizes[0] / (height // self.scale))
        arrays["sinc_first"] = np.array(final["sinc_first"])
        return arrays

    def lr(
        self,
        nodes: Nodes,
        region: Any,
        size: tuple[int, int],
        on_device: OnDevice,
        *,
        as_float: bool,
    ) -> Any:
        from nvidia.dali import fn, types

        noisy = _blurred_resized_noisy(nodes, "first", region, on_device)
        noisy = _blurred_resized_noisy(
            nodes, "second", through_jpeg(noisy, nodes["first_jpeg"]), on_device
        )
        low = fn.cast(region.shape()[0:2] // self.scale, dtype=types.FLOAT)
        quality = nodes["second_jpeg"]
        sinc_first = nodes["sinc_first"]
        if sinc_first:
            lr = through_jpeg(self._resize_and_sinc(nodes, noisy, low, on_device), quality)
        else:
            lr = fn.cast(
                self._resize_and_sinc(nodes, through_jpeg(noisy, quality), low, on_device),
                dtype=types.UINT8,
            )
        start = nodes["start"] // self.scale
        lr = fn.slice(
            lr, start=start, shape=[size[0] // self.scale, size[1] // self.scale], axes=[0, 1]
        )
        return fn.cast(lr, dtype=types.FLOAT) if as_float else lr

    def lr_on_host(
        self,
        parameters: Parameters,
        keys: Sequence[int],
        region: NDArray[np.uint8],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[np.uint8]:
        from pipeline.data.degradations.host import rounded_as

        *steps, last = steps_of(parameters, self.scale, keys)
        lr = run(region, steps, workspace)
        if last["step"] != "blur":
            lr = run(lr, [last], workspace)
            return rounded_as(region, self.part(lr, start, size), workspace)
        # Only this filter still depends on pixels around the crop.
        (top, left), (height, width) = (
            [side // self.scale for side in place] for place in (start, size)
        )
        reach = last["side"] // 2
        above, before = min(reach, top), min(reach, left)
        near = np.ascontiguousarray(
            lr[top - above : top + height + reach, left - before : left + width + reach]
        )
        near = rounded_as(region, run(near, [last], workspace), workspace)
        return near[above : above + height, before : before + width]

    def _resize_and_sinc(self, nodes: Nodes, image: Any, low: Any, on_device: OnDevice) -> Any:
        if self.has_final_box:
            image = filtered(image, on_device(nodes["final_box"]))
        return filtered(resized(image, low, nodes["final_mode"]), on_device(nodes["final_kernel"]))


def _draw_round(
    spec: FirstRound, randoms: Iterator[float], size: tuple[int, int], full: tuple[int, int]
) -> Parameters:
    """Draw the parameters of one round for an image of `size`; it is resized relative to `full`."""
    drawn = _draw_blur(spec, randoms)
    directions = dict(zip(("up", "down", "keep"), spec.resize_prob, strict=True))
    direction = Draws(randoms).choose(directions)
    low, high = {
        "up": (1.0, spec.resize_range[1]),
        "down": (spec.resize_range[0], 1.0),
        "keep": (1.0, 1.0),
    }[direction]
    factor = between((low, high), next(randoms))
    is_gaussian = next(randoms) < spec.gaussian_noise_prob
    parameters: Parameters = {
        "blur": drawn,
        "resize": direction,
        "factor": factor,
        "size": [max(8, int(side * factor)) for side in full],
        "mode": Draws(randoms).choose(dict.fromkeys(MODES, 1)),
        "noise": "gaussian" if is_gaussian else "poisson",
        "level": between(
            spec.noise_range if is_gaussian else spec.poisson_scale_range, next(randoms)
        ),
        "gray": next(randoms) < spec.gray_noise_prob,
        "jpeg": round(between(spec.jpeg_range, next(randoms))),
    }
    parameters["ratio"] = size[0] / parameters["size"][0]
    return parameters


def _draw_blur(spec: FirstRound, randoms: Iterator[float]) -> Parameters:
    """Draw the shape and parameters of a blur kernel.

    Every number is drawn whether or not the shape uses it, so that later draws do not depend on it.
    """
    is_blurred, is_sinc = next(randoms) < spec.blur_prob, next(randoms) < spec.sinc_prob
    shape = Draws(randoms).choose(spec.kernel_prob)
    sinc = _draw_sinc(spec.blur_kernel_size, randoms)
    sigma = [between(spec.blur_sigma, next(randoms)) for _ in range(2)]
    theta = between((-math.pi, math.pi), next(randoms))
    below_one, amount = next(randoms) < 0.5, next(randoms)
    if not is_blurred:
        return {"shape": "none"}
    if is_sinc:
        return {"shape": "sinc", "size": sinc[0], "cutoff": sinc[1]}
    numbers: Parameters = {"shape": shape, "size": sinc[0], "sigma": sigma}
    if shape.endswith("iso") and not shape.endswith("aniso"):
        numbers["sigma"] = [sigma[0], sigma[0]]
    else:
        numbers["theta"] = theta
    if not shape.startswith(("iso", "aniso")):
        low, high = spec.betag_range if shape.startswith("generalized") else spec.betap_range
        numbers["beta"] = between((min(low, 1), 1) if below_one else (1, max(high, 1)), amount)
    return numbers


def _draw_sinc(
    largest: int, randoms: Iterator[float], low_cutoff: float | None = None
) -> tuple[int, float]:
    """Draw (side, cutoff in radians per pixel) of a sinc kernel.

    As published, the cutoff of small kernels is at least pi / 3.
    """
    size = 7 + 2 * int(next(randoms) * ((largest - 7) // 2 + 1))
    lowest = low_cutoff or (math.pi / 3 if size < 13 else math.pi / 5)
    return size, between((lowest, math.pi), next(randoms))


def _blur_step(drawn: Parameters) -> Parameters | None:
    """Return the blur of a round as a step of a chain, or None for a round without blur."""
    shape = drawn["blur"]
    if shape["shape"] == "none":
        return None
    kind = KINDS_OF_BLUR[shape["shape"]]
    step = {"step": "blur", "kind": kind, "side": shape["size"]}
    if kind == "sinc":
        step["cutoff"] = shape["cutoff"]
    elif "theta" in shape:
        step["sigma_x"], step["sigma_y"] = shape["sigma"]
        step["angle"] = math.degrees(shape["theta"])
    else:
        step["sigma"] = shape["sigma"][0]
    if "beta" in shape:
        step["beta"] = shape["beta"]
    if drawn["mode"] == "area":
        # One filter instead of two: the area filter is convolved with the blur's kernel.
        step["box"] = drawn["ratio"]
    return step


def _kernel(drawn: Parameters) -> NDArray[np.float32]:
    """Return the kernel that a round applies before it resizes."""
    step = _blur_step(drawn)
    return blur.kernel(step) if step else _area_box(drawn["mode"], drawn["ratio"])


def _round_arrays(part: str, drawn: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
    fields = noise.noise_keys(keys, *drawn["size"], 1 if drawn["gray"] else 3)
    arrays = {
        "kernel": _kernel(drawn),
        "size": np.array(drawn["size"], np.float32),
        "mode": interpolation(drawn["mode"]),
        "poisson": np.array(drawn["noise"] == "poisson"),
        "gray": np.array(drawn["gray"]),
        **dict(zip(noise.NoiseKeys._fields, fields, strict=True)),
        "level": np.array(drawn["level"], np.float32),
        "jpeg": np.array(drawn["jpeg"], np.int32),
    }
    return {f"{part}_{name}": array for name, array in arrays.items()}


def _area_box(mode: str, ratio: float) -> NDArray[np.float32]:
    return (
        kernels.with_box(kernels.delta_kernel(), ratio)
        if mode == "area"
        else kernels.delta_kernel()
    )


def _blurred_resized_noisy(nodes: Nodes, part: str, image: Any, on_device: OnDevice) -> Any:
    """Return a node of FP32 levels, not clipped, after one round without its JPEG."""
    blurred = filtered(image, on_device(nodes[f"{part}_kernel"]))
    small = resized(blurred, nodes[f"{part}_size"], nodes[f"{part}_mode"])
    normal = noise.standard_normal(
        *(on_device(nodes[f"{part}_{name}"]) for name in noise.NoiseKeys._fields)
    )
    level, is_poisson = nodes[f"{part}_level"], nodes[f"{part}_poisson"]
    if is_poisson:
        noisy = noise.add_poisson(small, normal, level, gray=nodes[f"{part}_gray"])
    else:
        noisy = noise.add_gaussian(small, normal, level)
    return noisy


def steps_of(parameters: Parameters, scale: int, keys: Sequence[int]) -> list[Parameters]:
    """Return the draw for a sample as steps of a chain; see `chain.run`.

    keys: the sample's noise keys.
    """
    first, second, final = parameters["first"], parameters["second"], parameters["final"]
    height, width = parameters["region"]
    jpegs = [
        {"step": "compress", "codec": "jpeg", "quality": drawn["jpeg"], "subsampling": "420"}
        for drawn in (first, second)
    ]
    resize = {
        "step": "resize",
        "kind": final["mode"],
        "size": [height // scale, width // scale],
    }
    last = [resize]
    if "sinc" in final:
        side, cutoff = final["sinc"]
        last.append({"step": "blur", "kind": "sinc", "side": side, "cutoff": cutoff})
    return [
        *_steps_of_round(first, keys[:2]),
        jpegs[0],
        *_steps_of_round(second, keys[2:4]),
        *([*last, jpegs[1]] if final["sinc_first"] else [jpegs[1], *last]),
    ]


def _steps_of_round(drawn: Parameters, keys: Sequence[int]) -> list[Parameters]:
    """Return the steps of a round without its JPEG."""
    step, mode = _blur_step(drawn), drawn["mode"]
    if step and mode == "area":
        mode = "linear"  # the box is part of the blur
    return [
        *([step] if step else []),
        {"step": "resize", "kind": mode, "size": drawn["size"]},
        {
            "step": "noise",
            "kind": drawn["noise"],
            "level": drawn["level"],
            "gray": drawn["gray"],
            "words": list(keys),
        },
    ]
