"""Choose the network and its backend: the requested one, or the fastest worth converting to.

`choose_backend` decides from earlier measurements of the network on this machine if there are any;
torch is then imported only if it runs the network. Otherwise it loads the network with torch, and a
`ConversionCache` converts and times it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cli import UserError
from pipeline.export.network_files import FILE_BACKENDS, BackendKind
from pipeline.export.photographs import SIZES
from pipeline.files import short_path
from pipeline.inference.backends import Backend, FileBackend
from pipeline.inference.conversion_cache import ROUNDS, TIMED_SECONDS, ConversionCache, Original
from pipeline.inference.devices import Device
from pipeline.inference.file_facts import as_json, facts_of, from_json
from pipeline.inference.measurements import Measurements, cache_folder, digest
from pipeline.run_folder import network_file

PixelCount = Callable[[int], float]
"""Function from a network's scale to the number of LR pixels to upscale."""

BACKENDS = ("auto", "torch", *FILE_BACKENDS)
FILES = tuple(sorted({suffix for kind in FILE_BACKENDS.values() for suffix in kind.suffixes}))
"""Suffixes of files that contain a whole network, and not only weights."""
FORMAT = 2
"""Version of the facts that are kept about network files."""
EXPORT_SECONDS = 12.0
"""Time of PyTorch's exporter on one core for a network of a million parameters; larger ones take
longer."""
CHECKED_PIXELS = sum(batch * height * width for batch, height, width in SIZES)
"""LR pixels on which PyTorch and every backend are compared."""
TIMING_SECONDS = 2 * (1 + ROUNDS) * TIMED_SECONDS
USUAL_SHARE = 0.8
"""Typical time of the fastest backend as a share of PyTorch's: according to
`benchmarks/inference.py`, 0.65 to 1 for networks of this project."""


@dataclass(frozen=True)
class Chosen:
    """The chosen network and backend, ready to run."""

    file: Path
    network: str
    """The network's name and scale."""
    backend: Backend
    by: str
    """The device, the backend, and the reason for it, for the user."""
    measured: Measurements
    """What is known about the network on this machine."""


def is_network_file(model: Path | None) -> bool:
    """Whether `model` is a whole network, and not weights or a run folder (`None`: the newest)."""
    return model is not None and model.suffix.lower() in FILES and not model.is_dir()


def choose_backend(
    model: Path | None,
    asked: str,
    device: Device,
    precision: str,
    work: PixelCount,
    *,
    compiles: bool = False,
) -> Chosen:
    """Choose the backend that runs `model`. A conversion, which takes long, is reported on stdout.

    Args:
        model: weights, a run folder (`None`: the newest), or a network file.
        asked: one of `BACKENDS`.
        device: the device to run on.
        precision: "auto", "fp32", "fp16" or "bf16".
        work: the number of LR pixels to upscale, as a function of the scale.
        compiles: whether PyTorch compiles the network.

    Raises:
        UserError: the request contradicts itself, a package is missing, or the conversion fails.
    """
    if compiles and (
        device.type == "cpu" or asked not in ("auto", "torch") or is_network_file(model)
    ):
        raise UserError("--compile needs PyTorch on a GPU; omit it")
    if is_network_file(model):
        return _use_network_file(model, asked, device, precision)
    original = Original(network_file(model), device, precision, compiles=compiles)
    if asked in FILE_BACKENDS:
        if precision == "bf16":
            raise UserError(
                f"--precision bf16 needs --backend torch; {FILE_BACKENDS[asked].title} computes "
                "in FP32 or FP16"
            )
        _check_installed(FILE_BACKENDS[asked], to_convert=True)
        return _use_file_backend(original, FILE_BACKENDS[asked])
    if asked == "torch" or device.type != "cpu" or precision in ("fp16", "bf16"):
        return _use_torch(original)
    return _fastest(original, work)


def _check_installed(kind: BackendKind, *, to_convert: bool) -> None:
    if missing := kind.missing(to_convert=to_convert):
        raise UserError(
            f"--backend {kind.name} needs a package that is not installed; run: pip install "
            f"{missing}, or omit --backend"
        )


def _use_torch(original: Original, why: str = "") -> Chosen:
    import torch

    title = f"{original.device} with PyTorch {'.'.join(torch.__version__.split('.')[:2])}"
    return _chosen(original, original.backend, f"{title}{why and f' ({why})'}")


def _chosen(original: Original, backend: Backend, by: str) -> Chosen:
    name, scale, _, _ = original.facts()
    return Chosen(original.file, f"{name} x{scale}", backend, by, original.measured)


def _use_file_backend(original: Original, kind: BackendKind) -> Chosen:
    """Use the requested backend.

    Raises:
        UserError: the network cannot be converted, or its images differ from PyTorch's.
    """
    conversion = ConversionCache(original)
    verdict = conversion.verdict(kind)
    if verdict is None or verdict.reason:
        _announce(original, [kind])
        verdict = conversion.judge(kind)
    if verdict.reason:
        raise UserError(f"--backend {kind.name} cannot be used: {verdict.reason}; omit --backend")
    return _use_conversion(conversion, kind, "")


def _fastest(original: Original, work: PixelCount) -> Chosen:
    """Use the fastest backend as measured on this machine; measure first if that pays off."""
    kinds = [kind for kind in FILE_BACKENDS.values() if not kind.missing(to_convert=True)]
    if not kinds:
        lacking = dict.fromkeys(kind.missing(to_convert=True) for kind in FILE_BACKENDS.values())
        return _use_torch(original, f"other backends need {' or '.join(lacking)}, not installed")
    conversion = ConversionCache(original)
    verdicts = {kind: conversion.verdict(kind) for kind in kinds}
    unknown = [kind for kind, verdict in verdicts.items() if verdict is None]
    if unknown and _is_worth_it(conversion, unknown, work):
        _announce(original, unknown)
        verdicts |= {kind: conversion.judge(kind) for kind in unknown}
        unknown = []
    good = {
        kind: verdict.share for kind, verdict in verdicts.items() if verdict and not verdict.reason
    }
    if good and (best := min(good, key=good.__getitem__)) and good[best] < 1:
        return _use_conversion(conversion, best, f", {1 / good[best]:.1f} times as fast as PyTorch")
    if unknown:
        return _use_torch(
            original, f"{_titles(unknown)}: conversion would take longer than it saves"
        )
    if good:
        return _use_torch(original, f"{_titles(list(good))} measured slower here")
    return _use_torch(
        original,
        "; ".join(dict.fromkeys(verdict.reason for verdict in verdicts.values() if verdict)),
    )


def _is_worth_it(
    conversion: ConversionCache, kinds: Sequence[BackendKind], work: PixelCount
) -> bool:
    """Whether a typical speed-up saves more time on this work than the conversion takes."""
    network = conversion.original.backend.network
    seconds = conversion.seconds_per_pixel
    params = sum(parameter.numel() for parameter in network.parameters())
    export = 0.0 if conversion.is_made() else EXPORT_SECONDS * max(1.0, params / 1e6) ** 0.5
    judging = (1 + len(kinds)) * CHECKED_PIXELS * seconds + len(kinds) * TIMING_SECONDS
    return work(network.scale) * seconds * (1 - USUAL_SHARE) > export + judging


def _announce(original: Original, kinds: Sequence[BackendKind]) -> None:
    print(
        f"converting {short_path(original.file)} for {_titles(kinds)}, comparing and timing it "
        "against PyTorch ...",
        flush=True,
    )


def _titles(kinds: Sequence[BackendKind]) -> str:
    return " and ".join(kind.title for kind in kinds)


def _use_conversion(conversion: ConversionCache, kind: BackendKind, why: str) -> Chosen:
    title = conversion.title(kind)
    folder = short_path(cache_folder())
    where = f"kept in {folder}" if conversion.is_kept else f"not kept: {folder} cannot be written"
    return _chosen(
        conversion.original,
        conversion.backend(kind),
        f"{conversion.device} with {title} (converted, {where}{why})",
    )


def _use_network_file(path: Path, asked: str, device: Device, precision: str) -> Chosen:
    """Run a network file with a backend that reads it; its input format is determined once."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r} of --model")
    if precision != "auto":
        raise UserError(
            f"--precision {precision} is for weights; {str(path)!r} has a fixed precision; omit "
            "--precision"
        )
    kind = _kind_for(path, asked, device)
    file = kind.load(path, device)
    weights = path.with_suffix(".bin")  # OpenVINO has two files
    parts = [path, weights] if path.suffix.lower() == ".xml" and weights.is_file() else [path]
    measured = Measurements(
        digest(FORMAT, kind.version(), *(part.read_bytes() for part in parts))[:32]
    )
    try:
        facts = from_json(measured.get("facts"))
    except (TypeError, AttributeError):  # unknown so far, or broken
        facts = facts_of(file, repr(str(path)))
        measured.put("facts", as_json(facts))
    number = "fp16" if file.dtype == np.float16 else "fp32"
    backend = FileBackend(lambda _: file, facts, device, lambda _: number, number, measured)
    name = file.metadata.get("architecture", "network")
    note = "; uint8: 16-bit pictures are reduced to 8 bits" if file.dtype == np.uint8 else ""
    return Chosen(
        path,
        f"{name} x{facts.scale}",
        backend,
        f"{device} with {file.title} (file used unchanged{note})",
        measured,
    )


def _kind_for(path: Path, asked: str, device: Device) -> BackendKind:
    suffix = path.suffix.lower()
    kinds = [kind for kind in FILE_BACKENDS.values() if suffix in kind.suffixes]
    if asked == "auto":
        if device.type != "cpu":
            kinds = [kind for kind in kinds if kind.on_gpu]
            if not kinds:
                raise UserError(f"{str(path)!r} runs only on the CPU; add --device cpu")
        installed = [kind for kind in kinds if not kind.missing(to_convert=False)]
        if not installed:
            raise UserError(
                f"{str(path)!r} needs {' or '.join(kind.title for kind in kinds)}, which is not "
                f"installed; run: pip install {kinds[0].distributions[0]}"
            )
        return installed[0]
    if asked not in [kind.name for kind in kinds]:
        raise UserError(
            f"--backend {asked} does not read {suffix} files; choose "
            f"{' or '.join(['auto', *(kind.name for kind in kinds)])}"
        )
    _check_installed(FILE_BACKENDS[asked], to_convert=False)
    return FILE_BACKENDS[asked]
