"""What a network file takes and gives: as our own files say, else found out by running it on a
photograph."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline.cli import RunError, UserError
from pipeline.data.image_pixels import read_rgb
from pipeline.export.network_files import DESCRIBED, NetworkFile
from pipeline.export.photographs import SHIPPED, paths_within_packages
from pipeline.inference.backends import FileFacts, from_output, to_input
from pipeline.inference.reach import STRIP, distance_within, edge_changes, shift_of

LIKE_ITS_INPUT = 15.0
"""dB of a result, reduced, against what it was made from, at least."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
UNKNOWN_HALO = 64
"""Of networks that look at the whole image: tiles are near, not equal."""


def facts_of(file: NetworkFile, name: str) -> FileFacts:
    """The facts of a file, which messages call `name`.

    `UserError` for what is not a network from one RGB image to a larger one, with float or byte
    values.
    """
    facts = _from_input(file, name)
    said = file.metadata
    if said.keys() >= {*DESCRIBED}:
        try:
            scale, params = int(said["scale"]), json.loads(said["params"])
            return replace(facts, scale=scale, halo=_own_halo(said["architecture"], scale, params))
        except (ValueError, TypeError):
            pass  # another program's, which has the same keys
    if importlib.util.find_spec("skimage") is None:
        raise UserError(
            f"{name} does not say what it takes, and scikit-image, with whose photographs that is "
            "found "
            "out, is not installed; do: pip install scikit-image"
        )
    photo = read_rgb(paths_within_packages(SHIPPED[:1], "--images")[0])
    facts = _with_scale(file, facts, photo, name)
    facts = facts if facts.window else replace(facts, multiple=_multiple(file, facts, photo, name))
    return replace(facts, halo=_halo(file, facts, photo))


def as_json(facts: FileFacts) -> dict[str, Any]:
    """The facts as JSON values."""
    return asdict(facts)


def from_json(values: Mapping[str, Any]) -> FileFacts:
    """What `as_json` gave; `TypeError` for anything else."""
    window = values.get("window")
    return FileFacts(**{**values, "window": None if window is None else tuple(window)})


def _own_halo(architecture: str, scale: int, params: Mapping[str, Any]) -> int:
    """The receptive radius of a network of `pipeline.models`; needs torch."""
    import torch

    from pipeline.models import build_generator

    with torch.random.fork_rng(devices=[]):
        return build_generator(architecture, scale, **params).receptive_radius


def _from_input(file: NetworkFile, name: str) -> FileFacts:
    """Layout, type, batch and sizes, which every file says."""
    if len(file.inputs) != 1:
        raise UserError(
            f"{name} takes {len(file.inputs)} inputs, where a network from image to image takes one"
        )
    shape = file.inputs[0]
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        shown = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(
            f"{name} takes ({shown}), where images are (N, 3, height, width) or (N, height, width, "
            "3)"
        )
    if file.dtype is None:
        raise UserError(
            f"{name} takes another type than float32, float16 or bytes (uint8); convert it for one "
            "of them"
        )
    layout = "nchw" if shape[1] == 3 else "nhwc"
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    if (height is None) != (width is None):
        raise UserError(
            f"{name} fixes one side of images and not the other; convert it for images of any size"
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
    """Scale, and the value of white: that with which the result looks like what it was made
    from."""
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
                "which is not an RGB image a whole number of times larger"
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
        reason = f"{psnr:.0f} dB of the photograph it was shown, reduced again"
    raise UserError(
        f"{name} does not enlarge an RGB photograph ({reason}); does it take other values or "
        "colours?"
    )


def _multiple(file: NetworkFile, facts: FileFacts, photo: np.ndarray, name: str) -> int:
    """The least number of which height and width must be multiples."""
    for multiple in MULTIPLES:
        height, width = (multiple * (64 // multiple + more) for more in (1, 3))
        try:
            sr = _run(file, facts, _cut(photo, height, width))
        except RunError:
            continue
        if sr.shape[-2:] == (height * facts.scale, width * facts.scale):
            return multiple
    raise UserError(
        f"{name} takes images of some sizes only, and not of multiples of up to {MULTIPLES[-1]} "
        "pixels"
    )


def _halo(file: NetworkFile, facts: FileFacts, photo: np.ndarray) -> int:
    """From which distance on an edge changes nothing on a photograph, or half a level where it
    always changes some.

    A network that looks at the whole image gets `UNKNOWN_HALO`, and of one size only more than
    there is.
    """
    height, width = facts.window or STRIP
    shift = shift_of(width)
    photo = _cut(photo, height, width + shift)
    left, right = (_run(file, facts, photo[:, start : start + width]) for start in (0, shift))
    changes = edge_changes(left, right, shift, facts.scale)
    half = 1.01 if file.dtype == np.uint8 else 0.5  # what gives bytes rounds
    found = distance_within(changes, 0.01 / 255) or distance_within(changes, half / 255)
    return found or (max(facts.window) if facts.window else UNKNOWN_HALO)


def _cut(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """The first rows and columns; mirrored on where there are too few."""
    below, right = (
        max(0, wanted - side) for wanted, side in zip((height, width), photo.shape, strict=False)
    )
    return np.pad(photo, ((0, below), (0, right), (0, 0)), "symmetric")[:height, :width]


def _run(file: NetworkFile, facts: FileFacts, image: np.ndarray) -> np.ndarray:
    return from_output(
        file(to_input(np.stack([image] * (facts.batch or 1)), facts, file.dtype)), facts
    )
