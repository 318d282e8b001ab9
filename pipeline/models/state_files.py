"""State dicts in files: .safetensors and what torch.save writes, read without running anything, and made plain.

Nothing in a file is ever executed: .safetensors cannot hold code, and the others are read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pipeline.cli import UserError, nearest

# Where the field's training codes keep a state dict within a .pth file, the one to prefer first.
STATE_KEYS = ("params_ema", "params-ema", "ema_state_dict", "state_dict_ema", "model_ema", "params", "state_dict",
              "model_state_dict", "generator_state_dict", "model", "generator", "netG", "net_g", "net", "module")
PICKLED_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)
# What stands before a generator's names in the state dict of a whole GAN…
GENERATOR_PREFIXES = ("generator", "netG", "net_g")
# …and before every name where a network was saved from within DataParallel or Lightning.
WRAPPERS = ("module", "_forward_module", *GENERATOR_PREFIXES)
# As WRAPPERS, but some networks' own names begin so, with a number behind.
ATTRIBUTES = ("model", "net", "network")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def read_state(path: Path, weights: str, metadata_key: str) -> tuple[dict[str, Tensor], str | None]:
    """The state dict named `weights` ("auto": see `weights.read_network`) and the text under `metadata_key`, if any.

    Tensors are dense numbers of `FLOATS` or `INTEGERS` on the CPU, their names without what wrappers add. `UserError`
    for what is missing, unreadable, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}" + (": it is a folder" if path.is_dir() else ""))
    if path.suffix.lower() == ".safetensors":
        tensors, description = _read_safetensors(path, weights, metadata_key)
    elif path.suffix.lower() in PICKLED_SUFFIXES:
        tensors, description = _read_pickled(path, weights, metadata_key)
    else:
        raise UserError(f"weights file {str(path)!r} is none of {', '.join(SUFFIXES)}")
    tensors = _strip_wrappers(tensors)
    _check_kinds(path, tensors)
    return tensors, description


def _read_safetensors(path: Path, weights: str, metadata_key: str) -> tuple[dict[str, Tensor], str | None]:
    if weights != "auto":
        raise UserError(f"{str(path)!r} holds one set of weights; leave out weights {weights!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            # Cloned, because the tensors of an open file are a window into it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable .safetensors file ({error}); is it cut short?") from error
    return tensors, metadata.get(metadata_key)


def _read_pickled(path: Path, weights: str, metadata_key: str) -> tuple[dict[str, Tensor], str | None]:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), flags=re.IGNORECASE)
        if code:
            raise UserError(f"{str(path)!r} holds pickled code besides tensors ({code[1]}), which is never run here; "
                            "save its state dict alone") from error
        raise UserError(f"{str(path)!r} is not a readable PyTorch file; is it cut short?") from error
    except PermissionError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    except Exception as error:  # of a broken file torch.load raises nearly anything: RuntimeError, EOFError, KeyError…
        raise UserError(f"{str(path)!r} is not a readable PyTorch file ({type(error).__name__}); "
                        "is it cut short?") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a state dict")
    description = content.get(metadata_key)
    return _choose_state(path, content, weights), description if isinstance(description, str) else None


def _check_archive(path: Path) -> None:
    """Refuse what torch does not: an archive with a byte changed, and one that holds a program."""
    try:
        if not zipfile.is_zipfile(path):
            return  # torch.load tells what is wrong, or it is of before PyTorch 1.6, without checksums
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(f"{str(path)!r} is a TorchScript program, which is never run here; save its "
                                "state_dict() instead: torch.save(torch.jit.load(FILE).state_dict(), ...)")
            damaged = archive.testzip()
    except PermissionError:
        return  # torch.load says so
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} is not a readable PyTorch file ({error}); is it damaged?") from error
    if damaged is not None:
        raise UserError(f"{str(path)!r} is damaged: the checksum of its {damaged} is wrong; copy or download it again")


def _check_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no plain numbers on the CPU, which would be cast without a word or fail far from here."""
    for name, tensor in tensors.items():
        kind = ("quantised" if tensor.is_quantized else "sparse" if tensor.layout != torch.strided else
                "without values (meta)" if tensor.device.type != "cpu" else
                "" if tensor.dtype in FLOATS + INTEGERS else str(tensor.dtype))
        if kind:
            raise UserError(f"{str(path)!r}: tensor {name!r} is {kind}; weights must be one of {listed(FLOATS)}, dense")


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _choose_state(path: Path, content: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """The state dict named `weights` within `content`, or for "auto" the preferred one or `content` itself."""
    held = {key: value for key, value in content.items() if _is_state_dict(value)}
    if weights != "auto":
        if weights not in held:
            raise UserError(f"{str(path)!r} holds no weights {weights!r}"
                            + (nearest(weights, held) if held else "; it is one state dict: leave that out"))
        return dict(held[weights])
    for key in STATE_KEYS:
        if key in held:
            return dict(held[key])
    if _is_state_dict(content):
        return dict(content)
    if len(held) == 1:
        return dict(next(iter(held.values())))
    raise UserError(f"{str(path)!r} holds no state dict; found {', '.join(map(str, list(content)[:5])) or 'nothing'}")


def _is_state_dict(value: Any) -> bool:
    return (isinstance(value, Mapping) and len(value) > 0
            and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()))


def _strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers have added to the names, and what does not belong to the generator."""
    tensors = {".".join(part for part in key.split(".") if part != "_orig_mod"): tensor
               for key, tensor in tensors.items()}
    first = {key.split(".")[0] for key in tensors}
    numbered = any(key.split(".")[1].isdecimal() for key in tensors if "." in key)
    for wrapper in WRAPPERS if numbered else (*WRAPPERS, *ATTRIBUTES):
        if first == {wrapper} or (wrapper in first and wrapper in GENERATOR_PREFIXES):
            return _strip_wrappers({key.removeprefix(f"{wrapper}."): tensor for key, tensor in tensors.items()
                                    if key.startswith(f"{wrapper}.")})
    return tensors
