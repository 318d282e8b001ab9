"""Build and call our C++ kernel (`depthwise.cpp`), compiled for this processor on first use.

Compiling takes about a second. The library is stored where torch and DeepSpeed keep compiled
extensions (TORCH_EXTENSIONS_DIR, or the user's cache), in a folder named after the source, the
compiler, torch and the processor. The first process builds it while others wait, and the file is
moved into place only when complete. It is called through ctypes.
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

from pipeline.installation import user_cache_dir

SOURCE = Path(__file__).with_name("depthwise.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
COMPILERS = ("g++", "c++")
KERNEL_SIZES = (3, 5)
BUILD_TIMEOUT = 120  # seconds
TOLERANCE = 1e-4
"""For the check after loading: largest difference from PyTorch, relative to the largest value."""


class NotBuiltError(Exception):
    """The native kernel is not available; the message is a short reason."""


@functools.cache
def why_not_native() -> str:
    """Return why the native kernel does not work here, or "" if it does; builds it if needed."""
    try:
        _check(_library())
    except NotBuiltError as error:
        return str(error)
    return ""


def forward(images: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise convolution that keeps the size, of float32 (N, C, H, W) on the CPU.

    Input is converted to channels_last, and the output is channels_last. `weight` is (C, 1, K, K)
    with K 3 or 5. Raises `MemoryError` if memory runs out.
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
    needs_images: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients with respect to images, weight and bias.

    `gradient` (N, C, H, W) is the gradient with respect to the output. Gradients that are not
    wanted are `None`.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    to_images = (
        torch.empty_like(images, memory_format=torch.channels_last) if needs_images else None
    )
    to_weight = torch.zeros_like(weight) if needs_weight else None
    to_bias = weight.new_zeros(weight.shape[0]) if needs_weight else None
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
    """Return the compiled library; raise `NotBuiltError` if there is none."""
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
            f"{compiler} failed to compile the kernel: {' '.join(lines[:1])[:200]}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:  # errors of the linker or the disk
        raise NotBuiltError(" ".join(str(error).split())[:200]) from error


def _built(compiler: str) -> Path:
    """Return the library's path; one process builds it if necessary, while others wait."""
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
    # The operating system releases this lock when its process ends.
    with open(folder / ".building", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _compile(compiler, Path(scratch)).replace(library)
    return library


def _compile(compiler: str, scratch: Path) -> Path:
    """Compile into `scratch` and return the library's path.

    OpenMP functions must come from torch's own library, so that there is a single thread pool. The
    linker is therefore not given OpenMP but libtorch_cpu, whose dependencies the loader then
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
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT)
    return library


def _cache() -> Path:
    """Return the folder for compiled files: TORCH_EXTENSIONS_DIR, or one in the user's cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else user_cache_dir()


def _first_line(compiler: str) -> str:
    """Return the first line of the compiler's version output."""
    return subprocess.run(
        (compiler, "--version"), check=True, capture_output=True, text=True, timeout=10
    ).stdout.partition("\n")[0]


def _processor() -> str:
    """Return what `-march=native` depends on: architecture, model and features of the processor."""
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
    """Raise `NotBuiltError` unless the kernel agrees with PyTorch: compilers can be broken."""
    del library  # only loading could fail
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
        raise NotBuiltError("the compiled kernel's results differ from PyTorch's")
