"""Compression by real codecs: encode and decode in memory, as an image or as a frame of a video.

Images: JPEG by OpenCV's libjpeg-turbo, and WebP, AVIF, JPEG XL and JPEG 2000 by imagecodecs, which
wraps libwebp, libavif with libaom, libjxl and OpenJPEG. Video: see `steps.video`. All codecs run on
one thread each and release the GIL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.cli import UserError, nearest
from pipeline.data.degradations.base import OnDevice, through_jpeg
from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    Size,
    StepNodes,
    StepSpec,
    shares_of,
)
from pipeline.data.degradations.steps.video import (
    CODERS,
    MOTIONS,
    VIDEO_CODECS,
    Codec,
    Setting,
    draw_clip,
    signature,
    through_video,
)
from pipeline.libraries import cv2
from pipeline.spec import Factor, Probability, Range, within

STILL_CODECS = {
    "jpeg": Codec(
        Setting("quality (high is good)", "libjpeg", 1, 100, (30, 95)),
        subsamplings=("420", "422", "440", "411", "444"),
    ),
    "webp": Codec(
        Setting("quality (high is good)", "libwebp", 0, 100, (30, 95)),
        Setting("method (0 is fast)", "libwebp", 0, 6, (4, 4)),
    ),
    "avif": Codec(
        Setting("quality (high is good)", "libavif", 0, 100, (25, 85)),
        Setting("speed (0 is slow)", "libavif", 0, 10, (8, 8)),
        ("420", "422", "444"),
    ),
    "jxl": Codec(
        Setting("quality (high is good)", "libjxl", 1, 100, (30, 90)),
        Setting("effort (1 is fast)", "libjxl", 1, 9, (5, 5)),
        ("444",),
    ),
    "jp2": Codec(Setting("PSNR in dB", "OpenJPEG", 15, 60, (26, 40)), subsamplings=("444",)),
}
CODECS = {**STILL_CODECS, **VIDEO_CODECS}
ALL = "all"
"""Key of a range that applies to all codecs of the step."""
GRID = 16  # pixels: the largest blocks of JPEG, and of WebP's prediction


def _with_all(value: Any) -> Any:
    """Let a single range or number apply to all codecs."""
    if isinstance(value, int | float | list | tuple) and not isinstance(value, bool):
        return {ALL: value}
    return value


def _known(table: dict[str, Any]) -> dict[str, Any]:
    for name in table:
        if name not in (*CODECS, ALL):
            raise ValueError(f"no codec named {name!r}{nearest(name, CODECS)}")
    return table


PerCodec = Annotated[dict[str, Range], BeforeValidator(_with_all), AfterValidator(_known)]


def _described(settings: dict[str, Setting]) -> str:
    return "; ".join(
        f"{codec}: {setting.library}'s {setting.name}, {setting.lowest}..{setting.highest}, by "
        f"default {list(setting.default)}"
        for codec, setting in settings.items()
    )


class CompressSpec(StepSpec):
    """Compression by an image or video codec."""

    codec: shares_of(*CODECS) = Field(  # type: ignore[valid-type]
        {"jpeg": 1.0}, description="relative probability of each codec"
    )
    quality: PerCodec = Field(
        {},
        description="range of the quality, uniform over integers, for all codecs of the step or as "
        "a table {codec: range}; "
        + _described({name: codec.quality for name, codec in CODECS.items()}),
    )
    preset: PerCodec = Field(
        {},
        description="range of the encoder's speed setting, given as for quality; "
        + _described({name: codec.preset for name, codec in CODECS.items() if codec.preset}),
    )
    subsampling: shares_of("420", "422", "440", "411", "444") = Field(  # type: ignore[valid-type]
        {"420": 1.0},
        description="relative probability of each chroma subsampling, among those that the drawn "
        "codec supports; webp, mpeg4, flv1, wmv2, vp8 and av1 always have 420, jxl and jp2 444",
    )
    passes: Annotated[Range, within(1, 8)] = Field(
        (1.0, 1.0),
        description="image codecs: range of the number of times the image is compressed; each pass "
        "after the first has its own quality, subsampling and shift of the block grid (0..15 "
        "pixels)",
    )
    frames: Annotated[Range, within(1, 16)] = Field(
        (3.0, 8.0), description="video: range of the number of frames of the clip; one is kept"
    )
    gop: Annotated[Range, within(1, 250)] = Field(
        (3.0, 12.0), description="video: range of the distance between I frames"
    )
    b_frames: Probability = Field(
        0.5,
        description="video: probability of up to 2 B frames in a row (h264, hevc, mpeg2, mpeg4)",
    )
    motion: shares_of(*MOTIONS) = Field(  # type: ignore[valid-type]
        {"pan": 0.4, "zoom": 0.2, "shake": 0.2, "cut": 0.1, "still": 0.1},
        description="video: relative probability of each motion; `cut` changes the scene",
    )
    speed: Factor = Field(
        (0.25, 6.0), description="video: range of the motion of pan and shake, in pixels per frame"
    )
    zoom: Annotated[Range, within(1, 1.5)] = Field(
        (1.005, 1.04), description="video: range of the factor per frame of zoom, in or out"
    )

    @model_validator(mode="after")
    def _fits_the_codecs(self) -> CompressSpec:
        names = [name for name, share in self.codec.items() if share]
        for key in ("quality", "preset"):
            _check_ranges(key, getattr(self, key), names)
        # The default may be written out, as in the recipe that a run keeps.
        if self.subsampling != CompressSpec.model_fields["subsampling"].default:
            given = [name for name, share in self.subsampling.items() if share]
            some_choose = any(len(CODECS[name].subsamplings) > 1 for name in names)
            for name in names:
                can = CODECS[name].subsamplings
                if not set(given) & set(can) and (len(can) > 1 or not some_choose):
                    raise ValueError(
                        f"subsampling: {name} has {', '.join(can)} only, not {', '.join(given)}"
                    )
        if self.passes[1] >= 2 and not any(name in STILL_CODECS for name in names):
            raise ValueError(
                "passes are for image codecs; repeat the step to compress video repeatedly"
            )
        return self


def _check_ranges(key: str, table: dict[str, tuple[float, float]], names: list[str]) -> None:
    """Check the ranges of `quality` or `preset` against what each codec accepts."""
    settings: dict[str, Setting | None] = {name: getattr(CODECS[name], key) for name in names}
    for name in table:
        if name != ALL and name not in names:
            raise ValueError(f"{key}: {name} is not among the step's codecs, {', '.join(names)}")
    if ALL in table:
        scales = {setting and (setting.name, setting.highest) for setting in settings.values()}
        if len(scales) > 1:  # the same numbers mean something else for each
            raise ValueError(
                f"{key} is measured differently by {', '.join(names)}; give a table of ranges: "
                f"{{{names[0]}: [{table[ALL][0]:g}, {table[ALL][1]:g}], {names[1]}: …}}"
            )
    for name, setting in settings.items():
        low, high = table.get(name) or table.get(ALL) or (None, None)
        if low is None or high is None:
            continue
        if setting is None:
            raise ValueError(f"{key}: {name} has no such setting")
        if not setting.lowest <= low <= high <= setting.highest:
            raise ValueError(
                f"{key}: [{low:g}, {high:g}] is not a range [low, high] within "
                f"{setting.lowest}..{setting.highest}, the {setting.name} of {name}"
            )


def _drawn(table: dict[str, Any], name: str, setting: Setting, draws: Draws) -> int:
    return draws.integer(table.get(name) or table.get(ALL) or setting.default)


def _subsampling(spec: CompressSpec, codec: Codec, draws: Draws) -> str:
    can = {name: share for name, share in spec.subsampling.items() if name in codec.subsamplings}
    return draws.choose(can) if sum(can.values()) > 0 else codec.subsamplings[0]


def draw(spec: CompressSpec, draws: Draws, canvas: Canvas) -> Parameters:
    name = draws.choose(spec.codec)
    codec = CODECS[name]
    drawn: Parameters = {
        "codec": name,
        "quality": _drawn(spec.quality, name, codec.quality, draws),
    }
    if codec.preset:
        drawn["preset"] = _drawn(spec.preset, name, codec.preset, draws)
    drawn["subsampling"] = _subsampling(spec, codec, draws)
    if name in VIDEO_CODECS:
        return drawn | draw_clip(spec, name, draws, canvas)
    passes = draws.integer(spec.passes)
    if passes > 1:
        drawn["again"] = [
            {
                "quality": _drawn(spec.quality, name, codec.quality, draws),
                "subsampling": _subsampling(spec, codec, draws),
                "shift": [draws.integer((0, GRID - 1)), draws.integer((0, GRID - 1))],
            }
            for _ in range(passes - 1)
        ]
    return drawn


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    pixels = host.rounded(image, workspace)
    if drawn["codec"] in VIDEO_CODECS:
        return through_video(pixels, drawn)
    pixels = _through_still(pixels, drawn, workspace)
    for again in drawn.get("again", ()):
        top, left = again["shift"]
        shifted = cv2.copyMakeBorder(pixels, top, 0, left, 0, cv2.BORDER_REPLICATE)
        decoded = _through_still(shifted, {**drawn, **again}, workspace)
        pixels = np.ascontiguousarray(decoded[top:, left:])
    return pixels


def _through_still(pixels: Image, drawn: Parameters, workspace: Any) -> Image:
    """Encode and decode uint8 pixels, which are not changed."""
    import imagecodecs

    from pipeline.data.degradations import host

    quality, preset = drawn["quality"], drawn.get("preset")
    one: Any = {"numthreads": 1}
    match drawn["codec"]:
        case "jpeg":
            return host.through_jpeg(pixels, quality, workspace, drawn["subsampling"])
        case "webp":
            data = imagecodecs.webp_encode(pixels, quality, lossless=False, method=preset, **one)
            return imagecodecs.webp_decode(data)
        case "avif":
            data = imagecodecs.avif_encode(
                pixels, quality, speed=preset, pixelformat=drawn["subsampling"], codec="aom", **one
            )
            return imagecodecs.avif_decode(data, **one)
        case "jxl":
            distance = jxl_distance(quality)
            data = imagecodecs.jpegxl_encode(
                pixels, distance=distance, effort=preset, lossless=False, **one
            )
            return imagecodecs.jpegxl_decode(data, **one)
        case "jp2":
            data = imagecodecs.jpeg2k_encode(pixels, quality, reversible=False, **one)
            return imagecodecs.jpeg2k_decode(data, **one)
    raise ValueError(f"no codec named {drawn['codec']!r}")


def jxl_distance(quality: float) -> float:
    """Return libjxl's distance for a quality, as `JxlEncoderDistanceFromQuality` does."""
    if quality >= 30:
        return 0.1 + (100 - quality) * 0.09
    return 53 / 3000 * quality**2 - 23 / 20 * quality + 25


_LIBRARIES = {"webp": "WEBP", "avif": "AVIF", "jxl": "JPEGXL", "jp2": "JPEG2K"}


def check(spec: CompressSpec) -> None:
    """Raise `UserError` for codecs that this build of PyAV or imagecodecs lacks."""
    missing = [name for name, share in spec.codec.items() if share and not is_available(name)]
    if missing:
        present = [name for name in CODECS if name not in missing and is_available(name)]
        lacking = ", ".join(
            f"{name} ({CODERS[name].encoder})" if name in CODERS else name for name in missing
        )
        raise UserError(
            f"compress: no encoder here for {lacking}; PyAV and imagecodecs have "
            f"{', '.join(present)}; name one of these, or install the packages of requirements.txt"
        )


def is_available(name: str) -> bool:
    """Whether a codec's encoder and decoder are in the installed libraries."""
    if name in CODERS:
        from av.codec.codec import Codec as FFmpegCodec
        from av.codec.codec import UnknownCodecError

        try:
            FFmpegCodec(CODERS[name].encoder, "w")
            FFmpegCodec(CODERS[name].decoder, "r")
        except UnknownCodecError:
            return False
        return True
    import imagecodecs

    return name not in _LIBRARIES or getattr(imagecodecs, _LIBRARIES[name]).available


def versions() -> dict[str, str]:
    """Return the versions of all libraries that code images here, for the identity of a run.

    PyAV's version stands for the libraries in its wheel that do not say theirs: libvpx, SVT-AV1
    and dav1d.
    """
    import av
    import cv2
    import imagecodecs
    import simplejpeg

    found = {
        "opencv": cv2.__version__,
        "opencv's jpeg": _found(r"JPEG: +(.+)", cv2.getBuildInformation()),
        "simplejpeg": simplejpeg.__version__,
        "imagecodecs": imagecodecs.__version__,
        "pyav": av.__version__,
        "ffmpeg": av.ffmpeg_version_info,
    }
    for name in ("webp", "avif", "jpegxl", "jpeg2k"):
        if getattr(imagecodecs, name.upper()).available:
            library, _, version = getattr(imagecodecs, f"{name}_version")().partition(" ")
            found[library] = version
    for library, numbers in av.library_versions.items():
        if library in ("libavcodec", "libswscale"):
            found[library] = ".".join(map(str, numbers))
    # x264 and x265 sign what they encode.
    for name, signed in (("h264", r"x264 - core ([\w. ]*\w)"), ("hevc", r"x265 \(.*?\) - ([^:]+)")):
        if is_available(name):
            found[CODERS[name].encoder] = _found(signed, signature(name))
    return found


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1].strip() if match else "unknown"


def _arrays(drawn: Parameters, size: Size) -> tuple[Any, ...]:
    return (np.array(drawn["quality"], np.int32),)


def _add(image: Any, nodes: Mapping[str, Any], on_device: OnDevice) -> Any:
    from nvidia.dali import fn, types

    return fn.cast(through_jpeg(image, nodes["quality"]), dtype=types.FLOAT)


NODES = StepNodes(
    columns=("quality",),
    arrays=_arrays,
    idle={"quality": 50},
    add=_add,
    covers=lambda spec: (
        [name for name, share in spec.codec.items() if share] == ["jpeg"]
        and [name for name, share in spec.subsampling.items() if share] == ["420"]
        and round(spec.passes[1]) == 1
    ),
    fits=lambda drawn: (
        (drawn["codec"], drawn["subsampling"]) == ("jpeg", "420") and "again" not in drawn
    ),
)
