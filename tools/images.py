"""Photographs of any kind to RGB bytes: gray, palette, transparency, 16 bits, CMYK and EXIF orientation included."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import PIL
import simplejpeg
from PIL import Image

from pipeline.data.image_files import is_npy, npy_layout
from tools.common.image_headers import BadImageError, ImageHeader, read_header
from tools.common.image_streams import check_complete, check_file_size, without_sloppiness

MAX_MEGAPIXELS = 1000  # OpenCV refuses images of more than 2^30 pixels

# EXIF orientation -> (transpose first, then flip vertically, flip horizontally)
_ORIENTATIONS = {1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0),
                 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
# EXIF in JPEG, PNG (also in a text chunk, as ImageMagick writes it) and WebP; XMP
_ORIENTATION_SIGNS = (b"Exif\0\0", b"eXIf", b"Raw profile type", b"EXIF", b"tiff:Orientation")


def prepare_decoders() -> None:
    """Set up the libraries for our own threads: one core a photo, quiet, and our pixel limit instead of PIL's."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    imagecodecs.spng_version()  # loaded once, not by several threads at a time
    Image.init()  # the plugin table is filled once, not by several threads at a time
    Image.MAX_IMAGE_PIXELS = None  # check_megapixels comes first


def check_megapixels(header: ImageHeader, max_megapixels: float) -> None:
    """Refuse, before a byte is decoded, an image that would fill the memory (a decompression bomb)."""
    megapixels = header.height * header.width / 1e6
    if megapixels > max_megapixels:
        raise BadImageError(f"{header.height}x{header.width} is {megapixels:.0f} megapixels, above the limit of "
                            f"{max_megapixels:g} (--max-megapixels)")


def decoder_name(header: ImageHeader) -> str:
    """The library that `decode_photo` decodes such an image with, and its version."""
    if _is_for_spng(header):
        return imagecodecs.spng_version()
    if header.is_plain and header.format == "jpeg":
        return f"simplejpeg {simplejpeg.__version__}"
    is_opencv = header.depth == 16 or (header.is_plain and header.format != "tiff")
    return f"opencv {cv2.__version__}" if is_opencv else f"pillow {PIL.__version__}"


def decode_photo(data: bytes, header: ImageHeader) -> np.ndarray:
    """The image as uint8 RGB (height, width, 3), upright. Transparent parts are composited over white.

    16-bit samples are scaled by 1/257 and rounded. Raises `BadImageError` with the reason; never returns half an image.
    Damage within the data shows by a checksum (PNG, deflated TIFF) or where its code does not work out (JPEG, lossless
    WebP, LZW). Lossy WebP, JPEG 2000 and uncompressed data have neither: wrong bytes in them are wrong pixels.
    """
    check_complete(data, header)
    try:
        if header.depth == 16:
            pixels = _decode_deep(data, header)
        elif header.depth not in (1, 2, 4, 8):
            raise BadImageError(f"{header.depth or 'mixed'} bits a sample; only 1 to 8 and 16 are read")
        elif header.is_plain and header.format != "tiff":
            pixels = _decode_plain(data, header)
        else:
            if header.format == "jpeg" and header.channels == 4:
                _decode_jpeg(data, "CMYK")  # Pillow hides the warnings of libjpeg
            return _decode_with_pillow(data, header)
    except BadImageError:
        raise
    except Exception as error:
        raise _undecodable(error) from error
    _check_size(pixels, header)
    return pixels if header.format == "tiff" else _upright(pixels, data)  # OpenCV, like Pillow, has turned a TIFF


def decode_plain(data: bytes, header: ImageHeader) -> np.ndarray:
    """A plain PNG, JPEG or WebP (`is_plain`) as uint8 RGB (height, width, 3), as it is stored: not turned by EXIF.

    These are the fastest decoders, and to the bit the pixels that DALI gives; what libjpeg only warns of, though, is
    damage here. Raises `BadImageError` with the reason; `data` must have passed `check_complete`.
    """
    try:
        pixels = _decode_plain(data, header)
    except BadImageError:
        raise
    except Exception as error:
        raise _undecodable(error) from error
    _check_size(pixels, header)
    return pixels


def _undecodable(error: Exception) -> BadImageError:
    """Decoders meet hostile bytes and raise whatever they like."""
    if isinstance(error, MemoryError):
        return BadImageError("not enough memory to decode it")
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadImageError(f"cannot be decoded: {reason[:200]}")


def _check_size(pixels: np.ndarray, header: ImageHeader) -> None:
    """A decoder must give the size that the header promised (and that the pixel limit was held against)."""
    if {*pixels.shape[:2]} != {header.height, header.width}:
        raise BadImageError(f"decoded to {pixels.shape[0]}x{pixels.shape[1]} where its header says "
                            f"{header.height}x{header.width}")


def _is_for_spng(header: ImageHeader) -> bool:
    return header.format == "png" and header.is_plain and header.channels == 3


def _decode_plain(data: bytes, header: ImageHeader) -> np.ndarray:
    """Gray or RGB of 8 bits, by the fastest decoder."""
    if _is_for_spng(header):
        pixels = imagecodecs.spng_decode(data)  # 1.3 times as fast as OpenCV's
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise BadImageError(f"decoded to {pixels.dtype} {pixels.shape}")
        return pixels
    if header.format == "jpeg":
        return _decode_jpeg(data, "RGB")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise BadImageError("cannot be decoded")
    return pixels


def _decode_jpeg(data: bytes, colors: str) -> np.ndarray:
    """Decode as accurately as libjpeg can; what libjpeg warns of is an error, unless it does no harm to the pixels."""
    while True:
        try:
            return simplejpeg.decode_jpeg(data, colors, fastdct=False, fastupsample=False, strict=True)
        except ValueError as error:
            warning = str(error)
        repaired = without_sloppiness(data, warning)  # libjpeg tells its first warning only: there may be another
        if repaired is None:
            raise BadImageError(f"damaged: {warning.removeprefix('Corrupt JPEG data: ')}")
        data = repaired


def _decode_deep(data: bytes, header: ImageHeader) -> np.ndarray:
    """16 bits a sample: Pillow would drop the lower byte, or refuse."""
    if header.channels > 4 or (header.format == "tiff" and _is_odd_tiff(data)):
        raise BadImageError("16 bits a sample are read as gray, RGB or RGBA only")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise BadImageError("cannot be decoded at 16 bits a sample")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] == 4:
        pixels = _over_white(pixels[..., :3], pixels[..., 3:], 65535)
    elif pixels.shape[2] == 1:
        pixels = np.repeat(_clear_gray_to_white(pixels, data, header), 3, axis=2)
    elif pixels.shape[2] != 3:
        raise BadImageError(f"{pixels.shape[2]} channels of 16 bits; only 1, 3 and 4 are read")
    return ((pixels[..., ::-1].astype(np.uint32) + 128) // 257).astype(np.uint8)


def _is_odd_tiff(data: bytes) -> bool:
    """Whether the TIFF is neither gray (black is zero) nor RGB; its tag 262 says."""
    with Image.open(io.BytesIO(data)) as image:
        return image.tag_v2.get(262) not in (1, 2)


def _decode_with_pillow(data: bytes, header: ImageHeader) -> np.ndarray:
    """Everything that is not plain: palettes, transparency, CMYK (Adobe's inverted one too), TIFF and BMP."""
    with Image.open(io.BytesIO(data)) as image:
        if {image.width, image.height} != {header.width, header.height}:
            raise BadImageError(f"two sizes: {image.height}x{image.width} and {header.height}x{header.width}")
        image.load()  # raises on truncation, LOAD_TRUNCATED_IMAGES being off
        orientation = image.getexif().get(0x0112, 1) if header.format != "tiff" else 1  # Pillow has turned a TIFF
        if header.format == "png" and header.depth < 8 and image.mode in ("1", "L"):
            gray = _clear_gray_to_white(np.array(image.convert("L")), data, header)
            pixels = np.repeat(gray[..., None], 3, axis=2)
        elif "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
            rgba = np.asarray(image.convert("RGBA"))
            pixels = _over_white(rgba[..., :3], rgba[..., 3:], 255)
        elif image.mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
            pixels = np.asarray(image.convert("RGB"))
        else:
            raise BadImageError(f"pixels of mode {image.mode!r} are not read; convert the photo to 8 or 16-bit RGB")
    return _turn(pixels, orientation)


def _clear_gray_to_white(gray: np.ndarray, data: bytes, header: ImageHeader) -> np.ndarray:
    """Make the one gray level white that a gray PNG declares transparent (chunk tRNS), if it does.

    `gray` spans the whole range of its dtype. OpenCV overlooks the chunk, Pillow does not scale it below 8 bits.
    """
    if header.format != "png":
        return gray
    level = dict(_png_chunks(data)).get(b"tRNS")
    if level is None:
        return gray
    white, highest = np.iinfo(gray.dtype).max, (1 << header.depth) - 1
    clear = (int.from_bytes(level[:2], "big") & highest) * (white // highest)
    return np.where(gray == clear, gray.dtype.type(white), gray)


def _over_white(color: np.ndarray, alpha: np.ndarray, white: int) -> np.ndarray:
    """Composite `color` (height, width, 3) over white: what lies under transparent pixels is often garbage."""
    alpha = alpha.astype(np.uint64 if white > 255 else np.uint32)
    return ((color * alpha + white * (white - alpha) + white // 2) // white).astype(color.dtype)


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Turn the pixels as the file's EXIF (or XMP) orientation says."""
    metadata = _png_metadata(data) if data.startswith(b"\x89PNG") else data
    if not any(sign in metadata for sign in _ORIENTATION_SIGNS):  # Pillow decodes all of a PNG to look for EXIF
        return pixels
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(0x0112, 1)
    except Exception as error:  # as in decode_photo
        raise BadImageError(f"broken metadata: {error}") from error
    return _turn(pixels, orientation)


def _png_metadata(data: bytes) -> bytes:
    """All chunks of a complete PNG but those that hold pixels."""
    return b"".join(kind + content for kind, content in _png_chunks(data))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(Name, content) of every chunk of a complete PNG but those that hold pixels."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] != b"IDAT":
            yield data[at + 4 : at + 8], data[at + 8 : end]
        at = end + 4


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8; others mean upright)."""
    transpose, vertical, horizontal = _ORIENTATIONS.get(orientation, (0, 0, 0))
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if vertical:
        pixels = pixels[::-1]
    if horizontal:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# The lossless formats that crops are stored in, and whether an image fits into uint8 RGB without loss.


FORMATS = ("npy", "png", "webp", "jp2")
"""What crops can be stored as; each is also the file's suffix."""
WEBP_MAX_SIDE = 16383

# The fastest of OpenCV's settings whose files are not larger than those of Pillow's level 6: 0.506 instead of 0.509 of
# the raw size on photographs, 2.7 times as fast.
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT,
        cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FAST_FILTERS)
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX")  # Pillow's, which convert to RGB without rounding
_ALPHA_MODES = ("LA", "PA", "RGBA")


def encode(pixels: np.ndarray, form: str) -> bytes:
    """uint8 RGB (height, width, 3) as the content of a file of the format `form` (of `FORMATS`), bit-exact in each.

    Raises `BadImageError` where the format cannot hold the image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    return _ENCODERS[form](np.ascontiguousarray(pixels))


def _encode_npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, pixels, version=(1, 0))
    return file.getvalue()


def _encode_png(pixels: np.ndarray) -> bytes:
    is_done, content = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _PNG)
    if not is_done:
        raise BadImageError(f"{pixels.shape[0]}x{pixels.shape[1]} pixels cannot be written as PNG")
    return content.tobytes()


def _encode_webp(pixels: np.ndarray) -> bytes:
    if max(pixels.shape) > WEBP_MAX_SIDE:
        raise BadImageError(f"{pixels.shape[0]}x{pixels.shape[1]}: WebP holds at most {WEBP_MAX_SIDE} pixels a side")
    # Method 0 encodes 5 times faster than method 1, for files 4 % larger; PNG's are larger still.
    return _encode_with_pillow(pixels, "webp", lossless=True, method=0, quality=20)


def _encode_jp2(pixels: np.ndarray) -> bytes:
    # The whole-number 5-3 wavelet; the reversible colour transform (mct) takes off a third of the size.
    return _encode_with_pillow(pixels, "jpeg2000", irreversible=False, mct=1, no_jp2=False)


def _encode_with_pillow(pixels: np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


_ENCODERS = {"npy": _encode_npy, "png": _encode_png, "webp": _encode_webp, "jp2": _encode_jp2}


@contextmanager
def parallel_encoder(form: str, threads: int) -> Iterator[Callable[[np.ndarray], bytes]]:
    """`encode` to `form`, to be called from so many threads at once.

    Pillow's JPEG 2000 encoder keeps Python's lock, and so it runs in processes; the others let threads run.
    """
    if form != "jp2" or threads == 1:
        yield partial(encode, form=form)
        return
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        yield lambda pixels: pool.submit(encode, pixels, form).result()


def _begin_worker() -> None:
    """Leave CTRL+C to the parent, and end when the parent is killed, which otherwise no worker would notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def decode(data: bytes, form: str) -> np.ndarray:
    """What `encode` was given: uint8 RGB (height, width, 3) of the content of a file of the format `form`.

    Raises `BadImageError` where `data` is damaged, incomplete or something else.
    """
    if form == "npy":
        return _decode_npy(data)
    header = read_header(io.BytesIO(data))
    if header.format != form:
        raise BadImageError(f"the content is {header.format}, not {form}")
    return decode_photo(data, header)


def _decode_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        pixels = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImageError(f"not an .npy array: {' '.join(str(error).split())[:200]}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or file.tell() != len(data):
        raise BadImageError(f"not one array of uint8 (height, width, 3) but {pixels.dtype} {pixels.shape}")
    return np.ascontiguousarray(pixels)


def decode_file(path: str | os.PathLike[str], *, max_megapixels: float = MAX_MEGAPIXELS,
                exact: bool = False) -> np.ndarray:
    """The pixels of any image of a dataset: uint8 RGB (height, width, 3), upright, transparency over white.

    With `exact`, images that these pixels cannot hold are refused (see `inexactness`) instead of reduced to them.
    Raises `BadImageError` (or `BadNpyError`) with the reason, `OSError` where the disk or the permissions stand in the
    way.
    """
    path = Path(path)
    if is_npy(path):
        if not path.exists():
            raise FileNotFoundError(None, "No such file (a link into nowhere?)")
        layout = npy_layout(path)
        pixels = np.fromfile(path, np.uint8, offset=layout.offset)
        return pixels.reshape(layout.height, layout.width, 3)
    with open(path, "rb") as file:
        header = read_header(file)
        check_megapixels(header, max_megapixels)
        check_file_size(header, os.fstat(file.fileno()).st_size)
        file.seek(0)
        data = file.read()
    reason = inexactness(data, header) if exact else ""
    if reason:
        raise BadImageError(reason)
    return decode_photo(data, header)


def is_stored_as(path: Path, form: str) -> bool:
    """Whether an image is a file of the format `form` already, whatever its name says."""
    if is_npy(path) or form == "npy":
        return is_npy(path) and form == "npy"
    with open(path, "rb") as file:
        return read_header(file).format == form


def inexactness(data: bytes, header: ImageHeader) -> str:
    """Why uint8 RGB pixels cannot hold all of an encoded image; empty where they can.

    Gray, palettes and an alpha channel that is opaque everywhere can be held; 16 bits, transparency, CMYK and further
    frames or pages cannot. Metadata and colour profiles do not count: training sees neither.
    """
    if header.depth > 8 or header.depth == 0:
        return f"{header.depth or 'mixed'} bits a sample; uint8 pixels would lose the lower ones"
    if header.format == "png" and b"acTL" in data[:data.find(b"IDAT")]:
        return "an animation; only its first frame would be left"
    if header.is_plain and header.format not in ("tiff", "webp"):
        return ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _inexactness_of(image, header)
    except Exception as error:  # hostile bytes: whatever Pillow raises
        return f"cannot be decoded: {' '.join(str(error).split())[:200] or type(error).__name__}"


def _inexactness_of(image: Image.Image, header: ImageHeader) -> str:
    """`inexactness` of an image that Pillow has opened."""
    if getattr(image, "n_frames", 1) > 1:
        return f"{image.n_frames} frames or pages; only the first would be left"
    if header.format == "tiff" and image.mode == "P":
        return "a TIFF palette, which holds 16-bit colours"
    if "transparency" in image.info or image.mode in _ALPHA_MODES:
        image.load()
        least = image.convert("RGBA").getchannel("A").getextrema()[0]
        return "" if least == 255 else "transparency; it would be composited over white"
    if image.mode not in _OPAQUE_MODES:
        return f"colours of mode {image.mode}; RGB would round them"
    return ""
