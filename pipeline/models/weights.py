"""Read and write files of weights, ours and others', and recognise networks from their tensors.

No code in a file is ever executed: .safetensors cannot hold any, and .pth is read with
`weights_only=True`. A network's class says which tensors are its own: `recognise` identifies them
by names and shapes, and `convert` renames those of another project. What no class recognises is
left to spandrel. Files are written atomically.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.cli import UserError, nearest, one_line
from pipeline.files import check_utf8, parse_json, write_atomically, write_pieces_atomically
from pipeline.models import GENERATORS, build_generator, build_outline, spandrel

# State dicts in .safetensors files and files of torch.save, read without executing code and reduced
# to plain tensors.


# Keys under which common training codes store a state dict in a .pth file, preferred ones first.
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
# Prefixes of a generator's names in the state dict of a whole GAN …
GENERATOR_PREFIXES = ("generator", "netG", "net_g")
# … and of all names if a network was saved inside DataParallel or Lightning.
WRAPPERS = ("module", "_forward_module", *GENERATOR_PREFIXES)
# Like WRAPPERS, except that some networks' own names start with these, followed by a number.
ATTRIBUTES = ("model", "net", "network")
MAX_EXPANSION = 100
FREE_BYTES = 64 << 20
"""A file may hold this many times its size, and this many bytes in addition.

torch.save compresses nothing, but several tensors may share their values.
"""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def read_state(path: Path, weights: str, metadata_key: str) -> tuple[dict[str, Tensor], str | None]:
    """Return the state dict named `weights` and the text under `metadata_key`, if there is one.

    For "auto", see `read_network`. The tensors are dense, of `FLOATS` or `INTEGERS`, on the CPU,
    with the prefixes of wrappers removed. Raises `UserError` for a file that is missing,
    unreadable, damaged or of another kind.
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
        raise UserError(
            f"weights file {str(path)!r} has none of the suffixes {', '.join(SUFFIXES)}"
        )
    tensors = _strip_wrappers(tensors)
    _check_kinds(path, tensors)
    return tensors, description


def _read_safetensors(
    path: Path, weights: str, metadata_key: str
) -> tuple[dict[str, Tensor], str | None]:
    if weights != "auto":
        raise UserError(f"{str(path)!r} holds a single set of weights; omit weights {weights!r}")
    check_utf8(path, "safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            # Cloned, because the tensors of an open file share its memory.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is not a readable .safetensors file ({error}); is it truncated?"
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
                f"{str(path)!r} contains pickled code besides tensors ({code[1]}), which is never "
                "executed here; save only its state dict"
            ) from error
        raise UserError(
            f"{str(path)!r} is not a readable PyTorch file; is it truncated?"
        ) from error
    except PermissionError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    # For a broken file, torch.load raises nearly any exception: RuntimeError, EOFError, KeyError…
    except Exception as error:
        raise UserError(
            f"{str(path)!r} is not a readable PyTorch file ({type(error).__name__}); is it "
            "truncated?"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a state dict")
    description = content.get(metadata_key)
    return _choose_state(path, content, weights), description if isinstance(
        description, str
    ) else None


def _check_archive(path: Path) -> None:
    """Reject what torch.load accepts: an archive with a changed byte, and a TorchScript program."""
    try:
        if not zipfile.is_zipfile(path):
            # torch.load reports any error; files from before PyTorch 1.6 have no checksums.
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except PermissionError:
        return  # torch.load reports it
    except Exception as error:  # zipfile raises all kinds of errors for hostile bytes
        raise _damaged(path, error) from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(
            f"{str(path)!r} is a TorchScript program, which is never executed here; save "
            "its state_dict() instead: torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    _check_expansion(path, sum(member.file_size for member in members))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise _damaged(path, error) from error
    if damaged is not None:
        raise UserError(
            f"{str(path)!r} is damaged: the checksum of its {damaged} is wrong; copy or download "
            "it again"
        )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{str(path)!r} is not a readable PyTorch file ({one_line(error)}); is it damaged?"
    )


def _check_expansion(path: Path, num_bytes: int) -> None:
    """Reject a file that holds far more than its size, before that fills the memory."""
    if num_bytes > MAX_EXPANSION * os.path.getsize(path) + FREE_BYTES:
        raise UserError(
            f"{str(path)!r} expands to {num_bytes / 1e9:.1f} GB, more than {MAX_EXPANSION} times "
            "its size; is it a decompression bomb? Save only the state dict"
        )


def _check_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reject tensors that would be cast silently or fail later: all but dense CPU numbers."""
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
    _check_expansion(
        path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    )


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    """Format dtypes for messages, e.g. "float16, float32"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _choose_state(path: Path, content: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """Return the state dict named `weights` in `content`.

    "auto" selects the preferred one, or `content` itself.
    """
    held = {key: value for key, value in content.items() if _is_state_dict(value)}
    if weights != "auto":
        if weights not in held:
            raise UserError(
                f"{str(path)!r} holds no weights {weights!r}"
                + (nearest(weights, held) if held else "; it is a single state dict: omit weights")
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
        f"{str(path)!r} contains no state dict; found "
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
    """Remove the prefixes of wrappers from names, and tensors that are not the generator's."""
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


# Tensors that identify discriminators: BasicSR's two (and ours), the first ESRGAN's,
# SRGAN-PyTorch's, and ours with several scales.
DISCRIMINATORS = (
    ("conv0_0.weight", "linear2.weight"),
    ("conv0.weight", "conv9.weight"),
    ("features.0.weight", "classifier.0.weight"),
    ("scales.0.conv0.weight",),
    ("scales.0.0.weight",),
)
METADATA_KEY = "vastscale"


@dataclass
class SavedNetwork:
    """The content of a weights file: all that is needed to build the network again."""

    name: str
    """Its name in `GENERATORS`."""
    scale: int
    params: dict[str, Any]
    """The other keyword arguments of its class."""
    state_dict: dict[str, Tensor]
    """Its tensors on the CPU, in the dtypes of the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Its origin: "step", "recipe"…"""
    source: str = field(default="", compare=False, repr=False)
    """The file it was read from, for messages."""

    def build(self) -> nn.Module:
        """Build the network in eval mode, float32 on the CPU, with exactly these tensors.

        Half precision is widened. Raises `UserError` if a tensor is missing, unexpected, of another
        shape or kind of number, or not finite.
        """
        source = f"{self.source}: " if self.source else ""
        sizes = [side for tensor in self.state_dict.values() for side in tensor.shape]
        try:
            most = max([len(self.state_dict), *sizes])
            network = build_outline(self.name, self.scale, self.params, most)
            expected = network.state_dict()
            self._check_tensors(expected)
            if any(tensor.is_meta for tensor in expected.values()):
                # Initial values are overwritten; creating them must not advance the trainer's RNG.
                with torch.random.fork_rng(devices=[]):
                    network = build_generator(self.name, self.scale, **self.params)
        except UserError as error:
            raise UserError(f"{source}{error}") from error
        network.load_state_dict(self.state_dict, strict=True)
        return network.eval()

    def _check_tensors(self, expected: Mapping[str, Tensor]) -> None:
        title = f"network {self.name!r} x{self.scale}"
        for key in sorted(expected.keys() | self.state_dict.keys()):
            if key not in self.state_dict:
                raise UserError(
                    f"{title} needs the tensor {key!r}, which is missing from the weights; were "
                    "they trained with different parameters?"
                )
            if key not in expected:
                raise UserError(
                    f"{title} has no tensor {key!r}, but the weights contain it; were they "
                    "trained with different parameters?"
                )
            tensor = self.state_dict[key]
            if tensor.shape != expected[key].shape:
                raise UserError(
                    f"{title}: tensor {key!r} is {tuple(tensor.shape)} in the weights but must be "
                    f"{tuple(expected[key].shape)}"
                )
            if tensor.dtype not in (
                FLOATS if expected[key].is_floating_point() else FLOATS + INTEGERS
            ):
                raise UserError(
                    f"{title}: tensor {key!r} is {tensor.dtype} in the weights but must be one of "
                    f"{listed(FLOATS)}; convert it"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{title}: tensor {key!r} contains NaN or infinity; training diverged, use an "
                    "earlier step"
                )


def read_network(path: str | Path, weights: str = "auto") -> SavedNetwork:
    """Read a file of weights (`SUFFIXES`), recognising from the tensors what it does not describe.

    `weights` names the state dict to read from a .pth file with several; "auto" is the first of
    `STATE_KEYS` that exists (EMA first), or the only one. Prefixes of wrappers are removed:
    `_orig_mod.` (torch.compile) anywhere, `WRAPPERS` at the start, in any nesting; from a whole
    GAN, the generator is read. Raises `UserError` for a file that is missing, unreadable or
    damaged, that contains code or anything but plain numbers, or whose network is unknown.
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
    """Write `saved` to a .safetensors (flat) or .pth file (under "params_ema"), bit for bit.

    The header of a .safetensors file also has architecture, scale and metadata as plain keys, for
    programs that display them. The file is written atomically: to a temporary file that is flushed
    to disk and renamed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".pth"):
        raise UserError(
            f"cannot write weights to {str(path)!r}: the name must end in .safetensors or .pth"
        )
    if path.suffix.lower() == ".safetensors":
        check_utf8(path, "safetensors")
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
        metadata = {
            "architecture": saved.name,
            "scale": str(saved.scale),
            **saved.metadata,
            METADATA_KEY: description,
        }
        write_pieces_atomically(path, _safetensors(saved.state_dict, metadata))
    else:
        # Cloned, because torch.save writes the whole storage that a tensor is a view of.
        tensors = {
            key: tensor.detach().to("cpu", copy=True).contiguous()
            for key, tensor in saved.state_dict.items()
        }
        buffer = io.BytesIO()
        torch.save({"params_ema": tensors, METADATA_KEY: description}, buffer)
        write_atomically(path, buffer.getvalue())


# The dtypes of a .safetensors file in the order in which the library writes them; tensors of one
# dtype are sorted by name. The library needs a copy of the whole file in memory and writes metadata
# in random order. Here, bytes go straight from the tensors to disk, and the same weights always
# give the same file.
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
    """Yield the content of a .safetensors file in pieces: its header, then each tensor."""
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
    written += b" " * (-len(written) % 8)  # the tensors start at a multiple of 8
    yield len(written).to_bytes(8, "little") + written
    for name in names:
        yield memoryview(
            tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        )


def _recognised(path: Path, tensors: dict[str, Tensor]) -> SavedNetwork:
    """Identify the network that the tensors belong to."""
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
            f"{str(path)!r} matches no known network ({', '.join(GENERATORS)}); its first tensors "
            f"are {', '.join(list(tensors)[:3])}"
        )
    if len(candidates) > 1:
        raise RuntimeError(
            f"{str(path)!r} matches several networks: "
            f"{' and '.join(saved.name for saved in candidates)}"
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
        fields = parse_json(description)
        return SavedNetwork(
            name=str(fields["name"]),
            scale=int(fields["scale"]),
            params=dict(fields["params"]),
            state_dict=tensors,
            metadata={str(key): str(value) for key, value in fields.get("metadata", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{str(path)!r}: its {METADATA_KEY!r} metadata is invalid ({one_line(error)})"
        ) from error
