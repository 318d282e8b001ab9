"""Image files of every kind with the pixels they must decode to, computed from the numbers written
into them."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageCms

HEIGHT, WIDTH = 64, 72


@dataclass(frozen=True)
class Case:
    """A file: its content, and what every command must make of it."""

    content: bytes
    expected: np.ndarray | None  # uint8 RGB, upright; None: it must be refused
    tolerance: int = 0
    refusal: str = ""  # part of the reason
    inexact: str = (
        ""  # why convert_dataset.py, which keeps every bit, refuses it; empty: it takes it
    )


def deep_picture() -> np.ndarray:
    """uint16 RGB (HEIGHT, WIDTH, 3): smooth, so that lossy formats preserve it, and with odd low
    bytes."""
    random = np.random.default_rng(5)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.BICUBIC
    )
    return (
        np.asarray(coarse).astype(np.uint16) * 256 + random.integers(0, 256, (HEIGHT, WIDTH, 3))
    ).astype(np.uint16)


DEEP = deep_picture()
PHOTO = np.rint(DEEP / 257).astype(np.uint8)
GRAY, DEEP_GRAY = PHOTO[..., :1], DEEP[..., :1]
DEEP_ALPHA = np.repeat(np.linspace(0, 65535, WIDTH).astype(np.uint16)[None, :, None], HEIGHT, 0)
DEEP_ALPHA[20:24] = 0
DEEP_ALPHA[24:28] = 65535
ALPHA = np.rint(DEEP_ALPHA / 257).astype(np.uint8)


def as_rgb(
    values: np.ndarray, most: int, alpha: np.ndarray | None = None, most_alpha: int = 0
) -> np.ndarray:
    """Convert levels 0..most of gray or colours, over white by `alpha`, to uint8 RGB."""
    share = values.astype(np.float64) / most
    if alpha is not None:
        weight = alpha.astype(np.float64) / (most_alpha or most)
        share = share * weight + (1 - weight)
    return np.broadcast_to(np.rint(share * 255), (*values.shape[:2], 3)).astype(np.uint8)


def turned_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels to store so that `orientation` turns them into `pixels`."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]


def pil(pixels: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.squeeze(pixels))
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(content: bytes) -> np.ndarray:
    """Decode an ordinary 8-bit file with Pillow."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


# TIFF: bits x channels x kind of alpha x planes x tiles x byte order, with alternating compression.

COMPRESSIONS = (
    {},
    {"compression": "lzw"},
    {"compression": "zlib", "predictor": True},
    {"compression": "packbits"},
    {"compression": "zstd"},
)
EXTRA = {
    "none": None,
    "unassociated": "unassalpha",
    "associated": "assocalpha",
    "unspecified": "unspecified",
}


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, metadata=None, **options)
    return file.getvalue()


def tiff_cases() -> Iterator[tuple[str, Case]]:
    turns = itertools.cycle(range(1, 9))
    compressions = itertools.cycle(COMPRESSIONS)
    for bits, colors, extra, planes, tiles, order in itertools.product(
        (8, 16),
        ("gray", "rgb", "white-is-zero"),
        EXTRA,
        ("contig", "separate"),
        (False, True),
        ("<", ">"),
    ):
        if colors == "white-is-zero" and extra != "none":
            continue
        white, kind = (255, np.uint8) if bits == 8 else (65535, np.uint16)
        values = {8: PHOTO, 16: DEEP}[bits][..., : 3 if colors == "rgb" else 1]
        alpha = {8: ALPHA, 16: DEEP_ALPHA}[bits]
        stored, expected, tolerance = values, as_rgb(values, white), 0
        if colors == "white-is-zero":
            stored = white - values
        if extra in ("unassociated", "associated"):
            expected = as_rgb(values, white, alpha)
            if extra == "associated":  # which loses transparent content
                values = np.rint(values * (alpha / white)).astype(kind)
                expected, tolerance = (
                    np.clip(np.rint((values / white + 1 - alpha / white) * 255), 0, 255),
                    1,
                )
                expected, stored = np.broadcast_to(expected, PHOTO.shape).astype(np.uint8), values
            stored = np.concatenate([stored, alpha], 2)
        elif extra == "unspecified":
            stored = np.concatenate([stored, alpha[::-1]], 2)
        turn = next(turns)
        stored = turned_back(stored, turn)
        if planes == "separate":
            if stored.shape[2] == 1:
                continue
            stored = np.moveaxis(stored, -1, 0)
        options = dict(next(compressions))
        if options.get("compression") in ("packbits",) and bits == 16:
            options = {}
        if tiles:
            options["tile"] = (32, 48)
        stored = np.ascontiguousarray(np.squeeze(stored, 2) if stored.shape[2] == 1 else stored)
        photometric = {"gray": "minisblack", "rgb": "rgb", "white-is-zero": "miniswhite"}[colors]
        if extra != "none":
            options["extrasamples"] = [EXTRA[extra]]
        content = tiff(
            stored,
            photometric=photometric,
            planarconfig=planes if stored.ndim == 3 else None,
            byteorder=order,
            extratags=[(274, 3, 1, turn, True)],
            **options,
        )
        inexact = "transparency" if "associated" in extra else ""
        layout, endian = "tiles" if tiles else "strips", "be" if order == ">" else "le"
        name = f"{bits}-{colors}-{extra}-{planes}-{layout}-{endian}"
        yield f"tiff-{name}-turn{turn}.tif", Case(content, expected, tolerance, inexact=inexact)


def other_tiffs() -> Iterator[tuple[str, Case]]:
    flags = PHOTO[..., 0] > 127
    yield "tiff-1bit.tif", Case(tiff(flags, photometric="minisblack"), as_rgb(flags[..., None], 1))
    yield (
        "tiff-1bit-white-is-zero.tif",
        Case(tiff(flags, photometric="miniswhite"), as_rgb(~flags[..., None], 1)),
    )
    yield (
        "tiff-fax.tif",
        Case(
            pil(Image.fromarray(flags), "tiff", compression="group4"), as_rgb(flags[..., None], 1)
        ),
    )
    palette = Image.fromarray(PHOTO).quantize(16)
    yield (
        "tiff-palette.tif",
        Case(pil(palette, "tiff"), np.asarray(palette.convert("RGB")), inexact="palette"),
    )
    yield "tiff-jpeg.tif", Case(pil(PHOTO, "tiff", compression="jpeg", quality=95), PHOTO, 24)
    yield "tiff-big.tiff", Case(tiff(PHOTO, photometric="rgb", bigtiff=True), PHOTO)
    ink = np.dstack([255 - PHOTO, np.full((HEIGHT, WIDTH), 51, np.uint8)])
    expected = np.rint(PHOTO.astype(float) * (255 - 51) / 255).astype(np.uint8)
    yield (
        "tiff-cmyk.tif",
        Case(pil(Image.fromarray(ink, mode="CMYK"), "tiff"), expected, 1, inexact="CMYK"),
    )
    for name, pixels, word in (
        ("float32", (PHOTO / 255).astype(np.float32), "unsigned integers"),
        ("float16", (PHOTO / 255).astype(np.float16), "unsigned integers"),
        ("int16", (DEEP >> 1).astype(np.int16), "unsigned integers"),
        ("int8", (PHOTO >> 1).astype(np.int8), "unsigned integers"),
        ("uint32", DEEP.astype(np.uint32) * 65537, "32 bits"),
    ):
        yield f"tiff-{name}.tif", Case(tiff(pixels, photometric="rgb"), None, refusal=word)
    yield (
        "tiff-uint32-gray.tif",
        Case(
            tiff(DEEP[..., 0].astype(np.uint32), photometric="minisblack"), None, refusal="32 bits"
        ),
    )
    yield (
        "tiff-jpeg2000.tif",
        Case(
            tiff(PHOTO, photometric="rgb", compression="jpeg2000"),
            None,
            refusal="compression 34712",
        ),
    )


# PNG, written by hand: every colour type, depth and transparency.


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(values: np.ndarray, depth: int, color: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """`values`: (height, width, channels), of `depth` bits."""
    height, width, _ = values.shape
    if depth == 16:
        rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    elif depth == 8:
        rows = values.astype(np.uint8).reshape(height, -1)
    else:
        bits = (values >> np.arange(depth)[::-1] & 1).astype(np.uint8)
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
        + b"".join(chunks)
        + chunk(b"IDAT", data)
        + after
        + chunk(b"IEND", b"")
    )


def png_cases() -> Iterator[tuple[str, Case]]:
    for depth in (1, 2, 4, 8, 16):
        most = (1 << depth) - 1
        levels = (DEEP_GRAY >> (16 - depth)).astype(np.int64)
        yield (
            f"png-gray{depth}.png",
            Case(png(levels, depth, 0), as_rgb(levels, most)),
        )
        clear = int(levels[10, 10, 0])
        expected = np.where(levels == clear, 255, as_rgb(levels, most)).astype(np.uint8)
        yield (
            f"png-gray{depth}-clear.png",
            Case(
                png(levels, depth, 0, chunk(b"tRNS", struct.pack(">H", clear))),
                expected,
                inexact="transparency",
            ),
        )
    for depth, values, alpha in ((8, PHOTO, ALPHA), (16, DEEP, DEEP_ALPHA)):
        most = (1 << depth) - 1
        yield (
            f"png-rgb{depth}.png",
            Case(png(values, depth, 2), as_rgb(values, most)),
        )
        clear = values[10, 10]
        expected = np.where(
            (values == clear).all(2, keepdims=True), 255, as_rgb(values, most)
        ).astype(np.uint8)
        yield (
            f"png-rgb{depth}-clear.png",
            Case(
                png(values, depth, 2, chunk(b"tRNS", clear.astype(">u2").tobytes())),
                expected,
                inexact="transparency",
            ),
        )
        for color, colors in ((4, values[..., :1]), (6, values)):
            stored = np.concatenate([colors, alpha], 2)
            yield (
                f"png-alpha{color}-{depth}.png",
                Case(
                    png(stored, depth, color),
                    as_rgb(colors, most, alpha),
                    inexact="transparency",
                ),
            )
    opaque = np.concatenate([PHOTO, np.full_like(ALPHA, 255)], 2)
    yield "png-opaque.png", Case(png(opaque, 8, 6), PHOTO)
    for depth in (1, 2, 4, 8):
        indices = (DEEP_GRAY >> (16 - depth)).astype(np.int64)
        colors = np.random.default_rng(depth).integers(0, 256, (1 << depth, 3), np.uint8)
        plte = chunk(b"PLTE", colors.tobytes())
        yield f"png-palette{depth}.png", Case(png(indices, depth, 3, plte), colors[indices[..., 0]])
        opacity = np.full(1 << depth, 255, np.uint8)
        opacity[: 1 << depth >> 1] = 90
        yield (
            f"png-palette{depth}-clear.png",
            Case(
                png(indices, depth, 3, plte, chunk(b"tRNS", opacity.tobytes())),
                as_rgb(colors[indices[..., 0]], 255, opacity[indices]),
                inexact="transparency",
            ),
        )
    frame = chunk(b"acTL", struct.pack(">II", 1, 0))
    control = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0))
    other = zlib.compress(np.insert(PHOTO[::-1].reshape(HEIGHT, -1), 0, 0, axis=1).tobytes())
    yield (
        "png-animated-default-is-no-frame.png",
        Case(
            png(PHOTO, 8, 2, frame, after=control + chunk(b"fdAT", struct.pack(">I", 1) + other)),
            PHOTO,
            inexact="animation",
        ),
    )
    for turn in range(1, 9):
        yield (
            f"png-turn{turn}.png",
            Case(png(turned_back(PHOTO, turn), 8, 2, chunk(b"eXIf", exif(turn))), PHOTO),
        )
    yield (
        "png-turn6-deep.png",
        Case(png(turned_back(DEEP, 6), 16, 2, chunk(b"eXIf", exif(6))), PHOTO),
    )
    content = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(8))
    yield "png-xmp8.png", Case(png(turned_back(PHOTO, 8), 8, 2, content), PHOTO)


def exif(turn: int) -> bytes:
    return struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, 0x0112, 3, 1, turn, 0, 0)


def xmp(turn: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/>'
        b"</rdf:RDF></x:xmpmeta>" % turn
    )


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_cases() -> Iterator[tuple[str, Case]]:
    kinds = {
        "420": {"subsampling": 2},
        "444": {"subsampling": 0},
        "progressive": {"progressive": True},
    }
    for name, options in kinds.items():
        content = pil(PHOTO, "jpeg", quality=92, **options)
        yield f"jpeg-{name}.jpg", Case(content, opened(content))
    content = pil(GRAY, "jpeg")
    yield "jpeg-gray.jpeg", Case(content, opened(content))
    content = pil(PHOTO, "jpeg", quality=92)
    yield "jpeg-no-end.jpg", Case(content[:-2], opened(content))
    yield "jpeg-half-an-end.jpg", Case(content[:-1], opened(content))
    yield "jpeg-cut.jpg", Case(content[:-40], None, refusal="truncated")
    yield (
        "jpeg-progressive-no-end.jpg",
        Case(pil(PHOTO, "jpeg", progressive=True)[:-2], None, refusal="truncated"),
    )
    twelve = bytearray(content)
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    yield "jpeg-12bit.jpg", Case(bytes(twelve), None, refusal="12 bits")
    for turn in range(1, 9):
        content = pil(np.ascontiguousarray(turned_back(PHOTO, turn)), "jpeg", quality=92)
        expected = turned_again(opened(content), turn)
        for name, metadata in (
            ("turn", b"Exif\0\0" + exif(turn)),
            ("xmp", b"http://ns.adobe.com/xap/1.0/\0" + xmp(turn)),
        ):
            yield (
                f"jpeg-{name}{turn}.jpg",
                Case(content[:2] + segment(0xE1, metadata) + content[2:], expected),
            )
    ink = np.dstack([255 - PHOTO, np.full((HEIGHT, WIDTH), 51, np.uint8)])
    expected = np.rint(PHOTO.astype(float) * (255 - 51) / 255).astype(np.uint8)
    content = pil(Image.fromarray(ink, mode="CMYK"), "jpeg", quality=100, subsampling=0)
    yield "jpeg-cmyk-adobe.jpg", Case(content, expected, 12, inexact="CMYK")
    content = pil(Image.fromarray(255 - ink, mode="CMYK"), "jpeg", quality=100, subsampling=0)
    start = content.index(b"\xff\xee")
    yield (
        "jpeg-cmyk-no-adobe.jpg",
        Case(content[:start] + content[start + 16 :], expected, 12, inexact="CMYK"),
    )


def turned_again(pixels: np.ndarray, turn: int) -> np.ndarray:
    return turned_back(pixels, {6: 8, 8: 6}.get(turn, turn))


# WebP, BMP, JPEG 2000, AVIF, JPEG XL, PNM


def other_cases() -> Iterator[tuple[str, Case]]:
    lossless = {"lossless": True, "exact": True}
    rgba = np.dstack([PHOTO, ALPHA])
    yield "webp-lossless.webp", Case(pil(PHOTO, "webp", **lossless), PHOTO)
    content = pil(PHOTO, "webp", quality=90)
    yield "webp-lossy.webp", Case(content, opened(content))
    yield (
        "webp-alpha.webp",
        Case(pil(rgba, "webp", **lossless), as_rgb(PHOTO, 255, ALPHA), inexact="transparency"),
    )
    turned = np.ascontiguousarray(turned_back(PHOTO, 5))
    yield "webp-turn5.webp", Case(pil(turned, "webp", exif=exif(5), **lossless), PHOTO)
    yield (
        "webp-animated.webp",
        Case(
            pil(
                PHOTO,
                "webp",
                save_all=True,
                append_images=[Image.fromarray(PHOTO[::-1])],
                duration=50,
                **lossless,
            ),
            PHOTO,
            inexact="frames",
        ),
    )
    yield "bmp.bmp", Case(pil(PHOTO, "bmp"), PHOTO)
    yield "bmp-gray.bmp", Case(pil(GRAY, "bmp"), as_rgb(GRAY, 255))
    rows = np.dstack([PHOTO[::-1, :, ::-1], ALPHA[::-1]])
    head = (
        struct.pack("<IiiHHIIIIII", 108, WIDTH, HEIGHT, 1, 32, 3, rows.size, 0, 0, 0, 0)
        + struct.pack("<IIII4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
        + bytes(48)
    )
    yield (
        "bmp-alpha.bmp",
        Case(
            struct.pack("<2sIII", b"BM", 122 + rows.size, 0, 122) + head + rows.tobytes(),
            as_rgb(PHOTO, 255, ALPHA),
            inexact="transparency",
        ),
    )
    yield "jp2.jp2", Case(pil(PHOTO, "jpeg2000", irreversible=False, no_jp2=False), PHOTO)
    yield (
        "jp2-gray.jp2",
        Case(pil(GRAY, "jpeg2000", irreversible=False, no_jp2=False), as_rgb(GRAY, 255)),
    )
    yield (
        "jp2-alpha.jp2",
        Case(
            pil(rgba, "jpeg2000", irreversible=False, no_jp2=False),
            as_rgb(PHOTO, 255, ALPHA),
            inexact="transparency",
        ),
    )
    for bits in (10, 12, 16):
        for name, values in (("rgb", DEEP), ("gray", DEEP_GRAY)):
            levels = values >> (16 - bits)
            content = imagecodecs.jpeg2k_encode(
                np.squeeze(levels), level=0, reversible=True, bitspersample=bits
            )
            yield (
                f"jp2-{name}{bits}.jp2",
                Case(
                    content,
                    as_rgb(levels, (1 << bits) - 1),
                    inexact="" if bits == 16 else f"{bits} bits",
                ),
            )
    smooth = {"quality": 100, "subsampling": "4:4:4"}
    yield "avif.avif", Case(pil(PHOTO, "avif", **smooth), PHOTO, 4)
    yield (
        "avif-alpha.avif",
        Case(pil(rgba, "avif", **smooth), as_rgb(PHOTO, 255, ALPHA), 5, inexact="transparency"),
    )
    yield (
        "avif-turn6.avif",
        Case(
            pil(
                np.ascontiguousarray(turned_back(PHOTO, 6)),
                "avif",
                exif=b"Exif\0\0" + exif(6),
                **smooth,
            ),
            PHOTO,
            4,
        ),
    )
    for bits, values, alpha in (
        (8, PHOTO, ALPHA),
        (16, DEEP, DEEP_ALPHA),
        (10, DEEP >> 6, DEEP_ALPHA >> 6),
    ):
        most, inexact = (1 << bits) - 1, {8: "", 16: "linear"}.get(bits, f"{bits} bits")
        for name, colors in (("rgb", values), ("gray", values[..., :1])):
            # imagecodecs marks deep ones as linear
            tone = colors if bits == 8 else srgb_tone(colors / most) * most
            content = imagecodecs.jpegxl_encode(
                np.squeeze(colors), lossless=True, bitspersample=bits
            )
            yield f"jxl-{name}{bits}.jxl", Case(content, as_rgb(tone, most), 1, inexact=inexact)
            content = imagecodecs.jpegxl_encode(
                np.concatenate([colors, alpha], 2), lossless=True, bitspersample=bits
            )
            yield (
                f"jxl-{name}-alpha{bits}.jxl",
                Case(content, as_rgb(tone, most, alpha), 1, inexact=inexact or "transparency"),
            )
    for most, kind in ((255, np.uint8), (65535, ">u2"), (1000, ">u2"), (100, np.uint8)):
        for letter, suffix, values in (("6", "ppm", DEEP), ("5", "pgm", DEEP_GRAY)):
            levels = np.rint(values / 65535 * most)
            content = (
                f"P{letter}\n# made\n{WIDTH} {HEIGHT}\n{most}\n".encode()
                + levels.astype(kind).tobytes()
            )
            inexact = "" if most in (255, 65535) else f"levels up to {most}"
            yield (
                f"pnm-{suffix}-{most}.{suffix}",
                Case(content, as_rgb(levels, most), most not in (255, 65535), inexact=inexact),
            )
    flags = PHOTO[..., :1] > 127
    content = b"P4 %d %d\n" % (WIDTH, HEIGHT) + np.packbits(~flags[..., 0], axis=1).tobytes()
    yield "pnm.pbm", Case(content, as_rgb(flags, 1))
    text = " ".join(map(str, PHOTO.reshape(-1).tolist()))
    yield "pnm-text.ppm", Case(f"P3\n{WIDTH} {HEIGHT}\n255\n{text}\n".encode(), PHOTO)


# Colour profiles, applied and undone by the formulas of ICC's matrix profiles and of sRGB.

# to XYZ D50
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
GAMMA = 563 / 256


def profile(space: bytes, gamma: float) -> bytes:
    """An ICC profile of version 2: a matrix and a power curve for RGB, a power curve for gray."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    name = b"Wide test"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78),
        b"wtpt": b"XYZ "
        + bytes(4)
        + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249))),
    }
    if space == b"RGB ":
        for letter, column in zip(b"rgb", ADOBE.T, strict=True):
            fixed = np.rint(column * 65536).astype(int)
            tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + struct.pack(">iii", *fixed)
            tags[bytes([letter]) + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for key, content in tags.items():
        content += bytes(-len(content) % 4)
        table += key + struct.pack(">II", at, len(content))
        body, at = body + content, at + len(content)
    head = (
        struct.pack(">I4sI4s4s4s", at, b"none", 0x02400000, b"mntr", space, b"XYZ ")
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + struct.pack(">iii", 63190, 65536, 54061)
    )
    return head + bytes(128 - len(head)) + table + body


def srgb_tone(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_srgb(levels: np.ndarray) -> np.ndarray:
    """Convert uint8 of the RGB profile above to uint8 sRGB."""
    linear = (levels / 255) ** GAMMA @ ADOBE.T @ np.linalg.inv(SRGB).T
    return np.rint(255 * srgb_tone(linear)).astype(np.uint8)


def profile_cases() -> Iterator[tuple[str, Case]]:
    wide, inexact = profile(b"RGB ", GAMMA), "Wide test"
    tame = PHOTO // 2 + 64  # colours within sRGB
    assert np.abs(to_srgb(tame).astype(int) - tame).max() > 10
    for name, content in (
        ("png", pil(tame, "png", icc_profile=wide)),
        ("tif", pil(tame, "tiff", icc_profile=wide)),
        ("webp", pil(tame, "webp", lossless=True, icc_profile=wide)),
        ("jpg", pil(tame, "jpeg", quality=98, subsampling=0, icc_profile=wide)),
        ("avif", pil(tame, "avif", quality=100, subsampling="4:4:4", icc_profile=wide)),
    ):
        yield (
            f"profile-wide-of-{name}.{name}",
            Case(content, to_srgb(opened(content)), 2, inexact=inexact),
        )
    deep = tiff(tame.astype(np.uint16) * 257, photometric="rgb", iccprofile=wide)
    yield "profile-wide-deep.tif", Case(deep, to_srgb(tame), 2, inexact="Wide test")
    gray = as_rgb(srgb_tone((GRAY / 255) ** 1.75), 1)
    yield (
        "profile-gray.png",
        Case(pil(GRAY, "png", icc_profile=profile(b"GRAY", 1.75)), gray, 2, inexact=inexact),
    )
    standard = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "profile-srgb.png", Case(pil(PHOTO, "png", icc_profile=standard), PHOTO)
    yield "profile-broken.png", Case(pil(PHOTO, "png", icc_profile=b"no profile" * 20), PHOTO)


def foreign_cases() -> Iterator[tuple[str, Case]]:
    heic = struct.pack(">I4s4sI4s", 24, b"ftyp", b"heic", 0, b"mif1") + b"heic" + bytes(200)
    yield "foreign-heic.jpg", Case(heic, None, refusal="HEIC")
    yield "foreign-gif.png", Case(pil(Image.fromarray(PHOTO), "gif"), None, refusal="GIF")
    yield "foreign-text.png", Case(b"no image at all\n" * 20, None, refusal="not an image")
    yield "foreign-empty.png", Case(b"", None, refusal="empty")


def make_cases() -> dict[str, Case]:
    return {
        name: case
        for made in (
            tiff_cases,
            other_tiffs,
            png_cases,
            jpeg_cases,
            other_cases,
            profile_cases,
            foreign_cases,
        )
        for name, case in made()
    }


CASES = make_cases()
GOOD = {name: case for name, case in CASES.items() if case.expected is not None}
BAD = {name: case for name, case in CASES.items() if case.expected is None}
