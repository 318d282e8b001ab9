"""tools/video_to_data.py and tools/mkv_to_mp4.py as processes: crops, restarts, errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset_corpus import CHECKOUT, assert_user_error, run_tool, stamped_tree, tree
from tools.crops.grid import halved
from tools.video.choice import Sampling
from tools.video.frames import FrameCounts, sample_frames, segment_frames
from tools.video.probe import Segment, open_video, probe, segments
from video_corpus import H264, H265, MOVING, TESTSRC, VP9, ffmpeg, from_pixels, pan, still

GATES_OFF = ["--min-sharpness", 0, "--min-gradient", 0, "--keep-duplicates"]
SMALL = ["--size", 96, *GATES_OFF]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films with scenes, in folders, next to files that are not films."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "deep").mkdir()
    (folder / ".hidden").mkdir()
    scenes = [still(1)] * 30 + pan(2, 60, 4.0) + [still(3)] * 30
    from_pixels(folder / "a.mp4", scenes, *H264)
    from_pixels(folder / "deep" / "ö b.mkv", pan(4, 50, 5.0), *H265, "-pix_fmt", "yuv420p10le")
    (folder / "notes.txt").write_text("no film")
    (folder / ".hidden" / "c.mp4").write_bytes(b"junk")
    os.symlink("/", folder / "linked_folder")
    return folder


def lines(path: Path) -> list[dict]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_crops_are_the_pixels_of_the_frames(films: Path, tmp_path: Path) -> None:
    result = run_tool(
        "video_to_data", films, "--out", tmp_path / "out", *SMALL, "--segment-time", 2
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    records = lines(tmp_path / "out" / "manifest.jsonl")
    assert {record["photo"] for record in records} == {"a.mp4", "deep/ö b.mkv"}
    expected = {}
    for name in ("a.mp4", "deep/ö b.mkv"):
        info = probe(films / name)
        for piece in segments(info, 2):
            for frame in sample_frames(
                films / name, info, piece, Sampling(), f"0/{name}/{piece.start_s}"
            ):
                expected[f"{name}/{piece.start_s:06d}/f{frame.index:06d}"] = frame
    for record in records:
        frame = expected[record["path"].rpartition("_x2_")[0]]
        pixels, top, left = (
            np.load(tmp_path / "out" / record["path"]),
            record["top"],
            record["left"],
        )
        assert np.array_equal(pixels, halved(frame.pixels)[top : top + 96, left : left + 96])
        assert record["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
        assert (record["scale"], record["time"]) == (2, round(frame.time_s, 6))
        assert record["decoder"].startswith("pyav ")
    assert {record["path"].rpartition("_x2_")[0] for record in records} == {*expected}
    assert len(records) == 3 * len(expected)
    assert f"170 frames decoded, {len(expected)} cut" in result.stdout
    firsts = [record["time"] for record in records if record["photo"] == "a.mp4"]
    assert {0.0, 1.2, 3.6} <= {*firsts}  # the first frame of each scene
    assert not any(0 < time < 1.2 for time in firsts)  # a static scene


def test_threads_do_not_matter_and_seed_and_sampling_do(films: Path, tmp_path: Path) -> None:
    runs = {
        "one": ["--threads", 1],
        "five": ["--threads", 5],
        "seed": ["--seed", 1],
        "often": [
            "--min-interval",
            2,
            "--frame-interval",
            3,
            "--max-interval",
            4,
            "--min-change",
            0,
        ],
    }
    for name, arguments in runs.items():
        assert (
            run_tool(
                "video_to_data", films, "--out", tmp_path / name, *SMALL, *arguments
            ).returncode
            == 0
        )
    assert tree(tmp_path / "one") == tree(tmp_path / "five")
    assert tree(tmp_path / "one") != tree(tmp_path / "seed")
    assert len(tree(tmp_path / "often")) > 2 * len(tree(tmp_path / "one"))


def test_files_and_folders_and_full_size(films: Path, tmp_path: Path) -> None:
    result = run_tool(
        "video_to_data",
        films / "a.mp4",
        films / "deep",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--keep-lossy-size",
        "--num-scales",
        1,
    )
    assert result.returncode == 0, result.stderr
    records = lines(tmp_path / "out" / "manifest.jsonl")
    assert {(record["photo"], record["scale"]) for record in records} == {
        ("a.mp4", 1),
        ("deep/ö b.mkv", 1),
    }


def test_killed_and_started_again(films: Path, tmp_path: Path) -> None:
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "mandelbrot=size=640x360:rate=25",
        "-t",
        12,
        *H264,
        tmp_path / "long.mp4",
    )
    arguments = [*SMALL, "--segment-time", 1, "--threads", 1]
    assert (
        run_tool(
            "video_to_data", tmp_path / "long.mp4", "--out", tmp_path / "whole", *arguments
        ).returncode
        == 0
    )
    out = tmp_path / "killed"
    command = [
        sys.executable,
        str(CHECKOUT / "tools" / "video_to_data.py"),
        tmp_path / "long.mp4",
        "--out",
        out,
    ]
    kills = 0
    for num_lines in (1, 40):
        process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)], stdout=subprocess.DEVNULL
        )
        manifest = out / "manifest.jsonl"
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if manifest.exists() and manifest.read_bytes().count(b"\n") >= num_lines:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    folder = out / "long.mp4" / "000011"  # the last one
    assert "/000011/" not in (out / "manifest.jsonl").read_text()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.txt").write_text("not made by the tool")
    (folder / "f000001_x2_000_000.npy.tmp").write_bytes(b"half-written")
    result = run_tool("video_to_data", tmp_path / "long.mp4", "--out", out, *arguments)
    assert result.returncode == 0, result.stderr
    assert (folder / "mine.txt").read_text() == "not made by the tool"
    (folder / "mine.txt").unlink()
    assert tree(out) == tree(tmp_path / "whole")
    before = stamped_tree(out / "long.mp4")
    again = run_tool("video_to_data", tmp_path / "long.mp4", "--out", out, *arguments)
    assert again.returncode == 0
    assert "0 segments cut" in again.stdout
    assert stamped_tree(out / "long.mp4") == before


def test_a_changed_video_is_cut_anew(films: Path, tmp_path: Path) -> None:
    shutil.copytree(films / "deep", tmp_path / "films")
    shutil.copy(films / "a.mp4", tmp_path / "films" / "a.mp4")
    assert (
        run_tool("video_to_data", tmp_path / "films", "--out", tmp_path / "out", *SMALL).returncode
        == 0
    )
    before = stamped_tree(tmp_path / "out")
    from_pixels(tmp_path / "films" / "a.mp4", pan(9, 30, 5.0), *H264)
    assert (
        run_tool("video_to_data", tmp_path / "films", "--out", tmp_path / "out", *SMALL).returncode
        == 0
    )
    after = stamped_tree(tmp_path / "out")
    assert {name for name in after if name.startswith("ö") and after[name] != before[name]} == set()
    assert {name for name in before if name.startswith("a.mp4")} != {
        name for name in after if name.startswith("a.mp4")
    }
    assert (
        run_tool("video_to_data", tmp_path / "films", "--out", tmp_path / "new", *SMALL).returncode
        == 0
    )
    crops = {
        name: digest for name, digest in tree(tmp_path / "out").items() if name.endswith(".npy")
    }
    assert crops == {
        name: digest for name, digest in tree(tmp_path / "new").items() if name.endswith(".npy")
    }


def test_videos_that_cannot_be_used_are_named(films: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(films / "a.mp4", folder / "good.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.avi").write_text("This is not a video.\n" * 99)
    ffmpeg(
        *TESTSRC,
        "-t",
        0.4,
        "-vf",
        "format=yuv420p10le,setparams=color_trc=smpte2084",
        *H265,
        folder / "hdr.mkv",
    )
    ffmpeg(*TESTSRC, "-t", 0.4, "-s", "160x120", *VP9, folder / "small.webm")
    from_pixels(folder / "black.mp4", [np.full((360, 640, 3), 16, np.uint8)] * 30, *H264)
    result = run_tool("video_to_data", folder, "--out", tmp_path / "out", *SMALL)
    assert result.returncode == 1
    assert result.stderr == ""
    rejects = {
        reject["photo"]: (reject["gate"], reject["reason"])
        for reject in lines(tmp_path / "out" / "rejects.jsonl")
    }
    assert rejects["empty.mp4"] == ("decode", "empty file")
    assert rejects["text.avi"][1].startswith("not a video")
    assert rejects["hdr.mkv"][1].startswith(
        "HDR: its transfer characteristic is SMPTE ST 2084 (PQ)"
    )
    assert rejects["small.webm"][0] == "size"
    assert rejects["black.mp4"][0] == "flat"
    assert "no frame worth storing among 30" in rejects["black.mp4"][1]
    assert {record["photo"] for record in lines(tmp_path / "out" / "manifest.jsonl")} == {
        "good.mp4"
    }
    for name in ("empty.mp4", "text.avi", "hdr.mkv"):
        assert f"rejected {name}: " in result.stdout
    again = run_tool("video_to_data", folder, "--out", tmp_path / "out", *SMALL)
    assert again.returncode == 1  # the three bad films are still there
    assert "small.webm" not in again.stdout  # settled
    assert "black.mp4" not in again.stdout


def test_damage_and_missing_ends_are_reported_and_the_rest_is_cut(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, "-g", 20, tmp_path / "hole.ts")
    data = bytearray((tmp_path / "hole.ts").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "hole.ts").write_bytes(data)
    ffmpeg(*MOVING, *H264, tmp_path / "cut.mkv")
    os.truncate(tmp_path / "cut.mkv", (tmp_path / "cut.mkv").stat().st_size // 2)
    arguments = [tmp_path / "hole.ts", tmp_path / "cut.mkv", "--size", 64, *GATES_OFF]
    result = run_tool("video_to_data", *arguments, "--out", tmp_path / "out", "--threads", 1)
    assert result.returncode == 1, result.stderr
    assert "rejected hole.ts at 0.000 s: damaged: " in result.stdout
    reasons = {
        reject["photo"]: reject["reason"] for reject in lines(tmp_path / "out" / "rejects.jsonl")
    }
    assert "damaged: " in reasons["hole.ts"]
    assert "truncated: " in reasons["cut.mkv"]
    times = {
        name: [
            record["time"]
            for record in lines(tmp_path / "out" / "manifest.jsonl")
            if record["photo"] == name
        ]
        for name in ("hole.ts", "cut.mkv")
    }
    assert max(times["hole.ts"]) > 3
    assert 1 < max(times["cut.mkv"]) < 3.5
    # Two decoder threads per film, until damage is met.
    assert (
        run_tool("video_to_data", *arguments, "--out", tmp_path / "four", "--threads", 4).returncode
        == 1
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "four")


def test_bad_arguments_are_said_in_one_line(films: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert_user_error(
        run_tool("video_to_data", films, *out, "--min-interval", 12),
        "--min-interval 12",
        "all three",
    )
    assert_user_error(
        run_tool("video_to_data", films, *out, "--segment-time", 0.5), "--segment-time 0.5", "1 to"
    )
    assert_user_error(run_tool("video_to_data", films, *out, "--min-change", -1), "--min-change -1")
    assert_user_error(
        run_tool("video_to_data", tmp_path / "none", *out), "none", "no such file or folder"
    )
    (tmp_path / "empty").mkdir()
    assert_user_error(
        run_tool("video_to_data", tmp_path / "empty", *out), "no videos below this folder", ".mkv"
    )
    assert_user_error(
        run_tool("video_to_data", films, "--out", films / "out"), "neither may lie within the other"
    )
    assert_user_error(run_tool("video_to_data", *out), "no video given")
    assert not (tmp_path / "out").exists()
    assert run_tool("video_to_data", films, *out, *SMALL).returncode == 0
    assert_user_error(
        run_tool("video_to_data", films, *out, *SMALL, "--segment-time", 3),
        "segment_time",
        "another",
    )


def test_mkv_to_mp4_copies_bit_by_bit(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    (folder / "deep").mkdir(parents=True)
    sound = ["-f", "lavfi", "-i", "sine=duration=4"]
    (tmp_path / "text.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n")
    ffmpeg(
        *TESTSRC, *sound, "-i", tmp_path / "text.srt", *H264, "-c:a", "libopus", folder / "a.mkv"
    )
    ffmpeg(*TESTSRC, *H265, "-pix_fmt", "yuv420p10le", folder / "deep" / "b.MKV")
    ffmpeg(*TESTSRC, "-c:v", "libvpx", "-deadline", "realtime", folder / "vp8.mkv")
    shutil.copy(folder / "a.mkv", folder / "cut.mkv")
    os.truncate(folder / "cut.mkv", (folder / "a.mkv").stat().st_size // 2)
    (folder / "taken.mkv").write_bytes(b"whatever")
    (folder / "taken.mp4").write_bytes(b"mine")
    sources = {
        name: digest for name, digest in tree(folder).items() if name.lower().endswith("mkv")
    }
    result = run_tool("mkv_to_mp4", folder)
    assert result.returncode == 1
    assert "2 videos written as .mp4; already there: 1; skipped: 2" in result.stdout
    assert "MP4 does not support its video codec, vp8" in result.stdout
    assert "cut.mkv: truncated: " in result.stdout
    assert "a.mkv: dropped: subtitle" in result.stdout
    # no half-written files
    assert {*tree(folder)} == {*sources, "a.mp4", "deep/b.mp4", "taken.mp4"}
    assert (folder / "taken.mp4").read_bytes() == b"mine"
    assert {name: tree(folder)[name] for name in sources} == sources
    for before, after in (("a.mkv", "a.mp4"), ("deep/b.MKV", "deep/b.mp4")):
        assert frames(folder / before) == frames(folder / after)
    with open_video(folder / "a.mp4") as (container, _):
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    stamps = stamped_tree(folder)
    again = run_tool("mkv_to_mp4", folder)
    assert "0 videos written as .mp4; already there: 3; skipped: 2" in again.stdout
    assert stamped_tree(folder) == stamps
    assert_user_error(run_tool("mkv_to_mp4", tmp_path / "none"), "no such folder or file")
    assert_user_error(run_tool("mkv_to_mp4", folder / "a.mp4"), "not an .mkv file")


def frames(path: Path) -> list[tuple[float, str]]:
    """(second, digest of the pixels) of every frame."""
    info, found = probe(path), []
    for frame in segment_frames(path, info, Segment(0, None, None), FrameCounts()):
        seconds = float((frame.pts - info.start) * info.time_base)
        found.append(
            (
                round(seconds, 2),
                hashlib.sha256(frame.to_ndarray(format="rgb24").tobytes()).hexdigest(),
            )
        )
    return found


def test_a_still_background_is_stored_once(tmp_path: Path) -> None:
    """With a fixed camera, no crop repeats another, however often the tool was stopped."""
    background, frames = still(5, 256, 512), []
    for step in range(60):
        frame = background.copy()
        # moves only through the upper half
        frame[20:120, 4 * step : 4 * step + 100] = still(6, 100, 100)
        frames.append(frame)
    (tmp_path / "films").mkdir()
    from_pixels(tmp_path / "films" / "fixed.mp4", frames, *H264)
    arguments = [
        tmp_path / "films",
        "--size",
        128,
        "--keep-lossy-size",
        "--min-sharpness",
        0,
        "--segment-time",
        1,
        "--num-scales",
        1,
    ]
    out = tmp_path / "data" / "films"
    assert run_tool("video_to_data", *arguments, "--out", out).returncode == 0
    records = lines(out / "manifest.jsonl")
    lower = [record for record in records if record["top"] >= 128]
    assert len({record["time"] for record in records}) > 3
    assert 0 < len(lower) <= 8, "each place of the still half at most once, but for its random gaps"
    result = run_tool(
        "check_training_data",
        "--data-dir",
        tmp_path / "data",
        "--min-size",
        128,
        "--min-sharpness",
        0,
    )
    assert result.returncode == 0, result.stdout
    # the last segment is lost
    shutil.rmtree(out / "fixed.mp4" / sorted(os.listdir(out / "fixed.mp4"))[-1])
    before = set(tree(out))
    assert run_tool("video_to_data", *arguments, "--out", out).returncode == 0
    assert {record["path"] for record in lines(out / "manifest.jsonl")} == {
        record["path"] for record in records
    }
    assert before < set(tree(out))
