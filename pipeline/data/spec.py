"""The data part of a recipe: how samples are made of the dataset. Needs no torch and no DALI."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field

from pipeline.cli import nearest
from pipeline.data.degradations import KINDS
from pipeline.data.degradations.base import NoiseSpec
from pipeline.data.degradations.bicubic import BicubicSpec
from pipeline.spec import Factor, Probability, Spec

AnyDegradation = Union[tuple(kind.Spec for kind in KINDS)]  # type: ignore[valid-type]  # noqa: UP007


class BrightnessSpec(Spec):
    """HR crops made brighter or darker before their LR is made."""

    probability: Probability = Field(0.0, description="of a sample to be changed")
    range: Factor = Field((0.5, 1.2), description="of the factor, evenly")


def _named(value: Any) -> Any:
    """`degradation: gaussian` is short for `degradation: {name: gaussian}`, and bicubic is what
    needs no name."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict):
        value = {"name": "bicubic", **value}
        known = [kind.Spec.model_fields["name"].default for kind in KINDS]
        if value["name"] not in known:
            raise ValueError(
                f"no degradation named {value['name']!r}{nearest(str(value['name']), known)}"
            )
    return value


MOST_THREADS, MOST_AUTOMATIC = 64, 16


def _threads(value: Any) -> Any:
    is_number = (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_THREADS
    )
    if not is_number and value != "auto":
        raise ValueError(f"{value!r} is neither auto nor a whole number from 1 to {MOST_THREADS}")
    return value


class DataSpec(Spec):
    """How samples are made of the dataset."""

    crop: int = Field(
        192, ge=8, description="side of the HR crop in pixels, a multiple of the scale"
    )
    multiplier: int = Field(1, ge=1, le=100_000, description="random crops of every file an epoch")
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (),
        description="shares of an epoch, one for each dataset folder; none: every file equally "
        "often",
    )
    augment: bool = Field(
        True, description="the eight symmetries of the square, each equally likely"
    )
    brightness: BrightnessSpec = BrightnessSpec()
    degradation: Annotated[AnyDegradation, Field(discriminator="name"), BeforeValidator(_named)] = (
        Field(BicubicSpec(), description="how LR is made, or that it is read: paired")
    )
    lr_noise: NoiseSpec = NoiseSpec()
    cache_gb: float = Field(
        0,
        ge=0,
        le=4096,
        description="memory for decoded images, a rank; pays where files are "
        "encoded and decoding is what training waits for",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="skip: take another sample for one whose file is bad"
    )
    max_bad_files: float = Field(
        0.001, ge=0, le=1, description="share of the files that skip may meet before it stops"
    )
    threads: Annotated[int | Literal["auto"], BeforeValidator(_threads)] = Field(
        "auto",
        description="CPU threads of the loader, per rank; auto: a rank's share of the cores that "
        "it may use, "
        f"at most {MOST_AUTOMATIC}",
    )
    prefetch: int = Field(3, ge=1, le=16, description="batches made ahead")


def num_threads(threads: int | Literal["auto"], cores: int | None = None) -> int:
    """CPU threads of a rank's loader. `cores`: its share of those that it may use; by default they
    are its own."""
    if threads != "auto":
        return threads
    return max(1, min(MOST_AUTOMATIC, len(os.sched_getaffinity(0)) if cores is None else cores))
