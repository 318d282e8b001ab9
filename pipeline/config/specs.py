"""The data part of a recipe: how samples are made of the dataset. Needs no torch.

The defaults of `realesrgan` are those of Real-ESRGAN (Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021; options/train_realesrnet_x4plus.yml), under the same names.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pipeline.cli import nearest

KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


class Spec(BaseModel):
    """Part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _both_ends(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _within(lowest: float, highest: float = math.inf) -> AfterValidator:
    """The rule of a range `[low, high]` of finite numbers within [lowest, highest]."""
    def check(value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (math.isfinite(high) and lowest <= low <= high <= highest):
            bounds = f"at least {lowest:g}" if math.isinf(highest) else f"within {lowest:g}..{highest:g}"
            raise ValueError(f"[{low:g}, {high:g}] is not a range [low, high] of numbers {bounds}")
        return value

    return AfterValidator(check)


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], BeforeValidator(_both_ends)]  # one number stands for both ends
Sigma = Annotated[Range, _within(1e-3, 50)]  # of a blur, in pixels
Exponent = Annotated[Range, _within(1e-3, 20)]
Levels = Annotated[Range, _within(0, 255)]
Factor = Annotated[Range, _within(0, 100)]
Quality = Annotated[Range, _within(1, 100)]


class BrightnessSpec(Spec):
    """HR crops made brighter or darker before their LR is made."""

    probability: Probability = Field(0.0, description="of a sample to be changed")
    range: Factor = Field((0.5, 1.2), description="of the factor, evenly")


class NoiseSpec(Spec):
    """White Gaussian noise on LR, added before it is rounded to bytes."""

    probability: Probability = Field(0.0, description="of a sample to be changed")
    sigma: Levels = Field((0.0, 10.0), description="of the standard deviation, in levels, evenly")


class BicubicSpec(Spec):
    """LR by the antialiased cubic, as the benchmark sets are made."""

    name: Literal["bicubic"] = "bicubic"


class GaussianSpec(Spec):
    """LR by a Gaussian blur and taking one pixel in `scale` ("BD"), at the centre of each LR pixel."""

    name: Literal["gaussian"] = "gaussian"
    sigma: Sigma = Field((1.6, 1.6), description="of the standard deviation, in HR pixels, evenly")


class PairedSpec(Spec):
    """LR as it lies on disk: beside HR (`NAME_lr<scale>.npy`), or in a folder of its own (--lr-dir)."""

    name: Literal["paired"] = "paired"


class FirstRound(Spec):
    """One round of blur, resizing, noise and JPEG. Probabilities of a list are shares: they need not add up to 1."""

    blur_prob: Probability = Field(1.0, description="of blurring at all")
    blur_kernel_size: int = Field(21, ge=7, le=31, description="largest side of the kernel; odd sizes from 7 on")
    kernel_prob: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        dict(zip(KERNELS, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True)), description="share of each shape")
    sinc_prob: Probability = Field(0.1, description="of a sinc kernel instead (ringing)")
    blur_sigma: Sigma = Field((0.2, 3.0), description="along each axis of the kernel, in pixels")
    betag_range: Exponent = Field((0.5, 4.0), description="exponent of the generalized kernels; half are below 1")
    betap_range: Exponent = Field((1.0, 2.0), description="exponent of the plateau kernels; half are below 1")
    resize_prob: tuple[float, float, float] = Field((0.2, 0.7, 0.1), description="shares of up, down, keep")
    resize_range: Range = Field((0.15, 1.5), description="of the factor: down from its low end, up to its high end")
    gaussian_noise_prob: Probability = Field(0.5, description="of Gaussian noise; Poisson noise otherwise")
    noise_range: Levels = Field((1.0, 30.0), description="sigma of Gaussian noise, in levels")
    poisson_scale_range: Factor = Field((0.05, 3.0), description="factor of Poisson noise")
    gray_noise_prob: Probability = Field(0.4, description="of the same noise in all channels")
    jpeg_range: Quality = Field((30.0, 95.0), description="JPEG quality")

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
            raise ValueError(f"{list(shares)} must be three shares (up, down, keep), none below 0, not all 0")
        return shares

    @field_validator("resize_range")
    @classmethod
    def _around_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.05 <= value[0] <= 1 <= value[1] <= 4:
            raise ValueError(f"{list(value)} must be [low, high] with low in 0.05..1 and high in 1..4")
        return value


class SecondRound(FirstRound):
    """As the first, with the published defaults of the second."""

    blur_prob: Probability = 0.8
    blur_sigma: Sigma = (0.2, 1.5)
    resize_prob: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range: Range = (0.3, 1.2)
    noise_range: Levels = (1.0, 25.0)
    poisson_scale_range: Factor = (0.05, 2.5)


class RealEsrganSpec(Spec):
    """LR by the second-order chain of Real-ESRGAN."""

    name: Literal["realesrgan"] = "realesrgan"
    first: FirstRound = FirstRound()
    second: SecondRound = SecondRound()
    final_sinc_prob: Probability = Field(0.8, description="of a sinc filter at the end, before or after the last JPEG")
    surroundings: int = Field(144, ge=0, le=1024, description="HR pixels more that are degraded than the crop has, so "
                              "that blocks and borders fall anywhere in it; 256 + 144 = 400 as published")


def _named(value: Any) -> Any:
    """`degradation: gaussian` is short for `degradation: {name: gaussian}`, and bicubic is what needs no name."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict):
        value = {"name": "bicubic", **value}
        if value["name"] not in DEGRADATIONS:
            raise ValueError(f"no degradation named {value['name']!r}{nearest(str(value['name']), DEGRADATIONS)}")
    return value


DegradationSpec = BicubicSpec | GaussianSpec | RealEsrganSpec | PairedSpec
DEGRADATIONS = ("bicubic", "gaussian", "realesrgan", "paired")


class DataSpec(Spec):
    """How samples are made of the dataset."""

    crop: int = Field(192, ge=8, description="side of the HR crop in pixels, a multiple of the scale")
    multiplier: int = Field(1, ge=1, le=100_000, description="random crops of every file an epoch")
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (), description="shares of an epoch, one for each dataset folder; none: every file equally often")
    augment: bool = Field(True, description="the eight symmetries of the square, each equally likely")
    brightness: BrightnessSpec = BrightnessSpec()
    degradation: Annotated[DegradationSpec, Field(discriminator="name"), BeforeValidator(_named)] = Field(
        BicubicSpec(), description="how LR is made: bicubic, gaussian, realesrgan, or read: paired")
    lr_noise: NoiseSpec = NoiseSpec()
    cache_gb: float = Field(0, ge=0, le=4096, description="memory for decoded images, a rank; pays where files are "
                            "encoded and decoding is what training waits for")
    on_error: Literal["stop", "skip"] = Field("stop", description="skip: take another sample for one whose file is bad")
    max_bad_files: float = Field(0.001, ge=0, le=1, description="share of the files that skip may meet before it stops")
    threads: int = Field(2, ge=1, le=64, description="CPU threads of the loader, per rank")
    prefetch: int = Field(3, ge=1, le=16, description="batches made ahead")
