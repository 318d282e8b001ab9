"""The data section of a recipe: how samples are made from the dataset.

Imports neither torch nor DALI.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BeforeValidator, Field, model_validator

from pipeline.cli import nearest
from pipeline.data.degradations import KINDS
from pipeline.data.degradations.base import DegradationSpec, NoiseSpec
from pipeline.data.degradations.bicubic import BicubicSpec
from pipeline.data.degradations.chain import GROUPS
from pipeline.data.degradations.steps import STEPS
from pipeline.installation import recipe_names
from pipeline.spec import Factor, Number, Probability, Range, Spec, within

AnyDegradation = Union[tuple(kind.Spec for kind in KINDS)]  # type: ignore[valid-type]  # noqa: UP007
PER_FOLDER = "per_folder"
PRESETS = "recipes/degradations"
"""Folder of the presets: YAML files with what `data.degradation` may contain."""


class BrightnessSpec(Spec):
    """Random brightness of HR crops, applied before LR is made."""

    probability: Probability = Field(0.0, description="probability that a sample is changed")
    range: Factor = Field((0.5, 1.2), description="range of the factor, uniform")


def _named(value: Any) -> Any:
    """Expand `degradation: gaussian` to `degradation: {name: gaussian}`; bicubic is the default.

    A list stands for one degradation per dataset folder.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, list | tuple):
        value = {"name": PER_FOLDER, "folders": value}
    if isinstance(value, dict):
        value = {"name": "bicubic", **value}
        known = [*(kind.Spec.model_fields["name"].default for kind in KINDS), PER_FOLDER]
        name = str(value["name"])
        if name in (*STEPS, *GROUPS):
            raise ValueError(
                f"{name!r} is a step or group, not a degradation; a chain has them: "
                f"{{name: chain, steps: [{name}]}}"
            )
        if name not in known:
            known += recipe_names(PRESETS)
            near = nearest(name, known)
            rest = "" if "choose from" in near else f"; there are {', '.join(known)}"
            raise ValueError(
                f"no degradation named {name!r}{near}{rest}, and YAML files of your own by their "
                "path"
            )
        return value
    if not isinstance(value, DegradationSpec):
        raise ValueError(
            f"{value!r} is not a degradation; give its name, such as bicubic, or a table with it"
        )
    return value


class PerFolderSpec(DegradationSpec):
    """Another degradation for each dataset folder. In a recipe, a list of degradations."""

    name: Literal["per_folder"] = "per_folder"
    folders: tuple[
        Annotated[AnyDegradation, Field(discriminator="name"), BeforeValidator(_named)], ...
    ] = Field(min_length=1, description="degradations, in the order of the dataset folders")

    @property
    def by_folder(self) -> tuple[DegradationSpec, ...]:
        return self.folders


MAX_THREADS, MAX_AUTOMATIC_THREADS = 64, 16


def _threads(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_THREADS
    if not is_number and value != "auto":
        raise ValueError(f"{value!r} is neither auto nor an integer from 1 to {MAX_THREADS}")
    return value


MixName = Literal["mixup", "cutmix", "resizemix", "cutblur"]
MIXES = get_args(MixName)


class MixingSpec(Spec):
    """Samples that are mixed with their partner, see `pipeline/data/mixing.py`."""

    probability: Probability = Field(0.0, description="probability that a sample is mixed")
    kinds: dict[MixName, Annotated[Number, Field(gt=0)]] = Field(
        dict.fromkeys(MIXES, 1.0),
        min_length=1,
        description="kind -> how often it is chosen relative to the others",
    )
    share: Annotated[Range, within(0, 1)] = Field(
        (0.0, 0.5), description="mixup: range of the partner's share of each value, uniform"
    )
    side: Annotated[Range, within(0, 1)] = Field(
        (0.2, 0.7),
        description="other kinds: range of the box's side as a share of the crop's, uniform",
    )

    @model_validator(mode="before")
    @classmethod
    def _replace_kinds(cls, value: Any) -> Any:
        # `kinds: cutblur` and `kinds: [mixup, cutmix]` are all equally often.
        kinds = value.get("kinds") if isinstance(value, dict) else None
        if isinstance(kinds, str):
            kinds = [kinds]
        if isinstance(kinds, list | tuple) and all(isinstance(kind, str) for kind in kinds):
            return {**value, "kinds": dict.fromkeys(kinds, 1.0)}
        return value

    @property
    def has_partners(self) -> bool:
        """Whether some samples are mixed with another one."""
        return self.probability > 0 and any(kind != "cutblur" for kind in self.kinds)


class DataSpec(Spec):
    """How samples are made from the dataset."""

    crop: int = Field(
        192, ge=8, description="side of the HR crop in pixels, a multiple of the scale"
    )
    multiplier: int = Field(1, ge=1, le=100_000, description="random crops per file and epoch")
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (),
        description="share of each dataset folder in an epoch, in order; empty: every file equally "
        "often",
    )
    depth: Literal["auto", 8, 16] = Field(
        "auto",
        description="bits per value in the whole run; auto: 16 if a file of the dataset has more "
        "than 8, else 8. Files of the other depth are converted",
    )
    augment: bool = Field(
        True,
        description="flip and rotate each sample by one of the eight symmetries of a square, "
        "uniformly",
    )
    brightness: BrightnessSpec = BrightnessSpec()
    degradation: Annotated[
        AnyDegradation | PerFolderSpec, Field(discriminator="name"), BeforeValidator(_named)
    ] = Field(
        BicubicSpec(),
        description="how LR is made from HR; paired reads LR files instead; a list has one "
        "degradation per dataset folder",
    )
    lr_noise: NoiseSpec = NoiseSpec()
    sharpen_hr: bool = Field(
        False,
        description="sharpen HR before LR is made, as published for Real-ESRGAN (unsharp mask of "
        "sigma 8, weight 0.5, threshold 10); images for validation are not sharpened",
    )
    mixing: MixingSpec = MixingSpec()
    cache_gb: float = Field(
        0,
        ge=0,
        le=4096,
        description="GB of memory per rank for decoded images; helps where decoding encoded files "
        "limits training",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="skip: replace a sample whose file is bad with another"
    )
    max_bad_files: float = Field(
        0.001,
        ge=0,
        le=1,
        description="stop although on_error is skip when more than this share of the files is bad",
    )
    threads: Annotated[int | Literal["auto"], BeforeValidator(_threads)] = Field(
        "auto",
        description="CPU threads of the loader, per rank; auto: the rank's share of the available "
        f"cores, at most {MAX_AUTOMATIC_THREADS}",
    )
    prefetch: int = Field(3, ge=1, le=16, description="number of batches prepared in advance")

    @property
    def bits(self) -> int:
        """Bits per value, 8 or 16. A depth that is still "auto" is 8, as in earlier versions."""
        return 16 if self.depth == 16 else 8

    @model_validator(mode="after")
    def _blurs(self) -> DataSpec:
        makes_bicubic = all(of.name == "bicubic" for of in self.degradation.by_folder)
        if (
            self.mixing.probability
            and "cutblur" in self.mixing.kinds
            and makes_bicubic
            and not self.lr_noise.probability
        ):
            raise ValueError(
                "mixing by cutblur would change nothing, because it replaces parts of LR by the "
                "bicubic of HR, which LR is already; set mixing.kinds=[mixup, cutmix, resizemix]"
            )
        return self

    @model_validator(mode="after")
    def _makes_lr(self) -> DataSpec:
        if self.sharpen_hr and any(self.degradation.paired_folders):
            raise ValueError(
                "sharpen_hr needs LR that is made from HR, but a degradation is paired; sharpen "
                "the HR files themselves, or omit sharpen_hr"
            )
        return self


def num_threads(threads: int | Literal["auto"], cores: int | None = None) -> int:
    """Return the number of CPU threads of a rank's loader.

    `cores` is the rank's share of the cores; by default, all cores that the process may use.
    """
    if threads != "auto":
        return threads
    return max(
        1, min(MAX_AUTOMATIC_THREADS, len(os.sched_getaffinity(0)) if cores is None else cores)
    )
