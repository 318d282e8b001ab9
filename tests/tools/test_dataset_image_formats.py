"""Crops are restored bit by bit from every storage format; inexact images are recognised."""

from __future__ import annotations

import io
import os
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image

from dataset_corpus import bad_files, bad_npy_files, encoded, exif, good_files, photograph
from fabricate import shared
from pipeline.data.image_files import BadNpyError
from pipeline.data.image_headers import BadImageError, check_complete, read_header
from tools.images import FORMATS, WEBP_MAX_SIDE, decode, decode_file, encode


def contents() -> dict[str, np.ndarray]:
    """uint8 RGB pixels of every awkward size and content."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (70, 91, 3), np.uint8)
    return {
        "photograph": photograph(128, 150),
        "noise": noise,
        "one_pixel": noise[:1, :1],
        "row": noise[:1],
        "column": noise[:, :1],
        "odd": noise[:33, :5],
        "black": np.zeros((40, 40, 3), np.uint8),
        "white": np.full((40, 40, 3), 255, np.uint8),
        "extremes": (noise // 128 * 255).astype(np.uint8),
        "red_alone": noise * np.uint8([1, 0, 0]),
        "gray": np.repeat(noise[..., :1], 3, 2),
        "strided": noise[::2, ::-1],
    }


@pytest.mark.parametrize("content", contents())
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_bit_exact(form: str, content: str) -> None:
    pixels = contents()[content]
    data = encode(pixels, form)
    np.testing.assert_array_equal(decode(data, form), pixels)
    if form != "npy":  # and with other decoders
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)
        foreign = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(foreign[..., ::-1], pixels)
    else:
        np.testing.assert_array_equal(np.load(io.BytesIO(data)), pixels)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "npy"])
def test_our_files_are_plain_and_lossless_to_our_own_header_reader(form: str) -> None:
    data = encode(photograph(64, 80), form)
    header = read_header(io.BytesIO(data))
    assert (header.format, header.height, header.width, header.depth, header.channels) == (
        form,
        64,
        80,
        8,
        3,
    )
    assert header.is_plain
    assert not header.is_lossy
    check_complete(data, header)


def test_compression_pays() -> None:
    pixels = photograph(256, 256)
    sizes = {form: len(encode(pixels, form)) for form in FORMATS}
    assert sizes["webp"] < sizes["png"] < sizes["npy"]
    assert sizes["jp2"] < sizes["png"]


def test_png_is_not_larger_than_pillows_on_photographs() -> None:
    photographs = [
        np.asarray(Image.open(path)) for path in sorted(shared("data/kodak").glob("*.png"))[:6]
    ]
    ours = sum(len(encode(pixels, "png")) for pixels in photographs)
    assert ours <= sum(len(encoded(pixels, "png", compress_level=6)) for pixels in photographs)


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_an_error_not_half_an_image(form: str) -> None:
    data = encode(photograph(96, 96), form)
    for broken in (data[:-50], data[: len(data) // 2], b"", b"nonsense" * 40):
        with pytest.raises(BadImageError):
            decode(broken, form)
    other = encode(photograph(96, 96), FORMATS[FORMATS.index(form) - 1])
    with pytest.raises(BadImageError):
        decode(other, form)


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    for wrong in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="must be uint8"):
            encode(wrong, "png")
    with pytest.raises(BadImageError, match=str(WEBP_MAX_SIDE)):
        encode(np.zeros((1, WEBP_MAX_SIDE + 1, 3), np.uint8), "webp")
    for name, data in bad_npy_files().items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadNpyError):
            decode_file(tmp_path / name)
        if name != "fortran.npy":  # the order in memory does not matter
            with pytest.raises(BadImageError):
                decode(data, "npy") if name != "none.npy" else encode_empty(data)


def encode_empty(data: bytes) -> None:
    """An array without pixels can be decoded, but is not an image."""
    assert decode(data, "npy").size == 0
    raise BadImageError("empty")


def test_files_of_every_kind_are_decoded(tmp_path: Path) -> None:
    for name, data in good_files().items():
        (tmp_path / name).write_bytes(data)
        pixels = decode_file(tmp_path / name)
        assert pixels.dtype == np.uint8
        assert sorted(pixels.shape[:2]) == [96, 106]
    for name, data in bad_files().items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImageError):
            decode_file(tmp_path / name)
    with pytest.raises(BadImageError, match="max-megapixels"):
        decode_file(tmp_path / "plain.png", max_megapixels=0.001)
    with pytest.raises(FileNotFoundError):
        decode_file(tmp_path / "missing.npy")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "tiff", "jpeg2000"])
def test_a_file_far_larger_than_its_pixels_is_refused_unread(form: str, tmp_path: Path) -> None:
    (tmp_path / "sparse.png").write_bytes(encoded(photograph(40, 50), form))
    os.truncate(tmp_path / "sparse.png", 3 << 40)
    with pytest.raises(BadImageError, match="40x50"):
        decode_file(tmp_path / "sparse.png")
    # e.g. a thumbnail
    (tmp_path / "notes.png").write_bytes(encoded(photograph(40, 50), form) + bytes(1 << 20))
    np.testing.assert_equal(decode_file(tmp_path / "notes.png").shape, (40, 50, 3))


def frames(form: str, **options: object) -> bytes:
    """Two frames or pages in one file."""
    images = [Image.fromarray(photograph(40, 50, seed)) for seed in range(2)]
    return encoded(images[0], form, save_all=True, append_images=images[1:], **options)


def encoded_jp2(pixels: np.ndarray, bits: int) -> bytes:
    return imagecodecs.jpeg2k_encode(
        pixels, level=0, codecformat="jp2", bitspersample=bits, reversible=True
    )


@pytest.mark.parametrize("form", ["npy", "png", "jp2"])
def test_16_bits_are_stored_without_loss(form: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 52, 3)).astype(np.uint16)
    content = encode(pixels, form)
    np.testing.assert_array_equal(decode(content, form), pixels)
    path = tmp_path / f"a.{form}"
    path.write_bytes(content)
    np.testing.assert_array_equal(decode_file(path, exact=True, depth=None), pixels)
    assert decode_file(path).dtype == np.uint8
    with pytest.raises(BadImageError, match="WebP holds 8"):
        encode(pixels, "webp")


def with_alpha(alpha: int, form: str, mode: str = "RGBA", **options: object) -> bytes:
    pixels = np.dstack([photograph(40, 50), np.full((40, 50), 255, np.uint8)])
    pixels[5, 7, 3] = alpha
    return encoded(Image.fromarray(pixels).convert(mode), form, **options)


def palette() -> Image.Image:
    return Image.fromarray(photograph(40, 50)).convert("P")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded_jp2(photograph(40, 50).astype(np.uint16) * 4, 10), "10 bits"),
        (with_alpha(254, "png"), "transparency"),
        (with_alpha(0, "png", "LA"), "transparency"),
        (with_alpha(254, "webp", lossless=True, exact=True), "transparency"),
        (with_alpha(9, "tiff"), "transparency"),
        (encoded(Image.fromarray(photograph(40, 50)).convert("CMYK"), "jpeg"), "CMYK"),
        (encoded(Image.fromarray(photograph(40, 50)).convert("LAB"), "tiff"), "LAB"),
        (encoded(palette(), "tiff"), "palette"),
        (encoded(palette(), "png", transparency=palette().getpixel((3, 4))), "transparency"),
        (frames("png"), "animation"),
        (frames("webp", lossless=True), "2 frames"),
        (frames("tiff"), "2 frames"),
    ],
)
def test_what_uint8_rgb_cannot_hold_is_refused_where_it_must_be_exact(
    data: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(BadImageError, match=reason):
        decode_file(path, exact=True)


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (with_alpha(255, "png"), "RGB"),
        (with_alpha(255, "tiff"), "RGB"),
        (encoded(Image.fromarray(photograph(40, 50)).convert("L"), "png"), "RGB"),
        (encoded(palette(), "png"), "RGB"),
        (encoded(Image.fromarray(photograph(40, 50)).convert("1"), "png"), "RGB"),
        (encoded(photograph(40, 50), "bmp"), "RGB"),
        (encoded(photograph(40, 50), "tiff"), "RGB"),
        (encoded(photograph(40, 50), "webp"), "RGB"),
        (encoded(photograph(40, 50), "jpeg"), "RGB"),
    ],
)
def test_what_uint8_rgb_can_hold_is_taken(data: bytes, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with Image.open(path) as image:
        np.testing.assert_array_equal(
            decode_file(path, exact=True), np.asarray(image.convert(mode))
        )


def test_a_turned_photograph_is_taken_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    path.write_bytes(encoded(photograph(40, 50), "png", exif=exif(6)))
    np.testing.assert_array_equal(decode_file(path, exact=True), np.rot90(photograph(40, 50), -1))
