"""Networks converted for other runtimes, compared and timed against PyTorch, and kept in a folder of the user's."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from pipeline.cli import RunError, UserError
from pipeline.export.onnx_file import Form, convert, quiet
from pipeline.export.parity import LIMITS, Check, checks, compare, photographs
from pipeline.export.runtimes import NetworkFile, RuntimeKind, usable_threads
from pipeline.files import write_atomically
from pipeline.inference.backends import Backend, dtype_of
from pipeline.inference.file_backend import Facts, FileBackend
from pipeline.inference.torch_backend import TorchBackend
from pipeline.models.weights import SavedNetwork

FORMAT = 1
"""Of the files. NAME.onnx: the SHA-256 of an ONNX file, and that file. NAME-RUNTIME-….json: a `Verdict`."""
TIMED_SECONDS = 0.5
"""That PyTorch should take for the image on which runtimes are timed."""
TIMED_SIDES = (64, 256)
"""The image's side, at least and at most."""
ROUNDS = 3
_PACKAGES = ("torch", "onnx", "onnxscript")
_PIPELINE = Path(__file__).resolve().parents[1]
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Verdict:
    """What came out for one network in one runtime on this machine."""

    reason: str = ""
    """Why it is not used: it fails, or makes other images than PyTorch; empty: it makes the same."""
    share: float = 0.0
    """Its time, as a share of PyTorch's."""


class Conversion:
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

    def verdict(self, kind: RuntimeKind) -> Verdict | None:
        """That of an earlier time; `None` where there is none, or a broken one."""
        try:
            found = json.loads(self._verdict_path(kind).read_bytes())
            return Verdict(str(found["reason"]), float(found["share"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def judge(self, kind: RuntimeKind) -> Verdict:
        """Convert, compare with PyTorch at several sizes and batches of photographs, and take the time."""
        try:
            self._load(kind, self._is_half(), is_new=True)
            verdict = Verdict(share=self._share(kind))
        except (UserError, RunError) as error:
            verdict = Verdict(reason=str(error))
        self._keep(self._verdict_path(kind), json.dumps(vars(verdict)).encode())
        return verdict

    def backend(self, kind: RuntimeKind) -> FileBackend:
        """The network in that runtime; FP32 where FP16 overflows, for which it is converted then."""
        network = self._by_torch.network
        return FileBackend(lambda dtype: self._load(kind, dtype == torch.float16), Facts(
            network.scale, network.receptive_radius), self.device,
            lambda is_deep: dtype_of(self._precision, self.device, is_deep=is_deep), torch.float32)

    def title(self, kind: RuntimeKind) -> str:
        """Name and version of the runtime."""
        return self._load(kind, self._is_half()).title

    def _load(self, kind: RuntimeKind, half: bool, *, is_new: bool = False) -> NetworkFile:
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

    def _share(self, kind: RuntimeKind) -> float:
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
        """What PyTorch makes of photographs; computed once for all runtimes."""
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

    def _verdict_path(self, kind: RuntimeKind) -> Path:
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
