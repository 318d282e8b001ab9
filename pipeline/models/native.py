"""Our own C++ (`depthwise.cpp`), compiled for this processor on first use, kept, and called by
ctypes.

A compiler takes about a second for it. The library lies where torch and DeepSpeed keep what they
compile (TORCH_EXTENSIONS_DIR, or the user's cache), in a folder named after the source, the
compiler, torch and the processor. The first process builds it, others that want it wait, and it
appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("depthwise.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
COMPILERS = ("g++", "c++")
KERNEL_SIZES = (3, 5)
LONGEST_BUILD = 120  # seconds
TOLERANCE = 1e-4
"""Of the check after loading: the largest difference to PyTorch in parts of the largest value."""


class NotBuiltError(Exception):
    """There is no native kernel here. The message says why, in a few words."""


@functools.cache
def why_not_native() -> str:
    """Empty if the native kernel works here, else the reason; builds it where that was never
    done."""
    try:
        _check(_library())
    except NotBuiltError as error:
        return str(error)
    return ""


def forward(images: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise convolution that keeps the size: float32 (N, C, H, W) on the CPU -> the same, both
    channels_last.

    `weight`: (C, 1, K, K) with K 3 or 5. `MemoryError` where the memory does not suffice.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty_like(images, memory_format=torch.channels_last)
    _call("depthwise_forward", (images, weight, bias, out), images, weight, dilation)
    return out


def backward(
    images: Tensor,
    gradient: Tensor,
    weight: Tensor,
    dilation: int,
    *,
    wants_images: bool = True,
    wants_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a loss by images, weight and bias, where its gradient by the output is
    `gradient` (N, C, H, W)."""
    images = images.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    to_images = (
        torch.empty_like(images, memory_format=torch.channels_last) if wants_images else None
    )
    to_weight = torch.zeros_like(weight) if wants_weight else None
    to_bias = weight.new_zeros(weight.shape[0]) if wants_weight else None
    _call(
        "depthwise_backward",
        (images, gradient, weight, to_images, to_weight, to_bias),
        images,
        weight,
        dilation,
    )
    return to_images, to_weight, to_bias


def _call(
    function: str, tensors: tuple[Tensor | None, ...], images: Tensor, weight: Tensor, dilation: int
) -> None:
    number, channels, height, width = images.shape
    if not images.numel():
        return
    pointers = [
        ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors
    ]
    sizes = [
        ctypes.c_int64(size)
        for size in (number, height, width, channels, weight.shape[-1], dilation)
    ]
    if getattr(_library(), function)(*pointers, *sizes, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"no memory for a depthwise convolution of {tuple(images.shape)}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled library; `NotBuiltError` where there is none."""
    compiler = next(
        (
            path
            for name in (os.environ.get("CXX", ""), *COMPILERS)
            if name and (path := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        raise NotBuiltError("there is no C++ compiler (Debian: apt install g++)")
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        lines = [
            line for line in error.stderr.splitlines() if "error" in line
        ] or error.stderr.splitlines()
        raise NotBuiltError(
            f"{compiler} could not compile it: {' '.join(lines[:1])[:200]}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:  # the linker's message, or the disk's
        raise NotBuiltError(" ".join(str(error).split())[:200]) from error


def _built(compiler: str) -> Path:
    """The library's file, built if need be, by one process while the others wait."""
    identity = "\n".join(
        (
            SOURCE.read_text(encoding="utf-8"),
            *FLAGS,
            compiler,
            _first_line(compiler),
            version("torch"),
            _processor(),
        )
    )
    folder = _cache() / f"vastscale-depthwise-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    library = folder / "depthwise.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(
        folder / ".building", "w"
    ) as guard:  # a lock of the system: it ends with the process that holds it
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _compile(compiler, Path(scratch)).replace(library)
    return library


def _compile(compiler: str, scratch: Path) -> Path:
    """Compile into `scratch`. The OpenMP functions are those of torch's own library, so that there
    is one thread pool.

    Hence the linker is not told of OpenMP, but of libtorch_cpu, whose dependencies the loader then
    searches.
    """
    libraries = Path(torch.__file__).parent / "lib"
    compiled, library = scratch / "depthwise.o", scratch / "depthwise.so"
    link = (
        "-shared",
        "-Wl,--no-as-needed",
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",
        "-ltorch_cpu",
        "-lc10",
    )
    for command in (
        (compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)),
        (compiler, str(compiled), *link, "-o", str(library)),
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
    return library


def _cache() -> Path:
    """Where compiled things are kept: as `launch.environment` says, or the user's cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vastscale"
    )


def _first_line(compiler: str) -> str:
    """Of what the compiler says of its version."""
    return subprocess.run(
        (compiler, "--version"), check=True, capture_output=True, text=True, timeout=10
    ).stdout.partition("\n")[0]


def _processor() -> str:
    """What `-march=native` goes by: the architecture, and model and abilities of the first
    processor."""
    try:
        first = (
            Path("/proc/cpuinfo")
            .read_text(encoding="utf-8", errors="replace")
            .split("\n\n")[0]
            .splitlines()
        )
    except OSError:
        first = [platform.processor()]
    kept = (
        "model name",
        "cpu family",
        "model\t",
        "flags",
        "Features",
        "CPU part",
        "CPU implementer",
    )
    return "\n".join([platform.machine(), *(line for line in first if line.startswith(kept))])


def _check(library: ctypes.CDLL) -> None:
    """`NotBuiltError` unless it computes what PyTorch computes: a compiler may be broken."""
    del library  # loaded, which is what can fail
    generator = torch.Generator().manual_seed(0)
    images, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((2, 19, 9, 11), (19, 1, 5, 5), (19,))
    )
    ours = forward(images, weight, bias, 2)
    theirs = F.conv2d(images, weight, bias, padding=4, dilation=2, groups=19)
    gradients = backward(images, theirs, weight, 2)
    to_images = F.conv_transpose2d(theirs, weight, padding=4, dilation=2, groups=19)
    to_weight = torch.nn.grad.conv2d_weight(
        images, weight.shape, theirs, padding=4, dilation=2, groups=19
    )
    pairs = zip(
        (ours, *gradients), (theirs, to_images, to_weight, theirs.sum(dim=(0, 2, 3))), strict=True
    )
    if not all(
        (one - other).abs().max() <= TOLERANCE * other.abs().max()
        for one, other in pairs
        if one is not None
    ):
        raise NotBuiltError("compiled, it computes something else than PyTorch")
