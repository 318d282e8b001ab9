"""Changes of brightness and colour: levels, gamma, temperature, contrast, hue and saturation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations.base import OnDevice
from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    Size,
    StepNodes,
    StepSpec,
    levels,
    to_ycc,
)
from pipeline.libraries import cv2
from pipeline.spec import Angle, Factor, Range, within


class ColorSpec(StepSpec):
    """Changes of brightness and colour, each from its own range, in this order."""

    black: Annotated[Range, within(-128, 127)] = Field(
        (0, 0), description="range of the level that becomes black; below 0, black becomes gray"
    )
    white: Annotated[Range, within(128, 511)] = Field(
        (255, 255),
        description="range of the level that becomes white; above 255, white becomes gray",
    )
    gamma: Annotated[Range, within(0.1, 10)] = Field(
        (0.9, 1.1), description="range of the exponent; above 1, midtones become darker"
    )
    temperature: Annotated[Range, within(-0.5, 0.5)] = Field(
        (-0.05, 0.05),
        description="range of the warmth t: red is multiplied by 1 + t, blue by 1 - t",
    )
    contrast: Factor = Field((0.9, 1.1), description="range of the factor around middle gray")
    brightness: Annotated[Range, within(-255, 255)] = Field(
        (-10, 10), description="range of the number of levels to add"
    )
    hue: Angle = Field(
        (0, 0), description="range of the rotation of Cb towards Cr (BT.601) in degrees"
    )
    saturation: Factor = Field((0.8, 1.2), description="range of the factor of Cb and Cr")


def draw(spec: ColorSpec, draws: Draws, canvas: Canvas) -> Parameters:
    names = [name for name in ColorSpec.model_fields if name != "probability"]
    return {name: draws.between(getattr(spec, name)) for name in names}


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    image = levels(image)
    scale = 255 / (drawn["white"] - drawn["black"])
    if drawn["gamma"] != 1:
        image -= np.float32(drawn["black"])
        image *= np.float32(scale / 255)
        # Levels beyond black keep their sign.
        power = cv2.pow(np.abs(image), drawn["gamma"])
        image, scale, black = np.copysign(power, image), 255, 0.0
    else:
        black = drawn["black"]
    return cv2.transform(image, _matrix(drawn, scale, black))


def _matrix(drawn: Parameters, scale: float, black: float) -> NDArray[np.float32]:
    """Return all changes except gamma as one (3, 4) matrix for (R, G, B, 1).

    The level `black` becomes 0, and `scale` is the factor that stretches the levels.
    """
    # Hue and saturation do not change gray.
    turn, saturation = math.radians(drawn["hue"]), drawn["saturation"]
    chroma = np.eye(3)
    chroma[1:, 1:] = saturation * np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    warmth = np.array([1 + drawn["temperature"], 1, 1 - drawn["temperature"]])
    mixed = np.linalg.inv(to_ycc()) @ chroma @ to_ycc() * (drawn["contrast"] * scale * warmth)
    offset = 127.5 * (1 - drawn["contrast"]) + drawn["brightness"] - mixed.sum(1) * black
    return np.column_stack([mixed, offset]).astype(np.float32)


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    black, white = drawn["black"], drawn["white"]
    return (
        *(np.array(value, np.float32) for value in (black, 1 / (white - black), drawn["gamma"])),
        _matrix(drawn, 255, 0),
    )


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    part = (image - nodes["black"]) * nodes["scale"]
    # Levels beyond black keep their sign.
    sign = 1.0 - 2.0 * fn.cast(part < 0.0, dtype=types.FLOAT)
    power = dali_math.pow(dali_math.abs(part), nodes["gamma"])
    return fn.coord_transform(power * sign, MT=nodes["matrix"])


NODES = StepNodes(
    columns=("black", "scale", "gamma", "matrix"),
    arrays=_arrays,
    idle={
        **dict.fromkeys(("black", "temperature", "brightness", "hue"), 0.0),
        **dict.fromkeys(("gamma", "contrast", "saturation"), 1.0),
        "white": 255.0,
    },
    add=_add,
)
