"""Encoded files on the host: good ones by their pixels, bad ones by their errors."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from conftest import photograph
from pipeline.data import decoding
from pipeline.data.decoding import (
    BadFileError,
    HostDecoder,
    decoding_fault,
    encoded_size,
    read_encoded,
)
from pipeline.data.image_files import MissingFileError

HEIGHT, WIDTH, CROP = 90, 133, (48, 40)
PHOTO = photograph(1, HEIGHT, WIDTH)
GRAY = PHOTO[..., 0].copy()
RGBA = np.dstack([PHOTO, GRAY])


def pil(pixels: np.ndarray, form: str, mode: str = "", **options: Any) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def several(form: str, **options: Any) -> bytes:
    return pil(
        PHOTO,
        form,
        save_all=True,
        append_images=[Image.fromarray(photograph(2, HEIGHT, WIDTH))],
        **options,
    )


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def opencv(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    is_done, content = cv2.imencode(
        suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, options
    )
    assert is_done
    return content.tobytes()


def exif(orientation: int) -> bytes:
    fields = Image.Exif()
    fields[0x0112] = orientation
    return fields.tobytes()


def tiff_of_orientation(orientation: int) -> bytes:
    return struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def jpeg_with(*segments: bytes) -> bytes:
    whole = pil(PHOTO, "jpeg")
    between = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments
    )
    return whole[:2] + between + whole[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(header: bytes, content: bytes) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


def interlaced_png() -> bytes:
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = (row for top, left, down, right in passes for row in PHOTO[top::down, left::right])
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1), pixels)


def bmp(
    width: int, height: int, bits: int, compression: int, content: bytes, palette: bytes = b""
) -> bytes:
    start = 54 + len(palette)
    return (
        struct.pack("<2sIII", b"BM", start + len(content), 0, start)
        + struct.pack(
            "<IiiHHIIIIII", 40, width, height, 1, bits, compression, len(content), 0, 0, 0, 0
        )
        + palette
        + content
    )


def top_down_bmp() -> bytes:
    rows = np.zeros((HEIGHT, (WIDTH * 3 + 3) // 4 * 4), np.uint8)
    rows[:, : WIDTH * 3] = PHOTO[..., ::-1].reshape(HEIGHT, -1)
    return bmp(WIDTH, -HEIGHT, 24, 0, rows.tobytes())


def run_length_bmp() -> bytes:
    rows = (b"".join(bytes((1, level)) for level in row) + b"\0\0" for row in GRAY[::-1])
    return bmp(
        WIDTH,
        HEIGHT,
        8,
        1,
        b"".join(rows) + b"\0\1",
        b"".join(bytes((i, i, i, 0)) for i in range(256)),
    )


def png_turned_at_its_end(orientation: int) -> bytes:
    whole = pil(PHOTO, "png")
    return whole[:-12] + chunk(b"eXIf", tiff_of_orientation(orientation)) + whole[-12:]


def webp_without_exif_flag() -> bytes:
    whole = bytearray(pil(PHOTO, "webp", lossless=True, exif=exif(6)))
    whole[20] &= ~8
    return bytes(whole)


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)

LOSSLESS: dict[str, Callable[[], bytes]] = {
    "png": lambda: pil(PHOTO, "png"),
    "png of opencv": lambda: opencv(PHOTO, ".png"),
    "png 16 bits": lambda: opencv(PHOTO.astype(np.uint16) * 257, ".png"),
    "png interlaced": interlaced_png,
    "png with more": lambda: pil(PHOTO, "png") + b"and more" * 20,
    "webp": lambda: pil(PHOTO, "webp", lossless=True),
    "webp method 0": lambda: pil(PHOTO, "webp", lossless=True, method=0, quality=20),
    "webp exif 1": lambda: pil(PHOTO, "webp", lossless=True, exif=exif(1)),
    "webp exif unflagged": webp_without_exif_flag,
    "webp with more": lambda: pil(PHOTO, "webp", lossless=True) + b"and more" * 20,
    "bmp": lambda: pil(PHOTO, "bmp"),
    "bmp top down": top_down_bmp,
    "bmp alpha": lambda: pil(RGBA, "bmp"),
    "bmp with more": lambda: pil(PHOTO, "bmp") + b"and more",
    "tiff": lambda: pil(PHOTO, "tiff"),
    "tiff of opencv": lambda: opencv(PHOTO, ".tif"),
    "tiff lzw": lambda: pil(PHOTO, "tiff", compression="tiff_lzw"),
    "tiff deflate": lambda: pil(PHOTO, "tiff", compression="tiff_deflate"),
    "tiff packbits": lambda: pil(PHOTO, "tiff", compression="packbits"),
    "tiff zstandard": lambda: tiff(PHOTO, photometric="rgb", compression="zstd"),
    "tiff strips": lambda: tiff(
        PHOTO, photometric="rgb", rowsperstrip=16, compression="zlib", predictor=True
    ),
    "tiff tiles": lambda: tiff(PHOTO, photometric="rgb", tile=(32, 64), compression="lzw"),
    "tiff planes": lambda: tiff(
        np.moveaxis(PHOTO, -1, 0), photometric="rgb", planarconfig="separate"
    ),
    "tiff big-endian": lambda: tiff(PHOTO, photometric="rgb", byteorder=">"),
    "tiff 64 bits": lambda: tiff(PHOTO, photometric="rgb", bigtiff=True),
    "tiff 16 bits": lambda: tiff(PHOTO.astype(np.uint16) * 257, photometric="rgb"),
    "tiff pages": lambda: several("tiff"),
    "jp2": lambda: pil(PHOTO, "jpeg2000", irreversible=False, mct=1, no_jp2=False),
    "jp2 tiles": lambda: pil(
        PHOTO, "jpeg2000", irreversible=False, tile_size=(64, 64), no_jp2=False
    ),
    "jp2 codestream": lambda: pil(PHOTO, "jpeg2000", irreversible=False, no_jp2=True),
    "jp2 with more": lambda: pil(PHOTO, "jpeg2000", irreversible=False, no_jp2=False) + b"and more",
    "jxl": lambda: imagecodecs.jpegxl_encode(PHOTO, lossless=True),
    "ppm": lambda: pil(PHOTO, "ppm"),
}
"""Files that decode to `PHOTO`."""

OTHERS: dict[str, Callable[[], bytes]] = {
    **{
        f"jpeg subsampling {kind}": lambda kind=kind: pil(PHOTO, "jpeg", subsampling=kind)
        for kind in (0, 1, 2)
    },
    "jpeg 4:1:1": lambda: imagecodecs.jpeg8_encode(PHOTO, subsampling="411"),
    "jpeg progressive": lambda: pil(PHOTO, "jpeg", progressive=True),
    "jpeg restarts": lambda: pil(PHOTO, "jpeg", restart_marker_blocks=4),
    "jpeg gray": lambda: pil(GRAY, "jpeg"),
    "jpeg cmyk": lambda: pil(PHOTO, "jpeg", "CMYK"),
    "jpeg comment": lambda: pil(PHOTO, "jpeg", comment=b"an end \xff\xd9 of nothing"),
    "jpeg thumbnail": lambda: jpeg_with(
        b"Exif\0\0" + tiff_of_orientation(1) + pil(photograph(3, 30, 40), "jpeg")
    ),
    "jpeg with more": lambda: pil(PHOTO, "jpeg") + b"and more" * 20,
    "jpeg with zeros": lambda: pil(PHOTO, "jpeg") + bytes(300),
    "jpeg motion photo": lambda: pil(PHOTO, "jpeg") + pil(photograph(3, 30, 40), "jpeg"),
    "jpeg mpo": lambda: several("mpo"),
    "jpeg xmp": lambda: jpeg_with(XMP),
    "jpeg exif twice": lambda: jpeg_with(
        b"Exif\0\0" + tiff_of_orientation(6), b"Exif\0\0" + tiff_of_orientation(1)
    ),
    "jpeg exif 9": lambda: jpeg_with(b"Exif\0\0" + tiff_of_orientation(9)),
    "jpeg exif cut": lambda: jpeg_with(b"Exif\0\0" + tiff_of_orientation(6)[:12]),
    "png alpha": lambda: pil(RGBA, "png"),
    "png gray": lambda: pil(GRAY, "png"),
    "png palette": lambda: pil(PHOTO, "png", "P"),
    "png 1 bit": lambda: pil(PHOTO, "png", "1"),
    "png animated": lambda: several("png"),
    "webp lossy": lambda: pil(PHOTO, "webp"),
    "webp alpha": lambda: pil(RGBA, "webp"),
    "webp animated": lambda: several("webp", duration=100),
    "bmp gray": lambda: pil(GRAY, "bmp"),
    "bmp run lengths": run_length_bmp,
    "tiff gray": lambda: pil(GRAY, "tiff"),
    "tiff fax": lambda: pil(PHOTO, "tiff", "1", compression="group4"),
    "tiff jpeg": lambda: pil(PHOTO, "tiff", compression="jpeg"),
    "tiff cmyk": lambda: pil(PHOTO, "tiff", "CMYK"),
    "tiff cielab": lambda: pil(PHOTO, "tiff", "LAB"),
    "avif": lambda: pil(PHOTO, "avif"),
    "jp2 lossy": lambda: pil(
        PHOTO, "jpeg2000", irreversible=True, quality_mode="rates", quality_layers=[10]
    ),
    "jp2 alpha": lambda: pil(RGBA, "jpeg2000", no_jp2=False),
    **{
        f"jpeg exif {turn}": lambda turn=turn: pil(PHOTO, "jpeg", exif=exif(turn))
        for turn in range(1, 9)
    },
}
NOT_FOR_DALI = {
    "png alpha",
    "png 16 bits",
    "tiff 16 bits",
    "jpeg cmyk",
    "jpeg xmp",
    "webp alpha",
    "webp animated",
    "tiff fax",
    "tiff jpeg",
    "tiff cmyk",
    "tiff cielab",
    "tiff",
    "tiff of opencv",
    "tiff lzw",
    "tiff deflate",
    "tiff packbits",
    "tiff zstandard",
    "tiff strips",
    "tiff tiles",
    "tiff planes",
    "tiff big-endian",
    "tiff 64 bits",
    "tiff pages",
    "tiff gray",
    "jp2",
    "jp2 tiles",
    "jp2 codestream",
    "jp2 with more",
    "jp2 lossy",
    "jp2 alpha",
    "avif",
    "jxl",
    "ppm",
}
"""Kinds that the one decoder of all commands decodes, whose pixels DALI is given. Of all others it
gets the file."""
TURNED: dict[str, Callable[[int], bytes]] = {
    "png": lambda turn: pil(PHOTO, "png", exif=exif(turn)),
    "png at its end": png_turned_at_its_end,
    "webp": lambda turn: pil(PHOTO, "webp", lossless=True, exif=exif(turn)),
    "tiff": lambda turn: pil(PHOTO, "tiff", tiffinfo={274: turn}),
}
PLAIN = {
    "PNG": "png",
    "WebP": "webp",
    "BMP": "bmp",
    "TIFF": "tiff",
    "JPEG 2000": "jp2",
    "JPEG": "jpeg subsampling 2",
}
"""One file of each format."""


@cache
def content(name: str) -> bytes:
    return {**LOSSLESS, **OTHERS}[name]()


@pytest.fixture(scope="module")
def decoder() -> Iterator[HostDecoder]:
    with HostDecoder(threads=1, batch=4) as decoder:
        yield decoder


def in_a_graph(data: bytes, corner: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (whole image, crop of `CROP` at `corner` decoded alone) from a training graph."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        stream = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True)
        return (
            fn.decoders.image(stream, device="cpu", output_type=types.RGB),
            fn.decoders.image_slice(
                stream,
                start=list(corner),
                shape=list(CROP),
                axes=[0, 1],
                device="cpu",
                output_type=types.RGB,
            ),
        )

    whole, crop = graph().run()
    return np.array(whole.at(0)), np.array(crop.at(0))


def bad(path: Path) -> BadFileError:
    """Return the error for a file, which must be one line that names it."""
    with pytest.raises(BadFileError) as caught:
        read_encoded(str(path))
    error = caught.value
    assert error.path == str(path)
    assert str(error).startswith(f"{path}: {error.reason}; ")
    assert "--clean" in str(error)
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize("name", [*LOSSLESS, *OTHERS])
def test_good_files_raise_no_alarm_and_decode_as_in_training(
    tmp_path: Path, decoder: HostDecoder, name: str
) -> None:
    path = tmp_path / "image.png"  # the content decides, not the name
    path.write_bytes(content(name))
    (image,) = decoder.decode([str(path)])
    assert isinstance(image, np.ndarray), image
    if name in LOSSLESS:
        np.testing.assert_array_equal(image, PHOTO)
    assert encoded_size(str(path)) == image.shape[:2]
    stream = read_encoded(str(path)).stream.tobytes()
    if name in NOT_FOR_DALI:
        assert stream == b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes()
    elif name != "webp exif 1":  # see the test below
        assert stream == content(name)
    corner = (image.shape[0] - CROP[0], 17)
    whole, crop = in_a_graph(stream, corner)
    np.testing.assert_array_equal(image, whole)
    np.testing.assert_array_equal(crop, whole[corner[0] :, corner[1] : corner[1] + CROP[1]])


@pytest.mark.parametrize("name", TURNED)
def test_every_orientation_is_applied(tmp_path: Path, decoder: HostDecoder, name: str) -> None:
    turned = (
        PHOTO,
        PHOTO[:, ::-1],
        PHOTO[::-1, ::-1],
        PHOTO[::-1],
        PHOTO.transpose(1, 0, 2),
        np.rot90(PHOTO, -1),
        PHOTO[::-1, ::-1].transpose(1, 0, 2),
        np.rot90(PHOTO),
    )
    paths = [tmp_path / str(turn) for turn in range(1, 9)]
    for turn, path in enumerate(paths, 1):
        path.write_bytes(TURNED[name](turn))
        assert encoded_size(str(path)) == turned[turn - 1].shape[:2]
    for image, expected in zip(decoder.decode([str(path) for path in paths]), turned, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_an_odd_chunk_before_the_exif_of_webp_is_survived(
    tmp_path: Path, decoder: HostDecoder
) -> None:
    turned = {1: PHOTO, 6: np.rot90(PHOTO, -1)}
    for orientation, expected in turned.items():
        data = pil(PHOTO, "webp", lossless=True, exif=exif(orientation), icc_profile=b"x" * 101)
        path = tmp_path / f"{orientation}.webp"
        path.write_bytes(data)
        (image,) = decoder.decode([str(path)])
        np.testing.assert_array_equal(image, expected)
        stream = read_encoded(str(path)).stream.tobytes()
        changed = [(old, new) for old, new in zip(data, stream, strict=True) if old != new]
        assert changed  # only the lengths of odd chunks
        assert all(old % 2 == 1 and new == old + 1 for old, new in changed if old != 255)
        assert len(changed) <= 4


@pytest.mark.parametrize(
    "name",
    [
        "png",
        "png of opencv",
        "webp",
        "webp exif 1",
        "webp lossy",
        "bmp",
        "bmp top down",
        "bmp alpha",
        "bmp run lengths",
        "tiff",
        "tiff of opencv",
        "tiff lzw",
        "tiff deflate",
        "tiff tiles",
        "tiff planes",
        "tiff 64 bits",
        "jp2",
        "jp2 codestream",
        "jpeg gray",
        "jpeg subsampling 2",
        "jpeg progressive",
        "jpeg restarts",
        "jpeg thumbnail",
    ],
)
def test_a_file_cut_anywhere_is_named(tmp_path: Path, name: str) -> None:
    whole, path = content(name), tmp_path / "cut"
    for length in (
        1,
        10,
        30,
        len(whole) // 50,
        len(whole) // 10,
        len(whole) // 2,
        len(whole) * 9 // 10,
        len(whole) - 100,
        len(whole) - 10,
        len(whole) - 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        if length >= len(whole) - 2 and name.startswith("jpeg") and name != "jpeg progressive":
            assert decoding_fault(str(path)) == ""  # only the end marker is missing
            continue
        reason = bad(path).reason
        assert "truncated" in reason or length < 40, (length, reason)
        with pytest.raises(BadFileError):
            read_encoded(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "jpeg subsampling 2",
        "jpeg progressive",
        "jpeg with zeros",
        "png",
        "png interlaced",
        "jp2",
        "jp2 codestream",
        "tiff strips",
        "tiff deflate",
        "tiff lzw",
        "tiff zstandard",
    ],
)
def test_a_tail_of_zeros_is_named(tmp_path: Path, name: str) -> None:
    whole, path = content(name), tmp_path / "zeros"
    for share in (0.1, 0.5, 0.9):
        start = int((len(whole) - 300) * share)
        path.write_bytes(whole[:start] + bytes(len(whole) - start))
        words = ("truncated", "damaged", "broken", "DALI", "without width and height")
        assert any(word in bad(path).reason for word in words), start


def test_zeros_are_how_lossless_webp_writes_black(tmp_path: Path) -> None:
    image = photograph(1, 600, 900)
    image[200:] = 0
    stream = pil(image, "webp", lossless=True, method=0, quality=20)
    assert bytes(4096) in stream  # so zeros must not count as damage
    (tmp_path / "black.webp").write_bytes(stream)
    assert decoding_fault(str(tmp_path / "black.webp")) == ""


NOT_IMAGES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "nothing": (b"", "empty file"),
    "text": (b"not an image at all", "not an image"),
    "zeros": (bytes(5000), "zero bytes"),
    "gif": (lambda: pil(PHOTO, "gif"), "GIF"),
    "npy": (b"\x93NUMPY\1\0" + bytes(100), ".npy"),
    "jpeg 2000 in tiff, which decodes to black": (
        lambda: tiff(PHOTO, photometric="rgb", compression="jpeg2000"),
        "compression 34712",
    ),
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_what_is_no_image_is_named(tmp_path: Path, kind: str) -> None:
    made, word = NOT_IMAGES[kind]
    path = tmp_path / "image.png"
    path.write_bytes(made if isinstance(made, bytes) else made())
    assert word in bad(path).reason
    assert word in decoding_fault(str(path))
    with pytest.raises(BadFileError, match=word):
        encoded_size(str(path))


@pytest.mark.parametrize(
    "bomb",
    [
        png_of(struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0), bytes(10_000)),
        bmp(30_000, 30_000, 8, 1, b"\0\1", bytes(1024)),
    ],
    ids=["png", "bmp"],
)
def test_an_image_bomb_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: bytes
) -> None:
    monkeypatch.setattr(
        decoding, "_decoding_pipeline", lambda *_: pytest.fail("it was given to DALI")
    )
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    with pytest.raises(BadFileError, match="pixels, more than the limit of 256 Mi"):
        encoded_size(str(path))
    assert "pixels, more than" in bad(path).reason
    assert "pixels, more than" in decoding_fault(str(path))


def test_a_sparse_giant_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "giant.png"
    path.write_bytes(content("png"))
    os.truncate(path, 1 << 40)
    assert "bytes; at most" in bad(path).reason


def test_a_missing_file_is_named(tmp_path: Path, decoder: HostDecoder) -> None:
    path = str(tmp_path / "image.png")
    for function in (encoded_size, read_encoded):
        with pytest.raises(
            MissingFileError, match=r"image\.png: no such file; .*select_training_files"
        ):
            function(path)
    assert decoding_fault(path) == "no such file"
    (tmp_path / "there.png").write_bytes(content("png"))
    missing, there = decoder.decode([path, str(tmp_path / "there.png")])
    assert isinstance(missing, MissingFileError)
    np.testing.assert_array_equal(there, PHOTO)


def test_what_says_nothing_about_the_file_is_no_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "image.png")
    Path(path).write_bytes(content("png"))
    with pytest.raises(NotADirectoryError):
        read_encoded(f"{path}/deeper")
    monkeypatch.setattr(
        os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(OSError, match="Input/output") as fault:
        encoded_size(path)
    assert fault.value.filename == path
    assert "not a regular file" in bad(tmp_path).reason
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in bad(tmp_path / "pipe.png").reason


@pytest.mark.parametrize("name", PLAIN.values())
def test_hostile_bytes_raise_nothing_else(tmp_path: Path, name: str) -> None:
    chance, path = random.Random(name), tmp_path / "hostile"
    found = 0
    for _ in range(300):
        data = bytearray(content(name))
        for _ in range(chance.choice((1, 3, 10))):
            data[int(len(data) * chance.random() ** 4)] = chance.choice(
                (0, 1, 127, 128, 255, chance.randrange(256))
            )
        path.write_bytes(data)
        for function in (encoded_size, read_encoded):
            try:
                function(str(path))
            except BadFileError:
                found += 1
    assert 0 < found < 600


def test_decoding_fault_gives_one_readable_line(tmp_path: Path) -> None:
    damaged = bytearray(content("png"))
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.jpg").write_bytes(damaged)
    # the decoder verifies checksums
    assert read_encoded(str(tmp_path / "damaged.jpg")).stream.tobytes() == damaged
    fault = decoding_fault(str(tmp_path / "damaged.jpg"))
    assert fault.startswith("its PNG data cannot be decoded")
    assert "\n" not in fault
    (tmp_path / "whole.jpg").write_bytes(content("png"))
    assert decoding_fault(str(tmp_path / "whole.jpg")) == ""
    np.save(tmp_path / "whole.npy", PHOTO)
    assert decoding_fault(str(tmp_path / "whole.npy")) == ""
    np.save(tmp_path / "float.npy", PHOTO / 255)
    assert "pixels must be uint8" in decoding_fault(str(tmp_path / "float.npy"))


def test_bad_files_do_not_spoil_the_others(tmp_path: Path, decoder: HostDecoder) -> None:
    damaged = bytearray(content("png"))
    damaged[len(damaged) // 2] ^= 1  # only decoding reveals it
    files = {
        "0.png": content("png"),
        "1.png": bytes(damaged),
        "2.jpg": content("jpeg exif 6"),
        "3.txt": b"text",
        "4.webp": content("webp"),
        "5.jpg": content("jpeg gray")[:900],
        "6.png": bytes(damaged),
        "7.tif": content("tiff lzw"),
        "8.jp2": content("jp2"),
        "9.bmp": content("bmp"),
    }
    paths = [str(tmp_path / name) for name in files]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    images = decoder.decode(paths)
    wrong = {i: image for i, image in enumerate(images) if isinstance(image, BadFileError)}
    assert sorted(wrong) == [1, 3, 5, 6]
    assert all(error.path == paths[i] for i, error in wrong.items())
    for i in (0, 4, 7, 8, 9):
        np.testing.assert_array_equal(images[i], PHOTO)
    assert images[2].shape == (WIDTH, HEIGHT, 3)
    kept = images[0]
    assert kept.flags.c_contiguous
    assert kept.flags.owndata
    decoder.decode([paths[2]] * 9)  # would overwrite pixels that are not copied
    np.testing.assert_array_equal(kept, PHOTO)
    assert decoder.decode([]) == []


def test_closing_ends_the_threads(tmp_path: Path) -> None:
    good, torn = tmp_path / "good.png", tmp_path / "torn.png"
    good.write_bytes(content("png"))
    torn.write_bytes(content("png")[:4000] + b"\0" + content("png")[4001:])

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def once() -> HostDecoder:
        with HostDecoder(threads=3, batch=2) as decoder:
            assert isinstance(decoder.decode([str(good), str(torn), str(good)])[1], BadFileError)
            assert isinstance(decoder.decode([str(good)])[0], np.ndarray)
            assert threads() > before
        return decoder

    before = 0
    once()  # DALI's once-per-process threads remain
    before = threads()
    for _ in range(3):
        closed = once()
    assert threads() == before
    with pytest.raises(ValueError, match="closed"):
        closed.decode([str(good)])
    closed.close()
