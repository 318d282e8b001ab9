"""Build every DALI graph for a GPU without having one, and read which operators DALI created.

DALI creates the operators in C++ and lists them in its serialised file. The pipeline's device is
removed just before its backend starts, which would fail without a driver; the operators have their
devices by then. CUDA itself is not used.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import simplejpeg
from test_degradations import CROP, photographs, source

from conftest import photograph
from pipeline.data import reader
from pipeline.data.decoding import HostDecoder
from pipeline.data.degrading import HostDegraded
from pipeline.data.reader import training_pipeline
from pipeline.data.source import CropSource

NOISE = {"lr_noise": {"probability": 0.5}}
BRIGHT = {"brightness": {"probability": 0.5}}
CHAIN = {
    "name": "chain",
    "steps": [
        "blur",
        {"one_of": [{"noise": {"kind": ["gaussian", "poisson"]}}, "none"]},
        {"sometimes": {"probability": 0.5, "steps": [{"sharpen": {"kind": ["unsharp", "usm"]}}]}},
        {"color": {"probability": 0.5}},
        "compress",
        {"resize": {"to": "lr"}},
    ],
}
SPLIT = {"name": "chain", "steps": [*CHAIN["steps"], "chroma", "noise"]}
KINDS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "npy": ((".npy",), {}),
    "PNG": ((".png",), {}),
    "JPEG": ((".jpg",), {}),
    "both": ((".npy", ".jpg"), {}),
    "skip": ((".npy", ".jpg"), {"on_error": "skip"}),
    "brightness and noise": ((".jpg",), BRIGHT | NOISE),
    "gaussian": ((".npy",), {"degradation": "gaussian"}),
    "gaussian and noise": ((".jpg",), {"degradation": "gaussian"} | NOISE),
    "realesrgan": ((".npy",), {"degradation": "realesrgan"}),
    "realesrgan, all": ((".npy", ".jpg"), {"degradation": "realesrgan"} | BRIGHT | NOISE),
    "realesrgan, large": (
        (".jpg",),
        {"degradation": {"name": "realesrgan", "second": {"resize_range": (0.3, 3)}}},
    ),
    "sharpened": ((".npy", ".jpg"), {"degradation": "realesrgan", "sharpen_hr": True} | BRIGHT),
    "chain": ((".npy",), {"degradation": CHAIN}),
    "chain, all": ((".npy", ".jpg"), {"degradation": CHAIN, "sharpen_hr": True} | BRIGHT | NOISE),
    "chain, split": ((".npy",), {"degradation": SPLIT}),
    "chain, split, all": (
        (".npy", ".jpg"),
        {"degradation": SPLIT, "sharpen_hr": True} | BRIGHT | NOISE,
    ),
    "16 bits": ((".npy", ".jpg"), {"depth": 16} | BRIGHT),
    "16 bits and noise": ((".npy",), {"depth": 16, "degradation": "gaussian"} | NOISE),
    "16 bits, realesrgan": (
        (".npy",),
        {"depth": 16, "degradation": "realesrgan", "sharpen_hr": True},
    ),
    "16 bits, chain, split": ((".npy",), {"depth": 16, "degradation": SPLIT}),
    "16 bits, paired": ((".npy",), {"depth": 16, "degradation": "paired"}),
    "paired": ((".npy",), {"degradation": "paired"}),
    "paired JPEG": ((".npy", ".jpg"), {"degradation": "paired"} | NOISE),
}


def files(root: Path, suffixes: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Return (HR names, HR name -> path of LR) of photographs with every suffix."""
    names, lr_paths = [], {}
    for number, suffix in enumerate(suffixes):
        for name, side in ((f"{number}{suffix}", 96), (f"{number}_lr{suffix}", 48)):
            pixels = photograph(number, side, side + side // 48)
            if suffix == ".npy":
                np.save(root / name, pixels)
            else:
                assert cv2.imwrite(str(root / name), pixels)
        names.append(f"{number}{suffix}")
        lr_paths[names[-1]] = str(root / f"{number}_lr{suffix}")
    return names, lr_paths


def crops_of(root: Path, kind: str, micro_batch: int = 4) -> CropSource:
    suffixes, data = KINDS[kind]
    names, lr_paths = files(root, suffixes)
    return source(root, names, scale=2, micro_batch=micro_batch, lr_paths=lr_paths, **data)


# The operators in DALI's protobuf messages, by their field numbers.


class Input(NamedTuple):
    name: str
    device: str
    argument: str  # device of the operator; empty: that of its inputs


class Operator(NamedTuple):
    name: str
    inputs: list[Input]
    outputs: list[Input]
    arguments: dict[str, Any]

    @property
    def device(self) -> str:
        return self.arguments["device"]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field of a protobuf message.

    Nested messages and strings are bytes.
    """
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
            continue
        size = integer() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[at : at + size]
        at += size


def operators(pipeline: Any) -> list[Operator]:
    pipeline._device_id = None
    return [_operator(value) for number, value in fields(pipeline.serialize()) if number == 5]


def _operator(message: bytes) -> Operator:
    parts = [*fields(message)]
    arguments = dict(_argument(dict(fields(value))) for number, value in parts if number == 4)
    inputs, outputs = (
        [_input(dict(fields(value))) for at, value in parts if at == number] for number in (2, 3)
    )
    return Operator(
        next(value.decode() for number, value in parts if number == 1), inputs, outputs, arguments
    )


def _input(found: Mapping[int, Any]) -> Input:
    return Input(found[1].decode(), found[2].decode(), found[4].decode() if found[3] else "")


def _argument(found: Mapping[int, Any]) -> tuple[str, Any]:
    value = next((found[number] for number in (3, 4, 5, 6) if number in found), None)
    if found[2] == b"float" and value is not None:
        (value,) = struct.unpack("<f", value)
    return found[1].decode(), value.decode() if isinstance(value, bytes) else value


ON_THE_HOST = {
    "ExternalSource",
    "Constant",
    "Stack",
    "Cast",
    "_ArithmeticGenericOp",
    "_Shape",
    "_TensorSubscript",
    "_conditional__Split",
    "_conditional__Merge",
}
"""What may run on the CPU: what is fed, and small numbers that say how."""


@pytest.mark.parametrize("decodes_on_gpu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_for_a_gpu_works_on_the_gpu(
    tmp_path: Path, kind: str, decodes_on_gpu: bool
) -> None:
    crops = crops_of(tmp_path, kind)
    pipeline = training_pipeline(
        crops, 0, device_id=0, threads=2, prefetch=2, decodes_on_gpu=decodes_on_gpu
    )
    # so that outputs can be requested on a stream and live as long as they are held
    assert pipeline.exec_dynamic
    is_split = "split" in kind
    if is_split:
        assert isinstance(pipeline, HostDegraded)
        pipeline = pipeline._pipeline
    made = operators(pipeline)
    decoders = [one for one in made if one.name.startswith("decoders__")]
    sides = 1 + crops.spec.degradation.reads_lr
    assert len(decoders) == (sides if crops.has_streams else 0)
    for decoder in decoders:
        assert decoder.device == ("mixed" if decodes_on_gpu else "cpu")
        assert decoder.arguments["jpeg_fancy_upsampling"] == 1
        assert decoder.arguments.get("hw_decoder_load", 0.65) == (0 if decodes_on_gpu else 0.65)
    on_the_cpu = {one.name for one in made if one.device == "cpu" and one not in decoders}
    assert on_the_cpu <= ON_THE_HOST | (
        {"Slice"} if kind == "skip" and not decodes_on_gpu else set()
    )
    for one in made:
        # No synchronisation: parameters and conditions are never on the GPU, and no pixels return
        # from it.
        assert all(part.device == "cpu" for part in one.inputs if part.argument), one
        assert (
            one.device != "cpu"
            or one.name == "_Shape"
            or all(part.device == "cpu" for part in one.inputs)
        ), one
    taken = {part.name for one in made for part in one.inputs}
    results = [
        part
        for one in made
        if one.name != "_conditional__Split"
        for part in one.outputs
        if part.name not in taken
    ]
    assert [part.device for part in results] == ["gpu", "gpu"]
    # fn.flip would launch one kernel per sample.
    counts = Counter(one.name for one in made)
    assert not counts["Flip"]
    # To CHW, either way: HR, and LR unless the host finishes it. Chains turn the region before.
    turns_first = crops.degradation.turns_first
    if crops.depth == 16:  # which CropMirrorNormalize does not make
        assert not counts["CropMirrorNormalize"]
        return
    assert counts["CropMirrorNormalize"] == (1 if turns_first else 2)
    assert counts["Transpose"] == (3 if turns_first and not is_split else 2)


def test_what_the_host_degrades_does_not_touch_the_gpu(tmp_path: Path) -> None:
    names = photographs(tmp_path, (96, 96))
    chain = {"name": "chain", "steps": ["chroma", "blur", "noise"]}
    made = []
    for device_id in (0, None):
        crops = source(tmp_path, names, scale=2, micro_batch=2, degradation=chain)
        assert crops.degrades_on_host
        pipeline = training_pipeline(crops, 0, device_id=device_id, threads=1, prefetch=1)
        made.append([np.array(side.as_array()) for side in pipeline.run()])
    for on_gpu, on_cpu in zip(*made, strict=True):
        np.testing.assert_array_equal(on_gpu, on_cpu)


# GPU-specific parts of the graphs, run on the CPU.


@pytest.mark.parametrize("kind", ["PNG", "both", "paired JPEG", "gaussian", "16 bits"])
def test_flips_by_sampling_are_flips(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampling(reader._TrainingGraph):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.flips_by_sampling = True

    crops, found = crops_of(tmp_path, kind, micro_batch=64), []
    for graph in (reader._TrainingGraph, Sampling):
        monkeypatch.setattr(reader, "_TrainingGraph", graph)
        pipeline = training_pipeline(crops, 0, device_id=None, threads=1, prefetch=1)
        found.append([np.array(side.as_array()) for side in pipeline.run()])
    assert (
        len(
            {
                (one.flip_vertical, one.flip_horizontal, one.transpose)
                for one in crops.samples(0, 64)
            }
        )
        == 8
    )
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_chroma_is_interpolated_as_libjpeg_turbo_does(tmp_path: Path, on_error: str) -> None:
    """In the graph and in the host's decoder; a GPU's default would differ by 40 dB."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    pixels = cv2.resize(pixels, (96, 96), interpolation=cv2.INTER_NEAREST)
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    (tmp_path / "0.jpg").write_bytes(data)
    whole = simplejpeg.decode_jpeg(data, "RGB", fastupsample=False)
    assert (
        np.abs(whole.astype(int) - simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)).max()
        > 20
    )
    with HostDecoder(threads=1, batch=1) as decoder:
        np.testing.assert_array_equal(decoder.decode([str(tmp_path / "0.jpg")])[0], whole)
    crops = source(tmp_path, ["0.jpg"], scale=2, micro_batch=16, augment=False, on_error=on_error)
    hr = np.array(
        training_pipeline(crops, 0, device_id=None, threads=1, prefetch=1).run()[0].as_array()
    )
    for sample, got in zip(crops.samples(0, 16), hr, strict=True):
        expected = whole[sample.top : sample.top + CROP, sample.left : sample.left + CROP]
        np.testing.assert_array_equal(got.transpose(1, 2, 0), expected)


def test_no_file_of_dalis_translation_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    crops = crops_of(tmp_path / "images", "realesrgan")
    pipeline = training_pipeline(crops, 0, device_id=None, threads=1, prefetch=1)
    pipeline.run()
    reader.low_resolution(photograph(0, 48, 52), crops.spec.degradation, 2, seed=0, number=0)
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert not left
