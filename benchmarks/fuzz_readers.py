"""The readers that `fuzz.py` tests, small valid files for each, and the ways to mutate them."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint_index import DamagedError
from pipeline.cli import RunError, UserError
from pipeline.data.image_headers import BadImageError
from tools.video.probe import BadVideoError

HEIGHT, WIDTH = 24, 20  # pixels of the images


def _as_it_is(content: bytes) -> bytes:
    return content


@dataclass(frozen=True)
class Sample:
    """A small valid file."""

    name: str
    content: bytes
    """What is mutated: the file, or the part of it that is worth mutating."""
    wrap: Callable[[bytes], bytes] = _as_it_is
    """Makes the file from the mutated content, such as by adding correct checksums."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Files that must be in the same folder: name -> content."""
    is_text: bool = False


@dataclass(frozen=True)
class Reader:
    """The readers of one kind of file."""

    samples: Callable[[], Sequence[Sample]]
    read: Sequence[Callable[[Path], Any]]
    """Each reads a file as some command does."""
    clear: tuple[type[Exception], ...] = (UserError,)
    """Exceptions that every command turns into one line."""


# Mutations.


NUMBERS = (
    "0",
    "-1",
    "1e400",
    "-1e400",
    "NaN",
    "1e-400",
    "0.5",
    "4294967296",
    "-9223372036854775809",
    "18446744073709551616",
    "9" * 400,
    "9" * 5000,
)
WORDS = (
    *NUMBERS,
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"\\ud800"',
    '"\\u0000"',
    '"../../x"',
    "2024-99-99",
    "0001-01-01T00:00:00+14:00",
    "1:99:99",
    "!!binary x",
    "!!set {a, b}",
    "&a [*a]",
    "{<<: *a}",
    "[" * 3000,
    '{"a":' * 3000,
    "\ufeff",
    "\u2028",
    "\0",
    "\t",
    "'",
    "#",
    "-oProxyCommand=x",
)


def mutated(draw: random.Random, sample: Sample, others: Sequence[Sample]) -> bytes:
    """Return the content of a mutated file."""
    content = sample.content
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if sample.is_text and draw.random() < 0.7:
            content = _mutated_text(draw, content)
        else:
            content = draw.choice(_MUTATIONS)(draw, content, draw.choice(others).content)
    return sample.wrap(content)


def _mutated_text(draw: random.Random, content: bytes) -> bytes:
    pattern = draw.choice((rb"-?\d[\d.e+-]*", rb"\w+", rb'"[^"\n]*"|[\w.-]+', rb"[^\n]*\n"))
    places = list(re.finditer(pattern, content))
    if not places:
        return content
    place = draw.choice(places)
    word = draw.choice(NUMBERS if pattern.startswith(b"-") else WORDS).encode("utf-8")
    if pattern.endswith(b"\n"):
        word = draw.choice((b"", 2 * place[0], word + b"\n", draw.choice(places)[0]))
    elif draw.random() < 0.2:
        word += place[0]
    return content[: place.start()] + word + content[place.end() :]


def _place(draw: random.Random, content: bytes) -> int:
    """Draw a position, mostly near the start, where headers are."""
    end = len(content) if draw.random() < 0.3 else min(len(content), draw.choice((32, 128, 512)))
    return draw.randrange(max(1, end))


def _change_number(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at, size = _place(draw, content), draw.choice((1, 2, 2, 4, 4, 4, 8))
    most = 1 << 8 * size
    extremes = (0, 1, 2, most // 2 - 1, most // 2, most - 1, most - 8, len(content))
    drawn = (draw.randrange(most), draw.randrange(min(most, 70000)))
    value = draw.choice((*extremes, *drawn))
    number = (value % most).to_bytes(size, draw.choice(("big", "little")))
    return content[:at] + number + content[at + size :]


def _flip_bit(draw: random.Random, content: bytes, other: bytes) -> bytes:
    changed, at = bytearray(content or b"\0"), _place(draw, content)
    changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _change_byte(draw: random.Random, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    changed[_place(draw, content)] = draw.randrange(256)
    return bytes(changed)


def _cut(draw: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at = _place(draw, content)
    return content[:at] + content[at + draw.choice((1, 2, 4, 8, 12, 64, 512)) :]


def _repeat(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at, size = _place(draw, content), draw.choice((1, 2, 4, 8, 12, 20, 64, 512))
    return content[:at] + content[at : at + size] * draw.choice((2, 3, 100)) + content[at + size :]


def _erase(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at, size = _place(draw, content), draw.choice((2, 4, 8, 16, 64, 512))
    fill = draw.choice((b"\0", b"\xff", b" ", b"0"))
    return content[:at] + fill * len(content[at : at + size]) + content[at + size :]


def _insert(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at, start = _place(draw, content), _place(draw, other)
    return content[:at] + other[start : start + draw.choice((4, 16, 64, 512))] + content[at:]


def _join(draw: random.Random, content: bytes, other: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + other[draw.randrange(len(other) + 1) :]


_MUTATIONS = (
    *[_change_number] * 6,
    *[_change_byte] * 2,
    _flip_bit,
    _cut,
    _remove,
    _repeat,
    _erase,
    _insert,
    _join,
)


# Images.


def _images() -> list[Sample]:
    import imagecodecs
    import tifffile
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    photo = coarse.resize((WIDTH, HEIGHT), Image.BICUBIC)
    pixels = np.asarray(photo)
    deep = pixels.astype(np.uint16) * 257
    clear = np.dstack([pixels, pixels[..., 0]])
    exif = Image.Exif()
    exif[0x0112] = 6
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def pillow(image: Image.Image, form: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    def tiff(values: np.ndarray, **options: Any) -> bytes:
        file = io.BytesIO()
        tifffile.imwrite(file, values, **{"photometric": "rgb", **options})
        return file.getvalue()

    files = {
        "rgb.png": pillow(photo, "png", exif=exif, icc_profile=profile),
        "palette.png": pillow(photo.convert("P"), "png", transparency=3),
        "deep.png": imagecodecs.png_encode(deep),
        "alpha.png": pillow(Image.fromarray(clear), "png"),
        "rgb.jpg": pillow(photo, "jpeg", exif=exif, icc_profile=profile),
        "progressive.jpg": pillow(photo, "jpeg", progressive=True, subsampling=0),
        "inks.jpg": pillow(photo.convert("CMYK"), "jpeg"),
        "lossy.webp": pillow(photo, "webp"),
        "lossless.webp": pillow(photo, "webp", lossless=True),
        "extended.webp": pillow(Image.fromarray(clear), "webp", exif=exif, icc_profile=profile),
        "rgb.bmp": pillow(photo, "bmp"),
        "palette.bmp": pillow(photo.convert("P"), "bmp"),
        "plain.tif": tiff(pixels),
        "deflate.tif": tiff(pixels, compression="zlib"),
        "big.tif": tiff(pixels, bigtiff=True, iccprofile=profile),
        "tiles.tif": tiff(deep, tile=(16, 16), compression="zlib"),
        "planes.tif": tiff(np.moveaxis(pixels, 2, 0), planarconfig="separate"),
        "lzw.tif": pillow(photo, "tiff", compression="tiff_lzw"),
        "palette.tif": pillow(photo.convert("P"), "tiff"),
        "rgb.jp2": pillow(photo, "jpeg2000", irreversible=False),
        "deep.jp2": imagecodecs.jpeg2k_encode(deep),
        "codestream.jp2": imagecodecs.jpeg2k_encode(pixels, codecformat="j2k"),
        "rgb.avif": pillow(photo, "avif"),
        "rgb.jxl": imagecodecs.jpegxl_encode(pixels),
        "alpha.jxl": imagecodecs.jpegxl_encode(clear, usecontainer=True),
        "rgb.ppm": pillow(photo, "ppm"),
        "text.pgm": b"P2 # gray\n3 2\n255\n0 10 20\n30 40 255\n",
        "bits.pbm": b"P4\n9 2\n\x55\x80\xaa\0",
        "deep.ppm": b"P6 20 24 65535\n" + deep.astype(">u2").tobytes(),
        "rgb.gif": pillow(photo, "gif"),
        "rgb.tga": pillow(photo, "tga"),
    }
    samples = [Sample(name, content) for name, content in files.items()]
    samples += [
        Sample(name, content, _with_png_sums)
        for name, content in files.items()
        if name.endswith(".png")
    ]
    return samples


def _with_png_sums(content: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, so that decoders look at the mutated ones."""
    changed, at = bytearray(content), 8
    while at + 12 <= len(changed):
        end = at + 8 + int.from_bytes(changed[at : at + 4], "big")
        if end + 4 > len(changed):
            break
        changed[end : end + 4] = struct.pack(">I", zlib.crc32(changed[at + 4 : end]))
        at = end + 4
    return bytes(changed)


def _cut_image(path: Path) -> None:
    from tools.crops.cutting import CropSettings, open_picture

    settings = CropSettings(
        size=8,
        format="npy",
        seed=0,
        cover=False,
        keep_lossy_size=True,
        num_scales=None,
        min_gradient=0,
        min_sharpness=0,
        max_hash_distance=None,
        against=(),
    )
    with open(path, "rb") as file:
        open_picture(file, settings, max_megapixels=100)


def _train_on_image(path: Path) -> None:
    from pipeline.data.decoding import encoded_size, read_encoded

    encoded_size(str(path))
    read_encoded(str(path))


def _check_image(path: Path) -> None:
    from tools.crops.manifest import ManifestIndex
    from tools.dataset.judging import FileChecker, FileRules

    for is_whole in (False, True):
        rules = FileRules(
            min_size=1, max_size=None, max_megapixels=100, decode=is_whole, min_gradient=0.1
        )
        FileChecker(path.parent, rules, ManifestIndex(path.parent, []), None)(path.name)


def _convert_image(path: Path) -> None:
    from tools.images import decode_file

    decode_file(path, max_megapixels=100, exact=True)


def _upscale_image(path: Path) -> None:
    from pipeline.inference.pictures import picture_size, read_picture

    picture_size(path)
    read_picture(path)


# .npy crops.


def _arrays() -> list[Sample]:
    samples = []
    for version in ((1, 0), (2, 0), (3, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, np.zeros((5, 4, 3), np.uint8), version)
        samples += [
            Sample(f"version{version[0]}.npy", file.getvalue(), is_text=is_text)
            for is_text in (False, True)
        ]
    return samples


def _read_array(path: Path) -> None:
    from pipeline.data.image_files import npy_layout, read_npy

    layout = npy_layout(path)
    region = 0, 0, layout.height, layout.width
    read_npy(str(path), layout, region, bytearray(layout.height * layout.width * 3))


def _decode_array(path: Path) -> None:
    from tools.images import decode

    decode(path.read_bytes(), "npy")


# Tar archives.


def _archives() -> list[Sample]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")
    photo = file.getvalue()

    def packed(form: int, members: Mapping[str, bytes]) -> bytes:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=form) as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return archive.getvalue().rstrip(b"\0") + bytes(1024)

    members = {"a.png": photo, "x" * 120 + "/ü.png": photo, "b.txt": b"text"}
    samples = []
    for form, name in ((tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "pax")):
        inner = packed(form, members)
        samples += [
            Sample(f"{name}.tar", inner),
            Sample(f"{name}.tar", inner, _with_tar_sums),
            Sample(f"{name}.tar.gz", inner, lambda content: gzip.compress(_with_tar_sums(content))),
            Sample(f"{name}.tar.gz", gzip.compress(inner)),
            Sample(f"nested-{name}.tar", packed(form, {"inner.tar": inner}), _with_tar_sums),
        ]
    return samples


def _with_tar_sums(content: bytes) -> bytes:
    """Correct the checksums of the headers of a tar archive."""
    changed = bytearray(content)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def _read_archive(path: Path) -> None:
    from tools.tar.members import TarReader

    for _ in TarReader(path):
        pass


# Videos.


def _videos() -> list[Sample]:
    import av

    samples = []
    for suffix, codec, pixel_format in (
        ("mp4", "libx264", "yuv420p"),
        ("mkv", "ffv1", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("ts", "mpeg2video", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("y4m", "wrapped_avframe", "yuv420p"),
    ):
        file = io.BytesIO()
        kind = {"y4m": "yuv4mpegpipe", "ts": "mpegts", "mkv": "matroska"}.get(suffix, suffix)
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixel_format
            for number in range(6):
                picture = np.full((32, 32, 3), 40 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        samples.append(Sample(f"a.{suffix}", file.getvalue()))
    return samples


def _read_video(path: Path) -> None:
    from tools.video.choice import Sampling
    from tools.video.frames import sample_frames
    from tools.video.probe import probe, segments

    info = probe(path)
    if not info.refusals:
        for segment in segments(info, 3600)[:2]:
            for _ in sample_frames(path, info, segment, Sampling(), "key"):
                pass


# Weights.


def _network() -> Any:
    import torch

    from pipeline.models import build_generator

    torch.manual_seed(0)
    return build_generator("srresnet", 2, num_features=4, num_blocks=1)


def _description(network: Any, name: str) -> Any:
    from pipeline.models.weights import SavedNetwork

    params = {"num_features": 4, "num_blocks": 1}
    return SavedNetwork(name, 2, params, network.state_dict(), {"step": "1"})


def _safetensors() -> list[Sample]:
    import tempfile

    from pipeline.models.weights import write_network

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_network(path, _description(_network(), "srresnet"))
        content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, tensors = content[8:end], content[end:]
    inner = json.loads(header)["__metadata__"]["vastscale"]
    bare = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}

    def framed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + tensors

    def described(text: bytes) -> bytes:
        metadata = {"vastscale": text.decode("utf-8", "replace")}
        return framed(json.dumps({"__metadata__": metadata, **bare}).encode())

    return [
        Sample("file.safetensors", content),
        Sample("header.safetensors", header, framed, is_text=True),
        Sample("bare.safetensors", json.dumps(bare).encode(), framed, is_text=True),
        Sample("description.safetensors", inner.encode(), described, is_text=True),
    ]


def _pickles() -> list[Sample]:
    import torch

    network = _network()
    samples = []
    for name, content in (
        ("bare", network.state_dict()),
        ("described", {"params_ema": network.state_dict(), "epoch": 3, "betas": [0.9, 0.99]}),
    ):
        old, new = io.BytesIO(), io.BytesIO()
        torch.save(content, old, _use_new_zipfile_serialization=False)
        torch.save(content, new)
        with zipfile.ZipFile(new) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        pickle_name = next(member for member in members if member.endswith("/data.pkl"))

        def zipped(
            text: bytes, members: dict[str, bytes] = members, pickle_name: str = pickle_name
        ) -> bytes:
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for member, held in members.items():
                    archive.writestr(member, text if member == pickle_name else held)
            return file.getvalue()

        samples += [
            Sample(f"{name}.pth", new.getvalue()),
            Sample(f"{name}-pickle.pth", members[pickle_name], zipped),
            Sample(f"{name}-old.pth", old.getvalue()),
        ]
    return samples


def _read_weights(path: Path) -> None:
    from pipeline.models.weights import read_network

    read_network(path).build()


# Network files.


def _onnx_file() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    weights = np.zeros((12, 3, 1, 1), np.float32)
    for channel in range(3):
        weights[4 * channel : 4 * channel + 4, channel] = 1  # each pixel four times
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("DepthToSpace", ["c"], ["y"], blocksize=2, mode="CRD"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, "a", "b"])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="fuzz"
    )
    description = {"architecture": "srresnet", "scale": "2", "params": '{"num_features": 4}'}
    helper.set_model_props(model, description)
    return model.SerializeToString()


def _onnx_files() -> list[Sample]:
    import onnx

    content = _onnx_file()

    def described(text: bytes) -> bytes:
        model = onnx.load_from_string(content)
        scale, _, params = text.decode("utf-8", "replace").partition("\n")
        values = {"architecture": "srresnet", "scale": scale, "params": params}
        onnx.helper.set_model_props(model, values)
        return model.SerializeToString()

    description = b'2\n{"num_features": 4, "num_blocks": 1, "colour_space": "rgb"}\n'
    return [Sample("a.onnx", content), Sample("b.onnx", description, described, is_text=True)]


def _openvino_files() -> list[Sample]:
    import tempfile

    import openvino

    from pipeline.libraries import openvino_core

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.onnx").write_bytes(_onnx_file())
        model = openvino_core().read_model(Path(folder) / "a.onnx")
        for key, value in (("architecture", "srresnet"), ("scale", "2"), ("params", "{}")):
            model.set_rt_info(value, ["vastscale", key])
        openvino.save_model(model, Path(folder) / "a.xml")
        xml, weights = ((Path(folder) / f"a.{suffix}").read_bytes() for suffix in ("xml", "bin"))
    return [Sample("a.xml", xml, beside={"a.bin": weights}, is_text=True)]


def _read_network_file(name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        from pipeline.export.network_files import FILE_BACKENDS
        from pipeline.inference.devices import Device
        from pipeline.inference.file_facts import facts_of

        facts_of(FILE_BACKENDS[name].load(path, Device("cpu")), repr(str(path)))

    return read


# Text: configuration, lists, and what the tools and runs write.


def _text(name: str, *contents: bytes, **beside: bytes) -> Callable[[], list[Sample]]:
    return lambda: [
        Sample(name, content, is_text=True, beside={"base.yaml": b"scale: 2\n"})
        for content in contents
    ]


RECIPE = b"""\
base: demo
name: mine
scale: 2
generator: {name: vapsr, num_features: 16, num_blocks: 2}
losses: {l1: 1.0, ms_ssim: {weight: 0.1}}
data:
  crop: 96
  degradation: &d {name: gaussian, sigma: [0.2, 1.5]}
adversarial: {weight: 1e-3, discriminator: vgg, labels: {smoothing: 0.1}}
best: {metric: psnr}
steps: 400
save_minutes: 2.5
previews: {files: [a.png], count: 3}
stages: {first: {steps: 10}, second: {steps: 20, data: {degradation: *d}}}
"""
OVERRIDES = b"""\
data.crop=96
data={crop: 96, degradation: {name: gaussian, sigma: [0.2, 1.5]}}
losses={l1: 1.0, ms_ssim: {weight: 0.1}}
generator.num_blocks=3
ds.optimizer.params.betas=[0.9, 0.99]
"""
SEARCH = b"""\
ds.optimizer.params.lr: {low: 2e-4, high: 2e-2, log: true}
generator.num_blocks: [3, 5, 8]
data.crop: {low: 64, high: 128, step: 32}
losses: [{l1: 1.0}, {l1: 1.0, fft: 0.05}]
losses.fft: {low: 0.01, high: 0.2, log: true, when: {losses: [{l1: 1.0, fft: 0.05}]}}
"""
DS_CONFIG = b"""\
{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
 "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.99]}},
 "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 400}},
 "bf16": {"enabled": false}, "zero_optimization": {"stage": 0}}
"""
RECORD = {
    "path": "a.png/x1_0_0.npy",
    "photo": "a.png",
    "scale": 1,
    "top": 0,
    "left": 0,
    "size": 64,
    "bytes": 12416,
    "sha256": "00" * 32,
    "decoder": "spng 1",
    "gates": {"gradient": 5.1, "source_sharpness": 0.9, "hash": "0123456789abcdef" * 4},
    "photo_bytes": 100,
    "photo_mtime_ns": 10**18,
    "folder_crops": 1,
    "time": 1.5,
}


def _read_recipe(path: Path) -> None:
    from pipeline.config.recipe import load_stages

    for recipe in load_stages(str(path)):
        recipe.model_dump(mode="json")


def _read_overrides(path: Path) -> None:
    from pipeline.config.recipe import load_stages, parse_overrides

    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    load_stages("demo", parse_overrides(text.splitlines())[0])


def _read_search(path: Path) -> None:
    from tools.search.space import read_space

    read_space(str(path))


def _read_ds_config(path: Path) -> None:
    from pipeline.config.ds_config import batch_sizes, check_accelerate, load_ds_config

    config = load_ds_config(path)
    batch_sizes(config, 2)
    check_accelerate(config, {})


def _read_file_list(path: Path) -> None:
    from pipeline.data.image_files import read_file_list
    from tools.dataset.rejects import read_list

    read_list(path)
    read_file_list(path, path.parent)


def _read_hostfile(path: Path) -> None:
    from launch.cluster.hostfile import read_hostfile

    read_hostfile(path)


def _read_crop_manifest(path: Path) -> None:
    from pipeline.data.dataset import _recorded
    from tools.crops.manifest import ManifestIndex, format_line, iterate_records
    from tools.dataset.statistics import gather

    _recorded(path.parent, ["a.png/x1_0_0.npy", "b.npy"])
    gather(path.parent, 4, 0)
    for record in iterate_records(path.parent, [path.name]):
        format_line(record)
    ManifestIndex(path.parent, [path.name]).get("a.png/x1_0_0.npy")


def _check_against_manifest(path: Path) -> None:
    from tools.crops.manifest import ManifestIndex
    from tools.dataset.judging import FileChecker, FileRules

    rules = FileRules(1, None, 100, decode=True, min_gradient=0.1, min_sharpness=0.1)
    index = ManifestIndex(path.parent, [path.name])
    FileChecker(path.parent, rules, index, None)("a.png/x1_0_0.npy")


def _crop_manifests() -> list[Sample]:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros((64, 64, 3), np.uint8), (1, 0))
    line = json.dumps(RECORD).encode() + b"\n"
    beside = {"a.png/x1_0_0.npy": file.getvalue(), "dataset.json": b'{"tool": "images_to_data"}'}
    return [Sample("manifest.jsonl", count * line, beside=beside, is_text=True) for count in (1, 3)]


def _rejects() -> list[Sample]:
    values = {
        "photo": "a.png",
        "folder": "a.png",
        "gate": "flat",
        "reason": "flat",
        "photo_bytes": 100,
        "photo_mtime_ns": 10**18,
        "whole": True,
        "scale": 2,
        "top": 1,
        "left": 1,
    }
    return [Sample("rejects.jsonl", 2 * (json.dumps(values).encode() + b"\n"), is_text=True)]


def _read_rejects(path: Path) -> None:
    from tools.crops.cutting import reject_groups
    from tools.dataset.rejects import read_rejects

    read_rejects(path, "", 0)
    with open(path, "rb") as file:
        for _ in reject_groups(file):
            pass


def _checkpoints() -> list[Sample]:
    import hashlib

    weights = b"weights"
    identity = {"recipe": {"scale": 2}, "ds_config": {}, "dataset": {}, "precision": "FP32"}
    index = {
        "step": 3,
        "world_size": 1,
        "identity": identity,
        "files": {"a.bin": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}},
    }
    text = json.dumps(index, indent=1)

    def sealed(body: bytes) -> bytes:
        return body + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()

    beside = {"a.bin": weights}
    return [
        Sample("MANIFEST.json", text.encode(), beside=beside, is_text=True),
        Sample("MANIFEST.json", text.removesuffix("\n}").encode(), sealed, beside, is_text=True),
    ]


def _read_checkpoint(path: Path) -> None:
    from pipeline.checkpoint_index import damage, read_index

    damage(path.parent)
    read_index(path.parent)


LOG = b"""\
{"event": "train", "step": 50, "loss": 0.1, "learning_rate": 0.001, "images_per_second": 9.5}
{"event": "validation", "step": 50, "psnr_y": 31.5, "lpips": null}
"""
BOXES = b"""\
{"height": 100, "width": 120, "boxes": [
  {"x": 3, "y": 4, "width": 40, "height": 30, "colour": "#d55e00"}
]}
"""


def _read_log(path: Path) -> None:
    from tools.plot_run import PANELS, points, read_log

    log = read_log(path)
    for panel in PANELS:
        for curve in panel.curves:
            points(log, panel.event, curve.key)


def _read_boxes(path: Path) -> None:
    from tools.compare.boxes import read_boxes

    read_boxes(path, 100, 120)


READERS: dict[str, Reader] = {
    "images": Reader(
        _images,
        (_cut_image, _train_on_image, _check_image, _convert_image, _upscale_image),
        (UserError, BadImageError),
    ),
    "npy": Reader(_arrays, (_read_array, _decode_array), (UserError, BadImageError)),
    "tar": Reader(_archives, (_read_archive,)),
    "video": Reader(_videos, (_read_video,), (UserError, BadVideoError, OSError)),
    "safetensors": Reader(_safetensors, (_read_weights,)),
    "pth": Reader(_pickles, (_read_weights,)),
    "onnx": Reader(
        _onnx_files,
        (_read_network_file("onnx"), _read_network_file("openvino")),
        (UserError, RunError),
    ),
    "openvino": Reader(_openvino_files, (_read_network_file("openvino"),), (UserError, RunError)),
    "checkpoint": Reader(_checkpoints, (_read_checkpoint,), (DamagedError,)),
    "crop_manifest": Reader(_crop_manifests, (_read_crop_manifest, _check_against_manifest)),
    "rejects": Reader(_rejects, (_read_rejects,)),
    "recipe": Reader(_text("mine.yaml", RECIPE), (_read_recipe,)),
    "override": Reader(_text("overrides.txt", OVERRIDES), (_read_overrides,)),
    "search": Reader(_text("search.yaml", SEARCH), (_read_search,)),
    "ds_config": Reader(_text("ds_config.json", DS_CONFIG), (_read_ds_config,)),
    "log": Reader(_text("log.jsonl", LOG), (_read_log,)),
    "boxes": Reader(_text("boxes.json", BOXES), (_read_boxes,)),
    "file_list": Reader(
        _text("training_file_list.txt", b"a.png/x1_0_0.npy\nb/c.npy\n"), (_read_file_list,)
    ),
    "hostfile": Reader(
        _text("hostfile", b"# hosts\nnode1 slots=8\nnode2.local slots=4 # c\n"), (_read_hostfile,)
    ),
}
