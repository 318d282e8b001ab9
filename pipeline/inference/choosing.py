"""Which network, and what computes it: as asked, or the fastest that is installed and worth its conversion.

`choose_model` finds the weights, `choose_device` the device, `choose_backend` what computes there. A `ConversionCache`
keeps networks converted for other backends than PyTorch, compared and timed against it, in a folder of the user's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cli import RunError, UserError
from pipeline.distributed.gpus import torch_gpus
from pipeline.distributed.launcher import Place, gpu_of
from pipeline.export.network_files import FILE_BACKENDS, BackendKind, NetworkFile, usable_threads
from pipeline.export.onnx_file import Form, convert, quiet
from pipeline.export.parity import LIMITS, SIZES, Check, checks, compare, photographs
from pipeline.files import short_path, write_atomically
from pipeline.inference.backends import Backend, FileBackend, FileFacts, TorchBackend, dtype_of
from pipeline.inference.file_facts import facts_of
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import find_run, run_network_file

# The cache of converted networks.

FORMAT = 1
"""Of the files. NAME.onnx: the SHA-256 of an ONNX file, and that file. NAME-BACKEND-….json: a `BackendVerdict`."""
TIMED_SECONDS = 0.5
"""That PyTorch should take for the image on which backends are timed."""
TIMED_SIDES = (64, 256)
"""The image's side, at least and at most."""
ROUNDS = 3
_PACKAGES = ("torch", "onnx", "onnxscript")
_PIPELINE = Path(__file__).resolve().parents[1]
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class BackendVerdict:
    """What came out for one network in one backend on this machine."""

    reason: str = ""
    """Why it is not used: it fails, or makes other images than PyTorch; empty: it makes the same."""
    share: float = 0.0
    """Its time, as a share of PyTorch's."""


class ConversionCache:
    """A network as an ONNX file on one device, made when it is first needed.

    Args:
        weights: the file that it comes from.
        saved: what was read of it.
        by_torch: what it is compared with.
        precision: "auto", "fp16" or "fp32"; see `dtype_of`.
    """

    def __init__(self, weights: Path, saved: SavedNetwork, by_torch: TorchBackend, precision: str) -> None:
        self.device = by_torch.device
        self._saved, self._by_torch, self._precision = saved, by_torch, precision
        self._digest = _digest(FORMAT, weights.read_bytes(), saved.name, saved.scale, _code(),
                               *(version(package) for package in _PACKAGES))[:32]
        self._made: dict[bool, bytes] = {}
        self._files: dict[tuple[str, bool], NetworkFile] = {}
        self._compared_with: dict[bool, list[Check]] = {}
        self.is_kept = True
        """Whether the folder could be written."""

    def is_made(self) -> bool:
        """Whether there is an ONNX file already, perhaps a broken one."""
        return self._path(self._is_half()).is_file()

    def verdict(self, kind: BackendKind) -> BackendVerdict | None:
        """The verdict of an earlier time; `None` where there is none, or a broken one."""
        try:
            found = json.loads(self._verdict_path(kind).read_bytes())
            return BackendVerdict(str(found["reason"]), float(found["share"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def judge(self, kind: BackendKind) -> BackendVerdict:
        """Convert, compare with PyTorch at several sizes and batches of photographs, and take the time."""
        try:
            self._load(kind, self._is_half(), is_new=True)
            verdict = BackendVerdict(share=self._share(kind))
        except (UserError, RunError) as error:
            verdict = BackendVerdict(reason=str(error))
        self._keep(self._verdict_path(kind), json.dumps(vars(verdict)).encode())
        return verdict

    def backend(self, kind: BackendKind) -> FileBackend:
        """The network in that backend; FP32 where FP16 overflows, for which it is converted then."""
        network = self._by_torch.network
        return FileBackend(lambda dtype: self._load(kind, dtype == torch.float16), FileFacts(
            network.scale, network.receptive_radius), self.device,
            lambda is_deep: dtype_of(self._precision, self.device, is_deep=is_deep), torch.float32)

    def title(self, kind: BackendKind) -> str:
        """Name and version of the backend."""
        return self._load(kind, self._is_half()).title

    def _load(self, kind: BackendKind, half: bool, *, is_new: bool = False) -> NetworkFile:
        """`UserError` for a network that cannot be converted or loaded, `RunError` for one with other images."""
        if (kind.name, half) not in self._files:
            content = self._kept(half)
            is_new, content = is_new or content is None, content or self._make(half)
            file = kind.load(content, self.device)
            if is_new:
                with quiet():
                    compare(file.title, file, self._checks(half), LIMITS["float", half])
            self._files[kind.name, half] = file
        return self._files[kind.name, half]

    def _share(self, kind: BackendKind) -> float:
        """Its time over PyTorch's, for an image of which PyTorch needs about `TIMED_SECONDS`; in turns, the fastest of
        `ROUNDS`."""
        side = int(np.clip((TIMED_SECONDS / self.seconds_per_pixel) ** 0.5, *TIMED_SIDES)) // 16 * 16
        own, other = _seconds([self.backend(kind), self._by_torch], side, ROUNDS)
        return own / other

    @functools.cached_property
    def seconds_per_pixel(self) -> float:
        """PyTorch's, by a small image, after one that sets up."""
        side = TIMED_SIDES[0]
        return min(_seconds([self._by_torch], side, rounds=1)) / side**2

    def _checks(self, half: bool) -> list[Check]:
        """What PyTorch makes of photographs; computed once for all backends."""
        if half not in self._compared_with:
            self._compared_with[half] = checks(self._by_torch.network, Form(half=half), photographs(None))
        return self._compared_with[half]

    def _kept(self, half: bool) -> bytes | None:
        if half in self._made:
            return self._made[half]
        try:
            content = self._path(half).read_bytes()
        except OSError:
            return None
        digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def _make(self, half: bool) -> bytes:
        content = self._made[half] = convert(self._saved, self._by_torch.network, Form(half=half))
        self._keep(self._path(half), hashlib.sha256(content).digest() + content)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError:  # read-only, or full
            self.is_kept = False

    def _is_half(self) -> bool:
        return dtype_of(self._precision, self.device, is_deep=False) == torch.float16

    def _path(self, half: bool) -> Path:
        """The name changes with whatever could change the file: weights, code, packages."""
        return cache_folder() / f"{self._saved.name}-x{self._saved.scale}-{self._digest}{'-half' if half else ''}.onnx"

    def _verdict_path(self, kind: BackendKind) -> Path:
        """The name changes with whatever could change the verdict: versions, processor, number of threads."""
        where = _digest(kind.version(), self.device.type, _processor(), usable_threads(), torch.get_num_threads())[:8]
        file = self._path(self._is_half())
        return file.with_name(f"{file.stem}-{kind.name}-{where}.json")


def cache_folder() -> Path:
    """Where converted networks are kept: `$XDG_CACHE_HOME` or `~/.cache`, and `vastscale` in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vastscale" / "converted"


def _seconds(backends: Sequence[Backend], side: int, rounds: int) -> list[float]:
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    times: list[list[float]] = [[] for _ in backends]
    for place in range(1 + rounds):
        for backend, taken in zip(backends, times, strict=True):
            start = time.perf_counter()
            backend(image, backend.dtype_for(is_deep=False)).cpu()
            if place:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


@functools.cache
def _code() -> str:
    """A digest of the code that the networks and the conversion consist of."""
    files = [*sorted((_PIPELINE / "models").glob("*.py")), _PIPELINE / "export" / "onnx_file.py",
             _PIPELINE / "images.py"]
    return _digest(*(file.read_bytes() for file in files))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr([hashlib.sha256(part).digest() if isinstance(part, bytes) else part
                                for part in parts]).encode()).hexdigest()


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    except (OSError, StopIteration):  # not Linux
        return platform.processor()


# The choice.

PixelCount = Callable[[int], float]
"""How many LR pixels are to be upscaled with a network of that scale."""

BACKENDS = ("auto", "torch", *FILE_BACKENDS)
FILES = tuple(sorted({suffix for kind in FILE_BACKENDS.values() for suffix in kind.suffixes}))
"""Suffixes of files that hold a whole network, rather than weights."""
EXPORT_SECONDS = 12.0
"""That PyTorch's exporter takes for a network of a million parameters on one core; larger ones take longer."""
CHECKED_PIXELS = sum(batch * height * width for batch, height, width in SIZES)
"""LR pixels that PyTorch and every backend are shown to compare them."""
TIMING_SECONDS = 2 * (1 + ROUNDS) * TIMED_SECONDS
USUAL_SHARE = 0.8
"""Of PyTorch's time, by `benchmarks/inference.py`: the fastest backend takes 0.65 to 1 for networks of this project."""


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
    """Whether it is a file for a backend, rather than weights or a run folder (`None`: the newest)."""
    return model is not None and model.suffix.lower() in FILES and not model.is_dir()


def choose_backend(model: Path | None, asked: str, device: torch.device, precision: str, work: PixelCount) -> Chosen:
    """`asked` is one of `BACKENDS`; `model` as the command line has it: weights, a run folder, or a network file.

    `UserError` for what cannot be had. A conversion that takes long, as all do, is reported on stdout.
    """
    if is_network_file(model):
        return _of_file(model, asked, device, precision)
    chosen = choose_model(model)
    by_torch = TorchBackend(chosen.saved.build(), device, precision)
    if asked in FILE_BACKENDS:
        kind = FILE_BACKENDS[asked]
        _refuse_missing(kind, to_convert=True)
        return _by_file_backend(chosen, by_torch, kind, precision)
    if asked == "torch" or device.type != "cpu" or precision == "fp16":
        return _by_torch(chosen, by_torch)
    return _fastest(chosen, by_torch, precision, work)


def _refuse_missing(kind: BackendKind, *, to_convert: bool) -> None:
    if missing := kind.missing(to_convert=to_convert):
        raise UserError(f"--backend {kind.name} needs a package that is not installed; do: pip install {missing}, or "
                        "leave --backend out")


def _by_torch(chosen: Model, by_torch: TorchBackend, why: str = "") -> Chosen:
    title = f"{by_torch.device} by PyTorch {'.'.join(torch.__version__.split('.')[:2])}"
    return Chosen(chosen.file, f"{chosen.saved.name} x{by_torch.scale}", by_torch, f"{title}{why and f' ({why})'}")


def _by_file_backend(chosen: Model, by_torch: TorchBackend, kind: BackendKind, precision: str) -> Chosen:
    """As asked for. `UserError` where it cannot be converted, or does not make PyTorch's images."""
    conversion = ConversionCache(chosen.file, chosen.saved, by_torch, precision)
    verdict = conversion.verdict(kind)
    if verdict is None or verdict.reason:
        _announce(chosen, [kind])
        verdict = conversion.judge(kind)
    if verdict.reason:
        raise UserError(f"--backend {kind.name} cannot be used: {verdict.reason}; leave --backend out")
    return _by_conversion(conversion, kind, chosen, "")


def _fastest(chosen: Model, by_torch: TorchBackend, precision: str, work: PixelCount) -> Chosen:
    """What takes the least time, as measured on this machine, if finding out is worth it."""
    kinds = [kind for kind in FILE_BACKENDS.values() if not kind.missing(to_convert=True)]
    if not kinds:
        lacking = dict.fromkeys(kind.missing(to_convert=True) for kind in FILE_BACKENDS.values())
        return _by_torch(chosen, by_torch, f"other back-ends need {' or '.join(lacking)}, not installed")
    conversion = ConversionCache(chosen.file, chosen.saved, by_torch, precision)
    verdicts = {kind: conversion.verdict(kind) for kind in kinds}
    unknown = [kind for kind, verdict in verdicts.items() if verdict is None]
    if unknown and _is_worth_it(conversion, by_torch, unknown, work):
        _announce(chosen, unknown)
        verdicts |= {kind: conversion.judge(kind) for kind in unknown}
        unknown = []
    good = {kind: verdict.share for kind, verdict in verdicts.items() if verdict and not verdict.reason}
    if good and (best := min(good, key=good.__getitem__)) and good[best] < 1:
        return _by_conversion(conversion, best, chosen, f", {1 / good[best]:.1f} times as fast as PyTorch")
    if unknown:
        return _by_torch(chosen, by_torch, f"{_titles(unknown)}: conversion would take longer than it saves")
    if good:
        return _by_torch(chosen, by_torch, f"{_titles(list(good))} measured slower here")
    return _by_torch(chosen, by_torch, "; ".join(dict.fromkeys(
        verdict.reason for verdict in verdicts.values() if verdict)))


def _is_worth_it(conversion: ConversionCache, by_torch: TorchBackend, kinds: Sequence[BackendKind],
                 work: PixelCount) -> bool:
    """Whether the work takes PyTorch so long that even the slowest of usual gains is more than the conversion costs."""
    seconds = conversion.seconds_per_pixel
    params = sum(parameter.numel() for parameter in by_torch.network.parameters())
    export = 0.0 if conversion.is_made() else EXPORT_SECONDS * max(1.0, params / 1e6) ** 0.5
    judging = (1 + len(kinds)) * CHECKED_PIXELS * seconds + len(kinds) * TIMING_SECONDS
    return work(by_torch.scale) * seconds * (1 - USUAL_SHARE) > export + judging


def _announce(chosen: Model, kinds: Sequence[BackendKind]) -> None:
    print(f"converting {short_path(chosen.file)} for {_titles(kinds)}, comparing and timing it against PyTorch ...",
          flush=True)


def _titles(kinds: Sequence[BackendKind]) -> str:
    return " and ".join(kind.title for kind in kinds)


def _by_conversion(conversion: ConversionCache, kind: BackendKind, chosen: Model, why: str) -> Chosen:
    backend = conversion.backend(kind)
    folder = short_path(cache_folder())
    where = f"kept in {folder}" if conversion.is_kept else f"for this time only: {folder} cannot be written"
    return Chosen(chosen.file, f"{chosen.saved.name} x{backend.scale}", backend,
                  f"{conversion.device} by {conversion.title(kind)} (converted, {where}{why})")


def _of_file(path: Path, asked: str, device: torch.device, precision: str) -> Chosen:
    """A network in a file of its own, by a backend that reads it."""
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


def _kind_for(path: Path, asked: str, device: torch.device) -> BackendKind:
    suffix = path.suffix.lower()
    kinds = [kind for kind in FILE_BACKENDS.values() if suffix in kind.suffixes]
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
    _refuse_missing(FILE_BACKENDS[asked], to_convert=False)
    return FILE_BACKENDS[asked]


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
    """The device of that name; "auto" is the GPU where there is one. `UserError` for one that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch_gpus() else "cpu")
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
        raise UserError(f"--device {device} for {place.world_size} processes; leave --device out for one GPU "
                        "per process")
    count = torch_gpus() if device != "cpu" else 0
    if not count:
        return choose_device(device)
    own = torch.device("cuda", gpu_of(place, count))
    torch.cuda.set_device(own)
    return own
