"""The PNG encoder: every reader decodes the exact pixels, in every mode, filter and level."""

from __future__ import annotations

import io
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image

from fabricate import picture, shared
from pipeline.data.image_pixels import read_rgb
from pipeline.inference import png


def pixels_of(channels: int, kind: type, height: int = 37, width: int = 53) -> np.ndarray:
    """Return an image that is smooth above and noise below, so that rows get different filters."""
    image = np.concatenate([picture(height, width, 1), picture(height, width, 2)], axis=2)[
        ..., :channels
    ]
    image[height // 2 :] = np.random.default_rng(3).integers(0, 256, image[height // 2 :].shape)
    image = image.astype(kind)
    return (
        image
        if kind == np.uint8
        else image * 257 - np.random.default_rng(4).integers(0, 256, image.shape, kind)
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("level", [None, 0, 6, 12])
def test_every_mode_comes_back(channels, kind, level):
    pixels = pixels_of(channels, kind)
    data = png.encode_png(pixels, level)
    np.testing.assert_array_equal(imagecodecs.png_decode(data).reshape(pixels.shape), pixels)
    if channels != 2:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).reshape(
            pixels.shape
        )
        order = [0] if channels == 1 else [2, 1, 0, 3][:channels]
        np.testing.assert_array_equal(found[..., order], pixels)
    if kind == np.uint8:
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(data))).reshape(pixels.shape), pixels
        )


@pytest.mark.parametrize(("level", "filters"), [(2, {1, 3}), (6, {1, 2, 3, 4})])
def test_every_filter_is_used_where_it_is_the_best(monkeypatch, level, filters):
    # Bands of one or two rows: the row above often belongs to the previous band.
    monkeypatch.setattr(png, "_BAND_BYTES", 300)
    pixels = pixels_of(3, np.uint8, 96, 40)
    pixels[40:60] = pixels[40]  # equal to the row above
    data = png.encode_png(pixels, level)
    np.testing.assert_array_equal(imagecodecs.png_decode(data), pixels)
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + size]), np.uint8).reshape(
        96, -1
    )
    assert {*rows[:, 0].tolist()} == filters


def test_one_pixel_and_large_data_in_several_chunks(monkeypatch):
    one = np.full((1, 1, 3), 7, np.uint8)
    np.testing.assert_array_equal(imagecodecs.png_decode(png.encode_png(one)), one)
    monkeypatch.setattr(png, "_CHUNK_BYTES", 100)
    pixels = pixels_of(3, np.uint8)
    data = png.encode_png(pixels, chunks=png.chunk(b"tEXt", b"a\0b"))
    assert data.count(b"IDAT") > 3
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert Image.open(io.BytesIO(data)).text == {"a": "b"}


def test_photographs_are_smaller_at_level_6_than_by_libpng():
    pixels = read_rgb(shared("data/kodak/1.png"))[:200, :300]
    sizes = [len(png.encode_png(pixels, level)) for level in (1, 2, 6, 12)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < len(imagecodecs.png_encode(pixels, level=6))
