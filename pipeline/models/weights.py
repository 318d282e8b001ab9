"""Weights in files: read ours and foreign ones, know a network from its tensors alone, write them
whole or not at all.

Nothing in a file is ever executed: .safetensors cannot hold code, and .pth is read with
`weights_only=True`. A network's class says which tensors are its own: `recognise` knows them by
names and shapes, `convert` renames those of another project's layout. What no class knows is left
to spandrel.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.cli import UserError, nearest
from pipeline.files import write_atomically, write_pieces_atomically
from pipeline.models import GENERATORS, build_generator, spandrel

# State dicts in files: .safetensors and what torch.save writes, read without running anything, and
# made plain.
#
# Nothing in a file is ever executed: .safetensors cannot hold code, and the others are read with
# `weights_only=True`.


# Where the field's training codes keep a state dict within a .pth file, the one to prefer first.
STATE_KEYS = (
    "params_ema",
    "params-ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "params",
    "state_dict",
    "model_state_dict",
    "generator_state_dict",
    "model",
    "generator",
    "netG",
    "net_g",
    "net",
    "module",
)
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
    """The state dict named `weights` ("auto": see `weights.read_network`) and the text under
    `metadata_key`, if any.

    Tensors are dense numbers of `FLOATS` or `INTEGERS` on the CPU, their names without what
    wrappers add. `UserError` for what is missing, unreadable, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(
            f"no weights file {str(path)!r}" + (": it is a folder" if path.is_dir() else "")
        )
    if path.suffix.lower() == ".safetensors":
        tensors, description = _read_safetensors(path, weights, metadata_key)
    elif path.suffix.lower() in PICKLED_SUFFIXES:
        tensors, description = _read_pickled(path, weights, metadata_key)
    else:
        raise UserError(f"weights file {str(path)!r} is none of {', '.join(SUFFIXES)}")
    tensors = _strip_wrappers(tensors)
    _check_kinds(path, tensors)
    return tensors, description


def _read_safetensors(
    path: Path, weights: str, metadata_key: str
) -> tuple[dict[str, Tensor], str | None]:
    if weights != "auto":
        raise UserError(f"{str(path)!r} holds one set of weights; leave out weights {weights!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            # Cloned, because the tensors of an open file are a window into it.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is not a readable .safetensors file ({error}); is it cut short?"
        ) from error
    return tensors, metadata.get(metadata_key)


def _read_pickled(
    path: Path, weights: str, metadata_key: str
) -> tuple[dict[str, Tensor], str | None]:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), flags=re.IGNORECASE)
        if code:
            raise UserError(
                f"{str(path)!r} holds pickled code besides tensors ({code[1]}), which is never run "
                "here; "
                "save its state dict alone"
            ) from error
        raise UserError(
            f"{str(path)!r} is not a readable PyTorch file; is it cut short?"
        ) from error
    except PermissionError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    # of a broken file torch.load raises nearly anything: RuntimeError, EOFError, KeyError…
    except Exception as error:
        raise UserError(
            f"{str(path)!r} is not a readable PyTorch file ({type(error).__name__}); "
            "is it cut short?"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a state dict")
    description = content.get(metadata_key)
    return _choose_state(path, content, weights), description if isinstance(
        description, str
    ) else None


def _check_archive(path: Path) -> None:
    """Refuse what torch does not: an archive with a byte changed, and one that holds a program."""
    try:
        if not zipfile.is_zipfile(path):
            # torch.load tells what is wrong, or it is of before PyTorch 1.6, without checksums
            return
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"{str(path)!r} is a TorchScript program, which is never run here; save its "
                    "state_dict() instead: torch.save(torch.jit.load(FILE).state_dict(), ...)"
                )
            damaged = archive.testzip()
    except PermissionError:
        return  # torch.load says so
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"{str(path)!r} is not a readable PyTorch file ({error}); is it damaged?"
        ) from error
    if damaged is not None:
        raise UserError(
            f"{str(path)!r} is damaged: the checksum of its {damaged} is wrong; copy or download "
            "it again"
        )


def _check_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no plain numbers on the CPU, which would be cast without a word or
    fail far from here."""
    for name, tensor in tensors.items():
        kind = (
            "quantised"
            if tensor.is_quantized
            else "sparse"
            if tensor.layout != torch.strided
            else "without values (meta)"
            if tensor.device.type != "cpu"
            else ""
            if tensor.dtype in FLOATS + INTEGERS
            else str(tensor.dtype)
        )
        if kind:
            raise UserError(
                f"{str(path)!r}: tensor {name!r} is {kind}; weights must be one of "
                f"{listed(FLOATS)}, dense"
            )


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _choose_state(path: Path, content: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """The state dict named `weights` within `content`, or for "auto" the preferred one or `content`
    itself."""
    held = {key: value for key, value in content.items() if _is_state_dict(value)}
    if weights != "auto":
        if weights not in held:
            raise UserError(
                f"{str(path)!r} holds no weights {weights!r}"
                + (nearest(weights, held) if held else "; it is one state dict: leave that out")
            )
        return dict(held[weights])
    for key in STATE_KEYS:
        if key in held:
            return dict(held[key])
    if _is_state_dict(content):
        return dict(content)
    if len(held) == 1:
        return dict(next(iter(held.values())))
    raise UserError(
        f"{str(path)!r} holds no state dict; found "
        f"{', '.join(map(str, list(content)[:5])) or 'nothing'}"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(
            isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
        )
    )


def _strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers have added to the names, and what does not belong to the generator."""
    tensors = {
        ".".join(part for part in key.split(".") if part != "_orig_mod"): tensor
        for key, tensor in tensors.items()
    }
    first = {key.split(".")[0] for key in tensors}
    numbered = any(key.split(".")[1].isdecimal() for key in tensors if "." in key)
    for wrapper in WRAPPERS if numbered else (*WRAPPERS, *ATTRIBUTES):
        if first == {wrapper} or (wrapper in first and wrapper in GENERATOR_PREFIXES):
            return _strip_wrappers(
                {
                    key.removeprefix(f"{wrapper}."): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(f"{wrapper}.")
                }
            )
    return tensors


# Tensors by which discriminators are known: BasicSR's two (and ours), and the first ESRGAN's and
# SRGAN-PyTorch's.
DISCRIMINATORS = (
    ("conv0_0.weight", "linear2.weight"),
    ("conv0.weight", "conv9.weight"),
    ("features.0.weight", "classifier.0.weight"),
)
METADATA_KEY = "vastscale"


@dataclass
class SavedNetwork:
    """A network as it lies in a file: all that is needed to build it again."""

    name: str
    """Its name in `GENERATORS`."""
    scale: int
    params: dict[str, Any]
    """The other keyword arguments of its class."""
    state_dict: dict[str, Tensor]
    """Its tensors on the CPU, in the dtypes of the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Where it comes from: "step", "recipe"…"""
    source: str = field(default="", compare=False, repr=False)
    """The file that it was read from, for messages."""

    def build(self) -> nn.Module:
        """The network in eval mode, float32 on the CPU, with exactly these tensors; a half file is
        widened.

        `UserError` where a tensor is missing, left over, of another shape or kind of number, or not
        finite.
        """
        source = f"{self.source}: " if self.source else ""
        try:
            with torch.random.fork_rng(
                devices=[]
            ):  # initial values are overwritten; a trainer's RNG must not shift
                network = build_generator(self.name, self.scale, **self.params)
        except UserError as error:
            raise UserError(f"{source}{error}") from error
        wanted = network.state_dict()
        title = f"{source}network {self.name!r} x{self.scale}"
        for key in sorted(wanted.keys() | self.state_dict.keys()):
            if key not in self.state_dict:
                raise UserError(
                    f"{title} needs the tensor {key!r}, which the weights lack; were they trained "
                    "with "
                    "other parameters?"
                )
            if key not in wanted:
                raise UserError(
                    f"{title} has no tensor {key!r}, which the weights hold; were they trained "
                    "with "
                    "other parameters?"
                )
            tensor = self.state_dict[key]
            if tensor.shape != wanted[key].shape:
                raise UserError(
                    f"{title}: tensor {key!r} is {tuple(tensor.shape)} in the weights but must be "
                    f"{tuple(wanted[key].shape)}"
                )
            if tensor.dtype not in (
                FLOATS if wanted[key].is_floating_point() else FLOATS + INTEGERS
            ):
                raise UserError(
                    f"{title}: tensor {key!r} is {tensor.dtype} in the weights but must be one of "
                    f"{listed(FLOATS)}; save it so"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{title}: tensor {key!r} holds NaN or infinity; training diverged, take an "
                    "earlier step"
                )
        network.load_state_dict(self.state_dict, strict=True)
        return network.eval()


def read_network(path: str | Path, weights: str = "auto") -> SavedNetwork:
    """Read a file of `state_files.SUFFIXES`; what it does not say of the network is recognised from
    the tensors.

    `weights` names the state dict to take from a .pth that holds several; "auto" is the first there
    is of `STATE_KEYS` (EMA first), or the only one. Prefixes of wrappers are stripped: `_orig_mod.`
    (torch.compile) anywhere, `WRAPPERS` in front, in any nesting; of a whole GAN the generator is
    taken. `UserError` for a file that is missing, unreadable, damaged, holds code or other than
    plain numbers, or is of no known network.
    """
    path = Path(path)
    tensors, description = read_state(path, weights, METADATA_KEY)
    saved = (
        _recognised(path, tensors)
        if description is None
        else _described(path, description, tensors)
    )
    saved.source = str(path)
    return saved


def write_network(path: str | Path, saved: SavedNetwork) -> None:
    """Write `saved` bit for bit to a .safetensors (flat) or .pth (under "params_ema") file.

    A .safetensors file's header also holds architecture, scale and metadata as plain keys, for
    programs that show them. The file appears whole or not at all: it is written aside, flushed to
    the disk and renamed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".pth"):
        raise UserError(
            f"cannot write weights to {str(path)!r}: the name must end in .safetensors or .pth"
        )
    description = json.dumps(
        {
            "name": saved.name,
            "scale": saved.scale,
            "params": saved.params,
            "metadata": saved.metadata,
        },
        sort_keys=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".safetensors":
        shown = {
            "architecture": saved.name,
            "scale": str(saved.scale),
            **saved.metadata,
            METADATA_KEY: description,
        }
        write_pieces_atomically(path, _safetensors(saved.state_dict, shown))
    else:
        # Cloned: torch.save writes all of the memory that a tensor is a part of.
        tensors = {
            key: tensor.detach().to("cpu", copy=True).contiguous()
            for key, tensor in saved.state_dict.items()
        }
        buffer = io.BytesIO()
        torch.save({"params_ema": tensors, METADATA_KEY: description}, buffer)
        write_atomically(path, buffer.getvalue())


# The kinds of tensor in a .safetensors file, in the order in which the library lays them down:
# those of one kind come together, by their names. It can write a file only from a whole copy of it,
# and leaves the order of the metadata to chance; here bytes go from the tensors to the disk, and
# the same weights make the same file.
SAFETENSORS_KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The content of a .safetensors file, piece by piece: its header, then each tensor."""
    ranks = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_KINDS)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of 8
    yield len(written).to_bytes(8, "little") + written
    for name in names:
        yield memoryview(
            tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        )


def _recognised(path: Path, tensors: dict[str, Tensor]) -> SavedNetwork:
    """The network that these tensors are of."""
    candidates = []
    for name, network in GENERATORS.items():
        for layout in (tensors, getattr(network, "convert", lambda _: None)(tensors)):
            found = _arguments(network, layout) if layout is not None else None
            if found is not None:
                candidates.append(SavedNetwork(name, *found, layout))
                break
    if not candidates:
        candidates = _of_spandrel(path, tensors)
    if not candidates and any(tensors.keys() >= {*names} for names in DISCRIMINATORS):
        raise UserError(
            f"{str(path)!r} holds a discriminator, not a generator; take the generator's file"
        )
    if not candidates:
        raise UserError(
            f"{str(path)!r} is of no network known here ({', '.join(GENERATORS)}); its first "
            "tensors are "
            f"{', '.join(list(tensors)[:3])}"
        )
    if len(candidates) > 1:
        raise RuntimeError(
            f"{str(path)!r} is taken for {' and '.join(saved.name for saved in candidates)}"
        )
    return candidates[0]


def _arguments(
    network: type[nn.Module], tensors: Mapping[str, Tensor]
) -> tuple[int, dict[str, Any]] | None:
    if not hasattr(network, "recognise"):
        return None
    return network.recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()})


def _of_spandrel(path: Path, tensors: dict[str, Tensor]) -> list[SavedNetwork]:
    try:
        found = spandrel.read_tensors(tensors)
    except ValueError as error:
        raise UserError(f"{str(path)!r} {error}") from error
    return [] if found is None else [SavedNetwork("spandrel", *found)]


def _described(path: Path, description: str, tensors: dict[str, Tensor]) -> SavedNetwork:
    try:
        said = json.loads(description)
        return SavedNetwork(
            name=str(said["name"]),
            scale=int(said["scale"]),
            params=dict(said["params"]),
            state_dict=tensors,
            metadata={str(key): str(value) for key, value in said.get("metadata", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(path)!r}: its {METADATA_KEY!r} metadata cannot be understood ({error!r})"
        ) from error
