"""Write networks as ONNX files for images of any size or of one, described in the metadata.

Images are floats or uint8; weights and arithmetic are FP32 or FP16.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.cli import RunError, UserError, one_line
from pipeline.models.common import COLOURS
from pipeline.models.weights import SavedNetwork

if TYPE_CHECKING:
    import onnx

from pipeline.images import to_bytes

LAYOUTS = ("nchw", "nhwc")


class ByteNetwork(nn.Module):
    """A generator from uint8 to uint8 images, including normalisation, clamping and rounding.

    It computes in the dtype of the network's weights; `half()` and `bfloat16()` work as on the
    network itself. Its tensors are the network's own, prefixed with "network.".

    Args:
        network: any generator of `pipeline.models`.
        layout: "nchw" or "nhwc", for input and output; nhwc is the layout of decoded images and of
            cameras.

    Raises:
        ValueError: unknown layout; in `forward`, images that are not uint8.
    """

    def __init__(self, network: nn.Module, layout: str = "nchw") -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} must be 'nchw' or 'nhwc'")
        self.network = network
        self.layout = layout

    def forward(self, images: Tensor) -> Tensor:
        """Upscale uint8 RGB by `scale` to uint8 RGB in the same layout.

        Values are clamped and rounded to the nearest level, not truncated.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}, but must be torch.uint8")
        if self.layout == "nchw":
            return to_bytes(self.network(images))
        return to_bytes(self.network(images.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).contiguous()


INPUT, OUTPUT = "input", "output"
INT64 = 7
"""ONNX's number of the type."""
OPSETS = range(17, 24)
"""LayerNormalization was added in 17; the pinned torch's exporter writes at most 23."""
FIX_SIZE = f"convert_to_onnx.py --shape 1x{COLOURS}x256x256"
"""The command that writes a file for images of one size, for messages."""
LARGEST_BYTES = 2**31 - 1
"""Maximum size of a protobuf message."""


@dataclass(frozen=True)
class Form:
    """The form of an ONNX file: type and layout of its images, precision and opset."""

    io: str = "float"
    """"float": [0, 1] with overshoot, in the type of the weights; "uint8": 0..255, clamped and
    rounded."""
    layout: str = "nchw"
    """"nchw" or "nhwc"."""
    half: bool = False
    """FP16 weights and arithmetic."""
    opset: int = 20
    size: tuple[int, int, int] | None = None
    """Batch, height and width of the only images that the file takes; `None`: any."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input and the output."""
        if self.io == "uint8":
            return torch.uint8
        return torch.float16 if self.half else torch.float32

    def shape(self, batch: int | str, height: int | str, width: int | str) -> tuple[int | str, ...]:
        """Return the shape of images of this size in the file's layout."""
        return (
            (batch, COLOURS, height, width)
            if self.layout == "nchw"
            else (batch, height, width, COLOURS)
        )


class Padded(nn.Module):
    """A generator whose inputs are extended to the sizes that it needs, without Python branches.

    The network itself extends images by reflection at the bottom and the right and crops the
    result, but with branches, of which an exporter would record only the one its example takes.
    """

    def __init__(self, network: nn.Module, multiple: int, minimum: int) -> None:
        super().__init__()
        self.network, self.multiple, self.minimum = network, multiple, minimum

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW images by `scale`."""
        height, width = images.shape[-2:]
        for dim in (2, 3):
            side = images.shape[dim]
            wanted = (
                (torch.sym_max(side, self.minimum) + self.multiple - 1)
                // self.multiple
                * self.multiple
            )
            places = torch.arange(wanted, device=images.device)
            images = images.index_select(
                dim, torch.minimum(places, 2 * (side - 1) - places).clamp(min=0)
            )
        scale = self.network.scale
        return self.network(images)[..., : height * scale, : width * scale]


class ChannelsLast(nn.Module):
    """A generator with NHWC float images as input and output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NHWC images by `scale`."""
        return self.network(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def with_form(network: nn.Module, form: Form) -> nn.Module:
    """Wrap a network for images of the form's layout and type; its weights' dtype stays."""
    if form.io == "uint8":
        return ByteNetwork(network, form.layout)
    return network if form.layout == "nchw" else ChannelsLast(network)


def convert(saved: SavedNetwork, network: nn.Module, form: Form) -> bytes:
    """Return the content of an ONNX file of `network`, which was built from `saved`.

    The network itself is left unchanged.

    Raises:
        UserError: the architecture cannot be written for images of any size (the message names
            --shape), or not with the form's opset, or it is too large for an ONNX file.
        RunError: the exporter wrote an invalid file.
    """
    import onnx

    if form.size is None and not getattr(network, "takes_any_size", True):
        raise UserError(_only_one_size(saved, "its code depends on the image size"))
    network = copy.deepcopy(network).eval()
    _fold_norms(network)
    if form.half:
        for parameter in network.parameters():  # buffers (statistics, kernels) stay in FP32
            parameter.data = parameter.data.half()
    multiple, minimum = _sizes(network)
    if form.size is None and (multiple, minimum) != (1, 1):
        network = Padded(network, multiple, minimum)
    model = _exported(with_form(network, form), form, saved)
    sides = model.graph.input[0].type.tensor_type.shape.dim
    if form.size is None and not all(side.dim_param or side.dim_value == COLOURS for side in sides):
        raise UserError(_only_one_size(saved, "its code branches on the image size"))
    if (written := model.opset_import[0].version) != form.opset:
        raise UserError(
            f"network {_name(saved)!r} cannot be written with opset {form.opset}, but with "
            f"{written}; use --opset {written}"
        )
    _forget_sources(model)
    onnx.helper.set_model_props(model, describe(saved, form))
    if model.ByteSize() > LARGEST_BYTES:
        raise UserError(
            f"the network takes {model.ByteSize() / 1e9:.1f} GB, but an ONNX file can contain at "
            "most 2 GB; try --half"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunError(
            f"PyTorch's exporter wrote an invalid ONNX file: {one_line(error)}"
            f"{'; omit --half' if form.half else ''}"
        ) from error
    return model.SerializeToString()


def describe(saved: SavedNetwork, form: Form) -> dict[str, str]:
    """Return the file's metadata: architecture, scale, parameters, provenance and form."""
    size = {} if form.size is None else {"shape": shown_shape(form.size)}
    return {
        **saved.metadata,
        **size,
        "architecture": saved.name,
        "scale": str(saved.scale),
        "params": json.dumps(saved.params, sort_keys=True),
        "io": form.io,
        "layout": form.layout,
        "dtype": "float16" if form.half else "float32",
        "colours": "RGB",
        "range": "0..255" if form.io == "uint8" else "0..1",
    }


def shown_shape(size: tuple[int, int, int]) -> str:
    """Return batch, height and width as `--shape` has them: 1x3x256x256."""
    batch, height, width = size
    return f"{batch}x{COLOURS}x{height}x{width}"


def _only_one_size(saved: SavedNetwork, why: str) -> str:
    return (
        f"network {_name(saved)!r} cannot be written as ONNX for images of any size: {why}; write "
        f"it for one size with {FIX_SIZE}"
    )


@torch.no_grad()
def _fold_norms(network: nn.Module) -> None:
    """Fold batch norms into the convolutions before them, in FP32.

    The exporter would do so as well, but from FP16 weights and FP32 statistics it makes a
    convolution of mixed types.
    """
    for row in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for place in range(len(row) - 1):
            if type(row[place]) is nn.Conv2d and isinstance(row[place + 1], nn.BatchNorm2d):
                row[place] = fuse_conv_bn_eval(row[place], row[place + 1])
                row[place + 1] = nn.Identity()


def _sizes(network: nn.Module) -> tuple[int, int]:
    """Return the number that height and width must be multiples of, and their minimum."""
    if (sizes := getattr(network, "image_sizes", None)) is not None:  # SpandrelNetwork
        return sizes
    fold = getattr(network, "unshuffle", 1)  # RRDBNet
    return fold, fold


def _exported(module: nn.Module, form: Form, saved: SavedNetwork) -> onnx.ModelProto:
    names = () if form.size else ("batch", "height", "width")
    dims = {axis: torch.export.Dim(axis) for axis in names}
    axes = {
        place: dims[name]
        for place, name in enumerate(form.shape("batch", "height", "width"))
        if name in dims
    }
    example = torch.zeros(form.shape(*(form.size or (2, 48, 52))), dtype=form.dtype)
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=form.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(axes,) if axes else None,
                custom_translation_table={torch.ops.aten.sort.stable: _sorted},
                external_data=False,
                verbose=False,
            )
            return program.model_proto
    except Exception as error:  # the exporter raises exceptions of many types
        why = f"PyTorch's exporter reports {one_line(error.__cause__ or error)}"
        if form.size is None:
            raise UserError(_only_one_size(saved, why)) from error
        raise UserError(f"network {_name(saved)!r} cannot be written as ONNX: {why}") from error


def _sorted(
    values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    """Translate a stable sort of small whole numbers (ATD's), which onnxscript lacks.

    TopK leaves the order of equal values to the backend, so each value gets its place as a second
    key.
    """
    from onnxscript import opset18 as op

    if dim != -1 or descending:
        raise NotImplementedError("only ascending sorts along the last dimension")
    count = op.Shape(values, start=-1)
    places = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
    keys = op.Add(op.Mul(op.Cast(values, to=INT64), count), places)
    _, order = op.TopK(keys, count, axis=-1, largest=0, sorted=1)
    return op.GatherElements(values, order, axis=-1), order


def _name(saved: SavedNetwork) -> str:
    return str(saved.params.get("arch", saved.name))


def _forget_sources(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes on every node: a quarter of the file, with this machine's paths."""
    for part in (model, model.graph, *model.functions):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    for item in (
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        item.ClearField("doc_string")
        del item.metadata_props[:]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the exporter and of networks' code, which the user can do nothing about.

    Errors are still raised.
    """
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
