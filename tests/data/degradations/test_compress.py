"""The step `compress`: pixels of direct calls to the codecs, clips of films, draws and refusals."""

from __future__ import annotations

import ctypes
import io
import math
import sys
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import av
import cv2
import imagecodecs
import numpy as np
import PIL.Image
import pytest
import simplejpeg
from pydantic import ValidationError

from conftest import photograph
from pipeline.cli import UserError
from pipeline.data.degradations import host
from pipeline.data.degradations.chain import Chain, ChainSpec
from pipeline.data.degradations.steps import compress, video
from pipeline.data.degradations.steps.compress import CODECS, CompressSpec
from pipeline.data.degradations.steps.video import CODERS, VIDEO_CODECS
from steps import applied, check_kind, draws_of, shares, unclipped

IMAGE = photograph(3, 61, 77)
AVX2 = cv2.checkHardwareSupport(11)
# Encoder, its options, decoder and matrix, written without the tables of the step.
FILMS: Mapping[str, tuple[str, dict[str, str], str, str]] = {
    "h264": (
        "libx264",
        {"crf": "30", "preset": "veryfast", **({"x264-params": "asm=avx2"} if AVX2 else {})},
        "h264",
        "ITU709",
    ),
    "hevc": (
        "libx265",
        {
            "crf": "30",
            "preset": "veryfast",
            "x265-params": "frame-threads=1:pools=none:log-level=0:wpp=0",
        },
        "hevc",
        "ITU709",
    ),
    "mpeg2": ("mpeg2video", {"qmin": "8", "qmax": "8"}, "mpeg2video", "ITU601"),
    "mpeg4": ("mpeg4", {"qmin": "8", "qmax": "8"}, "mpeg4", "ITU601"),
    "flv1": ("flv", {"qmin": "8", "qmax": "8"}, "flv", "ITU601"),
    "wmv2": ("wmv2", {"qmin": "8", "qmax": "8"}, "wmv2", "ITU601"),
    "vp8": (
        "libvpx",
        {
            "qmin": "40",
            "qmax": "40",
            "crf": "40",
            "deadline": "good",
            "cpu-used": "4",
            "lag-in-frames": "0",
        },
        "vp8",
        "ITU601",
    ),
    "vp9": (
        "libvpx-vp9",
        {"crf": "40", "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"},
        "vp9",
        "ITU709",
    ),
    "av1": (
        "libsvtav1",
        {"crf": "40", "preset": "9", "svtav1-params": "lp=1"},
        "libdav1d",
        "ITU709",
    ),
}
QUALITY = {"h264": 30, "hevc": 30, "vp8": 40, "vp9": 40, "av1": 40}
PRESET = {"h264": 2, "hevc": 2, "vp8": 4, "vp9": 4, "av1": 9}


def film(name: str, frames: int = 4, kept: int = 2, **changes: Any) -> dict[str, Any]:
    """Return what could be drawn for a film: a pan by whole pixels."""
    path = [[1.0, 3.0 * (i - kept), -2.0 * (i - kept)] for i in range(frames)]
    return {
        "codec": name,
        "quality": QUALITY.get(name, 8),
        "preset": PRESET.get(name),
        "subsampling": "420",
        "frame": kept,
        "gop": 8,
        "b_frames": 2 if CODERS[name].has_b_frames else 0,
        "path": path,
        **changes,
    }


def still(name: str, quality: int = 50, **changes: Any) -> dict[str, Any]:
    preset = {"webp": 4, "avif": 8, "jxl": 5}.get(name)
    subsampling = CODECS[name].subsamplings[0]
    return {
        "codec": name,
        "quality": quality,
        "preset": preset,
        "subsampling": subsampling,
        **changes,
    }


def any_drawn(name: str) -> dict[str, Any]:
    if name in VIDEO_CODECS:
        return film(name)
    again = [{**still(name, 30), "shift": [3, 5]}]
    return still(name, 35 if name == "jp2" else 50, again=again)


# Stills.


def by_pillow(image: np.ndarray, **options: Any) -> np.ndarray:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, **options)
    return np.asarray(PIL.Image.open(file).convert("RGB"))


@pytest.mark.parametrize("quality", [5, 60, 96])
def test_jpeg_is_that_of_pillow_and_libjpeg(quality: int) -> None:
    for subsampling in CODECS["jpeg"].subsamplings:
        got = applied("compress", IMAGE, still("jpeg", quality, subsampling=subsampling))
        if subsampling in ("444", "422", "420"):
            expected = by_pillow(
                IMAGE,
                format="JPEG",
                quality=quality,
                subsampling=("444", "422", "420").index(subsampling),
            )
        else:
            data = imagecodecs.jpeg8_encode(IMAGE, quality, subsampling=subsampling)
            expected = simplejpeg.decode_jpeg(data, "RGB")
        np.testing.assert_array_equal(got, expected, subsampling)
    own = host.through_jpeg(IMAGE, quality, host.Workspace())  # of Real-ESRGAN's chain
    np.testing.assert_array_equal(applied("compress", IMAGE, still("jpeg", quality)), own)


def test_other_stills_are_those_of_their_libraries() -> None:
    expected = {
        "webp": by_pillow(IMAGE, format="WEBP", quality=50, method=4),
        "jxl": imagecodecs.jpegxl_decode(
            imagecodecs.jpegxl_encode(IMAGE, distance=4.6, effort=5, lossless=False)
        ),
        "jp2": imagecodecs.jpeg2k_decode(imagecodecs.jpeg2k_encode(IMAGE, 50, reversible=False)),
    }
    for name, pixels in expected.items():
        np.testing.assert_array_equal(applied("compress", IMAGE, still(name)), pixels, name)
    for subsampling in ("420", "422", "444"):
        data = imagecodecs.avif_encode(IMAGE, 50, speed=8, pixelformat=subsampling, numthreads=1)
        got = applied("compress", IMAGE, still("avif", subsampling=subsampling))
        np.testing.assert_array_equal(got, imagecodecs.avif_decode(data), subsampling)


def test_the_distances_of_jpeg_xl_are_libjxls() -> None:
    for quality in (1, 20, 29, 30, 55, 99):
        by_quality = imagecodecs.jpegxl_encode(IMAGE, quality, effort=3, lossless=False)
        distance = compress.jxl_distance(quality)
        assert by_quality == imagecodecs.jpegxl_encode(
            IMAGE, distance=distance, effort=3, lossless=False
        )


def test_each_pass_has_a_grid_of_its_own() -> None:
    again = [{"quality": 40, "subsampling": "444", "shift": [3, 13]}]
    got = applied("compress", IMAGE, still("jpeg", 70, again=again))
    first = by_pillow(IMAGE, format="JPEG", quality=70, subsampling=2)
    shifted = np.pad(first, ((3, 0), (13, 0), (0, 0)), "edge")
    expected = by_pillow(shifted, format="JPEG", quality=40, subsampling=0)[3:, 13:]
    np.testing.assert_array_equal(got, expected)


# Films.


def keys(x: np.ndarray) -> np.ndarray:
    """OpenCV's cubic, a = -0.75."""
    x = np.abs(x)
    near = (1.25 * x - 2.25) * x**2 + 1
    far = ((-0.75 * x + 3.75) * x - 6) * x + 3
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def at(image: np.ndarray, zoom: float, down: float, right: float) -> np.ndarray:
    """Return the image enlarged about its centre and moved, by a float64 cubic, mirrored."""
    pixels, weights = image.astype(np.float64), []
    for length, by in zip(image.shape[:2], (down, right), strict=True):
        middle = (length - 1) / 2
        places = (np.arange(length) - middle - by) / zoom + middle
        margin = 2 * length
        taps = keys(places[:, None] - np.arange(-margin, length + margin))
        mirrored = np.pad(np.arange(length), margin, "reflect")
        weights.append(taps @ (mirrored[:, None] == np.arange(length)))
    down_first = np.tensordot(weights[0], pixels, (1, 0))
    return np.tensordot(weights[1], down_first, (1, 1)).transpose(1, 0, 2)


@pytest.mark.parametrize(
    "place", [[1, 5.25, -3.5], [1.1, 0, 0], [0.93, 0, 0], [-1, 9.5, 4], [1, 30, -40]]
)
def test_the_still_moves_as_its_path_says(place: list[float]) -> None:
    expected = at(IMAGE, *place).round().clip(0, 255)
    got = video.moved(IMAGE, place, 0, 0)
    # OpenCV's weights are those of multiples of 1/32 pixel.
    steps = 1 / 64 * np.abs(np.diff(IMAGE.astype(float), axis=1)).max() if place[0] != 1 else 0
    assert np.abs(got - expected).max() <= 1 + steps
    assert np.abs(got - expected).mean() < 0.5


def coded(
    clip: list[np.ndarray], name: str, subsampling: str, gop: int, b_frames: int
) -> list[tuple[np.ndarray, str]]:
    """Encode and decode a clip of even sides with PyAV: pixels and type (I, P, B) of each frame."""
    encoder_name, options, decoder_name, matrix = FILMS[name]
    encoder: Any = av.CodecContext.create(encoder_name, "w")
    encoder.height, encoder.width = clip[0].shape[:2]
    encoder.pix_fmt, encoder.thread_count = f"yuv{subsampling}p", 1
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.gop_size, encoder.max_b_frames, encoder.options = gop, b_frames, options
    packets = []
    exact = 0x4 | 0x2000 | 0x40000 | 0x80000  # bicubic, full chroma, accurate rounding, bit-exact
    for i, pixels in enumerate(clip):
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(
            format=encoder.pix_fmt,
            dst_colorspace=matrix,
            src_color_range="JPEG",
            dst_color_range="MPEG",
            interpolation=exact,
        )
        frame.pts, frame.time_base = i, Fraction(1, 25)
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder: Any = av.CodecContext.create(decoder_name, "r")
    decoder.extradata, decoder.thread_count = encoder.extradata, 1
    decoder.height, decoder.width = clip[0].shape[:2]
    frames = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
    results = []
    for frame in sorted(frames, key=lambda frame: frame.pts):
        planes = av.VideoFrame.from_ndarray(frame.to_ndarray(), frame.format.name)
        pixels = planes.reformat(
            format="rgb24",
            src_colorspace=matrix,
            src_color_range="MPEG",
            dst_color_range="JPEG",
            interpolation=exact,
        ).to_ndarray()
        results.append((pixels, "?IPB"[frame.pict_type]))
    return results


@pytest.mark.parametrize("name", VIDEO_CODECS)
def test_a_film_is_a_clip_that_pyav_encodes(name: str) -> None:
    image, kept, seen = photograph(5, 73, 79), 2, set()
    drawn = film(name, frames=7, kept=kept)  # more than what the step encodes, for some codecs
    clip = [at(image, *place).round().clip(0, 255).astype(np.uint8) for place in drawn["path"]]
    np.testing.assert_array_equal(clip[kept], image)
    padded = [np.pad(frame, ((0, 1), (0, 1), (0, 0)), "edge") for frame in clip]
    for subsampling in CODECS[name].subsamplings:
        for gop, b_frames in ((1, 0), (8, 0), (8, drawn["b_frames"])):
            frames = coded(padded, name, subsampling, gop, b_frames)
            pixels, kind = frames[kept]
            changes = {"subsampling": subsampling, "gop": gop, "b_frames": b_frames}
            got = applied("compress", image, {**drawn, **changes})
            np.testing.assert_array_equal(got, pixels[:73, :79], f"{changes}")
            seen.add((kind, got.tobytes()))
        if subsampling == "420":
            kinds = {kind for kind, _ in seen}
            assert {"I", "P", "B"} >= kinds >= {"I", "P"}
            assert ("B" in kinds) == CODERS[name].has_b_frames
            assert len({data for _, data in seen}) == len(kinds)  # each with its own artefacts


@pytest.mark.parametrize("name", VIDEO_CODECS)
def test_the_still_stays_in_its_place_and_keeps_its_brightness(name: str) -> None:
    smooth = cv2.GaussianBlur(photograph(6, 96, 96), (0, 0), 1.5)
    image = (70 + smooth.astype(np.float64) * 0.4).astype(np.uint8)  # no clipped colours
    quality = VIDEO_CODECS[name].quality.lowest + 1
    for subsampling in CODECS[name].subsamplings:
        got = applied("compress", image, film(name, quality=quality, subsampling=subsampling))
        assert np.abs((got.astype(float) - image).mean(axis=(0, 1))).max() < 0.5, subsampling
        before, after = (
            cv2.cvtColor(one, cv2.COLOR_RGB2YCrCb).astype(np.float64) for one in (image, got)
        )
        for channel in range(3):
            # A shift by (dy, dx) changes a plane by -dy and -dx times its slopes, to first order.
            slopes = [slope.ravel() for slope in np.gradient(before[..., channel])]
            change = (after - before)[..., channel].ravel()
            shift = np.linalg.lstsq(np.stack(slopes, 1), change, rcond=None)[0]
            assert np.abs(shift).max() < 0.1, (subsampling, channel)


@pytest.mark.parametrize("name", ["hevc", "vp9", "av1"])
def test_what_encoders_once_failed_at(name: str) -> None:
    # x265 at sides below 50 pixels, libvpx at noise in clips of key frames, SVT-AV1 at smooth
    # images of high quality.
    random = np.random.default_rng(5)
    noise = random.integers(0, 256, (34, 105, 3)).astype(np.uint8)
    smooth = (70 + cv2.GaussianBlur(photograph(6, 96, 96), (0, 0), 1.5) * 0.4).astype(np.uint8)
    lowest = VIDEO_CODECS[name].quality.lowest
    for image in (noise, noise[:, :34], smooth):
        for gop in (1, 8):
            drawn = film(name, quality=lowest, gop=gop)
            image = np.ascontiguousarray(image)
            got = applied("compress", image, drawn)
            before, after = (
                cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(float) for one in (image, got)
            )
            assert np.abs(after - before).mean() < 12  # 4:2:0 takes colours beyond 0..255


@pytest.mark.skipif(sys.platform != "linux", reason="sets the memory of glibc")
@pytest.mark.parametrize(
    ("name", "size", "preset"), [("h264", (130, 136), 5), ("hevc", (100, 64), 2)]
)
def test_the_bytes_do_not_depend_on_what_memory_held(
    name: str, size: tuple[int, int], preset: int
) -> None:
    image, results = photograph(sum(size), *size), set()
    drawn = film(name, quality=35, preset=preset, b_frames=0)
    perturb = -6  # M_PERTURB of malloc.h
    try:
        for value in (1, 85, 170, 250):
            ctypes.CDLL(None).mallopt(perturb, value)
            results.add(applied("compress", image, drawn).tobytes())
    finally:
        ctypes.CDLL(None).mallopt(perturb, 0)
    assert len(results) == 1


def test_the_neighbours_of_the_kept_frame_leave_traces() -> None:
    image = photograph(8, 64, 64)
    results = {}
    for motion in ("still", "pan", "zoom", "shake", "cut"):
        section = {"codec": "mpeg2", "quality": 12, "motion": motion, "frames": 5, "gop": 12}
        drawn = next(
            one for one in draws_of("compress", section | {"b_frames": 0}, 50) if one["frame"] == 3
        )
        assert drawn["path"][3] == [1, 0, 0]
        assert (drawn["path"] == [[1, 0, 0]] * 5) == (motion == "still")
        results[motion] = applied("compress", image, drawn)
    assert len({result.tobytes() for result in results.values()}) == 5


# All.


@pytest.mark.parametrize("name", CODECS)
def test_what_holds_for_all_steps(name: str) -> None:
    check_kind("compress", any_drawn(name))


@pytest.mark.parametrize("name", ["jpeg", "webp", "mpeg4"])
def test_levels_are_rounded_and_clipped_first(name: str) -> None:
    image = unclipped(5, 33, 47)
    before = image.clip(0, 255).round().astype(np.uint8)
    got = applied("compress", image, any_drawn(name))
    np.testing.assert_array_equal(got, applied("compress", before, any_drawn(name)))


def test_draws_are_within_their_ranges() -> None:
    drawn = draws_of("compress", {"codec": list(CODECS)}, 3000)
    found = shares(drawn, "codec")
    assert set(found) == set(CODECS)
    assert all(abs(share - 1 / len(CODECS)) < 0.02 for share in found.values())
    for one in drawn:
        codec = CODECS[one["codec"]]
        low, high = codec.quality.default
        assert low <= one["quality"] <= high
        assert ("preset" in one) == (codec.preset is not None)
        assert one["subsampling"] in codec.subsamplings
        assert "again" not in one
        if one["codec"] in VIDEO_CODECS:
            assert 3 <= len(one["path"]) <= 8
            assert one["path"][one["frame"]] == [1, 0, 0]
            assert 3 <= one["gop"] <= 12
            assert one["b_frames"] in ((0, 2) if CODERS[one["codec"]].has_b_frames else (0,))
    films = [one for one in drawn if one["codec"] in VIDEO_CODECS]
    expected = {"pan": 0.4, "zoom": 0.2, "shake": 0.2, "cut": 0.1, "still": 0.1}
    assert shares(films, "motion") == pytest.approx(expected, abs=0.04)
    assert 0.4 < np.mean([one["frame"] / (len(one["path"]) - 1) for one in films]) < 0.6


def test_ranges_are_those_of_the_recipe() -> None:
    section = {
        "codec": {"jpeg": 3, "h264": 1},
        "quality": {"jpeg": [10, 12], "h264": 33},
        "preset": {"h264": [0, 1]},
        "subsampling": {444: 1, 420: 3, 411: 1},
        "passes": [1, 3],
        "motion": "pan",
        "speed": 2,
    }
    drawn = draws_of("compress", section, 2000)
    stills, films = ([o for o in drawn if o["codec"] == name] for name in ("jpeg", "h264"))
    assert {one["quality"] for one in stills} == {10, 11, 12}
    assert {one["quality"] for one in films} == {33}
    assert {one["preset"] for one in films} == {0, 1}
    expected = {"444": 0.2, "420": 0.6, "411": 0.2}
    assert shares(stills, "subsampling") == pytest.approx(expected, abs=0.05)
    assert shares(films, "subsampling") == pytest.approx({"420": 0.75, "444": 0.25}, abs=0.06)
    again = [len(one.get("again", ())) for one in stills]
    assert np.bincount(again) / len(again) == pytest.approx([1 / 3] * 3, abs=0.05)
    shifts = [side for one in stills for pass_ in one.get("again", ()) for side in pass_["shift"]]
    assert set(shifts) == set(range(16))
    for one in films:
        (_, down, right), (_, down2, right2) = one["path"][:2]
        assert math.hypot(down2 - down, right2 - right) == pytest.approx(2)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"codec": "jpg"}, "did you mean 'jpeg'"),
        ({"codec": "h264", "quality": [30, 60]}, r"\[30, 60\] .* within 0..51, the CRF"),
        ({"codec": "vp9", "quality": 64}, r"0..63, the CRF \(low is good\) of vp9"),
        ({"codec": "mpeg2", "quality": [0, 9]}, r"1..31, the quantiser scale .* of mpeg2"),
        ({"codec": "jpeg", "quality": [90, 30]}, r"\[90, 30\] is not a range \[low, high\]"),
        ({"codec": ["jpeg", "h264"], "quality": 30}, "measured differently by jpeg, h264"),
        ({"codec": "jpeg", "quality": {"webq": 3}}, "no codec named 'webq'; did you mean 'webp'"),
        ({"codec": "jpeg", "quality": {"webp": 3}}, "webp is not among the step's codecs, jpeg"),
        ({"codec": "jpeg", "preset": 3}, "jpeg has no such setting"),
        ({"codec": "hevc", "preset": 10}, r"within 0..9, the preset"),
        ({"codec": "h264", "subsampling": 411}, "h264 has 420, 422, 444 only, not 411"),
        ({"codec": "webp", "subsampling": 444}, "webp has 420 only, not 444"),
        ({"codec": "h264", "passes": [1, 2]}, "repeat the step"),
        ({"codec": "h264", "frames": [3, 20]}, r"within 1..16"),
        ({"codec": "h264", "zoom": 0.9}, r"within 1..1.5"),
    ],
)
def test_what_a_codec_does_not_accept_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CompressSpec.model_validate(section)


def test_one_range_serves_codecs_that_measure_alike() -> None:
    spec = CompressSpec.model_validate({"codec": ["jpeg", "webp"], "quality": [40, 60]})
    assert CompressSpec.model_validate(spec.model_dump()) == spec
    mixed = CompressSpec.model_validate({"codec": ["jpeg", "jxl", "webp"], "subsampling": 444})
    drawn = draws_of("compress", {"codec": ["jpeg", "jxl", "webp"], "subsampling": 444}, 200)
    assert mixed.subsampling == {"444": 1}
    assert {(one["codec"], one["subsampling"]) for one in drawn} == {
        ("jpeg", "444"),
        ("jxl", "444"),
        ("webp", "420"),
    }


def test_a_missing_encoder_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"compress": {"codec": list(CODECS)}}
    chain = Chain(ChainSpec.model_validate({"steps": [step]}), 4)
    chain.check()
    monkeypatch.setitem(CODERS, "av1", CODERS["av1"]._replace(encoder="libnothing"))
    with pytest.raises(UserError, match=r"no encoder here for av1 \(libnothing\); .*jpeg, .* vp9;"):
        chain.check()


def test_versions_name_every_library() -> None:
    found = compress.versions()
    assert found["libx264"].startswith("1")
    assert found["libx265"][0].isdigit()
    assert found["pyav"] == av.__version__
    assert {"libwebp", "libavif", "libjxl", "openjpeg", "libavcodec", "opencv's jpeg"} <= set(found)
    assert "unknown" not in found.values()


@pytest.mark.parametrize("name", ["jpeg", "webp", "h264"])
def test_codecs_leave_no_threads_behind(name: str) -> None:
    before = threading.active_count()
    for _ in range(3):
        applied("compress", IMAGE, any_drawn(name))
    assert threading.active_count() == before
