"""pipeline.data.image_pixels: photographs of any kind become upright RGB bytes."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from dataset_corpus import bad_files, deep_png, encoded, exif, good_files, photograph
from pipeline.data import image_pixels
from pipeline.data.image_headers import BadImageError, ImageHeader, read_header
from pipeline.data.image_pixels import check_megapixels, decode_rgb, prepare_decoders
from tools.parallel import quiet_libraries

PIXELS = photograph(60, 80)
BAD = bad_files()


@pytest.fixture(autouse=True)
def _decoders(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    threads = cv2.getNumThreads()
    prepare_decoders()
    with quiet_libraries():
        yield
    cv2.setNumThreads(threads)


def decode(content: bytes) -> np.ndarray:
    """Read the header, then decode, as the tools do."""
    pixels = decode_rgb(content, read_header(io.BytesIO(content)))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("jpeg2000", {}),
        ("webp", {"lossless": True}),
    ],
)
def test_lossless_formats_are_exact(form, options):
    assert np.array_equal(decode(encoded(PIXELS, form, **options)), PIXELS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 60, "subsampling": 2}])
def test_jpeg_equals_pillow(options):
    content = encoded(PIXELS, "jpeg", **options)
    assert np.array_equal(decode(content), np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_gray_and_palette(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(decode(encoded(image, "png")), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_rounded():
    deep = np.random.default_rng(0).integers(0, 65536, (60, 80, 3)).astype(np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    assert np.array_equal(decode(deep_png(deep)), expected)
    assert np.array_equal(decode(deep_png(deep[..., 0])), np.repeat(expected[..., :1], 3, 2))
    tiff = cv2.imencode(".tiff", deep[..., ::-1])[1].tobytes()
    assert np.array_equal(decode(tiff), expected)


@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_transparency_is_composited_over_white(form):
    alpha = np.random.default_rng(1).integers(0, 256, PIXELS.shape[:2]).astype(np.uint8)
    alpha[:9] = 0
    alpha[9:18] = 255
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    pixels = decode(encoded(np.dstack([PIXELS, alpha]), form, **options))
    weight = alpha[..., None] / 255
    assert np.abs(pixels - (PIXELS * weight + 255 * (1 - weight))).max() <= 0.5 + 1e-9
    assert (pixels[:9] == 255).all()
    assert np.array_equal(pixels[9:18], PIXELS[9:18])


def test_transparency_of_sixteen_bits_and_of_palettes():
    alpha = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80, 1)
    deep = PIXELS.astype(np.uint16) * 257
    weight = alpha / 65535
    pixels = decode(deep_png(np.concatenate([deep, alpha], 2)))
    assert np.abs(pixels - (PIXELS * weight + 255 * (1 - weight))).max() <= 0.51
    palette = Image.fromarray(PIXELS).convert("P")
    clear = palette.getpixel((0, 0))
    pixels = decode(encoded(palette, "png", transparency=clear))
    assert (pixels[np.asarray(palette) == clear] == 255).all()


def gray_png(levels: np.ndarray, depth: int, clear: int) -> bytes:
    """A gray PNG of 1, 2, 4, 8 or 16 bits with one transparent level."""
    bits = (levels[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8)
    rows = np.packbits(bits.reshape(len(levels), -1), axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", levels.shape[1], len(levels), depth, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", clear),
        b"IDAT": zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes()),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_gray_png_is_white(depth):
    """Only that exact level: with 16 bits, neighbours that round to the same byte are kept."""
    levels = np.random.default_rng(depth).integers(0, 1 << depth, (40, 51))
    levels[3, 3:30] = clear = (1 << depth) // 3
    levels[4] = min(clear + 1, (1 << depth) - 1)
    expected = np.rint(levels * 255 / ((1 << depth) - 1))
    expected[levels == clear] = 255
    pixels = decode(gray_png(levels, depth, clear))
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_cmyk_of_adobe_is_not_inverted():
    pixels = decode(encoded(Image.new("CMYK", (64, 64), (0, 0, 0, 0)), "jpeg"))
    assert pixels.min() >= 250
    pixels = decode(encoded(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), "jpeg"))
    assert np.abs(pixels.astype(int) - (0, 255, 255)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_exif_orientation(form, orientation):
    options = {"lossless": True} if form == "webp" else {}
    content = encoded(PIXELS, form, exif=exif(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decode(content), np.asarray(expected))
    assert decode(content).shape == ((60, 80, 3) if orientation < 5 else (80, 60, 3))


@pytest.mark.parametrize("name", BAD)
def test_bad_files_raise_a_reason(name):
    with pytest.raises(BadImageError) as error:
        decode(BAD[name])
    assert str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_whose_end_marker_alone_is_missing_is_read(cut):
    content = encoded(PIXELS, "jpeg")
    assert np.array_equal(decode(content[:-cut]), decode(content))


@pytest.mark.parametrize("cut", [3, 4, 13, 400])
def test_a_jpeg_with_missing_pixels_is_an_error(cut):
    with pytest.raises(BadImageError, match="pixels are missing"):
        decode(encoded(PIXELS, "jpeg")[:-cut])


@pytest.mark.parametrize("cut", [1, 2, 13, 400])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("png", {}),
        ("jpeg", {"progressive": True}),
        ("webp", {}),
        ("jpeg2000", {}),
        ("tiff", {}),
        ("bmp", {}),
    ],
)
def test_a_missing_tail_is_an_error(form, options, cut):
    """Some decoders fill missing pixels with gray or ignore the last bytes; the tools must not."""
    with pytest.raises(BadImageError):
        decode(encoded(PIXELS, form, **options)[:-cut])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "jpeg2000"])
def test_a_forgiving_decoder_is_not_believed(monkeypatch, form):
    """A decoder may fill missing parts with gray and report success; this must be noticed."""
    monkeypatch.setattr(
        image_pixels, "_decode_plain", lambda data, header: np.full_like(PIXELS, 128)
    )
    content = encoded(PIXELS, form, **({"progressive": True} if form == "jpeg" else {}))
    assert (decode(content) == 128).all()
    with pytest.raises(BadImageError):
        decode(content[: len(content) // 2])


def test_what_cannot_be_kept_right_is_refused():
    floats = cv2.imencode(".tiff", PIXELS[..., 0].astype(np.float32))[1].tobytes()
    with pytest.raises(BadImageError, match="unsigned integers"):
        decode(floats)
    twelve = bytearray(encoded(PIXELS, "jpeg"))
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(BadImageError, match="12 bits"):
        decode(bytes(twelve))


def test_megapixel_limit():
    check_megapixels(ImageHeader("png", 1000, 2000), 2)
    with pytest.raises(
        BadImageError, match=r"1000x2001 is 2 megapixels, above the limit of 2 \(--max-megapixels\)"
    ):
        check_megapixels(ImageHeader("png", 1000, 2001), 2)


def test_good_corpus_decodes():
    for name, content in good_files().items():
        assert decode(content).shape[2] == 3, name
