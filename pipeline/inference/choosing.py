"""Which network, and what computes it: as asked, or the fastest that is installed and worth its conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cli import UserError
from pipeline.distributed.launcher import Place, gpu_of
from pipeline.export.parity import SIZES
from pipeline.export.runtimes import RUNTIMES, RuntimeKind
from pipeline.files import short
from pipeline.inference.backends import Backend
from pipeline.inference.converted import ROUNDS, TIMED_SECONDS, Conversion, cache_folder
from pipeline.inference.file_backend import FileBackend
from pipeline.inference.file_facts import facts_of
from pipeline.inference.torch_backend import TorchBackend
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import find_run, run_network_file

Work = Callable[[int], float]
"""How many LR pixels are to be upscaled with a network of that scale."""

BACKENDS = ("auto", "torch", *RUNTIMES)
FILES = tuple(sorted({suffix for kind in RUNTIMES.values() for suffix in kind.suffixes}))
"""What a file ends in that is no weights file, but a whole network."""
EXPORT_SECONDS = 12.0
"""That PyTorch's exporter takes for a network of a million parameters on one core; larger ones take longer."""
CHECKED_PIXELS = sum(batch * height * width for batch, height, width in SIZES)
"""LR pixels that PyTorch and every runtime are shown to compare them."""
TIMING_SECONDS = 2 * (1 + ROUNDS) * TIMED_SECONDS
USUAL_SHARE = 0.8
"""Of PyTorch's time, by `benchmarks/inference.py`: the fastest runtime takes 0.65 to 1 for networks of this project."""


@dataclass(frozen=True)
class Chosen:
    """A network, ready to run."""

    file: Path
    network: str
    """Its name and scale."""
    backend: Backend
    by: str
    """The device, what computes there, and why that."""


def is_network_file(model: Path | None) -> bool:
    """Whether it is a file for a runtime, rather than weights or a run folder (`None`: the newest)."""
    return model is not None and model.suffix.lower() in FILES and not model.is_dir()


def choose_backend(model: Path | None, asked: str, device: torch.device, precision: str, work: Work) -> Chosen:
    """`asked` is one of `BACKENDS`; `model` as the command line has it: weights, a run folder, or a network file.

    `UserError` for what cannot be had. A conversion that takes long, as all do, is told of on stdout.
    """
    if is_network_file(model):
        return _of_file(model, asked, device, precision)
    chosen = choose_model(model)
    by_torch = TorchBackend(chosen.saved.build(), device, precision)
    if asked in RUNTIMES:
        kind = RUNTIMES[asked]
        _refuse_missing(kind, to_convert=True)
        return _by_runtime(chosen, by_torch, kind, precision)
    if asked == "torch" or device.type != "cpu" or precision == "fp16":
        return _by_torch(chosen, by_torch)
    return _fastest(chosen, by_torch, precision, work)


def _refuse_missing(kind: RuntimeKind, *, to_convert: bool) -> None:
    if missing := kind.missing(to_convert=to_convert):
        raise UserError(f"--backend {kind.name} needs a package that is not installed; do: pip install {missing}, or "
                        "leave --backend out")


def _by_torch(chosen: Model, by_torch: TorchBackend, why: str = "") -> Chosen:
    title = f"{by_torch.device} by PyTorch {'.'.join(torch.__version__.split('.')[:2])}"
    return Chosen(chosen.file, f"{chosen.saved.name} x{by_torch.scale}", by_torch, f"{title}{why and f' ({why})'}")


def _by_runtime(chosen: Model, by_torch: TorchBackend, kind: RuntimeKind, precision: str) -> Chosen:
    """As asked for. `UserError` where it cannot be converted, or does not make PyTorch's images."""
    conversion = Conversion(chosen.file, chosen.saved, by_torch, precision)
    verdict = conversion.verdict(kind)
    if verdict is None or verdict.reason:
        _announce(chosen, [kind])
        verdict = conversion.judge(kind)
    if verdict.reason:
        raise UserError(f"--backend {kind.name} cannot be used: {verdict.reason}; leave --backend out")
    return _converted(conversion, kind, chosen, "")


def _fastest(chosen: Model, by_torch: TorchBackend, precision: str, work: Work) -> Chosen:
    """What takes the least time, as measured on this machine, if finding out is worth it."""
    kinds = [kind for kind in RUNTIMES.values() if not kind.missing(to_convert=True)]
    if not kinds:
        lacking = dict.fromkeys(kind.missing(to_convert=True) for kind in RUNTIMES.values())
        return _by_torch(chosen, by_torch, f"other back-ends need {' or '.join(lacking)}, not installed")
    conversion = Conversion(chosen.file, chosen.saved, by_torch, precision)
    verdicts = {kind: conversion.verdict(kind) for kind in kinds}
    unknown = [kind for kind, verdict in verdicts.items() if verdict is None]
    if unknown and _is_worth_it(conversion, by_torch, unknown, work):
        _announce(chosen, unknown)
        verdicts |= {kind: conversion.judge(kind) for kind in unknown}
        unknown = []
    good = {kind: verdict.share for kind, verdict in verdicts.items() if verdict and not verdict.reason}
    if good and (best := min(good, key=good.__getitem__)) and good[best] < 1:
        return _converted(conversion, best, chosen, f", {1 / good[best]:.1f} times as fast as PyTorch")
    if unknown:
        return _by_torch(chosen, by_torch, f"{_titles(unknown)} would not save what the conversion takes")
    if good:
        return _by_torch(chosen, by_torch, f"{_titles(list(good))} measured slower here")
    return _by_torch(chosen, by_torch, "; ".join(dict.fromkeys(
        verdict.reason for verdict in verdicts.values() if verdict)))


def _is_worth_it(conversion: Conversion, by_torch: TorchBackend, kinds: Sequence[RuntimeKind], work: Work) -> bool:
    """Whether the work takes PyTorch so long that even the slowest of usual gains is more than the conversion costs."""
    seconds = conversion.seconds_per_pixel
    params = sum(parameter.numel() for parameter in by_torch.network.parameters())
    export = 0.0 if conversion.is_made() else EXPORT_SECONDS * max(1.0, params / 1e6) ** 0.5
    judging = (1 + len(kinds)) * CHECKED_PIXELS * seconds + len(kinds) * TIMING_SECONDS
    return work(by_torch.scale) * seconds * (1 - USUAL_SHARE) > export + judging


def _announce(chosen: Model, kinds: Sequence[RuntimeKind]) -> None:
    print(f"converting {short(chosen.file)} for {_titles(kinds)}, comparing and timing it against PyTorch ...",
          flush=True)


def _titles(kinds: Sequence[RuntimeKind]) -> str:
    return " and ".join(kind.title for kind in kinds)


def _converted(conversion: Conversion, kind: RuntimeKind, chosen: Model, why: str) -> Chosen:
    backend = conversion.backend(kind)
    folder = short(cache_folder())
    where = f"kept in {folder}" if conversion.is_kept else f"for this time only: {folder} cannot be written"
    return Chosen(chosen.file, f"{chosen.saved.name} x{backend.scale}", backend,
                  f"{conversion.device} by {conversion.title(kind)} (converted, {where}{why})")


def _of_file(path: Path, asked: str, device: torch.device, precision: str) -> Chosen:
    """A network in a file of its own, by a runtime that reads it."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r} of --model")
    if precision != "auto":
        raise UserError(f"--precision {precision} is for weights; {str(path)!r} computes in what it was written in: "
                        "leave --precision out")
    kind = _kind_for(path, asked, device)
    file = kind.load(path, device)
    facts = facts_of(file, repr(str(path)))
    dtype = torch.float16 if file.dtype == np.float16 else torch.float32
    backend = FileBackend(lambda _: file, facts, device, lambda _: dtype, dtype)
    name = file.metadata.get("architecture", "network")
    note = "; bytes: of 16-bit pictures it sees 8" if file.dtype == np.uint8 else ""
    return Chosen(path, f"{name} x{facts.scale}", backend, f"{device} by {file.title} (the file as it is{note})")


def _kind_for(path: Path, asked: str, device: torch.device) -> RuntimeKind:
    suffix = path.suffix.lower()
    kinds = [kind for kind in RUNTIMES.values() if suffix in kind.suffixes]
    if asked == "auto":
        if device.type != "cpu":
            kinds = [kind for kind in kinds if kind.on_gpu]
            if not kinds:
                raise UserError(f"{str(path)!r} runs on the CPU only; say --device cpu")
        installed = [kind for kind in kinds if not kind.missing(to_convert=False)]
        if not installed:
            raise UserError(f"{str(path)!r} needs {' or '.join(kind.title for kind in kinds)}, which is not installed; "
                            f"do: pip install {kinds[0].distributions[0]}")
        return installed[0]
    if asked not in [kind.name for kind in kinds]:
        raise UserError(f"--backend {asked} does not read {suffix} files; choose "
                        f"{' or '.join(['auto', *(kind.name for kind in kinds)])}")
    _refuse_missing(RUNTIMES[asked], to_convert=False)
    return RUNTIMES[asked]


@dataclass(frozen=True)
class Model:
    """What is evaluated."""

    file: Path
    title: str
    saved: SavedNetwork

    @cached_property
    def sha256(self) -> str:
        """Of the file, in hexadecimal digits."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What tells this model from every other, as JSON values."""
        return {"file": str(self.file), "sha256": self.sha256,
                "name": self.saved.name, "params": self.saved.params, "metadata": self.saved.metadata}


def choose_model(model: Path | None) -> Model:
    """A weights file, or the best averaged weights of a run folder (`None`: of the newest run)."""
    if model is not None and not model.is_dir():
        return Model(model, model.stem, read_network(model))
    run_dir = model if model is not None else find_run()
    file = run_network_file(run_dir, "best", ema=True)
    return Model(file, run_dir.resolve().name, read_network(file))


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. `UserError` for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no device {device!r} here ({reason}); choose from auto, cpu, cuda") from error
    return place


def device_at(place: Place, device: str) -> torch.device:
    """`choose_device` for one process of several: "auto" and "cuda" are then the GPU of its own."""
    if place.world_size == 1:
        return choose_device(device)
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} for {place.world_size} processes; leave --device out for a GPU each")
    if device == "cpu" or not torch.cuda.is_available():
        return choose_device(device)
    own = torch.device("cuda", gpu_of(place, torch.cuda.device_count()))
    torch.cuda.set_device(own)
    return own
