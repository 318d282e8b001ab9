"""Compression of an image as one frame of a short video, for the step `compress`.

The image moves along a drawn path through a clip. FFmpeg, through PyAV, encodes and decodes the
clip in memory, and one frame is kept: the one in which the image is in its original position. It
has the artefacts of an I, P or B frame, predicted from the moved frames around it.

Colours: swscale converts RGB to Y'CbCr of limited range and back, in its bit-exact mode, by BT.709
for the codecs of HD video and by BT.601 for older ones, with chroma sited at the centre of the
pixels that share it. Encoders and decoders run on one thread each, so that the bytes do not depend
on the number of cores.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.data.degradations.steps.base import Canvas, Draws, Image, Parameters
from pipeline.libraries import cv2

if TYPE_CHECKING:
    from av import Packet, VideoFrame

BT709, BT601 = 1, 5  # swscale's numbers
LIMITED, FULL = 1, 2  # ranges of levels: 16..235, 0..255
FRAMES_PER_SECOND = 25
AVX2 = 11  # OpenCV's number
MOTIONS = ("still", "pan", "zoom", "shake", "cut")


class Setting(NamedTuple):
    """An integer setting of a codec, such as the CRF of x264."""

    name: str
    library: str
    lowest: int
    highest: int
    default: tuple[int, int]


class Codec(NamedTuple):
    """Settings of a codec that a recipe can choose."""

    quality: Setting
    preset: Setting | None = None
    subsamplings: tuple[str, ...] = ("420",)


class Coder(NamedTuple):
    """An encoder and a decoder of FFmpeg, and their settings."""

    encoder: str
    decoder: str
    options: dict[str, str]
    """Options of the encoder; `{quality}` and `{preset}` are replaced by the drawn values."""
    matrix: int
    has_b_frames: bool = False
    looks_ahead: bool = False
    """Whether frames beyond the next P frame change how a frame is encoded."""
    smallest: int = 16
    """Shortest side in pixels that is encoded; smaller images are padded."""


def _scale(default: tuple[int, int]) -> Codec:
    """Return a codec whose quality is FFmpeg's quantiser scale."""
    return Codec(Setting("quantiser scale (low is good)", "FFmpeg", 1, 31, default))


VIDEO_CODECS = {
    "h264": Codec(
        Setting("CRF (low is good)", "x264", 0, 51, (20, 38)),
        Setting("preset (0 is ultrafast, 9 placebo)", "x264", 0, 9, (1, 5)),
        ("420", "422", "444"),
    ),
    "hevc": Codec(
        Setting("CRF (low is good)", "x265", 0, 51, (22, 40)),
        Setting("preset (0 is ultrafast, 9 placebo)", "x265", 0, 9, (0, 2)),
        ("420", "422", "444"),
    ),
    "mpeg2": _scale((2, 16))._replace(subsamplings=("420", "422")),
    "mpeg4": _scale((2, 16)),
    "flv1": _scale((3, 16)),
    "wmv2": _scale((3, 16)),
    "vp8": Codec(
        Setting("quantiser (low is good)", "libvpx", 0, 63, (15, 55)),
        Setting("cpu-used (0 is slow)", "libvpx", 0, 5, (4, 5)),
    ),
    "vp9": Codec(
        Setting("CRF (low is good)", "libvpx", 0, 63, (25, 58)),
        Setting("cpu-used (0 is slow)", "libvpx", 0, 5, (4, 5)),
        ("420", "422", "444"),
    ),
    "av1": Codec(
        Setting("CRF (low is good)", "SVT-AV1", 1, 63, (28, 60)),
        # From preset 10 on, SVT-AV1 may write streams that cannot be decoded, as it warns.
        Setting("preset (0 is slow)", "SVT-AV1", 0, 9, (8, 9)),
    ),
}
# A fixed scale, with which the bit rate and the buffer of the rate control have no effect.
_FIXED = {"qmin": "{quality}", "qmax": "{quality}"}
# With a lag, strong noise at a low CRF may overflow libvpx's packet buffer, and encoding fails.
_LIBVPX = {"deadline": "good", "cpu-used": "{preset}", "lag-in-frames": "0"}
CODERS = {
    "h264": Coder(
        "libx264",
        "h264",
        {"crf": "{quality}", "preset": "{preset}"},
        BT709,
        has_b_frames=True,
        looks_ahead=True,
    ),
    "hevc": Coder(
        "libx265",
        "hevc",
        {
            "crf": "{quality}",
            "preset": "{preset}",
            "x265-params": "pools=none:frame-threads=1:wpp=0:log-level=none",
        },
        BT709,
        has_b_frames=True,
        looks_ahead=True,
        # With sides below 50 pixels x265 4.2 writes beyond its buffers, and the process crashes. An
        # image with one column of coding units (64 pixels) is predicted from uninitialised memory.
        smallest=72,
    ),
    "mpeg2": Coder("mpeg2video", "mpeg2video", _FIXED, BT601, has_b_frames=True),
    "mpeg4": Coder("mpeg4", "mpeg4", _FIXED, BT601, has_b_frames=True),
    "flv1": Coder("flv", "flv", _FIXED, BT601),
    "wmv2": Coder("wmv2", "wmv2", _FIXED, BT601),
    "vp8": Coder("libvpx", "vp8", {**_FIXED, **_LIBVPX, "crf": "{quality}"}, BT601),
    "vp9": Coder(
        "libvpx-vp9", "vp9", {**_LIBVPX, "crf": "{quality}", "b": "0", "row-mt": "0"}, BT709
    ),
    "av1": Coder(
        "libsvtav1",
        "libdav1d",
        {"crf": "{quality}", "preset": "{preset}", "svtav1-params": "lp=1"},
        BT709,
        looks_ahead=True,
        smallest=64,
    ),
}


def draw_clip(spec: Any, name: str, draws: Draws, canvas: Canvas) -> Parameters:
    """Draw the length of the clip, the frame to keep, the GOP, the B frames and the motion.

    `path` has [zoom, down, right] for each frame: the image is enlarged by `zoom` around its centre
    and then moved, in pixels. A negative zoom rotates it by 180 degrees, as another scene.
    """
    frames = draws.integer(spec.frames)
    frame = draws.integer((0, frames - 1))
    gop = draws.integer(spec.gop)
    b_frames = 2 if draws.chance(spec.b_frames) and CODERS[name].has_b_frames else 0
    motion = draws.choose(spec.motion)
    path = [[1.0, 0.0, 0.0] for _ in range(frames)]
    if motion == "pan":
        speed, angle = draws.between(spec.speed), 2 * math.pi * draws.uniform()
        for i, place in enumerate(path):
            distance = speed * (i - frame)
            place[1:] = [distance * math.sin(angle), distance * math.cos(angle)]
    elif motion == "zoom":
        factor = draws.between(spec.zoom) ** (1 if draws.chance(0.5) else -1)
        for i, place in enumerate(path):
            place[0] = factor ** (i - frame)
    elif motion == "shake":
        for i, place in enumerate(path):
            speed, angle = draws.between(spec.speed), 2 * math.pi * draws.uniform()
            if i != frame:
                place[1:] = [speed * math.sin(angle), speed * math.cos(angle)]
    elif motion == "cut":
        first = draws.integer((1, max(1, frames - 1)))  # frame of the second scene
        down, right = ((draws.uniform() - 0.5) * side / 2 for side in canvas.size)
        for i, place in enumerate(path):
            if (i < first) != (frame < first):
                place[:] = [-1.0, down, right]
    return {
        "frame": frame,
        "gop": gop,
        "b_frames": b_frames,
        "motion": motion,
        "path": path,
    }


def through_video(still: Image, drawn: Parameters) -> Image:
    """Encode and decode uint8 `still` (height, width, 3) with what `draw_clip` has drawn."""
    coder, kept = CODERS[drawn["codec"]], drawn["frame"]
    # Even sides suit every chroma subsampling.
    bottom, right = (
        max(side + side % 2, coder.smallest) - side for side in (still.shape[0], still.shape[1])
    )
    padded = cv2.copyMakeBorder(still, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    path = drawn["path"]
    if not coder.looks_ahead:  # frames after the next P frame make no difference
        path = path[: kept + 1 + drawn["b_frames"]]
    clip = [padded if place == [1, 0, 0] else moved(still, place, bottom, right) for place in path]
    decoded = _decoded(coder, *_encoded(coder, clip, drawn), padded.shape[:2], kept)
    return np.ascontiguousarray(_pixels(decoded, coder.matrix)[: still.shape[0], : still.shape[1]])


def moved(still: Image, place: list[float], bottom: int, right: int) -> Image:
    """Return the image at a place of the path: cubic, mirrored at its borders, then padded."""
    zoom, down, across = place
    middle_y, middle_x = ((side - 1) / 2 for side in still.shape[:2])
    to_still = np.array(
        [
            [1 / zoom, 0, middle_x - (middle_x + across) / zoom],
            [0, 1 / zoom, middle_y - (middle_y + down) / zoom],
        ]
    )
    frame = cv2.warpAffine(
        still,
        to_still,
        still.shape[1::-1],
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)


def _encoded(
    coder: Coder, clip: list[Image], drawn: Parameters
) -> tuple[list[Packet], bytes | None]:
    """Return the clip's packets and the codec's header."""
    import av
    from av.video.reformatter import VideoReformatter

    # Otherwise SVT-AV1 prints its configuration on stderr.
    os.environ.setdefault("SVT_LOG", "1")
    context: Any = av.CodecContext.create(coder.encoder, "w")
    context.height, context.width = clip[0].shape[:2]
    context.pix_fmt = f"yuv{drawn['subsampling']}p"
    context.time_base, context.framerate = Fraction(1, FRAMES_PER_SECOND), FRAMES_PER_SECOND
    context.gop_size, context.max_b_frames = drawn["gop"], drawn["b_frames"]
    context.thread_count = 1
    context.options = {key: value.format(**drawn) for key, value in coder.options.items()} | (
        # x264's AVX-512 code for the macroblock tree reads uninitialised memory; bytes would vary.
        {"x264-params": "asm=avx2"}
        if coder.encoder == "libx264" and cv2.checkHardwareSupport(AVX2)
        else {}
    )
    reformatter, packets = VideoReformatter(), []
    for i, pixels in enumerate(clip):
        frame = _converted(
            reformatter,
            av.VideoFrame.from_ndarray(pixels, "rgb24"),
            format=context.pix_fmt,
            dst_colorspace=coder.matrix,
            src_color_range=FULL,
            dst_color_range=LIMITED,
        )
        frame.pts, frame.time_base = i, context.time_base
        packets += context.encode(frame)
    packets += context.encode(None)
    return packets, context.extradata


def _decoded(
    coder: Coder, packets: list[Packet], header: bytes | None, size: tuple[int, int], kept: int
) -> VideoFrame:
    import av

    context: Any = av.CodecContext.create(coder.decoder, "r")
    context.thread_count = 1
    if header:
        context.extradata = header
    context.height, context.width = size
    for packet in (*packets, None):
        for frame in context.decode(packet):
            if frame.pts == kept:
                return frame
    raise RuntimeError(f"FFmpeg decoded no frame {kept} of a clip of {len(packets)} packets")


def _pixels(frame: VideoFrame, matrix: int) -> Image:
    import av
    from av.video.reformatter import VideoReformatter

    # Some decoders tag the chroma siting, and swscale would shift chroma: copy without the tags.
    untagged = av.VideoFrame(frame.width, frame.height, frame.format.name)
    for into, plane in zip(untagged.planes, frame.planes, strict=True):
        _samples(into)[...] = _samples(plane)
    planar = _converted(  # gives the same bytes as rgb24 in a fraction of the time
        VideoReformatter(),
        untagged,
        format="gbrp",
        src_colorspace=matrix,
        src_color_range=LIMITED,
        dst_color_range=FULL,
    )
    green, blue, red = (_samples(plane) for plane in planar.planes)
    return cv2.merge([red, green, blue])


def _samples(plane: Any) -> Image:
    """Return a view of a plane as uint8 (height, width)."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        : plane.height, : plane.width
    ]


def _converted(reformatter: Any, frame: VideoFrame, **options: Any) -> VideoFrame:
    from pipeline.data.videos import BITEXACT, SMOOTH, reformat

    return reformat(frame, reformatter, interpolation=SMOOTH | BITEXACT, threads=1, **options)


def signature(name: str) -> str:
    """Return an encoder's packets as text, which contain its description of itself."""
    gray = np.full((CODERS[name].smallest, CODERS[name].smallest, 3), 128, np.uint8)
    drawn = {"quality": 30, "preset": 0, "subsampling": "420", "gop": 1, "b_frames": 0}
    packets, header = _encoded(CODERS[name], [gray], drawn)
    return (b"".join(bytes(packet) for packet in packets) + (header or b"")).decode("latin-1")
