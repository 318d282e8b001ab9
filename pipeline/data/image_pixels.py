"""Decode image files to pixels, for every command; only training decodes its plain files elsewhere.

`decode_picture` keeps what the file holds: gray or colour, with or without alpha, 8 or 16 bits, in
the colour space of its profile; upscale.py works on that. `decode_rgb` reduces it to what networks
are trained and measured on: RGB of 8 or 16 bits.

- Pixels are upright: rotated as EXIF says, or else XMP.
- 16 bits become 8 by round(v / 257), 8 bits become 16 by 257 v, other depths by
  round(v * 255 / maximum) or round(v * 65535 / maximum).
- Transparent parts are composited over white, because the colours under them are often garbage.
- A colour profile other than sRGB is converted to sRGB; see `foreign_profile`.

Needs no torch. All functions may run in several threads at once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.cli import UserError
from pipeline.data.image_headers import (
    JXL_LINEAR,
    JXL_PREMULTIPLIED,
    SYCC,
    BadImageError,
    ImageHeader,
    NoEndError,
    check_complete,
    check_file_size,
    png_chunks,
    read_header,
    with_end,
    without_harmless_defect,
)
from pipeline.files import open_regular_file
from pipeline.libraries import cv2

MAX_MEGAPIXELS = 1000  # OpenCV refuses images of more than 2^30 pixels
Bytes = NDArray[np.uint8]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]

# EXIF orientation -> (transpose first, then flip vertically, flip horizontally)
_ORIENTATIONS = {
    1: (0, 0, 0),
    2: (0, 0, 1),
    3: (0, 1, 1),
    4: (0, 1, 0),
    5: (1, 0, 0),
    6: (1, 0, 1),
    7: (1, 1, 1),
    8: (1, 1, 0),
}


@dataclass(frozen=True)
class DecodedImage:
    """The whole content of an image file, upright."""

    pixels: Pixels
    """(height, width, channels): 1 channel is gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.

    Alpha is straight: the colours are not multiplied by it.
    """
    profile: bytes | None = None
    """ICC profile of the colours of `pixels`."""


def prepare_decoders() -> None:
    """Set up the libraries for our own threads: one core per image, no logging, our pixel limit."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    imagecodecs.spng_version()  # load it now, not in several threads at once
    Image.init()  # fill the plugin table now, not in several threads at once
    Image.MAX_IMAGE_PIXELS = None  # check_megapixels is called first


def check_megapixels(header: ImageHeader, max_megapixels: float) -> None:
    """Raise `BadImageError` for an image that would fill the memory, before decoding it."""
    megapixels = header.height * header.width / 1e6
    if megapixels > max_megapixels:
        raise BadImageError(
            f"{header.height}x{header.width} is {megapixels:.0f} megapixels, above the limit of "
            f"{max_megapixels:g} (--max-megapixels)"
        )


def read_rgb(path: str | os.PathLike[str], depth: int = 8) -> Any:
    """Read an image file as RGB (height, width, 3): uint8, or uint16 if `depth` is 16.

    Raises `UserError`, which names the file, if it cannot be read.
    """
    with naming(path), open_regular_file(path) as file:
        header = read_header(file)
        check_megapixels(header, MAX_MEGAPIXELS)
        check_file_size(header, os.fstat(file.fileno()).st_size)
        file.seek(0)
        return decode_rgb(file.read(), header, depth)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read (height, width) of an upright image from its header; raises the errors of `read_rgb`."""
    with naming(path), open_regular_file(path) as file:
        return read_header(file).size


def read_depth(path: str | os.PathLike[str]) -> int:
    """Read the bits per value, 8 or 16, of an image's pixels; raises the errors of `read_rgb`."""
    with naming(path), open_regular_file(path) as file:
        return read_header(file).pixel_depth


def read_profile(path: str | os.PathLike[str]) -> str:
    """Return `foreign_profile` of an image file; "" if it cannot be read."""
    try:
        with open_regular_file(path) as file:
            return foreign_profile(read_header(file))
    except (OSError, BadImageError):
        return ""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors about an unreadable image into a `UserError` that names the file `path`."""
    try:
        yield
    except BadImageError as error:
        raise UserError(
            f"image {os.fspath(path)!r} cannot be read ({error}); replace or remove it"
        ) from error
    except OSError as error:
        raise UserError(
            f"image {os.fspath(path)!r} cannot be read ({error.strerror or error}); replace or "
            "remove it"
        ) from error


def decode_rgb(data: bytes, header: ImageHeader, depth: int = 8) -> Any:
    """Decode an image to RGB (height, width, 3): upright, sRGB, composited over white.

    The pixels are uint8, or uint16 if `depth` is 16, whatever the file holds. Raises
    `BadImageError` with the reason; never returns a partial image. Damaged data is detected by
    checksums (PNG, deflated TIFF) or because the code is invalid (JPEG, lossless WebP, LZW). Lossy
    WebP, JPEG 2000 and uncompressed data have neither, so wrong bytes give wrong pixels.
    """
    if has_fast_decoder(header) and not foreign_profile(header):
        pixels = _rotated(_checked(data, header, _decode_plain), header.orientation)
        return in_depth(pixels, depth)
    return to_rgb(decode_picture(data, header), depth)


def decode_plain(data: bytes, header: ImageHeader) -> Bytes:
    """Decode a plain PNG, JPEG or WebP (`is_plain`) to uint8 RGB, as stored, without applying EXIF.

    Uses the fastest decoders, whose pixels equal DALI's to the bit. What libjpeg only warns of is
    an error here. `data` must have passed `check_complete`. Returns (height, width, 3); raises
    `BadImageError` with the reason.
    """
    return _decoded(data, header, _decode_plain)


def decode_picture(data: bytes, header: ImageHeader) -> DecodedImage:
    """Decode an image with everything the file holds; raises the errors of `decode_rgb`."""
    pixels = _checked(data, header, _DECODERS[header.format])
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if not 1 <= pixels.shape[2] <= 4:
        raise BadImageError(
            f"{pixels.shape[2]} channels; only gray and RGB are supported, with or without alpha"
        )
    profile = header.profile
    if profile is not None and not profile[16:20] == _space(header) == _SPACES[pixels.shape[2]]:
        profile = None  # e.g. a CMYK profile, after conversion to RGB
    return DecodedImage(
        pixels if _decoder_rotates(header) else _rotated(pixels, header.orientation), profile
    )


def to_rgb(image: DecodedImage, depth: int = 8) -> Any:
    """Convert to RGB (height, width, 3) of 8 or 16 bits: sRGB, composited over white."""
    pixels = image.pixels
    alpha, has_alpha = pixels[..., -1:], pixels.shape[2] in (2, 4)
    colors = pixels[..., :-1] if has_alpha else pixels
    if image.profile is not None and profile_name(image.profile):
        colors, alpha = (
            _by_profile(in_depth(colors, depth), image.profile),
            in_depth(alpha, depth),
        )
    if has_alpha:
        colors = over_white(colors, alpha)
    colors = in_depth(colors, depth)
    return _contiguous(np.repeat(colors, 3, axis=2) if colors.shape[2] == 1 else colors)


def to_8_bits(pixels: np.ndarray) -> Bytes:
    """Convert uint16 to uint8 by round(v / 257); return uint8 unchanged."""
    return (
        pixels
        if pixels.dtype == np.uint8
        else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    )


def in_depth(pixels: np.ndarray, depth: int) -> np.ndarray:
    """Return uint8 or uint16 pixels in `depth` bits, 8 or 16: 257 v, or round(v / 257)."""
    if depth == 8:
        return to_8_bits(pixels)
    return pixels if pixels.dtype == np.uint16 else pixels * np.uint16(257)


BAND = 64  # rows


def over_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite 8-bit or 16-bit `colors` (height, width, channels) over white.

    `alpha` is (height, width, 1), of the same type.
    """
    white = int(np.iinfo(colors.dtype).max)
    wide = np.uint64 if white > 255 else np.uint32
    composited = np.empty(colors.shape, colors.dtype)
    # In bands of rows, because the products of a whole image need several times its memory.
    for top in range(0, len(colors), BAND):
        band = slice(top, top + BAND)
        share = alpha[band].astype(wide)
        composited[band] = (colors[band] * share + white * (white - share) + white // 2) // white
    return composited


def decoder_name(header: ImageHeader) -> str:
    """Return the library and version that decodes an image, and any profile it converts."""
    foreign = foreign_profile(header)
    return f"{_library(header)}{f', {foreign} to sRGB' if foreign else ''}"


def _library(header: ImageHeader) -> str:
    if _is_for_spng(header):
        return imagecodecs.spng_version()
    if header.is_plain and header.format == "jpeg":
        return f"simplejpeg {simplejpeg.__version__}"
    if has_fast_decoder(header):
        return f"opencv {cv2.__version__}"
    is_deep = header.depth > 8 or (
        header.format == "png" and header.depth == 8 and header.channels != 1
    )
    by_imagecodecs = (
        header.format == "jxl" or is_deep or (header.format == "tiff" and _is_for_libtiff(header))
    )
    return (
        f"imagecodecs {imagecodecs.__version__}" if by_imagecodecs else f"pillow {PIL.__version__}"
    )


# Colour profiles.


_SPACES = {1: b"GRAY", 2: b"GRAY", 3: b"RGB ", 4: b"RGB "}
_NEAR_SRGB = 3  # largest difference (0..255) from sRGB of a profile that counts as sRGB


def foreign_profile(header: ImageHeader) -> str:
    """Return the name of the profile to convert to sRGB from; "" if the pixels are sRGB already."""
    if header.tags.get(JXL_LINEAR) == (1,) and header.format == "jxl":
        return "linear sRGB"
    profile = header.profile
    return profile_name(profile) if profile is not None and profile[16:20] == _space(header) else ""


def _space(header: ImageHeader) -> bytes:
    """Return the colour space of the stored samples, as ICC profiles name it."""
    return {"gray": b"GRAY", "CMYK": b"CMYK"}.get(header.colors, b"RGB ")


@lru_cache(maxsize=256)
def profile_name(profile: bytes) -> str:
    """Return the name of a profile; "" if its colours equal sRGB's or it is broken."""
    try:
        read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = (
            " ".join((ImageCms.getProfileDescription(read) or "").split())
            or "a nameless colour profile"
        )
        if profile[16:20] == b"CMYK":
            return name
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        if profile[16:20] == b"GRAY":
            colors = levels[None, :, None]
        else:
            colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        converted = _by_profile(colors, profile).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return ""
    return name if np.abs(converted - colors).max() > _NEAR_SRGB else ""


def _by_profile(colors: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert gray or RGB (height, width, 1 or 3) from a profile's colours to sRGB.

    uint8 is converted by Pillow, uint16 by imagecodecs; both call Little CMS.
    """
    if colors.dtype == np.uint16:
        return imagecodecs.cms_transform(
            np.ascontiguousarray(colors[..., 0] if colors.shape[2] == 1 else colors),
            profile,
            _srgb_profile(),
            colorspace="gray" if colors.shape[2] == 1 else "rgb",
            outcolorspace="rgb",
            outdtype=np.uint16,
            intent=int(ImageCms.Intent.RELATIVE_COLORIMETRIC),
            # Otherwise Little CMS interpolates 16 bits in a coarse table, up to 14 levels off.
            flags=int(ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE),
        )
    image = Image.fromarray(
        np.ascontiguousarray(colors[..., 0] if colors.shape[2] == 1 else colors)
    )
    return np.asarray(_to_srgb(image, profile))


@lru_cache(maxsize=1)
def _srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    return ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


# Decoders by format. Each returns the pixels as stored, with 8 or 16 bits; `_decoder_rotates` names
# the formats that their decoder rotates.


def _checked(
    data: bytes, header: ImageHeader, decode: Callable[[bytes, ImageHeader], np.ndarray]
) -> np.ndarray:
    """Run `decode` on an image after checking that it is complete; check the decoded size."""
    try:
        check_complete(data, header)
    except NoEndError:
        whole = with_end(data, header)
        if whole is None:
            raise
        try:
            return _decoded(whole, header, decode)
        except BadImageError:
            raise BadImageError(
                "truncated: the JPEG has no end-of-image marker, and pixels are missing"
            ) from None
    return _decoded(data, header, decode)


def _decoded(
    data: bytes, header: ImageHeader, decode: Callable[[bytes, ImageHeader], np.ndarray]
) -> np.ndarray:
    try:
        pixels = decode(data, header)
    except BadImageError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for hostile bytes
        if isinstance(error, MemoryError):
            raise BadImageError("not enough memory to decode it") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if "BytesIO object" in reason:
            reason = f"damaged, or an unsupported kind of {header.title}"
        raise BadImageError(f"cannot be decoded: {reason[:200]}") from error
    if pixels.shape[:2] != (
        header.size if _decoder_rotates(header) else (header.height, header.width)
    ):
        raise BadImageError(
            f"decoded to {pixels.shape[0]}x{pixels.shape[1]}, but its header says "
            f"{header.height}x{header.width}"
        )
    return pixels


def has_fast_decoder(header: ImageHeader) -> bool:
    """Return whether a dedicated fast decoder reads the image as 8-bit RGB."""
    return header.is_plain and header.format in ("png", "jpeg", "webp", "jp2")


def _is_for_spng(header: ImageHeader) -> bool:
    return header.format == "png" and header.is_plain and header.channels == 3


def _decode_plain(data: bytes, header: ImageHeader) -> Bytes:
    """Decode 8-bit gray or RGB with the fastest decoder."""
    if _is_for_spng(header):
        pixels = imagecodecs.spng_decode(data)  # 1.3 times as fast as OpenCV's
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise BadImageError(f"decoded to {pixels.dtype} {pixels.shape}")
        return pixels
    if header.format == "jpeg":
        return _strict_jpeg(data, "RGB")
    pixels = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if pixels is None:
        raise BadImageError("cannot be decoded")
    return pixels


def _strict_jpeg(data: bytes, colors: str) -> Bytes:
    """Decode as accurately as libjpeg can; warnings count as errors unless they are harmless."""
    while True:
        try:
            return simplejpeg.decode_jpeg(
                data, colors, fastdct=False, fastupsample=False, strict=True
            )
        except ValueError as error:
            warning = str(error)
        # libjpeg reports only its first warning, so another one may follow.
        repaired = without_harmless_defect(data, warning)
        if repaired is None:
            raise BadImageError(f"damaged: {warning.removeprefix('Corrupt JPEG data: ')}")
        data = repaired


def _decode_jpeg(data: bytes, header: ImageHeader) -> Bytes:
    if header.is_plain:
        return _strict_jpeg(data, "GRAY" if header.channels == 1 else "RGB")
    if header.channels != 4:  # unusual chroma sampling
        return _by_pillow(data, header)
    _strict_jpeg(data, "CMYK")  # to get libjpeg's warnings, which Pillow hides
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if "adobe" not in image.info:  # Pillow assumes inverted inks, as Adobe writes them
            image = Image.fromarray(255 - np.asarray(image), mode="CMYK")
        return _inks_to_rgb(image, header)


def _inks_to_rgb(image: Image.Image, header: ImageHeader) -> Bytes:
    """Convert CMYK to sRGB by its profile, or by Pillow's formula if that is missing or broken."""
    if (
        header.profile is not None
        and header.profile[16:20] == b"CMYK"
        and profile_name(header.profile)
    ):
        return np.asarray(_to_srgb(image, header.profile))
    return np.asarray(image.convert("RGB"))


def _decode_png(data: bytes, header: ImageHeader) -> np.ndarray:
    clear = (
        None
        if header.is_plain or header.channels in (2, 4)
        else dict(png_chunks(data)).get(b"tRNS")
    )
    if header.depth < 8 or header.is_palette:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # raises on truncation, LOAD_TRUNCATED_IMAGES being off
            if header.is_palette:
                return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
            pixels = np.asarray(image.convert("L"))
    else:
        pixels = imagecodecs.png_decode(data)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if clear is None or pixels.shape[2] not in (1, 3):
        return pixels
    # One level or colour is transparent, given in the file's bit depth.
    white, highest = int(np.iinfo(pixels.dtype).max), (1 << header.depth) - 1
    level = np.frombuffer(clear[: 2 * pixels.shape[2]], ">u2").astype(np.int64) & highest
    is_clear = (pixels == level * (white // highest)).all(axis=2, keepdims=True)
    return np.concatenate([pixels, np.where(is_clear, 0, white).astype(pixels.dtype)], axis=2)


def _decode_tiff(data: bytes, header: ImageHeader) -> np.ndarray:
    if not _is_for_libtiff(header):
        return _by_pillow(data, header)
    pixels = imagecodecs.tiff_decode(data)
    if header.tags.get(284, (1,))[0] == 2 and pixels.ndim == 3:  # one plane per channel
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.shape[2] != header.channels:
        raise BadImageError(f"decoded to {pixels.dtype} {pixels.shape}")
    kind = header.tags.get(262, (1,))[0]
    num_colors = 3 if kind == 2 else 1
    if pixels.shape[2] < num_colors:
        raise BadImageError(f"an RGB TIFF with only {pixels.shape[2]} samples per pixel")
    colors, extra = pixels[..., :num_colors], pixels[..., num_colors:]
    if kind == 0:  # zero means white
        colors = np.iinfo(colors.dtype).max - colors
    # Meaning of the extra samples: 0 is unspecified (e.g. infrared from a scanner), 1 premultiplied
    # alpha, 2 straight alpha. If the tag is missing, programs take a single extra sample as alpha.
    kinds = header.tags.get(338, (2,) if extra.shape[2] == 1 else ())
    for number, kind in enumerate(kinds[: extra.shape[2]]):
        if kind in (1, 2):
            alpha = extra[..., number : number + 1]
            return np.concatenate(
                [_unmultiplied(colors, alpha) if kind == 1 else colors, alpha], axis=2
            )
    return np.ascontiguousarray(colors)


def _unmultiplied(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Divide colours by the `alpha` they were multiplied by; white where alpha is 0."""
    white = int(np.iinfo(colors.dtype).max)
    divided = (colors.astype(np.uint64) * white + alpha // 2) // np.maximum(alpha, 1).astype(
        np.uint64
    )
    return np.where(alpha == 0, white, np.minimum(divided, white)).astype(colors.dtype)


def _is_for_libtiff(header: ImageHeader) -> bool:
    """Return whether a TIFF is 8-bit or 16-bit gray or RGB; Pillow reads the rest, in 8 bits."""
    return header.tags.get(262, (1,))[0] in (0, 1, 2) and header.depth in (8, 16)


def _decode_jp2(data: bytes, header: ImageHeader) -> np.ndarray:
    if header.depth == 8:
        return _by_pillow(data, header)
    if header.tags[0][0] == SYCC:
        raise BadImageError(
            f"a JPEG 2000 image with YCC colours and {header.depth} bits is not supported; save it "
            "as RGB"
        )
    return _scaled(imagecodecs.jpeg2k_decode(data), (1 << header.depth) - 1)


def _decode_jxl(data: bytes, header: ImageHeader) -> np.ndarray:
    pixels = _scaled(imagecodecs.jpegxl_decode(data), (1 << header.depth) - 1)
    if pixels.ndim > 3:  # the frames of an animation
        pixels = pixels[0]
    colors, alpha = (
        (pixels[..., :-1], pixels[..., -1:]) if header.channels in (2, 4) else (pixels, None)
    )
    if alpha is not None and header.tags.get(JXL_PREMULTIPLIED) == (1,):
        colors = _unmultiplied(colors, alpha)
    if header.tags.get(JXL_LINEAR) == (1,):
        colors = _from_linear(colors)
    return colors if alpha is None else np.concatenate([colors, alpha], axis=2)


def _from_linear(levels: np.ndarray) -> np.ndarray:
    """Encode linear-light levels with the sRGB curve, at the same bit depth."""
    white = int(np.iinfo(levels.dtype).max)
    light = np.arange(white + 1) / white
    table = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(table * white).astype(levels.dtype)[levels]


def _scaled(pixels: np.ndarray, most: int) -> np.ndarray:
    """Scale levels 0..`most` to the full range of 8 or 16 bits, rounded."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BadImageError(
            f"decoded to {pixels.dtype}; only unsigned integers of up to 16 bits are supported"
        )
    white = 255 if most < 256 else 65535
    if most == white:
        return pixels
    kind = np.uint8 if white == 255 else np.uint16
    return ((np.minimum(pixels, most).astype(np.uint32) * white + most // 2) // most).astype(kind)


def _decode_pnm(data: bytes, header: ImageHeader) -> np.ndarray:
    kind, most = header.tags[0]
    if kind not in (5, 6):
        return _by_pillow(data, header)
    shape = header.height, header.width, header.channels
    raw = np.frombuffer(
        data, ">u2" if most > 255 else np.uint8, int(np.prod(shape)), header.pixels_at
    )
    return _scaled(raw.astype(raw.dtype.newbyteorder("=")).reshape(shape), most)


def _by_pillow(data: bytes, header: ImageHeader) -> Bytes:
    """Decode 8 bits per sample with Pillow, in the fewest channels that hold the whole content."""
    with Image.open(io.BytesIO(data)) as image:
        if {image.width, image.height} != {header.width, header.height}:
            raise BadImageError(
                f"conflicting sizes: {image.height}x{image.width} and "
                f"{header.height}x{header.width}"
            )
        image.load()  # raises on truncation, LOAD_TRUNCATED_IMAGES being off
        has_alpha = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa")
        if image.mode == "CMYK":
            return _inks_to_rgb(image, header)
        if image.mode in ("1", "L"):
            mode = "RGBA" if has_alpha else "L"
        elif image.mode == "LA":
            mode = "LA"
        elif image.mode in ("La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "LAB", "HSV"):
            mode = "RGBA" if has_alpha else "RGB"
        else:
            raise BadImageError(
                f"pixels of mode {image.mode!r} are not supported; save it as RGB with 8 or 16 bits"
            )
        return np.array(image if image.mode == mode else image.convert(mode))


_DECODERS: dict[str, Callable[[bytes, ImageHeader], np.ndarray]] = {
    "png": _decode_png,
    "jpeg": _decode_jpeg,
    "tiff": _decode_tiff,
    "jp2": _decode_jp2,
    "jxl": _decode_jxl,
    "pnm": _decode_pnm,
    **dict.fromkeys(("webp", "bmp", "avif", "gif", "tga"), _by_pillow),
}


def _decoder_rotates(header: ImageHeader) -> bool:
    """Return whether the decoder rotates the pixels itself: libjxl does, and Pillow for TIFF."""
    return header.format == "jxl" or (header.format == "tiff" and not _is_for_libtiff(header))


def _rotated(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8)."""
    transpose, vertical, horizontal = _ORIENTATIONS[orientation]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if vertical:
        pixels = pixels[::-1]
    if horizontal:
        pixels = pixels[:, ::-1]
    return _contiguous(pixels)


def _contiguous(pixels: np.ndarray) -> np.ndarray:
    """Return a C-contiguous, writable array; Pillow's arrays are read-only."""
    return np.require(pixels, requirements=("C", "W"))
