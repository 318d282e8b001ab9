"""tools/video/probe.py and frames.py on real files: frames, pixels, rejected videos."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from conftest import run_python
from dataset_corpus import CHECKOUT, encoded, photograph
from tools.video.choice import FrameChooser, Sampling
from tools.video.frames import DamagedError, Frame, FrameCounts, sample_frames, segment_frames
from tools.video.probe import BadVideoError, Segment, VideoInfo, open_video, probe, segments
from video_corpus import (
    H264,
    H265,
    LOSSLESS,
    MOVING,
    TESTSRC,
    VP9,
    fade,
    ffmpeg,
    from_pixels,
    pan,
    quadrants,
    still,
    yuv420p,
)

EVERY_FRAME = Sampling(frame_interval=1, min_interval=1, max_interval=1, min_change=0)
WHOLE = Segment(0, None, None)


def straight(path: Path) -> dict[int, np.ndarray]:
    """Time -> pixels of every frame, decoded once from start to end."""
    with open_video(path) as (container, stream):
        frames = list(container.decode(stream))
    times = [frame.pts if frame.pts is not None else frame.dts for frame in frames]
    assert len({*times}) == len(frames)
    return {
        time: frame.to_ndarray(format="rgb24") for time, frame in zip(times, frames, strict=True)
    }


def sampled(path: Path, sampling: Sampling = EVERY_FRAME, **options: object) -> list[Frame]:
    """Sampled frames of the whole video."""
    return list(sample_frames(path, probe(path), WHOLE, sampling, "key", **options))


KINDS: dict[str, Callable[[Path], object]] = {
    "b_frames.mp4": lambda path: ffmpeg(*TESTSRC, *H264, path),
    "open_gop.mkv": lambda path: ffmpeg(*TESTSRC, *H264, "-x264-params", "open-gop=1", path),
    "open_gop.ts": lambda path: ffmpeg(*TESTSRC, *H264, "-x264-params", "open-gop=1", path),
    "hevc_open_gop.mp4": lambda path: ffmpeg(*TESTSRC, *H265, "-pix_fmt", "yuv420p", path),
    "hevc_10_bit.mkv": lambda path: ffmpeg(*TESTSRC, *H265, "-pix_fmt", "yuv420p10le", path),
    "one_gop.mp4": lambda path: ffmpeg(*TESTSRC, *H264, "-g", 999, path),
    "intra_refresh.mkv": lambda path: ffmpeg(
        *TESTSRC, *H264, "-x264-params", "intra-refresh=1", path
    ),
    "variable_rate.mkv": lambda path: ffmpeg(
        *TESTSRC, "-vf", "select='lt(n,30)+not(mod(n,7))'", "-fps_mode", "vfr", *H264, path
    ),
    "vp9.webm": lambda path: ffmpeg(*TESTSRC, *VP9, path),
    "offset.mkv": lambda path: ffmpeg("-itsoffset", 10, *TESTSRC, *H264, path),
    "offset.mp4": lambda path: ffmpeg(*TESTSRC, *H264, "-output_ts_offset", 5, path),
    "fragments.mp4": lambda path: ffmpeg(
        *TESTSRC, *H264, "-movflags", "frag_keyframe+empty_moov", path
    ),
    "packed.avi": lambda path: ffmpeg(*TESTSRC, "-c:v", "mpeg4", "-bf", 2, "-g", 40, path),
    "dvd.vob": lambda path: ffmpeg(
        *TESTSRC, "-c:v", "mpeg2video", "-bf", 2, "-g", 15, "-b:v", "2M", path
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_segments_together_are_the_whole_video(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path)
    expected, info = straight(path), probe(path)
    pieces = segments(info, 1.3)
    assert len(pieces) in (3, 4)
    seen: list[int] = []
    for piece in pieces:
        for frame in segment_frames(path, info, piece, FrameCounts()):
            assert np.array_equal(frame.to_ndarray(format="rgb24"), expected[frame.pts])
            seen.append(frame.pts)
    assert seen == sorted(expected)


def test_edit_list_and_unknown_duration(tmp_path: Path) -> None:
    ffmpeg(*TESTSRC, *H264, tmp_path / "whole.mp4")
    ffmpeg("-ss", 1.3, "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "edited.mp4")
    # no duration, no index
    (tmp_path / "piped.webm").write_bytes(ffmpeg(*TESTSRC, *VP9, "-f", "webm", "-"))
    with av.open(tmp_path / "piped.webm") as container:
        assert container.duration is None
    for name in ("edited.mp4", "piped.webm"):
        path = tmp_path / name
        expected, info = straight(path), probe(path)
        assert not info.truncated
        assert info.duration_s == pytest.approx(len(expected) / 25, abs=0.1)
        seen = [
            frame.pts
            for piece in segments(info, 0.9)
            for frame in segment_frames(path, info, piece, FrameCounts())
        ]
        assert seen == sorted(expected)


def test_several_decoder_threads_give_the_same_frames(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, tmp_path / "a.mp4")
    one, three = (
        sampled(tmp_path / "a.mp4", Sampling(), codec_threads=threads) for threads in (1, 3)
    )
    assert len(one) > 5
    assert [(frame.index, frame.time_s) for frame in one] == [
        (frame.index, frame.time_s) for frame in three
    ]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, three, strict=True))


COLOURS = np.array(
    [
        [16, 16, 16],
        [235, 235, 235],
        [200, 40, 40],
        [40, 180, 60],
        [30, 60, 210],
        [220, 200, 30],
        [128, 128, 128],
        [90, 160, 200],
    ]
)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_colours_come_back_by_the_tags(
    matrix: str, is_full: bool, bits: int, tmp_path: Path
) -> None:
    space = "smpte170m" if matrix == "bt601" else matrix
    tags = f"setparams=colorspace={space}:range={'pc' if is_full else 'tv'}"
    pixel_format = "yuv420p" if bits == 8 else "yuv420p10le"
    encoder = LOSSLESS if bits == 8 else [*H265[:-1], "log-level=error:lossless=1"]
    path = from_pixels(
        tmp_path / "colours.mkv",
        [yuv420p(COLOURS, matrix, is_full, bits)] * 2,
        "-vf",
        tags,
        *encoder,
        pixel_format=pixel_format,
    )
    info = probe(path)
    assert (info.bits, info.is_full_range) == (bits, is_full)
    assert_colours(path)


@pytest.mark.parametrize(("height", "matrix"), [(64, "bt601"), (576, "bt601"), (720, "bt709")])
def test_untagged_colours_go_by_the_height(height: int, matrix: str, tmp_path: Path) -> None:
    assert_colours(
        from_pixels(
            tmp_path / "colours.mkv",
            [yuv420p(COLOURS, matrix, False, 8, height=height)] * 2,
            *LOSSLESS,
            pixel_format="yuv420p",
        )
    )


def assert_colours(path: Path) -> None:
    """The centre of every square has its colour."""
    pixels = sampled(path)[0].pixels
    assert np.abs(pixels[30, 32::64].astype(int) - COLOURS).max() <= 2


def test_rounding_of_10_bits_is_no_cutting_off(tmp_path: Path) -> None:
    gray = np.full((96, 64), 512, np.uint16)
    gray[:64] = 4 * 100 + 3  # limited range; (403 - 64) * 255 / 876 = 98.7
    path = from_pixels(
        tmp_path / "gray.mkv",
        [gray] * 2,
        *H265[:-1],
        "log-level=error:lossless=1",
        pixel_format="yuv420p10le",
    )
    info = probe(path)
    (frame,) = sample_frames_raw(path, info)
    assert abs(int(frame[20, 20, 0]) - 98.7) < 0.8


def sample_frames_raw(path: Path, info: VideoInfo) -> list[np.ndarray]:
    """The first frame, converted even though it is flat."""
    from tools.video.frames import _Converter

    return [
        _Converter(info)(frame, 0).pixels
        for frame in segment_frames(path, info, WHOLE, FrameCounts())
    ][:1]


@pytest.mark.parametrize(
    "turn",
    [
        ["-display_rotation", 90],
        ["-display_rotation", 180],
        ["-display_rotation", 270],
        ["-display_hflip"],
        ["-display_vflip"],
        ["-display_rotation", 90, "-display_hflip"],
    ],
)
def test_turned_videos_come_out_upright(turn: list[object], tmp_path: Path) -> None:
    from_pixels(tmp_path / "plain.mp4", [quadrants()] * 3, *LOSSLESS, "-pix_fmt", "yuv420p")
    ffmpeg(*turn, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    info = probe(tmp_path / "turned.mp4")
    raw = ffmpeg(
        "-i", tmp_path / "turned.mp4", "-frames:v", 1, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"
    )
    # ffmpeg rotates it by itself
    expected = np.frombuffer(raw, np.uint8).reshape(info.height, info.width, 3)
    pixels = sampled(tmp_path / "turned.mp4")[0].pixels
    assert pixels.shape == expected.shape
    at = np.ix_([40, info.height - 40], [40, info.width - 40])
    assert np.abs(pixels[at].astype(int) - expected[at]).max() <= 2
    assert not np.array_equal(pixels, sampled(tmp_path / "plain.mp4")[0].pixels)


@pytest.mark.parametrize(
    ("aspect", "size"), [("64/45", (169, 320)), ("8/9", (240, 284)), ("1001/1000", (240, 320))]
)
def test_pixels_become_square_by_shrinking(
    aspect: str, size: tuple[int, int], tmp_path: Path
) -> None:
    from_pixels(tmp_path / "a.mp4", [quadrants()] * 2, "-vf", f"setsar={aspect}", *H264)
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == size
    assert sampled(tmp_path / "a.mp4")[0].pixels.shape == (*size, 3)


def test_interlaced_video_is_deinterlaced(tmp_path: Path) -> None:
    frames = pan(3, 40, 6.0, 240, 320)
    from_pixels(
        tmp_path / "a.mp4",
        frames,
        "-vf",
        "format=yuv420p,tinterlace=interleave_top",
        "-flags",
        "+ilme+ildct",
        *H264,
        rate=50,
    )
    info = probe(tmp_path / "a.mp4")
    assert info.is_interlaced
    combed, clean = straight(tmp_path / "a.mp4"), sampled(tmp_path / "a.mp4")
    assert len(clean) == len(combed) == 20
    for (_, before), after in list(zip(sorted(combed.items()), clean, strict=True))[2:-2]:
        assert combing(after.pixels) < 0.5 * combing(before)


def combing(pixels: np.ndarray) -> float:
    """Mean difference of rows from the mean of their neighbours."""
    rows = pixels.astype(float)
    return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())


REFUSED = {
    "pq": (
        "setparams=color_trc=smpte2084:color_primaries=bt2020:colorspace=bt2020nc",
        "SMPTE ST 2084 (PQ)",
    ),
    "hlg": (
        "setparams=color_trc=arib-std-b67:color_primaries=bt2020:colorspace=bt2020nc",
        "ARIB STD-B67 (HLG)",
    ),
    "wide": ("setparams=color_trc=bt709:color_primaries=bt2020:colorspace=bt2020nc", "BT.2020"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_hdr_and_wide_gamut_are_refused_with_a_command_that_works(
    kind: str, tmp_path: Path
) -> None:
    tags, word = REFUSED[kind]
    ffmpeg(*TESTSRC, "-t", 0.4, "-vf", f"format=yuv420p10le,{tags}", *H265, tmp_path / "hdr.mkv")
    (refusal,) = probe(tmp_path / "hdr.mkv").refusals
    assert word in refusal
    command = refusal.partition("`ffmpeg ")[2].partition("`")[0].split()
    names = {"IN": tmp_path / "hdr.mkv", "OUT.mp4": tmp_path / "sdr.mp4"}
    ffmpeg(*(names.get(word, word) for word in command))
    assert probe(tmp_path / "sdr.mp4").refusals == ()


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    files = {
        "empty.mp4": b"",
        "text.mkv": b"This is not a video.\n" * 99,
        "photo.mp4": encoded(photograph(64, 64), "png"),
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "concat.mkv": b"ffconcat version 1.0\nfile other.mp4\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadVideoError, match="empty file" if not content else "not a video"):
            probe(tmp_path / name)
    (tmp_path / "cover.png").write_bytes(encoded(photograph(64, 64), "png"))
    sound = ["-f", "lavfi", "-i", "sine=duration=1"]
    ffmpeg(*sound, tmp_path / "sound.mp4")
    with pytest.raises(BadVideoError, match=r"no video stream$"):
        probe(tmp_path / "sound.mp4")
    ffmpeg(
        *sound,
        "-i",
        tmp_path / "cover.png",
        "-map",
        0,
        "-map",
        1,
        "-c:v",
        "copy",
        "-disposition:v",
        "attached_pic",
        tmp_path / "cover.mp4",
    )
    with pytest.raises(BadVideoError, match="no video stream except cover art"):
        probe(tmp_path / "cover.mp4")
    with pytest.raises(BadVideoError, match="not a regular file"):
        probe(tmp_path)


def test_cover_art_is_not_the_film(tmp_path: Path) -> None:
    # larger than the film
    (tmp_path / "cover.png").write_bytes(encoded(photograph(600, 600), "png"))
    ffmpeg(
        *TESTSRC,
        "-i",
        tmp_path / "cover.png",
        "-map",
        0,
        "-map",
        1,
        "-c:v:0",
        "libx264",
        "-c:v:1",
        "png",
        "-disposition:v:1",
        "attached_pic",
        "-t",
        1,
        tmp_path / "a.mp4",
    )
    assert (probe(tmp_path / "a.mp4").codec, probe(tmp_path / "a.mp4").height) == ("h264", 240)


def test_alpha_is_left_out(tmp_path: Path) -> None:
    rgba = np.dstack([quadrants(), np.full((240, 320), 7, np.uint8)])
    from_pixels(
        tmp_path / "a.mov",
        [rgba] * 2,
        "-c:v",
        "prores_ks",
        "-profile:v",
        4,
        "-pix_fmt",
        "yuva444p10le",
        pixel_format="rgba",
    )
    pixels = sampled(tmp_path / "a.mov")[0].pixels
    assert np.abs(pixels[::60, ::60].astype(int) - quadrants()[::60, ::60]).max() < 12


def test_damage_costs_the_frames_around_it_and_is_counted(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, "-g", 20, tmp_path / "good.ts")
    good = straight(tmp_path / "good.ts")
    data = bytearray((tmp_path / "good.ts").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path = tmp_path / "bad.ts"
    path.write_bytes(data)
    info, tally = probe(path), FrameCounts()
    frames = list(segment_frames(path, info, WHOLE, tally))
    assert all(
        np.array_equal(frame.to_ndarray(format="rgb24"), good[frame.pts]) for frame in frames
    )
    assert 60 < len(frames) < len(good) == 100
    assert frames[-1].pts == max(good)  # it continued after the damage
    assert tally.errors + tally.lost > 0
    with pytest.raises(DamagedError):  # several threads would lose other frames
        list(segment_frames(path, info, WHOLE, FrameCounts(), codec_threads=2))


def test_truncated_videos_give_what_is_there(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, tmp_path / "a.mkv")
    ffmpeg(*MOVING, *H264, "-movflags", "faststart", tmp_path / "first.mp4")
    ffmpeg(*MOVING, *H264, tmp_path / "last.mp4")
    for name in ("a.mkv", "first.mp4", "last.mp4"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    for name in ("a.mkv", "first.mp4"):
        info = probe(tmp_path / name)
        assert info.truncated.startswith("truncated")
        assert 1 < info.duration_s < 4
        assert 25 < len(list(segment_frames(tmp_path / name, info, WHOLE, FrameCounts()))) < 100
    with pytest.raises(BadVideoError, match="its header is damaged or truncated"):
        probe(tmp_path / "last.mp4")  # its index was at the end


READ_ALL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tools.video.choice import Sampling
from tools.video.frames import sample_frames
from tools.video.probe import BadVideoError, probe, segments
for path in map(Path, sys.argv[2:]):
    try:
        info = probe(path)
        pieces = segments(info, 1)[:9]
        frames = ([*sample_frames(path, info, piece, Sampling(), "key")] for piece in pieces)
        print("read", sum(map(len, frames)))
    except (BadVideoError, OSError) as error:
        assert str(error)
        print("refused")
"""


@pytest.mark.parametrize("kind", ["b_frames.mp4", "vp9.webm", "open_gop.ts", "packed.avi"])
def test_hostile_files_end(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / kind)
    good = (tmp_path / kind).read_bytes()
    rng = random.Random(kind)
    paths = []
    for number in range(8):
        data = bytearray(good)
        for _ in range(rng.choice([1, 10, 200])):
            most = 2000 if rng.random() < 0.7 else len(data)  # mostly in its header
            data[rng.randrange(most)] = rng.choice([0, 255, rng.randrange(256)])
        paths.append(tmp_path / f"{number}_{kind}")
        paths[-1].write_bytes(data)
    done = run_python(READ_ALL, str(CHECKOUT), *map(str, paths))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 8


def test_one_frame_of_a_still_and_one_after_each_cut(tmp_path: Path) -> None:
    frames = (
        [still(1)] * 60
        + [still(2)] * 40
        + [np.full((360, 640, 3), 16, np.uint8)] * 20
        + [still(3)] * 40
    )
    path = from_pixels(tmp_path / "a.mp4", frames + [still(1)] * 30, *H264)
    tally = FrameCounts()
    # not still(1) a second time
    assert [frame.index for frame in sampled(path, Sampling(), tally=tally)] == [0, 60, 120]
    assert tally.dropped["blank"] >= 1
    assert tally.dropped["similar"] >= 5
    assert tally.decoded == 190


def test_pans_are_sampled_within_the_intervals(tmp_path: Path) -> None:
    path = from_pixels(tmp_path / "a.mp4", pan(4, 200, 6.0), *H264)
    sampling = Sampling(frame_interval=7, min_interval=4, max_interval=12)
    indices = [frame.index for frame in sampled(path, sampling)]
    gaps = np.diff(indices)
    assert len(indices) > 20
    assert gaps.min() >= 4
    assert np.mean(gaps <= 12) > 0.9  # except for a candidate that was dropped
    other = [
        frame.index for frame in sample_frames(path, probe(path), WHOLE, sampling, "another key")
    ]
    assert other != indices


def test_gaps_have_the_mean_that_was_asked_for() -> None:
    chooser: FrameChooser[int] = FrameChooser(Sampling(10, 4, 15), "key", True)
    gaps = [chooser._gap() for _ in range(20000)]
    assert {*gaps} == {*range(4, 16)}
    assert np.mean(gaps) == pytest.approx(10, abs=0.1)


def test_cross_fades_are_avoided(tmp_path: Path) -> None:
    path = from_pixels(
        tmp_path / "a.mp4", [still(5)] * 30 + fade(still(5), still(6), 25) + [still(6)] * 30, *H264
    )
    tally = FrameCounts()
    frames = sampled(path, Sampling(4, 4, 4), tally=tally)
    for frame in frames:
        assert min(np.abs(frame.pixels.astype(int) - still(seed)).mean() for seed in (5, 6)) < 8
    assert len(frames) in (2, 3, 4)
    assert tally.dropped["cross-fade"] >= 3
