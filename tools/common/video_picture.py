"""How stored samples become a picture: colour tags, display matrix, shape of the pixels; and what must be refused."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import NamedTuple

from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

# AVColorSpace -> the matrix for swscale; RGB (0) needs none
_MATRICES = {0: Colorspace.DEFAULT, 1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601,
             6: Colorspace.ITU601, 7: Colorspace.SMPTE240M}
_UNKNOWN_MATRIX = 2
_TONE_MAP = ("zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
             "zscale=t=bt709:m=bt709:r=tv,format=yuv420p")
_GAMUT_MAP = "zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"


class Orientation(NamedTuple):
    """How a stored frame becomes upright: transposed first, then its rows, then its columns in reverse."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def square_size(height: int, width: int, aspect: Fraction) -> tuple[int, int]:
    """(Height, width) with square pixels. Only ever shrunk: stretching would invent pixels."""
    if aspect >= 1:
        return max(1, round(height / aspect)), width
    return height, max(1, round(width * aspect))


def colours(frame: VideoFrame, header_range: int) -> tuple[str, Colorspace, bool, tuple[str, ...]]:
    """(Transfer characteristic, matrix, full range?, refusals), by the tags; untagged, as players take them."""
    transfer, primaries, matrix = frame.color_trc, frame.color_primaries, frame.colorspace
    name = _enum_name(ColorTrc, transfer)
    refusals: tuple[str, ...] = ()
    if transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        refusals = (f"HDR: its transfer characteristic is {name}, which needs tone-mapping to taste first, such as "
                    f"`ffmpeg -i IN -vf {_TONE_MAP} -crf 12 OUT.mp4`",)
    elif primaries == ColorPrimaries.BT2020 or matrix in (9, 10):
        refusals = (f"wide gamut: BT.2020 colours (transfer characteristic {name}); map them to BT.709 first, such as "
                    f"`ffmpeg -i IN -vf {_GAMUT_MAP} -crf 12 OUT.mp4`",)
    elif transfer == ColorTrc.UNSPECIFIED and any(data.type.name.startswith("DOVI") for data in frame.side_data):
        refusals = ("Dolby Vision without a layer for ordinary screens; tone-map it with an editor first",)
    elif matrix != _UNKNOWN_MATRIX and matrix not in _MATRICES:
        refusals = (f"its colour matrix (number {matrix} of H.273) is not one of BT.601, BT.709, FCC, SMPTE 240M and "
                    "RGB; convert it with ffmpeg",)
    elif frame.format.is_rgb is False and matrix == 0:
        matrix = _UNKNOWN_MATRIX  # zeros in a header: RGB is impossible in this pixel format
    # mpv's and others' rule where a file does not say
    default = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    is_full = (frame.color_range or header_range) == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return name, _MATRICES.get(matrix, default), is_full or frame.format.is_rgb, refusals


def _enum_name(kind: type[ColorTrc], value: int) -> str:
    names = {2: "unknown", 16: "SMPTE ST 2084 (PQ)", 18: "ARIB STD-B67 (HLG)"}
    return names.get(value) or (kind(value).name if value in {*kind} else str(value))


def orientation(frame: VideoFrame) -> Orientation | None:
    """From the display matrix, which maps a stored point (x right, y down) to where it is shown."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])  # (x, y) -> (a x + c y, b x + d y)
    if not (b or c) and a and d:
        return Orientation(False, d < 0, a < 0)
    if not (a or d) and b and c:
        return Orientation(True, b < 0, c < 0)
    return None
