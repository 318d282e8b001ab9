"""The data part of a recipe: how samples are made of the dataset. Needs no torch.

The defaults of `realesrgan` are those of Real-ESRGAN (Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021; options/train_realesrnet_x4plus.yml), under the same names.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipeline.cli import nearest
from pipeline.config import names

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


# The recipe's `adversarial` part: a discriminator and how it is trained. Needs no torch.


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


Number = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
"""A finite one. YAML's `true` is none, though for Python it is 1."""


class NetworkSpec(BaseModel):
    """A network: its name in the table of its kind and, beside it, that network's own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _accept_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class InstanceNoiseSpec(Spec):
    """Gaussian noise on all images that the discriminator sees, falling to nothing (Sønderby et al., ICLR 2017)."""

    sigma: Number = Field(0.0, ge=0, le=1, description="standard deviation at the first step; 1 is the whole range")
    steps: int = Field(100_000, gt=0, description="after so many steps of the run there is none; it falls evenly")


class LabelsSpec(Spec):
    """The targets that the discriminator learns; the generator's is always 1."""

    smoothing: Number = Field(0.0, ge=0, lt=0.5, description="real is 1 - smoothing, fake 0 (Salimans et al. 2016)")
    noise: Number = Field(0.0, ge=0, lt=0.5, description="targets move by up to this, evenly, towards each other")
    flip: Number = Field(0.0, ge=0, lt=0.5, description="probability of a sample to be called its opposite")

    @model_validator(mode="after")
    def _keep_order(self) -> LabelsSpec:
        if self.smoothing + 2 * self.noise >= 1:  # real is above 1 - smoothing - noise, fake is below noise
            raise ValueError(f"smoothing {self.smoothing:g} + 2 x noise {self.noise:g} must be below 1, or a real "
                             "sample's target may lie below a fake one's; take less of either")
        return self


class AdversarialSpec(Spec):
    """A discriminator against the generator."""

    weight: Number = Field(gt=0, description="of the adversarial term among the generator's losses")
    loss: str = Field("vanilla", description="a name in pipeline/losses/adversarial.py")
    discriminator: NetworkSpec = NetworkSpec(name="vgg")
    ds_config: str | None = Field(None, description="DeepSpeed's file for the discriminator: optimizer, schedule, "
                                                    "clipping; default: the generator's")
    start: str | None = Field(None, description="weights of the discriminator to begin with: a run folder, or "
                                                "`previous`, which is the stage before; none: at random")
    discriminator_every: int = Field(1, ge=1, description="steps from one update of the discriminator to the next")
    generator_every: int = Field(1, ge=1, description="steps from one update of the generator to the next")
    labels: LabelsSpec = LabelsSpec()
    instance_noise: InstanceNoiseSpec = InstanceNoiseSpec()

    @field_validator("loss")
    @classmethod
    def _know_loss(cls, name: str) -> str:
        names.ADVERSARIAL_LOSSES.check(name)
        return name

    @field_validator("discriminator")
    @classmethod
    def _know_discriminator(cls, spec: NetworkSpec) -> NetworkSpec:
        names.DISCRIMINATORS.check(spec.name, spec.params)
        return spec

    @model_validator(mode="after")
    def _fit(self) -> AdversarialSpec:
        takes_labels = names.ADVERSARIAL_LOSSES.check(self.loss).flags["takes_labels"]
        if not takes_labels and (self.labels.smoothing or self.labels.noise):
            raise ValueError(f"loss {self.loss} has no targets to smooth or to move; leave labels.smoothing and "
                             "labels.noise out")
        if self.discriminator_every > 1 and self.generator_every > 1:
            raise ValueError("one of discriminator_every and generator_every must be 1: every step updates something")
        return self


# The recipe's `samples` part: which pictures show how far the network is. Needs no torch.


class SamplesSpec(Spec):
    """Pictures that are upscaled again and again while the network learns."""

    files: tuple[str, ...] = Field((), description="HR images, or folders of them, seen from the current folder; none: "
                                                   "some of the validation list, evenly apart")
    count: int | None = Field(None, ge=0, description="at most so many pictures; 0: none; default: all that are named, "
                                                      "or 3 of the validation list")
    side: int = Field(320, ge=64, le=4096, description="HR pixels; of a larger picture the middle is taken")
    keep: int = Field(50, ge=1, description="sets of pictures by epochs, and likewise by validations, in a whole run")

    @model_validator(mode="before")
    @classmethod
    def _accept_files_alone(cls, value: Any) -> Any:
        if value is False or value == "off":
            return {"count": 0}
        value = {"files": value} if isinstance(value, (str, list)) else value
        if isinstance(value, dict) and isinstance(value.get("files"), str):
            return {**value, "files": [value["files"]]}
        return value
