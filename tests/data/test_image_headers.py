"""pipeline.data.image_headers: sizes without decoding, and checks for completeness."""

from __future__ import annotations

import io
import struct
from contextlib import suppress

import pytest
from PIL import Image

from dataset_corpus import bad_files, encoded, exif, good_files, photograph
from pipeline.data.image_headers import BadImageError, check_complete, read_header

GOOD, BAD = good_files(), bad_files()


@pytest.mark.parametrize("name", GOOD)
def test_size_is_what_pillow_says(name):
    header = read_header(io.BytesIO(GOOD[name]))
    assert (header.height, header.width) == (96, 106)
    check_complete(GOOD[name], header)


@pytest.mark.parametrize(
    ("name", "lossy"),
    [
        ("photo.JpEg", True),
        ("progressive.jpg", True),
        ("cmyk.jpg", True),
        ("lossy.webp", True),
        ("lossless.webp", False),
        ("plain.png", False),
        ("photo.jp2", False),
        ("photo.tiff", False),
        ("photo.bmp", False),
        ("really_a_jpeg.png", True),
    ],
)
def test_lossy(name, lossy):
    assert read_header(io.BytesIO(GOOD[name])).is_lossy is lossy


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("jpeg2000", {"irreversible": True}),
        ("tiff", {"compression": "jpeg"}),
        ("webp", {"exif": exif(1)}),
    ],
)
def test_lossy_in_unusual_files(form, options):
    assert read_header(io.BytesIO(encoded(photograph(64, 64), form, **options))).is_lossy


def test_extended_lossless_webp_is_lossless():
    content = encoded(photograph(64, 70), "webp", lossless=True, exif=exif(1))
    assert content[12:16] == b"VP8X"
    header = read_header(io.BytesIO(content))
    assert (header.height, header.width, header.is_lossy) == (64, 70, False)


@pytest.mark.parametrize("marker", [*range(0xC0, 0xD0)])
def test_all_jpeg_frame_markers(marker):
    """SOF0..15 contain a size; DHT, JPG and DAC, in the same range, do not."""
    frame = struct.pack(">BBHBHHB", 0xFF, marker, 17, 8, 123, 456, 3) + bytes(9)
    content = b"\xff\xd8" + b"\xff\xfe\x00\x04hi" + b"\xff" + frame + b"\xff\xd9"
    if marker in (0xC4, 0xC8, 0xCC):
        with pytest.raises(BadImageError, match="without a frame header"):
            read_header(io.BytesIO(content))
    else:
        header = read_header(io.BytesIO(content))
        assert (header.height, header.width) == (123, 456)


def test_big_tiff_and_big_endian():
    entries = [(256, 4, 1, 70), (257, 4, 1, 60), (258, 3, 1, 8), (277, 3, 1, 1), (262, 3, 1, 1)]
    big = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries)) + b"".join(
        struct.pack("<HHQQ", *entry) for entry in entries
    )
    header = read_header(io.BytesIO(big))
    assert (header.height, header.width, header.depth) == (60, 70, 8)
    motorola = struct.pack(">2sHIH", b"MM", 42, 8, 2) + struct.pack(
        ">HHIHHHHII", 256, 3, 1, 70, 0, 257, 4, 1, 60
    )
    header = read_header(io.BytesIO(motorola))
    assert (header.height, header.width) == (60, 70)


def test_dimensions_of_a_bomb_need_no_decoding():
    content = bytearray(encoded(Image.new("1", (8, 8)), "png"))
    content[16:24] = struct.pack(">II", 100_000, 90_000)
    header = read_header(io.BytesIO(bytes(content)))
    assert (header.height, header.width) == (90_000, 100_000)


@pytest.mark.parametrize("name", [*BAD, "nothing"])
def test_bad_files_are_found_without_decoding(name):
    content = BAD.get(name, b"")
    if name == "cut.bmp":  # its decoder detects that
        return
    with pytest.raises(BadImageError):
        check_complete(content, read_header(io.BytesIO(content)))


@pytest.mark.parametrize(
    "name",
    [
        "plain.png",
        "photo.JpEg",
        "progressive.jpg",
        "restarts.jpg",
        "lossy.webp",
        "lossless.webp",
        "photo.jp2",
    ],
)
def test_every_cut_is_noticed(name):
    content = GOOD[name]
    for length in {*range(0, len(content) - 40, 61), *range(len(content) - 40, len(content))}:
        part = content[:length]
        with pytest.raises(BadImageError):
            check_complete(part, read_header(io.BytesIO(part)))


@pytest.mark.parametrize("name", GOOD)
def test_headers_survive_any_cut_and_flip(name):
    """Hostile bytes give a header or a BadImageError, never another exception."""
    content = GOOD[name]
    for at in range(0, min(len(content), 700), 3):
        for part in (content[:at], content[:at] + bytes([content[at] ^ 0x81]) + content[at + 1 :]):
            with suppress(BadImageError):
                check_complete(part, read_header(io.BytesIO(part)))


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photo():
    thumbnail = encoded(photograph(32, 32), "jpeg")
    content = encoded(photograph(96, 96), "jpeg")
    content = (
        content[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + content[2:]
    )
    check_complete(content, read_header(io.BytesIO(content)))
    assert b"\xff\xd9" in content[:-500]
    with pytest.raises(BadImageError, match="no end-of-image"):
        check_complete(content[:-500], read_header(io.BytesIO(content)))


def test_bytes_after_the_end_do_no_harm():
    for name in ("plain.png", "photo.JpEg", "lossy.webp"):
        content = GOOD[name] + b"appended by a camera"
        check_complete(content, read_header(io.BytesIO(content)))
