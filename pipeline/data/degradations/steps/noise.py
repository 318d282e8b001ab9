"""Noise on an image, as a pure function of a seed.

Gaussian and Poisson noise are those of `pipeline.data.degradations.noise`. The other kinds use the
same random words or those of a Philox generator, with their own tables and formulas: the
distributions of libraries may change between versions, which would change samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.data.degradations import noise
from pipeline.data.degradations.base import OnDevice
from pipeline.data.degradations.steps.base import (
    LUMA,
    Canvas,
    Draws,
    Image,
    Parameters,
    Size,
    StepNodes,
    StepSpec,
    levels,
    shares_of,
    to_ycc,
)
from pipeline.libraries import cv2
from pipeline.spec import Factor, Levels, Probability, Range, Sigma, within

KINDS = ("gaussian", "poisson", "uniform", "salt_and_pepper", "perlin", "grain")
RGB_ONLY = ("poisson", "salt_and_pepper")

SMALLEST_CELL = 2.0  # pixels between the gradients of the finest octave of Perlin noise
# Variance of Perlin noise with unit gradients, the mean over a cell: with the weights s(t) and
# 1 - s(t), s(t) = 6 t^5 - 15 t^4 + 10 t^3, it is 4 times the integral of s^2 times that of
# (t (1 - s))^2.
PERLIN_VARIANCE = 4 * (181 / 462) * (535 / 18018)
DIRECTIONS = 256  # of gradients


class NoiseSpec(StepSpec):
    """Noise; the result is neither clipped nor rounded."""

    kind: shares_of(*KINDS) = Field(  # type: ignore[valid-type]
        {"gaussian": 1.0}, description="relative probability of each kind"
    )
    sigma: Levels = Field(
        (1.0, 30.0),
        description="range of the standard deviation in levels (0..255): Gaussian, uniform and "
        "Perlin noise, and grain at half brightness",
    )
    poisson_scale: Factor = Field((0.05, 3.0), description="range of the factor of Poisson noise")
    gray: Probability = Field(
        0.4, description="probability of the same noise in all channels, if space is rgb"
    )
    space: shares_of("rgb", "ycc") = Field(  # type: ignore[valid-type]
        {"rgb": 1.0},
        description="relative probability of noise in R, G and B, or in Y, Cb and Cr; Poisson "
        "noise and salt and pepper are always in rgb",
    )
    chroma_sigma: Levels = Field(
        (1.0, 30.0),
        description="range of the standard deviation in Cb and Cr in levels, if space is ycc; "
        "sigma is then the standard deviation in Y",
    )
    amount: Annotated[Range, within(0, 1)] = Field(
        (0.001, 0.02), description="range of the share of pixels that salt and pepper replaces"
    )
    salt: Annotated[Range, within(0, 1)] = Field(
        (0.3, 0.7), description="range of the share of salt (255) in salt and pepper"
    )
    feature_size: Annotated[Range, within(SMALLEST_CELL, 1024)] = Field(
        (4.0, 32.0),
        description="range of the size of the largest features of Perlin noise in pixels, uniform "
        "in its logarithm",
    )
    octaves: Annotated[Range, within(1, 8)] = Field(
        (1, 4),
        description="range of the number of octaves of Perlin noise, each with half the size and "
        f"amplitude of the one before; octaves finer than {SMALLEST_CELL:g} pixels are omitted",
    )
    grain_size: Sigma = Field(
        (0.3, 1.0), description="range of the radius (sigma) of film grains in pixels"
    )

    @model_validator(mode="after")
    def _has_ycc(self) -> NoiseSpec:
        if self.space.get("ycc") and not any(
            self.kind.get(kind) for kind in KINDS if kind not in RGB_ONLY
        ):
            raise ValueError(
                f"space ycc is for {', '.join(kind for kind in KINDS if kind not in RGB_ONLY)} "
                f"noise; {' and '.join(RGB_ONLY)} need space rgb"
            )
        return self


def draw(spec: NoiseSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    drawn: Parameters = {
        "kind": kind,
        "level": draws.between(
            {"poisson": spec.poisson_scale, "salt_and_pepper": spec.amount}.get(kind, spec.sigma)
        ),
        "gray": draws.chance(spec.gray),
        "words": draws.words(),
    }
    if kind not in RGB_ONLY and draws.choose(spec.space) == "ycc":
        drawn |= {"space": "ycc", "gray": False, "chroma_level": draws.between(spec.chroma_sigma)}
    if kind == "salt_and_pepper":
        drawn["salt"] = draws.between(spec.salt)
    if kind == "perlin":
        low, high = spec.feature_size
        drawn["feature_size"] = low * (high / low) ** draws.uniform()
        drawn["octaves"] = draws.integer(spec.octaves)
    if kind == "grain":
        drawn["grain_size"] = draws.between(spec.grain_size)
    return drawn


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    image, kind, level = levels(image), drawn["kind"], drawn["level"]
    (height, width), channels = image.shape[:2], 1 if drawn["gray"] else 3
    words = (drawn["words"][0], drawn["words"][1])
    is_rgb = drawn.get("space", "rgb") == "rgb"
    if kind == "perlin":
        z = perlin(words, height, width, channels, drawn["feature_size"], drawn["octaves"])
    elif kind == "grain":
        z = _grain(words, height, width, channels, drawn["grain_size"], workspace)
        # If grains cover the share p of an area, the variance is p (1 - p).
        luma = cv2.transform(image, np.array([LUMA["bt601"]], np.float32) / 255).clip(0, 1)
        z *= (2 * np.sqrt(luma * (1 - luma))).reshape(height, width, *[1] * (z.ndim - 2))
    else:
        keys = noise.noise_keys(words, height, width, channels)
        if kind == "poisson":
            return host.with_poisson(image, keys, level, workspace)
        if kind == "gaussian" and is_rgb:
            return host.with_gaussian(image, keys, level, workspace)
        if kind == "gaussian":
            z = host.standard_normal(keys, workspace)
        else:
            quantiles = host.quantiles(keys, workspace)
            if kind == "salt_and_pepper":
                replaced = quantiles.reshape(height, width, channels)
                np.putmask(image, np.broadcast_to(replaced < level * 65536, image.shape), 0)
                np.putmask(
                    image,
                    np.broadcast_to(replaced < level * drawn["salt"] * 65536, image.shape),
                    255,
                )
                return image
            z = np.subtract(quantiles, 32767.5, dtype=np.float32)
            z *= math.sqrt(12) / 65536
    if is_rgb:
        return cv2.scaleAdd(host.in_all_channels(z, workspace), level, image, dst=image)
    strengths = [level, drawn["chroma_level"], drawn["chroma_level"]]
    to_rgb = (np.linalg.inv(to_ycc()) * strengths).astype(np.float32)
    return cv2.add(image, cv2.transform(z, to_rgb), dst=image)


def _grain(
    words: tuple[int, int], height: int, width: int, channels: int, sigma: float, workspace: Any
) -> NDArray[np.float32]:
    """Return white noise blurred with a Gaussian, with a variance of 1."""
    from pipeline.data.degradations import host, kernels

    radius = math.ceil(3 * sigma)
    taps = kernels.gaussian_kernel(2 * radius + 1, sigma, sigma, 0).sum(0)
    # Noise beyond the image, so that the filter does not mirror it at the borders.
    keys = noise.noise_keys(words, height + 2 * radius, width + 2 * radius, channels)
    z = host.standard_normal(keys, workspace)
    # Not `host.filtered`, whose buffer may contain the image.
    wide = cv2.sepFilter2D(z, cv2.CV_32F, taps, taps)
    return wide[radius : radius + height, radius : radius + width] / (taps**2).sum()


def perlin(
    words: tuple[int, int],
    height: int,
    width: int,
    channels: int,
    feature_size: float,
    octaves: int,
) -> NDArray[np.float32]:
    """Return Perlin's gradient noise, (height, width, channels), mean 0 and variance 1.

    One channel has the shape (height, width). Improved noise (Perlin 2002) with `DIRECTIONS`
    gradients of length 1 on a square lattice, one of each direction equally likely. Octave i has
    feature_size / 2^i pixels between gradients and the amplitude 2^-i.
    """
    generator = np.random.Philox(key=np.array(words, np.uint64))
    turns = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    cos, sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
    octaves = min(octaves, 1 + int(math.log2(feature_size / SMALLEST_CELL)))
    scale = 1 / math.sqrt(PERLIN_VARIANCE * sum(0.25**i for i in range(octaves)))
    total = np.zeros((height, width * channels), np.float32)
    for octave in range(octaves):
        offsets = generator.random_raw(2) * 2.0**-64
        (row, from_top, down), (column, from_left, across) = (
            _lattice(length, feature_size / 2**octave, offset)
            for length, offset in zip((height, width), offsets, strict=True)
        )
        shape = (row[-1] + 2, column[-1] + 2, channels)
        chosen = generator.random_raw(math.prod(shape) // 8 + 1).view(np.uint8)
        directions = chosen[: math.prod(shape)].reshape(shape)
        gradient_y, gradient_x = sin[directions], cos[directions]
        # The noise is a sum over the four corners of a cell, of weights and distances that are
        # products of one factor for the row and one for the column.
        slopes = np.zeros((shape[0], width, channels), np.float32)
        values = np.zeros_like(slopes)
        for corner in (0, 1):
            weight = across[corner][:, None]
            slopes += gradient_y[:, column + corner] * weight
            values += gradient_x[:, column + corner] * (weight * (from_left - corner)[:, None])
        for corner in (0, 1):
            for lines, distance in ((slopes, from_top - corner), (values, 1)):
                taken = lines.reshape(shape[0], -1)[row + corner]
                taken *= (scale * 0.5**octave * down[corner] * distance)[:, None]
                total += taken
    return total.reshape((height, width) if channels == 1 else (height, width, channels))


def _lattice(length: int, cell: float, offset: float) -> tuple[Any, Any, tuple[Any, Any]]:
    """Return each pixel's cell, its position in it (0..1) and the weights of the two sides."""
    places = (np.arange(length) + 0.5) / cell + offset
    first = np.floor(places).astype(np.intp)
    inside = (places - first).astype(np.float32)
    after = ((6 * inside - 15) * inside + 10) * inside**3
    return first, inside, (1 - after, after)


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    words = (drawn["words"][0], drawn["words"][1])
    return (
        np.array(drawn["kind"] == "poisson"),
        np.array(drawn["gray"]),
        *noise.noise_keys(words, *size, 1 if drawn["gray"] else 3),
        np.array(drawn["level"], np.float32),
    )


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    normal = noise.standard_normal(*(on_device(nodes[name]) for name in noise.NoiseKeys._fields))
    is_poisson = nodes["is_poisson"]
    if is_poisson:
        noisy = noise.add_poisson(image, normal, nodes["level"], gray=nodes["gray"])
    else:
        noisy = noise.add_gaussian(image, normal, nodes["level"])
    return noisy


IN_GRAPH = ("gaussian", "poisson")
NODES = StepNodes(
    columns=("is_poisson", "gray", *noise.NoiseKeys._fields, "level"),
    arrays=_arrays,
    idle={"kind": "gaussian", "gray": True, "words": (0, 0), "level": 0.0},
    add=_add,
    covers=lambda spec: (
        all(kind in IN_GRAPH for kind, share in spec.kind.items() if share)
        and not (spec.kind.get("gaussian") and spec.space.get("ycc"))
    ),
    fits=lambda drawn: drawn["kind"] in IN_GRAPH and "space" not in drawn,
)
