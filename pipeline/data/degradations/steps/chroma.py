"""Chroma subsampling of video and JPEG, and decoding by a different standard than encoding.

The image is converted to Y'CbCr, Cb and Cr are shrunk and enlarged, and the image is converted
back. Nothing is rounded or clipped. Luma changes only where the two standards or ranges differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations.steps.base import (
    LUMA,
    Canvas,
    Draws,
    Image,
    Parameters,
    StepSpec,
    levels,
    shares_of,
    to_ycc,
)
from pipeline.libraries import cv2

if TYPE_CHECKING:
    from pipeline.data.degradations.host import Taps

# Rows and columns of pixels per chroma sample.
FACTORS = {
    "444": (1, 1),
    "440": (2, 1),
    "422": (1, 2),
    "420": (2, 2),
    "411": (1, 4),
    "410": (4, 4),
}
# Whether a chroma sample is at the centre of its pixels or at the first of them: down, across.
SITING = {"center": (True, True), "left": (True, False), "top_left": (False, False)}
RANGES = ("full", "limited")


class ChromaSpec(StepSpec):
    """Chroma subsampling, and decoding with the wrong siting, matrix or range."""

    kind: shares_of(*FACTORS) = Field(  # type: ignore[valid-type]
        {"420": 1.0},
        description="relative probability of each subsampling; 410 has one chroma sample per 4x4 "
        "pixels, 444 one per pixel",
    )
    down: shares_of("box", "linear", "nearest") = Field(  # type: ignore[valid-type]
        {"box": 1.0, "linear": 1.0},
        description="relative probability of each kernel that shrinks chroma",
    )
    up: shares_of("nearest", "linear", "cubic") = Field(  # type: ignore[valid-type]
        {"nearest": 1.0, "linear": 2.0},
        description="relative probability of each kernel that enlarges chroma",
    )
    siting: shares_of(*SITING) = Field(  # type: ignore[valid-type]
        {"center": 1.0, "left": 1.0},
        description="relative probability of each position of chroma samples: center (JPEG, "
        "MPEG-1), left (MPEG-2, H.264) or top_left (BT.2020)",
    )
    decoded_siting: shares_of("same", *SITING) = Field(  # type: ignore[valid-type]
        {"same": 1.0},
        description="relative probability of each position that the decoder assumes; a wrong one "
        "shifts chroma",
    )
    matrix: shares_of(*LUMA) = Field(  # type: ignore[valid-type]
        {"bt601": 1.0}, description="relative probability of each matrix of the encoder"
    )
    decoded_matrix: shares_of("same", *LUMA) = Field(  # type: ignore[valid-type]
        {"same": 1.0},
        description="relative probability of each matrix of the decoder; a wrong one shifts "
        "colours",
    )
    range: shares_of(*RANGES) = Field(  # type: ignore[valid-type]
        {"full": 1.0},
        description="relative probability of each range of the encoder: full (0..255) or limited "
        "(16..235, chroma 16..240)",
    )
    decoded_range: shares_of("same", *RANGES) = Field(  # type: ignore[valid-type]
        {"same": 1.0},
        description="relative probability of each range of the decoder; a wrong one changes "
        "contrast and saturation",
    )


def draw(spec: ChromaSpec, draws: Draws, canvas: Canvas) -> Parameters:
    drawn = {"kind": draws.choose(spec.kind)}
    drawn |= {"down": draws.choose(spec.down), "up": draws.choose(spec.up)}
    for name in ("siting", "matrix", "range"):
        drawn[name] = draws.choose(getattr(spec, name))
        decoded = draws.choose(getattr(spec, f"decoded_{name}"))
        drawn[f"decoded_{name}"] = drawn[name] if decoded == "same" else decoded
    return drawn


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    encode = _matrix(drawn["matrix"], drawn["range"])
    decode = np.linalg.inv(_matrix(drawn["decoded_matrix"], drawn["decoded_range"]))
    ycc = cv2.transform(levels(image), encode[:3].astype(np.float32))
    chroma = np.ascontiguousarray(ycc[..., 1:])
    sides = list(
        zip(
            image.shape[:2],
            FACTORS[drawn["kind"]],
            SITING[drawn["siting"]],
            SITING[drawn["decoded_siting"]],
            strict=True,
        )
    )
    if drawn["kind"] != "444":
        down = [_down(n, factor, drawn["down"], middle) for n, factor, middle, _ in sides]
        up = [_up(n, factor, drawn["up"], middle) for n, factor, _, middle in sides]
        ycc[..., 1:] = host.sampled(host.sampled(chroma, *down), *up)
    return cv2.transform(ycc, decode[:3].astype(np.float32))


def _matrix(standard: str, extent: str) -> NDArray[np.float64]:
    """Return the 4x4 matrix from (R', G', B', 1) to (Y', Cb, Cr, 1); Cb and Cr are around 0."""
    matrix = np.eye(4)
    matrix[:3, :3] = to_ycc(standard)
    if extent == "limited":
        matrix[:3] *= np.array([[219.0], [224.0], [224.0]]) / 255
        matrix[0, 3] = 16
    return matrix


@lru_cache(maxsize=256)
def _down(length: int, factor: int, kernel: str, in_the_middle: bool) -> Taps:
    """Return the taps of every chroma sample of `length` pixels; borders are repeated."""
    from pipeline.data.degradations.host import Taps

    first = np.arange(-(-length // factor))[:, None] * factor
    centres = first + ((factor - 1) / 2 if in_the_middle else 0.0)
    if kernel == "nearest":
        places = np.floor(centres).astype(np.intp)
        weights = np.ones(places.shape)
    else:
        places = first + np.arange(1 - factor, 2 * factor)
        d = np.abs(places - centres)
        # Box: the part of the pixel within a chroma sample. Linear: a triangle twice as wide.
        weights = (factor / 2 + 0.5 - d).clip(0, 1) if kernel == "box" else (1 - d / factor).clip(0)
        used = weights.any(0)
        places, weights = places[:, used], weights[:, used]
    weights /= weights.sum(1, keepdims=True)
    return Taps(places.clip(0, length - 1), weights.astype(np.float32))


@lru_cache(maxsize=256)
def _up(length: int, factor: int, kernel: str, in_the_middle: bool) -> Taps:
    """Return the taps of every pixel, over the chroma samples."""
    from pipeline.data.degradations import host

    samples = -(-length // factor)
    offset = (factor - 1) / 2 if in_the_middle else 0.0
    centres = (np.arange(length) - offset) / factor
    if kernel == "cubic":
        return host.cubic_taps(centres, samples)
    if kernel == "nearest":
        places = np.ceil(centres - 0.5).astype(np.intp)[:, None]
        weights = np.ones(places.shape)
    else:
        places = np.floor(centres).astype(np.intp)[:, None] + np.arange(2)
        weights = 1 - np.abs(centres[:, None] - places)
    return host.Taps(places.clip(0, samples - 1), weights.astype(np.float32))
