"""Films that are damaged, unusual or interrupted, upscaled by `upscale.py`: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from pathlib import Path

import av
import numpy as np
import pytest

import upscale
import warm
from fabricate import run_command, tiny_saved, write_cubic
from pipeline.cli import RunError, UserError
from pipeline.inference import video
from pipeline.inference.film_output import write_film
from pipeline.inference.film_segments import _digest, discard_leftovers, open_segments
from pipeline.inference.sizes import TargetSize
from pipeline.inference.video import upscale_video
from pipeline.models.weights import write_network
from video_corpus import ffmpeg

PICTURES = ["-f", "lavfi", "-i", "mandelbrot=size=64x48:rate=25"]
H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "veryfast", "-bf", "2"]


def tone(rate=48000, frequency=440):
    return ["-f", "lavfi", "-i", f"sine=frequency={frequency}:sample_rate={rate}"]


def film(path, *arguments, rate=48000, seconds="0.4"):
    """Make a film of 10 frames with a tone."""
    ffmpeg(*PICTURES, *tone(rate), "-t", seconds, *H264, *arguments, path)
    return path


@pytest.fixture(scope="module")
def cubic(tmp_path_factory):
    return write_cubic(tmp_path_factory.mktemp("weights") / "cubic.safetensors")


def run(capsys, cubic, source, out, *arguments):
    return run_command(capsys, upscale, source, "-o", out, "--model", cubic, *arguments)


def packets(path, kind):
    """Return the packets of all tracks of one kind: number of the track, content, time."""
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        return [
            (packet.stream.index, bytes(packet), round(float(packet.pts * packet.time_base), 3))
            for packet in container.demux(streams)
            if packet.size
        ]


def frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def samples(path):
    """Decode all sound as 16-bit samples (channels, count)."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="s16p")
        decoded = [
            part.to_ndarray()
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    return np.concatenate(decoded, axis=1)


# Sound


@pytest.mark.parametrize(
    ("name", "result", "arguments", "codec", "note"),
    [
        (
            "wma.wmv",
            "a.mkv",
            ["-c:v", "msmpeg4", "-bf", "0", "-c:a", "wmav2"],
            "flac",
            "wmav2 to FLAC",
        ),
        ("mulaw.avi", "a.mkv", ["-c:a", "pcm_mulaw"], "flac", "pcm_mulaw to FLAC"),
        ("adpcm.avi", "a.mp4", ["-c:a", "adpcm_ms"], "aac", "adpcm_ms to AAC"),
        ("amr.3gp", "a.mkv", ["-c:a", "libopencore_amrnb"], "flac", "amr_nb to FLAC"),
        ("amr.3gp", "a.mov", ["-c:a", "libopencore_amrnb"], "amrnb", ""),
        (
            "nelly.flv",
            "a.mkv",
            ["-c:v", "flv1", "-bf", "0", "-c:a", "nellymoser"],
            "flac",
            "nellymoser to",
        ),
        ("disc.m2ts", "a.mkv", ["-ac", "2", "-c:a", "pcm_bluray"], "flac", "pcm_bluray to FLAC"),
        ("disc.m2ts", "a.mov", ["-ac", "2", "-c:a", "pcm_bluray"], "aac", "pcm_bluray to AAC"),
    ],
)
def test_sound_is_copied_or_else_converted(
    tmp_path, capsys, cubic, name, result, arguments, codec, note
):
    rate = 8000 if name.startswith(("amr", "nelly", "mulaw", "adpcm")) else 48000
    source = film(tmp_path / name, *arguments, rate=rate)
    out = tmp_path / result
    status, _, err = run(capsys, cubic, source, out)
    assert status == 0
    assert (note in err) if note else (err == "")
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.name == codec
    assert len(frames(out)) == 10
    if not note:
        assert [data for _, data, _ in packets(out, "audio")] == [
            data for _, data, _ in packets(source, "audio")
        ]
        return
    before, after = samples(source), samples(out)
    if codec == "flac":  # lossless
        assert np.abs(after.astype(int) - before).max() <= (0 if "pcm" in note else 1)
    else:
        assert after.shape[1] == pytest.approx(before.shape[1], rel=0.2)
        assert after.std() == pytest.approx(before.std(), rel=0.2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_damaged_packet_of_sound_costs_that_packet_alone(tmp_path, capsys, cubic):
    source = film(tmp_path / "a.ts", "-c:a", "aac", seconds="1.2")
    data = bytearray(source.read_bytes())
    headers = [
        start + at
        for start in range(0, len(data), 188)
        if (data[start + 1] & 0x1F, data[start + 2]) == (1, 1)
        and (at := bytes(data[start : start + 188]).find(b"\xff\xf1")) > 0
    ]
    data[headers[3] : headers[3] + 2] = b"\x12\x34"  # no longer ADTS
    source.write_bytes(data)
    for name in ("a.mp4", "a.mkv"):
        status, _, err = run(capsys, cubic, source, tmp_path / name)
        assert status == 0
        assert "a.ts: audio track 1 is damaged: dropped 3 packets" in err
        assert len(frames(tmp_path / name)) == 30
        kept = [data for _, data, _ in packets(tmp_path / name, "audio")]
        whole = [data for _, data, _ in packets(source, "audio")]
        assert len(kept) == len(whole) - 3
        assert samples(tmp_path / name).shape[1] > 40_000


def test_sound_that_cannot_be_finished_as_a_copy_is_converted(
    tmp_path, capsys, doubled, restoring, monkeypatch
):
    source, whole = doubled
    result = tmp_path / "out.mkv"

    def refusing(*arguments, copies_sound):
        if copies_sound:  # as when the last packets, which wait for others, are damaged
            raise av.InvalidDataError(int.from_bytes(b"INDA", "little"), "")
        return write_film(*arguments, copies_sound=copies_sound)

    monkeypatch.setattr(video, "write_film", refusing)
    double(source, result)
    assert capsys.readouterr().err.endswith("audio track 1 is converted from aac to FLAC\n")
    assert packets(result, "video") == packets(whole, "video")
    assert np.array_equal(samples(result), samples(source))


def test_tracks_keep_order_language_title_and_default_flag(tmp_path, capsys, cubic):
    source = tmp_path / "a.mkv"
    ffmpeg(
        *PICTURES, *tone(), *tone(frequency=880), "-t", "0.4",
        "-map", "1", "-map", "0", "-map", "2", *H264, "-c:a", "aac",
        "-metadata:s:a:0", "language=deu", "-metadata:s:a:0", "title=Deutsch",
        "-metadata:s:a:1", "language=fra", "-metadata:s:a:1", "title=Commentaire",
        "-disposition:a:0", "0", "-disposition:a:1", "default", source,
    )  # fmt: skip
    for name, title in (("out.mkv", "title"), ("out.mp4", "handler_name")):
        assert run(capsys, cubic, source, tmp_path / name)[0] == 0
        with av.open(str(tmp_path / name)) as container:
            assert [stream.type for stream in container.streams] == ["audio", "video", "audio"]
            first, second = container.streams.audio
            assert (first.metadata["language"], second.metadata["language"]) == ("deu", "fra")
            assert (first.metadata[title], second.metadata[title]) == ("Deutsch", "Commentaire")
            assert not first.disposition & av.stream.Disposition.default
            assert second.disposition & av.stream.Disposition.default


# Pictures


def test_a_clock_that_starts_late_starts_at_0(tmp_path, capsys, cubic):
    source = film(tmp_path / "a.ts", "-c:a", "aac", "-output_ts_offset", "5000")
    assert run(capsys, cubic, source, tmp_path / "a.mp4")[0] == 0
    begin = {}
    for path in (source, tmp_path / "a.mp4"):
        with av.open(str(path)) as container:
            begin[path.suffix] = [
                float(stream.start_time * stream.time_base) for stream in container.streams
            ]
    assert min(begin[".ts"]) > 5000
    assert min(begin[".mp4"]) == 0
    assert begin[".mp4"][0] - begin[".mp4"][1] == pytest.approx(
        begin[".ts"][0] - begin[".ts"][1], abs=0.001
    )
    assert b"elst" in (tmp_path / "a.mp4").read_bytes()  # for the sound's offset, not for 5,000 s
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / av.time_base < 1


@pytest.mark.parametrize(
    ("options", "turned"),
    [
        (["-display_hflip"], lambda image: image[:, ::-1]),
        (["-display_vflip"], lambda image: image[::-1]),
        (["-display_rotation", "90", "-display_hflip"], None),
    ],
)
def test_a_mirroring_display_matrix_is_applied(tmp_path, capsys, cubic, options, turned):
    plain, source = tmp_path / "plain.mp4", tmp_path / "a.mp4"
    ffmpeg(*PICTURES, "-t", "0.2", *H264, plain)
    ffmpeg(*options, "-i", plain, "-c", "copy", source)
    shown = tmp_path / "shown.png"  # as ffmpeg, like players, turns it
    ffmpeg("-i", source, "-frames:v", "1", shown)
    assert run(capsys, cubic, source, tmp_path / "out.mp4")[0] == 0
    expected = frames(shown)[0].astype(int)
    if turned is not None:
        assert np.abs(turned(frames(plain)[0]).astype(int) - expected).mean() < 2
    found = frames(tmp_path / "out.mp4")[0][::2, ::2].astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 12
    for flipped in (expected[::-1], expected[:, ::-1]):
        assert np.abs(found - flipped).mean() > 20


def test_alpha_is_dropped_with_a_word(tmp_path, capsys, cubic):
    source = tmp_path / "a.mov"
    ffmpeg(*PICTURES, "-t", "0.2", "-c:v", "prores_ks", "-pix_fmt", "yuva444p10le", source)
    status, _, err = run(capsys, cubic, source, tmp_path / "out.mov")
    assert status == 0
    assert err == f"note: {source}: its alpha channel is dropped, which H.264 cannot hold\n"


def test_damaged_pictures_are_reported_and_the_rest_is_upscaled(tmp_path, capsys, cubic):
    source = tmp_path / "a.mov"
    ffmpeg(*PICTURES, "-t", "0.4", "-c:v", "png", source)
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        middle = [bytes(packet) for packet in container.demux(video=0) if packet.size][5]
    at = data.find(middle)
    data[at + 8 : at + 40] = bytes(32)
    source.write_bytes(data)
    status, _, err = run(capsys, cubic, source, tmp_path / "out.mp4")
    assert status == 0
    assert "1 video packet could not be read or decoded; the rest is upscaled" in err
    times = [time for _, _, time in sorted(packets(tmp_path / "out.mp4", "video"), key=str)]
    assert sorted(times) == pytest.approx([0.04 * index for index in range(10) if index != 5])


# Interruptions


class Doubling:
    """Stands in for a network: frames are upscaled by repeating pixels."""

    scale = 2

    def precision_for(self, *, is_deep):
        return "fp32"

    def max_pixels(self, precision):
        return 2 * 64 * 48  # two frames at a time


def double(source, result, **settings):
    """Upscale in segments of 5 frames."""
    video.SEGMENT_FRAMES = (5, 5)
    video.upscale_images = lambda images, *_: images.repeat(2, 1).repeat(2, 2)
    upscale_video(Path(source), Path(result), TargetSize(), Doubling(), lambda _: None, settings)


def double_until(event, source, result):
    """Upscale, but die of SIGKILL at the given one of the events that change the disk."""
    left = event

    def counting(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counting(getattr(os, name)))
    double(source, result)


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """A film of 17 frames at uneven times with sound, and the result of an uninterrupted call."""
    folder = tmp_path_factory.mktemp("doubled")
    source = film(
        folder / "a.mkv", "-vf", "select='not(eq(mod(n,3),1))'", "-fps_mode", "vfr", "-c:a", "aac",
        seconds="1",
    )  # fmt: skip
    old = video.SEGMENT_FRAMES, video.upscale_images
    double(source, folder / "whole.mkv")
    video.SEGMENT_FRAMES, video.upscale_images = old
    return source, folder / "whole.mkv"


@pytest.fixture
def restoring(monkeypatch):
    """Undo what `double` changes."""
    monkeypatch.setattr(video, "SEGMENT_FRAMES", video.SEGMENT_FRAMES)
    monkeypatch.setattr(video, "upscale_images", video.upscale_images)


def assert_same_film(found, expected):
    for kind in ("video", "audio"):
        assert packets(found, kind) == packets(expected, kind)
    assert len(packets(found, "video")) == 17
    assert not [path for path in found.parent.iterdir() if path.name.startswith(".")]


def test_an_uninterrupted_film_has_the_frames_and_times_of_its_source(doubled):
    source, whole = doubled
    with av.open(str(source)) as before, av.open(str(whole)) as after:
        expected = [frame.time for frame in before.decode(video=0)]
        assert [frame.time for frame in after.decode(video=0)] == pytest.approx(expected, abs=0.001)
    with av.open(str(whole)) as container:
        times = [packet.dts for packet in container.demux(video=0) if packet.dts is not None]
        assert times == sorted(set(times))
    assert packets(whole, "audio") == [
        (index, data, pytest.approx(time, abs=0.002))
        for index, data, time in packets(source, "audio")
    ]
    assert (
        np.abs(frames(whole)[8].astype(int) - frames(source)[8].repeat(2, 0).repeat(2, 1)).mean()
        < 8
    )


def test_a_film_that_is_killed_again_and_again_is_the_same(tmp_path, doubled):
    source, whole = doubled
    result = tmp_path / "out.mkv"
    draws = random.Random(0)
    lives = finished = 0
    while finished < 3:
        lives += 1
        assert lives < 50
        process = warm.Fork(double_until, draws.randrange(1, 20), str(source), str(result))
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
        if result.exists():  # the command cleans up before it says that the result exists
            finished += 1
            discard_leftovers(result)
            assert_same_film(result, whole)
            result.unlink()
    assert lives > 6


def interrupt(monkeypatch, after):
    """Raise what CTRL+C raises after so many groups of frames; return the function's list."""
    calls = []
    upscale_images = video.upscale_images

    def interrupted(*arguments):
        calls.append(arguments[0])
        if len(calls) > after:
            raise KeyboardInterrupt
        return upscale_images(*arguments)

    monkeypatch.setattr(video, "upscale_images", interrupted)


def test_ctrl_c_and_the_same_command_continues(tmp_path, capsys, cubic, monkeypatch):
    source = film(tmp_path / "a.mkv", "-c:a", "aac")
    (tmp_path / "done").mkdir()
    monkeypatch.setattr(video, "SEGMENT_FRAMES", (3, 3))
    assert run(capsys, cubic, source, tmp_path / "whole.mkv")[0] == 0
    out = tmp_path / "done" / "out.mkv"
    for network, options, told in (
        (cubic, [], ""),
        (cubic, ["--tile", "32"], "options"),
        (tmp_path / "other.safetensors", [], "network"),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, after=2)
            status, _, err = run(capsys, cubic, source, out)
        assert status == 130
        assert "kept 6 frames; the same command continues" in err
        assert not out.exists()
        write_network(tmp_path / "other.safetensors", tiny_saved())
        status, stdout, err = run(capsys, network, source, out, *options)
        assert status == 0
        if told:
            assert err == f"note: {source}: starting over, because these changed: {told}\n"
        else:
            assert err == ""
            assert f"continuing {source} after 6 frames" in stdout
            for kind in ("video", "audio"):
                assert packets(out, kind) == packets(tmp_path / "whole.mkv", kind)
        assert [path.name for path in out.parent.iterdir()] == ["out.mkv"]
        out.unlink()


def test_another_source_or_size_starts_over(tmp_path, capsys, doubled, restoring, monkeypatch):
    source, _ = doubled
    copy, result = tmp_path / "copy.mkv", tmp_path / "out.mkv"
    copy.write_bytes(source.read_bytes())
    for change, told in (
        (lambda: os.utime(copy, (1, 1)), "source"),
        (lambda: monkeypatch.setattr(av, "__version__", "0"), "software"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, "write_film", lambda *_, **__: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                double(copy, result)
        capsys.readouterr()
        change()
        double(copy, result)
        assert capsys.readouterr().err.endswith(f"starting over, because these changed: {told}\n")
        result.unlink()


def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path, doubled, restoring):
    source, whole = doubled
    result = tmp_path / "out.mkv"
    folder = tmp_path / ".out.mkv.segments"
    for name in (".000002.h264.tmp", "film"):  # while frames are encoded, and at the end
        meet_a_full_disk(source, result, folder / name)
        assert not result.exists()
        (folder / name).unlink()
    assert {"000000.h264", "000003.json"} < set(os.listdir(folder))
    double(source, result)
    assert_same_film(result, whole)


def meet_a_full_disk(source: Path, result: Path, place: Path) -> None:
    """Upscale until `place`, in the folder of the segments, is written."""
    place.parent.mkdir(exist_ok=True)
    (place.parent / "lock").touch()
    place.symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=r"^No space left on device; free some space and run the same"
    ):
        double(source, result)


@pytest.mark.parametrize("name", ["000001.h264", "000001.json", "000000.json"])
def test_a_damaged_segment_is_made_again(tmp_path, doubled, restoring, name):
    source, whole = doubled
    result, folder = tmp_path / "out.mkv", tmp_path / ".out.mkv.segments"
    meet_a_full_disk(source, result, folder / "film")
    (folder / "film").unlink()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(b"[]" if name == "000000.json" else content)
    double(source, result)
    assert_same_film(result, whole)


def test_a_source_that_decodes_differently_is_upscaled_as_a_whole(
    tmp_path, capsys, doubled, restoring
):
    source, whole = doubled
    result, folder = tmp_path / "out.mkv", tmp_path / ".out.mkv.segments"
    meet_a_full_disk(source, result, folder / ".000002.h264.tmp")
    entry = json.loads((folder / "000001.json").read_text())
    del entry["entry_sha256"]
    entry["frames"][2][1] += 1
    (folder / "000001.json").write_text(json.dumps({**entry, "entry_sha256": _digest(entry)}))
    double(source, result)
    assert "decoded differently than the last time" in capsys.readouterr().err
    assert_same_film(result, whole)


def test_one_film_is_written_by_one_process_into_its_own_folder(tmp_path, doubled, restoring):
    source, _ = doubled
    result = tmp_path / "out.mkv"
    with open_segments(result, {}), pytest.raises(UserError, match="another process is writing"):
        double(source, result)
    for path in (tmp_path / ".out.mkv.segments").iterdir():
        path.unlink()
    mine = tmp_path / ".out.mkv.segments" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        double(source, result)
    (mine.parent / "lock").touch()  # a person's file in our folder
    double(source, result)
    assert mine.read_text() == "mine"
    assert result.exists()


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, doubled, restoring, monkeypatch):
    source, _ = doubled
    monkeypatch.setattr(
        video, "write_film", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    with pytest.raises(OSError, match="I/O error"):
        double(source, tmp_path / "out.mkv")
