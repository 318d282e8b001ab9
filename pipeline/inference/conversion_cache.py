"""A cache of networks converted for other backends, compared with and timed against PyTorch.

Entries are found by the weights file alone: torch is imported only to read, convert, compare and
time a network.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cli import RunError, UserError
from pipeline.export.network_files import BackendKind, NetworkFile, usable_threads
from pipeline.inference.backends import Backend, FileBackend, FileFacts, precision_of
from pipeline.inference.devices import Device
from pipeline.inference.measurements import Measurements, cache_folder, digest, keep
from pipeline.timing import fastest_seconds

if TYPE_CHECKING:
    from pipeline.export.parity import Check
    from pipeline.inference.torch_backend import TorchBackend
    from pipeline.models.weights import SavedNetwork

FORMAT = 2
"""Version of the cache's files. DIGEST.onnx is the SHA-256 of an ONNX file, followed by that file;
for DIGEST.json see `Measurements`."""
TIMED_SECONDS = 0.5
"""Time that PyTorch should take for the image on which backends are timed."""
TIMED_SIDES = (64, 256)
"""Smallest and largest side of that image, in pixels."""
ROUNDS = 3
_PACKAGES = ("torch", "onnx", "onnxscript", "spandrel")
_PIPELINE = Path(__file__).resolve().parents[1]
_DIGEST_BYTES = 32


class Original:
    """A network's weights file, which torch reads when the network is first needed.

    Args:
        file: the weights.
        device: the device that the network runs on.
        precision: "auto", "fp32", "fp16" or "bf16"; see `precision_of`.
        compiles: see `TorchBackend`.
    """

    def __init__(
        self, file: Path, device: Device, precision: str, *, compiles: bool = False
    ) -> None:
        self.file, self.device, self.precision, self._compiles = file, device, precision, compiles

    @functools.cached_property
    def measured(self) -> Measurements:
        """What is known about the network; `UserError` if the file cannot be read."""
        return Measurements(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of everything that determines the network: weights, code and packages.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            content = self.file.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"the weights file {str(self.file)!r} does not exist") from error
        except OSError as error:
            raise UserError(f"{str(self.file)!r} cannot be read ({error.strerror})") from error
        return digest(FORMAT, content, _code(), *map(_version, _PACKAGES))[:32]

    @functools.cached_property
    def saved(self) -> SavedNetwork:
        """The network as stored in the file."""
        from pipeline.models.weights import read_network

        return read_network(self.file)

    @functools.cached_property
    def backend(self) -> TorchBackend:
        """The network in PyTorch."""
        from pipeline.inference.torch_backend import TorchBackend

        return TorchBackend(
            self.saved.build(), self.device, self.precision, compiles=self._compiles
        )

    def facts(self) -> tuple[str, int, int, int]:
        """Return name, scale, receptive radius and grid (in LR pixels) of the network."""
        try:
            name, scale, radius, grid = self.measured.get("network")
            return str(name), int(scale), int(radius), int(grid)
        except (TypeError, ValueError):  # unknown so far, of an earlier version, or broken
            backend = self.backend
            found = (self.saved.name, backend.scale, backend.halo, backend.grid)
            self.measured.put("network", found)
            return found


@dataclass(frozen=True)
class BackendVerdict:
    """The result of trying one network in one backend on this machine."""

    reason: str = ""
    """Why it cannot be used: it fails, or its images differ from PyTorch's. Empty: it works."""
    share: float = 0.0
    """The backend's time as a share of PyTorch's."""


class ConversionCache:
    """A network as an ONNX file on one device, converted when it is first needed."""

    def __init__(self, original: Original) -> None:
        self.original, self.device = original, original.device
        self._made: dict[bool, bytes] = {}
        self._files: dict[tuple[str, bool], NetworkFile] = {}
        self._compared_with: dict[bool, list[Check]] = {}
        self.is_kept = True
        """Whether the cache folder is writable."""

    def is_made(self) -> bool:
        """Whether there is already an ONNX file, which may be broken."""
        return self._path(self._is_half()).is_file()

    def verdict(self, kind: BackendKind) -> BackendVerdict | None:
        """Return the verdict of an earlier run; `None` if there is none, or it is broken."""
        try:
            found = self.original.measured.get(self._verdict_name(kind))
            return BackendVerdict(str(found["reason"]), float(found["share"]))
        except (ValueError, KeyError, TypeError):
            return None

    def keep_verdict(self, kind: BackendKind, verdict: BackendVerdict) -> None:
        """Keep the verdict for later runs."""
        self.original.measured.put(self._verdict_name(kind), vars(verdict))

    def judge(self, kind: BackendKind) -> BackendVerdict:
        """Convert, compare with PyTorch on photographs in several sizes and batches; time it."""
        try:
            self._load(kind, self._is_half(), is_new=True)
            verdict = BackendVerdict(share=self._share(kind))
        except (UserError, RunError) as error:
            verdict = BackendVerdict(reason=str(error))
        self.keep_verdict(kind, verdict)
        return verdict

    def backend(self, kind: BackendKind) -> FileBackend:
        """Return the network in a backend. If FP16 overflows, it is also converted for FP32."""
        _, scale, radius, grid = self.original.facts()
        return FileBackend(
            lambda precision: self._load(kind, precision == "fp16"),
            FileFacts(scale, radius, grid=grid),
            self.device,
            lambda is_deep: precision_of(self.original.precision, self.device, is_deep=is_deep),
            "fp32",
            self.original.measured,
        )

    def title(self, kind: BackendKind) -> str:
        """Return name and version of the backend."""
        return self._load(kind, self._is_half()).title

    def _load(self, kind: BackendKind, half: bool, *, is_new: bool = False) -> NetworkFile:
        """Load the network in a backend; convert it and compare it with PyTorch if it is new.

        Raises:
            UserError: the network cannot be converted or loaded.
            RunError: its images differ from PyTorch's.
        """
        if (kind.name, half) not in self._files:
            content = self._kept(half)
            is_new, content = is_new or content is None, content or self._make(half)
            file = kind.load(content, self.device)
            if is_new:
                self._compare(file, half)
            self._files[kind.name, half] = file
        return self._files[kind.name, half]

    def _compare(self, file: NetworkFile, half: bool) -> None:
        """Compare a backend with PyTorch, whose results are computed once for all backends."""
        from pipeline.export.onnx_file import Form, quiet
        from pipeline.export.parity import LIMITS, checks, compare, photographs

        if half not in self._compared_with:
            self._compared_with[half] = checks(
                self.original.backend.network, Form(half=half), photographs(None)
            )
        with quiet():
            compare(file.title, file, self._compared_with[half], LIMITS["float", half])

    def _share(self, kind: BackendKind) -> float:
        """Return the backend's time divided by PyTorch's.

        Both take turns on an image that takes PyTorch about `TIMED_SECONDS`; the fastest of
        `ROUNDS` counts.
        """
        side = (
            int(np.clip((TIMED_SECONDS / self.seconds_per_pixel) ** 0.5, *TIMED_SIDES)) // 16 * 16
        )
        own, other = fastest_seconds(
            [upscaling(self.backend(kind), side), upscaling(self.original.backend, side)], ROUNDS
        )
        return own / other

    @functools.cached_property
    def seconds_per_pixel(self) -> float:
        """PyTorch's time per LR pixel, measured on a small image after a warm-up."""
        side = TIMED_SIDES[0]
        return fastest_seconds([upscaling(self.original.backend, side)], rounds=1)[0] / side**2

    def _kept(self, half: bool) -> bytes | None:
        if half in self._made:
            return self._made[half]
        try:
            content = self._path(half).read_bytes()
        except OSError:
            return None
        expected, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != expected:
            return None
        self._made[half] = content
        return content

    def _make(self, half: bool) -> bytes:
        from pipeline.export.onnx_file import Form, convert

        content = self._made[half] = convert(
            self.original.saved, self.original.backend.network, Form(half=half)
        )
        self.is_kept = keep(self._path(half), hashlib.sha256(content).digest() + content)
        return content

    def _is_half(self) -> bool:
        return precision_of(self.original.precision, self.device, is_deep=False) == "fp16"

    def _path(self, half: bool) -> Path:
        return cache_folder() / f"{self.original.digest}{'-half' if half else ''}.onnx"

    def _verdict_name(self, kind: BackendKind) -> str:
        """Name a verdict by everything that may change it: versions, processor, threads."""
        where = (self.device.type, _processor(), f"{usable_threads()} threads")
        return ", ".join(
            (f"verdict on {kind.version()}{' in FP16' if self._is_half() else ''}", *where)
        )


def upscaling(backend: Backend, side: int) -> Callable[[], object]:
    """Return a function that upscales one image of `side` x `side` to its pixels."""
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    return lambda: backend.start(image, backend.precision_for(is_deep=False), np.dtype(np.uint8))()


@functools.cache
def _code() -> str:
    """Digest the code of the networks and of the conversion."""
    files = [
        *sorted((_PIPELINE / "models").glob("*.py")),
        _PIPELINE / "export" / "onnx_file.py",
        _PIPELINE / "images.py",
    ]
    return digest(*(file.read_bytes() for file in files))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip()
            for line in lines
            if line.startswith(("model name", "CPU part"))
        )
    except (OSError, StopIteration):  # not Linux
        return platform.processor()
