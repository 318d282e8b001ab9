"""make_test_images.py and monitor_folder.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from dataset_corpus import CHECKOUT, assert_user_error, run_tool, stamped_tree, tree, write_files
from tools import monitor_folder
from tools.images import decode_file
from tools.make_test_images import KINDS, make_image
from tools.monitor_folder import FolderState, line, measure


def test_images_of_every_kind_in_any_format(tmp_path: Path) -> None:
    for form in ("png", "npy", "jp2"):
        result = run_tool(
            "make_test_images", tmp_path / form, "--count", 8, "--size", 96, 128, "--format", form
        )
        assert result.returncode == 0, result.stderr
    for number, kind in enumerate([*KINDS, "noise"]):
        pixels = make_image(kind, (96, 128), 0, number)
        assert pixels.shape == (96, 128, 3)
        assert pixels.dtype == np.uint8
        for form in ("png", "npy", "jp2"):
            np.testing.assert_array_equal(
                decode_file(tmp_path / form / f"{number:05d}_{kind}.{form}"), pixels
            )
    assert len(list((tmp_path / "png").iterdir())) == 8


def test_the_seed_decides_not_the_number_of_threads_or_images(tmp_path: Path) -> None:
    for name, more in {
        "one": ("--threads", 1),
        "many": ("--threads", 8),
        "more": ("--count", 20),
        "other": ("--seed", 1),
    }.items():
        arguments = {"--count": 14, "--size": 64, **dict([more])}
        flat = [part for flag, value in arguments.items() for part in (flag, value)]
        flat.insert(flat.index(64), 64)
        assert run_tool("make_test_images", tmp_path / name, *flat).returncode == 0
    one, many, more, other = (tree(tmp_path / name) for name in ("one", "many", "more", "other"))
    assert one == many
    assert one.items() < more.items()
    assert not {*one.values()} & {*other.values()}
    assert len({*one.values()}) == 14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 2), (64, 50)])
def test_every_size_works(kind: str, size: tuple[int, int]) -> None:
    assert make_image(kind, size, 3, 0).shape == (*size, 3)


def slope(kind: str) -> float:
    """Exponent of frequency in the mean amplitude spectrum, from 4 to 64 cycles per image."""
    images = np.stack([make_image(kind, (256, 256), 0, number).mean(-1) for number in range(6)])
    amplitude = np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True))).mean(0)
    frequency = np.rint(np.hypot(*np.meshgrid(*[np.fft.fftfreq(256, 1 / 256)] * 2))).astype(int)
    rings = np.bincount(frequency.ravel(), amplitude.ravel()) / np.bincount(frequency.ravel())
    return float(np.polyfit(np.log(np.arange(4, 65)), np.log(rings[4:65]), 1)[0])


def test_the_kinds_are_what_they_are_called() -> None:
    assert slope("noise") == pytest.approx(0, abs=0.05)
    assert slope("texture") == pytest.approx(-1, abs=0.1)
    assert -1.8 < slope("leaves") < -0.8  # photographs: about -1.2
    gradient = make_image("gradient", (64, 64), 0, 0).astype(int)
    assert abs(np.diff(gradient, 2, 0)).max() <= 1
    assert abs(np.diff(gradient, 2, 1)).max() <= 1
    zone = make_image("zone", (256, 256), 0, 0)
    assert zone.min() < 5
    assert zone.max() > 250


def test_images_that_are_there_stay(tmp_path: Path) -> None:
    arguments = ("make_test_images", tmp_path / "out", "--count", 3, "--size", 40, 40)
    assert run_tool(*arguments).returncode == 0
    before = stamped_tree(tmp_path)
    again = run_tool(*arguments)
    assert "0 images" in again.stdout
    assert "already there: 3" in again.stdout
    assert stamped_tree(tmp_path) == before
    assert_user_error(
        run_tool(*arguments, "--seed", 5), "00000_noise.png", "a different file with this name"
    )
    assert stamped_tree(tmp_path) == before


def test_make_test_images_user_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for arguments, word in (
        (("--count", 0), "--count 0"),
        (("--size", 0, 5), "--size 0 5"),
        (("--size", 17000, 5), "16384"),
        (("--seed", -1), "--seed -1"),
        (("--size", 16384, 5, "--format", "webp"), "16383"),
        (("--kinds", "cats"), "cats"),
    ):
        assert_user_error(run_tool("make_test_images", tmp_path / "out", *arguments), word)
    assert not (tmp_path / "out").exists()
    assert_user_error(run_tool("make_test_images", tmp_path / "file"), "cannot be written")


def test_the_folder_is_counted(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "a.npy": bytes(1000),
            "b/c/d.npy": bytes(500),
            "b/e.png": bytes(7),
            ".b.npy.tmp": bytes(9),
            "b/x.tmp": bytes(9),
        },
    )
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "b/nowhere").symlink_to(tmp_path / "missing")
    assert measure(tmp_path, "*")[1:] == (3, 1507)
    assert measure(tmp_path, "*.npy")[1:] == (2, 1500)
    result = run_tool("monitor_folder", tmp_path, "--count", 3, "--interval", 0.05)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 3
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d  3 files  0\.0 MB  \+0\.0 files/s  \+0\.00 MB/s  [\d.]+ GB free",
        result.stdout.splitlines()[2],
    )


def test_rates_and_time_to_go() -> None:
    recent = deque(
        [
            FolderState(100.0, 1000, 10_000_000),
            FolderState(102.0, 1100, 12_000_000),
            FolderState(104.0, 1400, 20_000_000),
        ]
    )
    text = line(recent, 5_000_000_000, 2000)
    assert (
        "1400 files  20.0 MB  +100.0 files/s  +2.50 MB/s  600 to go, ETA 0:00:06  5.0 GB free"
        in text
    )
    assert "398600 to go, ETA 1:06:26" in line(recent, 1, 400_000)
    assert "done" in line(recent, 1, 1400)
    assert "no growth" in line(deque([FolderState(0, 9, 9), FolderState(1, 5, 5)]), 1, 10)
    assert "-4.0 files/s" in line(deque([FolderState(0, 9, 9), FolderState(1, 5, 5)]), 1, None)


def test_it_stops_when_the_files_are_there(tmp_path: Path) -> None:
    def write() -> None:
        for number in range(40):
            (tmp_path / f"{number}.npy").write_bytes(bytes(100))
            time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    result = run_tool("monitor_folder", tmp_path, "--until", 40, "--interval", 0.1)
    writer.join()
    assert result.returncode == 0
    assert " 40 files " in result.stdout.splitlines()[-1]


def test_files_that_come_and_go_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            write_files(
                tmp_path, {f"folder{number % 3}/{number}.npy": b"x" for number in range(30)}
            )
            for number in range(30):
                (tmp_path / f"folder{number % 3}/{number}.npy").unlink()
            for number in range(3):
                (tmp_path / f"folder{number}").rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        counts = [measure(tmp_path, "*").files for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(0 <= count <= 30 for count in counts)
    # And one that certainly vanishes between its name and its size.
    (tmp_path / "a.npy").write_bytes(b"x")
    real = monitor_folder._entries

    def vanishing(folder: Path):
        for entry in real(folder):
            Path(entry.path).unlink()
            yield entry

    monkeypatch.setattr(monitor_folder, "_entries", vanishing)
    assert measure(tmp_path, "*").files == 0


def test_ctrl_c_and_a_folder_that_goes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(CHECKOUT / "tools/monitor_folder.py"),
        str(tmp_path / "in"),
        "--interval",
        "0.05",
    ]
    for end in ("interrupt", "remove"):
        (tmp_path / "in").mkdir()
        # If the tests run in a shell's background, SIGINT is ignored, and a child would inherit
        # that.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert "0 files" in process.stdout.readline()
        if end == "interrupt":
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        (tmp_path / "in").rmdir()
        if end == "interrupt":
            assert (process.returncode, errors) == (0, "")
        else:
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 1
            assert errors.startswith("error: ")
            assert "folder was removed" in errors


def test_monitor_folder_user_errors(tmp_path: Path) -> None:
    for arguments, word in (
        ((tmp_path / "missing",), "no such folder"),
        ((tmp_path, "--interval", 0), "--interval 0"),
        ((tmp_path, "--count", 0), "--count 0"),
        ((tmp_path, "--until", -3), "--until -3"),
        ((tmp_path, "--interval", "nan"), "--interval nan"),
    ):
        assert_user_error(run_tool("monitor_folder", *arguments), word)
