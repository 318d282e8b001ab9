"""The input and output format of a network file.

Files of this project describe themselves; others are run on a photograph to find out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline.cli import RunError, UserError
from pipeline.data.image_pixels import read_rgb
from pipeline.export.network_files import DESCRIBED, MAX_INPUT, NetworkFile
from pipeline.export.photographs import SHIPPED, paths_within_packages
from pipeline.files import parse_json
from pipeline.inference.backends import FileFacts, from_output, to_input
from pipeline.inference.reach import STRIP, distance_within, edge_changes, shift_of

LIKE_ITS_INPUT = 15.0
"""Minimum PSNR, in dB, of a downscaled result against the input image."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
UNKNOWN_HALO = 64
"""Overlap for networks that see the whole image; their tiles only approximate its result."""


def facts_of(file: NetworkFile, name: str) -> FileFacts:
    """Return the facts of a file, which messages call `name`.

    Raises:
        UserError: the file is not a network that restores or enlarges one RGB image, with float or
            uint8 values.
    """
    facts = _from_input(file, name)
    said = file.metadata
    if said.keys() >= {*DESCRIBED}:
        try:
            scale, params = int(said["scale"]), dict(parse_json(said["params"]))
            halo, grid = _own_reach(said["architecture"], scale, params)
            described = replace(facts, scale=scale, halo=halo, grid=grid)
        except (ValueError, TypeError):
            pass  # the file is from another program that uses the same keys
        else:
            _check_scale(file, described, name)
            return described
    if importlib.util.find_spec("skimage") is None:
        raise UserError(
            f"{name} does not say which input it expects; finding out needs photographs from "
            "scikit-image, which is not installed; run: pip install scikit-image"
        )
    photo = read_rgb(paths_within_packages(SHIPPED[:1], "--images")[0])
    facts = _with_scale(file, facts, photo, name)
    facts = facts if facts.window else replace(facts, multiple=_multiple(file, facts, photo, name))
    return replace(facts, halo=_halo(file, facts, photo))


def as_json(facts: FileFacts) -> dict[str, Any]:
    """Return the facts as JSON values."""
    return asdict(facts)


def from_json(values: Mapping[str, Any]) -> FileFacts:
    """Return the facts from `as_json`'s values; raise `TypeError` for anything else."""
    window = values.get("window")
    return FileFacts(**{**values, "window": None if window is None else tuple(window)})


def _own_reach(architecture: str, scale: int, params: Mapping[str, Any]) -> tuple[int, int]:
    """Return receptive radius and grid of a network of `pipeline.models`, in LR pixels.

    Needs torch.
    """
    from pipeline.models import build_outline

    network = build_outline(architecture, scale, params)
    return network.receptive_radius, getattr(network, "tile_grid", 1)


def _check_scale(file: NetworkFile, facts: FileFacts, name: str) -> None:
    """Raise `UserError` unless the network enlarges an image by the scale that the file says."""
    height, width = facts.window or (32, 64)
    try:
        shape = _run(file, facts, np.zeros((height, width, 3), np.uint8)).shape
    except (RunError, ValueError) as error:
        raise UserError(f"{name} cannot be run on an image of {width}x{height}: {error}") from error
    if shape[1:] != (3, height * facts.scale, width * facts.scale):
        raise UserError(
            f"{name} says that its scale is {facts.scale}, but turns an image of {width}x{height} "
            f"into {shape}; convert the network again"
        )


def _from_input(file: NetworkFile, name: str) -> FileFacts:
    """Return layout, data type, batch and sizes, which every file declares."""
    if len(file.inputs) != 1:
        raise UserError(
            f"{name} takes {len(file.inputs)} inputs, but an image-to-image network takes one"
        )
    shape = file.inputs[0]
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        shown = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(
            f"{name} takes input of shape ({shown}), but images have the shape "
            "(N, 3, height, width) or (N, height, width, 3)"
        )
    if file.dtype is None:
        raise UserError(
            f"{name} takes a data type other than float32, float16 and uint8; convert it to one "
            "of them"
        )
    layout = "nchw" if shape[1] == 3 else "nhwc"
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    if (height is None) != (width is None):
        raise UserError(
            f"{name} fixes only one side of the image; convert it for images of any size"
        )
    if (shape[0] or 1) * (height or 1) * (width or 1) > MAX_INPUT:
        raise UserError(
            f"{name} takes {shape[0] or 1} images of {height or 'any'} x {width or 'any'} pixels "
            f"at once, more than {MAX_INPUT >> 20} Mi pixels; convert it for smaller ones"
        )
    return FileFacts(
        scale=0,
        halo=0,
        layout=layout,
        white=255 if file.dtype == np.uint8 else 1,
        batch=shape[0],
        window=None if height is None else (height, width),
    )


def _with_scale(file: NetworkFile, facts: FileFacts, photo: np.ndarray, name: str) -> FileFacts:
    """Add the scale, and the value of white with which the result resembles the input image."""
    image = _cut(photo, *(facts.window or (64, 128)))
    reason = ""
    for white in (255,) if file.dtype == np.uint8 else (1, 255):
        facts = replace(facts, white=white)
        try:
            sr = _run(file, facts, image)
        except (RunError, ValueError) as error:
            raise UserError(
                f"{name} cannot be run on an RGB image of {image.shape[1]}x{image.shape[0]}: "
                f"{error}"
            ) from error
        scale = sr.shape[-2] // image.shape[0] if sr.ndim == 4 else 0
        if scale < 1 or sr.shape[1:] != (3, image.shape[0] * scale, image.shape[1] * scale):
            raise UserError(
                f"{name} turns an RGB image of {image.shape[1]}x{image.shape[0]} into {sr.shape}, "
                "which is not an RGB image larger by a whole factor"
            )
        height, width = image.shape[:2]
        reduced = (
            sr[0]
            .astype(np.float32)
            .reshape(3, height, scale, width, scale)
            .mean((2, 4))
            .transpose(1, 2, 0)
        )
        psnr = -10 * np.log10(np.square(reduced - image / 255).mean() + 1e-12)
        if psnr >= LIKE_ITS_INPUT:
            return replace(facts, scale=scale)
        reason = f"its result, downscaled, has {psnr:.0f} dB PSNR against the input"
    raise UserError(
        f"{name} does not restore or enlarge an RGB photograph ({reason}); does it expect other "
        "values or another channel order?"
    )


def _multiple(file: NetworkFile, facts: FileFacts, photo: np.ndarray, name: str) -> int:
    """Return the smallest number that height and width must be multiples of."""
    for multiple in MULTIPLES:
        height, width = (multiple * (64 // multiple + more) for more in (1, 3))
        try:
            sr = _run(file, facts, _cut(photo, height, width))
        except RunError:
            continue
        if sr.shape[-2:] == (height * facts.scale, width * facts.scale):
            return multiple
    raise UserError(
        f"{name} takes neither images of any size nor all multiples of 2 to {MULTIPLES[-1]} "
        "pixels; convert it for images of any size"
    )


def _halo(file: NetworkFile, facts: FileFacts, photo: np.ndarray) -> int:
    """Return the smallest distance in LR pixels at which an edge no longer changes a photograph.

    If there is none, return the smallest one at which the change is at most half a level.
    A network that sees the whole image gets `UNKNOWN_HALO`; one with a fixed input size gets
    its longer side, which is more than its tiles can overlap.
    """
    height, width = facts.window or STRIP
    shift = shift_of(width)
    photo = _cut(photo, height, width + shift)
    left, right = (_run(file, facts, photo[:, start : start + width]) for start in (0, shift))
    changes = edge_changes(left, right, shift, facts.scale)
    half = 1.01 if file.dtype == np.uint8 else 0.5  # uint8 results are already rounded
    found = distance_within(changes, 0.01 / 255) or distance_within(changes, half / 255)
    return found or (max(facts.window) if facts.window else UNKNOWN_HALO)


def _cut(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the first rows and columns, extended by reflection if there are too few."""
    below, right = (
        max(0, wanted - side) for wanted, side in zip((height, width), photo.shape, strict=False)
    )
    return np.pad(photo, ((0, below), (0, right), (0, 0)), "symmetric")[:height, :width]


def _run(file: NetworkFile, facts: FileFacts, image: np.ndarray) -> np.ndarray:
    images = to_input(np.stack([image] * (facts.batch or 1)), facts, file.dtype)
    try:
        return from_output(file(images), facts)
    except MemoryError as error:
        raise RunError("there is not enough memory for that") from error
