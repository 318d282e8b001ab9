"""Weights in files: read ours and foreign ones, know a network from its tensors alone, write them whole or not at all.

Nothing in a file is ever executed: .safetensors cannot hold code, and .pth is read with `weights_only=True`.
A network's class says which tensors are its own: `recognise` knows them by names and shapes, `convert` renames those of
another project's layout. What no class knows is left to spandrel.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.files import write_atomically
from pipeline.models import GENERATORS, build_generator, spandrel_reading
from pipeline.models.state_files import FLOATS, INTEGERS, listed, read_state

# Tensors by which discriminators are known: BasicSR's two (and ours), and the first ESRGAN's and SRGAN-PyTorch's.
DISCRIMINATORS = (("conv0_0.weight", "linear2.weight"), ("conv0.weight", "conv9.weight"),
                  ("features.0.weight", "classifier.0.weight"))
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
        """The network in eval mode, float32 on the CPU, with exactly these tensors; a half file is widened.

        `UserError` where a tensor is missing, left over, of another shape or kind of number, or not finite.
        """
        source = f"{self.source}: " if self.source else ""
        try:
            with torch.random.fork_rng(devices=[]):  # initial values are overwritten; a trainer's RNG must not shift
                network = build_generator(self.name, self.scale, **self.params)
        except UserError as error:
            raise UserError(f"{source}{error}") from error
        wanted = network.state_dict()
        title = f"{source}network {self.name!r} x{self.scale}"
        for key in sorted(wanted.keys() | self.state_dict.keys()):
            if key not in self.state_dict:
                raise UserError(f"{title} needs the tensor {key!r}, which the weights lack; were they trained with "
                                "other parameters?")
            if key not in wanted:
                raise UserError(f"{title} has no tensor {key!r}, which the weights hold; were they trained with "
                                "other parameters?")
            tensor = self.state_dict[key]
            if tensor.shape != wanted[key].shape:
                raise UserError(f"{title}: tensor {key!r} is {tuple(tensor.shape)} in the weights but must be "
                                f"{tuple(wanted[key].shape)}")
            if tensor.dtype not in (FLOATS if wanted[key].is_floating_point() else FLOATS + INTEGERS):
                raise UserError(f"{title}: tensor {key!r} is {tensor.dtype} in the weights but must be one of "
                                f"{listed(FLOATS)}; save it so")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{title}: tensor {key!r} holds NaN or infinity; training diverged, take an "
                                "earlier step")
        network.load_state_dict(self.state_dict, strict=True)
        return network.eval()


def read_network(path: str | Path, weights: str = "auto") -> SavedNetwork:
    """Read a file of `state_files.SUFFIXES`; what it does not say of the network is recognised from the tensors.

    `weights` names the state dict to take from a .pth that holds several; "auto" is the first there is of
    `STATE_KEYS` (EMA first), or the only one. Prefixes of wrappers are stripped: `_orig_mod.` (torch.compile) anywhere,
    `WRAPPERS` in front, in any nesting; of a whole GAN the generator is taken. `UserError` for a file that is missing,
    unreadable, damaged, holds code or other than plain numbers, or is of no known network.
    """
    path = Path(path)
    tensors, description = read_state(path, weights, METADATA_KEY)
    saved = _recognised(path, tensors) if description is None else _described(path, description, tensors)
    saved.source = str(path)
    return saved


def write_network(path: str | Path, saved: SavedNetwork) -> None:
    """Write `saved` bit for bit to a .safetensors (flat) or .pth (under "params_ema") file.

    A .safetensors file's header also holds architecture, scale and metadata as plain keys, for programs that show them.
    The file appears whole or not at all: it is written aside, flushed to the disk and renamed.
    """
    path = Path(path)
    description = json.dumps({"name": saved.name, "scale": saved.scale, "params": saved.params,
                              "metadata": saved.metadata}, sort_keys=True)
    # Cloned: safetensors refuses tensors that share memory or are not contiguous (channels_last).
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in saved.state_dict.items()}
    if path.suffix.lower() == ".safetensors":
        shown = {"architecture": saved.name, "scale": str(saved.scale), **saved.metadata, METADATA_KEY: description}
        content = _in_order(safetensors.torch.save(tensors, metadata=shown))
    elif path.suffix.lower() == ".pth":
        buffer = io.BytesIO()
        torch.save({"params_ema": tensors, METADATA_KEY: description}, buffer)
        content = buffer.getvalue()
    else:
        raise UserError(f"cannot write weights to {str(path)!r}: the name must end in .safetensors or .pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order, which safetensors itself leaves to chance."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of 8
    return len(written).to_bytes(8, "little") + written + content[end:]


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
        raise UserError(f"{str(path)!r} holds a discriminator, not a generator; take the generator's file")
    if not candidates:
        raise UserError(f"{str(path)!r} is of no network known here ({', '.join(GENERATORS)}); its first tensors are "
                        f"{', '.join(list(tensors)[:3])}")
    if len(candidates) > 1:
        raise RuntimeError(f"{str(path)!r} is taken for {' and '.join(saved.name for saved in candidates)}")
    return candidates[0]


def _arguments(network: type[nn.Module], tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
    if not hasattr(network, "recognise"):
        return None
    return network.recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()})


def _of_spandrel(path: Path, tensors: dict[str, Tensor]) -> list[SavedNetwork]:
    try:
        found = spandrel_reading.read_tensors(tensors)
    except ValueError as error:
        raise UserError(f"{str(path)!r} {error}") from error
    return [] if found is None else [SavedNetwork("spandrel", *found)]


def _described(path: Path, description: str, tensors: dict[str, Tensor]) -> SavedNetwork:
    try:
        said = json.loads(description)
        return SavedNetwork(name=str(said["name"]), scale=int(said["scale"]), params=dict(said["params"]),
                            state_dict=tensors,
                            metadata={str(key): str(value) for key, value in said.get("metadata", {}).items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r}: its {METADATA_KEY!r} metadata cannot be understood ({error!r})") from error
