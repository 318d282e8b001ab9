"""Comparison figures: pixels and positions, coordinates that replay, the window, errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset_corpus import (
    CHECKOUT,
    assert_user_error,
    encoded,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from pipeline.cli import run as run_command
from pipeline.metrics import measure
from tools.compare.boxes import COLOURS, Box, differing_boxes, parse_boxes
from tools.compare.figure import Style, annotated, magnified, psnr_y
from tools.crop_compare import Options, main

HEIGHT, WIDTH = 96, 160
HEADLESS = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """hr.png, lr.png (1/4, own colours), soft.png, and noisy.png, which differs in one corner."""
    hr = photograph(HEIGHT, WIDTH)
    noisy = hr.copy()
    noisy[60:90, 100:140] = 255 - noisy[60:90, 100:140]
    lr = photograph(HEIGHT // 4, WIDTH // 4, 1)
    write_files(
        tmp_path,
        {
            "hr.png": encoded(hr, "png"),
            "lr.png": encoded(lr, "png"),
            "soft.png": encoded(cv2.GaussianBlur(hr, (5, 5), 0), "png"),
            "noisy.png": encoded(noisy, "png"),
        },
    )
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def compare(
    folder: Path, *arguments: object, names: str = "hr.png lr.png soft.png noisy.png"
) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves half a second."""
    out, err = io.StringIO(), io.StringIO()
    words = [
        str(word)
        for word in (
            *(folder / name for name in names.split()),
            "--out",
            folder / "out",
            *arguments,
        )
    ]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        run_command(Options, main, words)
    return subprocess.CompletedProcess(words, stop.value.code, out.getvalue(), err.getvalue())


def coloured(picture: np.ndarray, colour: str) -> np.ndarray:
    """Mask of the pixels with exactly that colour."""
    return (picture == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(-1)


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` occurs in `picture`, byte for byte."""
    distance = cv2.matchTemplate(picture, part, cv2.TM_SQDIFF)
    candidates = np.argwhere(distance <= distance.min() + 1)
    return any(
        np.array_equal(picture[y : y + part.shape[0], x : x + part.shape[1]], part)
        for y, x in candidates[:50]
    )


def test_crops_are_the_pixels_of_their_boxes(results: Path) -> None:
    run = compare(results, "--box", "8,4,30,20", "--box", "100,62,40,24", "--panel", "120")
    assert run.returncode == 0, run.stderr
    sheet = pixels(results / "out/comparison.png")
    blocks = pixels(results / "lr.png").repeat(4, 0).repeat(4, 1)
    for number, (x, y, width, height, factor) in enumerate(
        [(8, 4, 30, 20, 4), (100, 62, 40, 24, 3)], 1
    ):
        for column, name in enumerate(("hr", "lr", "soft", "noisy"), 1):
            image = blocks if name == "lr" else pixels(results / f"{name}.png")
            expected = image[y : y + height, x : x + width].repeat(factor, 0).repeat(factor, 1)
            crop = pixels(results / f"out/crops/box{number}_{column}_{name}.png")
            np.testing.assert_array_equal(crop, expected)
            frame = np.array([*bytes.fromhex(COLOURS[number - 1][1:])], np.uint8)
            framed = np.broadcast_to(frame, (crop.shape[0] + 4, crop.shape[1] + 4, 3)).copy()
            framed[2:-2, 2:-2] = crop
            assert holds(sheet, framed), (number, name)


def test_the_annotated_image_keeps_what_is_inside_the_boxes(results: Path) -> None:
    assert compare(results, "--box", "20,30,40,20").returncode == 0
    hr, marked = pixels(results / "hr.png"), pixels(results / "out/annotated.png")
    np.testing.assert_array_equal(marked[30:50, 20:60], hr[30:50, 20:60])
    assert coloured(marked, COLOURS[0])[28:30, 18:62].all()
    assert coloured(marked, COLOURS[0])[28:52, 60:62].all()
    changed = (marked != hr).any(-1)
    changed[27:53, 17:63] = False
    assert not changed.any()


def test_lines_grow_with_the_image_and_stop_at_its_edges() -> None:
    widths = [
        coloured(
            np.asarray(
                annotated(np.zeros((size, size, 3), np.uint8), [Box(40, 40, 20, 20, "#d55e00")])
            ),
            "#d55e00",
        )[50, :40].sum()
        for size in (200, 800, 2000)
    ]
    assert widths == [2, 4, 10]
    whole = np.asarray(annotated(np.zeros((50, 60, 3), np.uint8), [Box(0, 0, 60, 50, "#d55e00")]))
    assert whole.shape == (50, 60, 3)
    assert coloured(whole, "#d55e00")[0].all()
    assert coloured(whole, "#d55e00")[:, -1].all()


def test_boxes_replay_from_the_coordinates_file(results: Path) -> None:
    coords = results / "boxes.json"
    assert (
        compare(
            results, "--box", "3,5,17,11", "--box", "50,60,33,22", "--coords", coords
        ).returncode
        == 0
    )
    stored = json.loads(coords.read_text())
    assert (stored["height"], stored["width"]) == (HEIGHT, WIDTH)
    assert stored["boxes"][1] == {"x": 50, "y": 60, "width": 33, "height": 22, "colour": COLOURS[1]}
    first = tree(results / "out")
    shutil.rmtree(results / "out")
    before = coords.stat().st_mtime_ns
    assert compare(results, "--coords", coords).returncode == 0
    assert tree(results / "out") == first
    assert coords.stat().st_mtime_ns == before
    stored["boxes"][0]["colour"] = "#123456"
    coords.write_text(json.dumps(stored))
    assert compare(results, "--coords", coords).returncode == 0
    assert coloured(pixels(results / "out/comparison.png"), "#123456").any()


def test_auto_finds_where_results_differ(results: Path) -> None:
    run = compare(results, "--auto", "2", "--auto-size", "20", names="hr.png lr.png noisy.png")
    assert run.returncode == 0, run.stderr
    boxes = json.loads((results / "out/boxes.json").read_text())["boxes"]
    first, second = boxes
    assert 100 <= first["x"] <= 120
    assert 60 <= first["y"] <= 70
    assert abs(first["x"] - second["x"]) >= 20 or abs(first["y"] - second["y"]) >= 20


def test_auto_takes_the_best_square_and_no_overlap() -> None:
    images = [photograph(60, 80, seed) for seed in range(3)]
    variance = np.stack(images)[..., 1].astype(np.float64).var(0)
    best = max(
        (variance[y : y + 16, x : x + 16].sum(), -y, -x) for y in range(45) for x in range(65)
    )
    boxes = differing_boxes(images, 4, 16)
    assert (boxes[0].y, boxes[0].x) == (-best[1], -best[2])
    covered = np.zeros((60, 80), int)
    for box in boxes:
        covered[box.y : box.y + 16, box.x : box.x + 16] += 1
    assert covered.max() == 1
    assert covered.sum() == 4 * 256
    assert len({box.colour for box in boxes}) == 4


def test_scores_are_those_of_the_evaluation(results: Path) -> None:
    run = compare(results, "--box", "8,4,60,40", "--reference", "--border", "4")
    assert run.returncode == 0, run.stderr
    hr, soft = (
        torch.tensor(pixels(results / name)).permute(2, 0, 1)[None]
        for name in ("hr.png", "soft.png")
    )
    whole = measure(soft, hr, 4)["psnr_y"]
    part = measure(soft[..., 4:44, 8:68], hr[..., 4:44, 8:68], 0)["psnr_y"]
    line = next(line for line in run.stdout.splitlines() if line.startswith("soft"))
    assert line.split()[1:] == [f"{whole:.3f}", f"{part:.3f}"]
    assert not any(line.startswith("lr") for line in run.stdout.splitlines())
    assert "noisy" in run.stdout
    assert psnr_y(hr[0].permute(1, 2, 0).numpy(), hr[0].permute(1, 2, 0).numpy()) == float("inf")


def test_magnification_is_by_whole_factors() -> None:
    crop = photograph(20, 30)
    assert magnified(crop, 240, smooth=False).shape == (160, 240, 3)
    assert magnified(crop, 239, smooth=False).shape == (140, 210, 3)
    np.testing.assert_array_equal(magnified(crop, 10, smooth=True), crop)
    smooth = magnified(crop, 240, smooth=True)
    np.testing.assert_array_equal(
        smooth, cv2.resize(crop, (240, 160), interpolation=cv2.INTER_CUBIC)
    )


def test_smooth_magnification_leaves_the_blocks_of_small_images(results: Path) -> None:
    assert compare(results, "--box", "8,4,32,16", "--zoom", "cubic").returncode == 0
    crop = pixels(results / "out/crops/box1_2_lr.png")
    np.testing.assert_array_equal(
        crop, pixels(results / "lr.png")[1:5, 2:10].repeat(28, 0).repeat(28, 1)
    )
    hr = pixels(results / "out/crops/box1_1_hr.png")
    assert not np.array_equal(hr, pixels(results / "hr.png")[4:20, 8:40].repeat(7, 0).repeat(7, 1))


def test_a_figure_has_the_photograph_left_of_the_crops(results: Path) -> None:
    assert (
        compare(
            results, "--box", "8,4,40,40", "--box", "60,30,40,40", "--layout", "figure"
        ).returncode
        == 0
    )
    picture = pixels(results / "out/comparison.png")
    assert compare(results, "--box", "8,4,40,40", "--box", "60,30,40,40").returncode == 0
    grid = pixels(results / "out/comparison.png")
    np.testing.assert_array_equal(picture[:, picture.shape[1] - grid.shape[1] :], grid)
    photo = picture[:, : picture.shape[1] - grid.shape[1]]
    gap = Style().gap
    middle = photo[photo.shape[0] // 2]
    assert (middle[:gap] == 255).all()
    assert (middle[gap:] == 255).all(-1).mean() < 0.02  # the hairline around a box
    assert all(coloured(photo, colour).any() for colour in COLOURS[:2])


def test_columns_wrap(results: Path) -> None:
    sizes = {}
    for columns in (1, 2, 4, 9):
        assert compare(results, "--box", "8,4,40,40", "--columns", columns).returncode == 0
        sizes[columns] = pixels(results / "out/comparison.png").shape[:2]
    assert sizes[4] == sizes[9]
    assert sizes[1][0] > sizes[2][0] > sizes[4][0]
    assert sizes[1][1] < sizes[2][1] < sizes[4][1]


def test_a_second_run_takes_away_the_crops_of_the_first(results: Path) -> None:
    assert compare(results, "--box", "8,4,40,40", "--box", "60,30,40,40").returncode == 0
    (results / "out/crops/mine.png").write_bytes(b"mine")
    assert compare(results, "--box", "8,4,40,40", names="hr.png soft.png").returncode == 0
    names = {path.name for path in (results / "out/crops").iterdir()}
    assert names == {"box1_1_hr.png", "box1_2_soft.png", "mine.png"}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            f"{name}/photo.png": encoded(photograph(64, 64, seed), "png")
            for seed, name in enumerate(("bicubic", "vapsr"))
        },
    )
    assert (
        compare(
            tmp_path, "--box", "1,1,20,20", names="bicubic/photo.png vapsr/photo.png"
        ).returncode
        == 0
    )
    assert {path.name for path in (tmp_path / "out/crops").iterdir()} == {
        "box1_1_bicubic.png",
        "box1_2_vapsr.png",
    }
    run = compare(tmp_path, "--box", "1,1,20,20", names="bicubic/photo.png bicubic/photo.png")
    assert_user_error(run, "two images have this name", "--labels")
    run = compare(
        tmp_path,
        "--box",
        "1,1,20,20",
        "--labels",
        "a/b c",
        "2",
        names="bicubic/photo.png vapsr/photo.png",
    )
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "out/crops").iterdir()} == {
        "box1_1_a_b_c.png",
        "box1_2_2.png",
    }


def test_the_same_command_gives_the_same_bytes(results: Path) -> None:
    assert compare(results, "--auto", "3", "--reference", "--layout", "figure").returncode == 0
    first = tree(results / "out")
    names = [results / name for name in ("hr.png", "lr.png", "soft.png", "noisy.png")]
    run = run_tool(
        "crop_compare",
        *names,
        "--auto=3",
        "--reference",
        "--layout=figure",
        "--out",
        results / "out",
    )
    assert run.returncode == 0, run.stderr
    assert "comparison.png" in run.stdout
    assert tree(results / "out") == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--box", "150,0,20,20"], ["150,0,20,20", "160 wide and 96 high"]),
        (["--box=-1,0,20,20"], ["-1,0,20,20", "extends beyond the first image"]),
        (["--box", "0,0,20,3"], ["at least 4 pixels"]),
        (["--box", "0,0,20"], ["X,Y,W,H"]),
        (["--box", "0,0,9,9.5"], ["X,Y,W,H"]),
        ([f"--box={i},0,20,20" for i in range(9)], ["9 boxes", "1 to 8"]),
        (["--auto", "9"], ["1 to 8"]),
        (["--auto", "-1"], ["1 to 8"]),
        (["--auto", "2", "--auto-size", "200"], ["--auto-size 200", "4 to 96"]),
        (["--auto", "8", "--auto-size", "90"], ["--auto 8", "only 1 squares"]),
        (["--auto", "1", "--box", "0,0,20,20"], ["--box and --auto"]),
        (["--box", "0,0,20,20", "--labels", "one"], ["1 names for 4 images"]),
        (["--box", "0,0,20,20", "--labels", "hr", "lr", "weich", "größer"], ["größer", "--font"]),
        (["--box", "0,0,20,20", "--panel", "8"], ["--panel 8"]),
        (["--box", "0,0,20,20", "--columns", "0"], ["--columns 0"]),
        (["--box", "0,0,20,20", "--border", "48", "--reference"], ["--border 48"]),
        (["--box", "0,0,20,20", "--border", "-1"], ["--border -1"]),
        (["--box", "0,0,20,20", "--font", "/nonexistent.ttf"], ["--font"]),
        (["--boxx", "0,0,20,20"], ["--box"]),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    results: Path, arguments: list[str], words: list[str]
) -> None:
    before = stamped_tree(results)
    assert_user_error(compare(results, *arguments), *words)
    assert stamped_tree(results) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "other.png",
            encoded(photograph(HEIGHT, WIDTH - 1), "png"),
            ["96x159", "96x160", "integer factor"],
        ),
        (
            "other.png",
            encoded(photograph(HEIGHT * 2, WIDTH * 2), "png"),
            ["192x320", "put the largest first"],
        ),
        (
            "other.png",
            encoded(photograph(HEIGHT // 2, WIDTH // 4), "png"),
            ["48x40", "integer factor"],
        ),
        ("other.png", b"no image at all", ["other.png", "not an image"]),
        ("other.png", encoded(photograph(HEIGHT, WIDTH), "png")[:-500], ["other.png"]),
        ("other.png", b"", ["empty file"]),
        ("missing.png", None, ["missing.png", "No such file"]),
    ],
)
def test_bad_images_are_one_line_and_write_nothing(
    results: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    if content is not None:
        (results / name).write_bytes(content)
    before = stamped_tree(results)
    assert_user_error(compare(results, "--box", "0,0,20,20", names=f"hr.png {name}"), *words)
    assert stamped_tree(results) == before


GOOD_BOX = {"x": 1, "y": 2, "width": 20, "height": 20, "colour": "#d55e00"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["broken JSON"]),
        ("[]", ["not a coordinates file"]),
        ("\udcff", ["broken JSON"]),
        ({"height": HEIGHT, "width": WIDTH}, ["KeyError"]),
        ({"height": 64, "width": 64, "boxes": [GOOD_BOX]}, ["64x64", "96x160"]),
        ({"height": HEIGHT, "width": WIDTH, "boxes": []}, ["0 boxes"]),
        ({"height": HEIGHT, "width": WIDTH, "boxes": [GOOD_BOX] * 9}, ["9 boxes"]),
        (
            {"height": HEIGHT, "width": WIDTH, "boxes": [{**GOOD_BOX, "x": 1.5}]},
            ["x must be an integer"],
        ),
        (
            {"height": HEIGHT, "width": WIDTH, "boxes": [{**GOOD_BOX, "x": True}]},
            ["x must be an integer"],
        ),
        (
            {"height": HEIGHT, "width": WIDTH, "boxes": [{**GOOD_BOX, "x": 150}]},
            ["extends beyond the first image"],
        ),
        ({"height": HEIGHT, "width": WIDTH, "boxes": [{**GOOD_BOX, "colour": "red"}]}, ["#d55e00"]),
        ({"height": HEIGHT, "width": WIDTH, "boxes": [None]}, ["not a coordinates file"]),
    ],
)
def test_bad_coordinates_are_one_line_and_write_nothing(
    results: Path, content: object, words: list[str]
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (results / "c.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = stamped_tree(results)
    assert_user_error(compare(results, "--coords", results / "c.json"), "c.json", *words)
    assert stamped_tree(results) == before


def test_an_existing_coordinates_file_is_not_overwritten(results: Path) -> None:
    (results / "c.json").write_text("mine")
    run = compare(results, "--coords", results / "c.json", "--box", "0,0,20,20")
    assert_user_error(run, "exists", "another --coords")
    assert (results / "c.json").read_text() == "mine"


def test_images_that_do_not_differ_have_no_best_place(results: Path) -> None:
    shutil.copy(results / "hr.png", results / "same.png")
    assert_user_error(
        compare(results, "--auto", "1", names="hr.png same.png"), "differ in only 0 places"
    )
    assert_user_error(compare(results, "--auto", "1", names="hr.png lr.png"), "needs two images")


def test_a_folder_that_cannot_be_written_is_one_line(results: Path) -> None:
    (results / "out").write_text("a file")
    assert_user_error(compare(results, "--box", "0,0,20,20"), "not a folder")
    (results / "out").unlink()
    assert_user_error(
        compare(results, "--box", "0,0,20,20", "--coords", results / "no/where/c.json"), "c.json"
    )


def test_no_images(tmp_path: Path) -> None:
    assert_user_error(run_tool("crop_compare", "--auto", 1), "no images")


def test_without_a_display_the_ways_out_are_named(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HEADLESS.items():
        monkeypatch.setenv(name, value)
    before = stamped_tree(results)
    for arguments in ([], ["--coords", results / "new.json"]):
        run = run_tool("crop_compare", results / "hr.png", *arguments, "--out", results / "out")
        assert_user_error(run, "cannot be drawn", "--box", "--auto", "--coords")
    assert stamped_tree(results) == before


def test_boxes_of_the_command_line_take_the_colours_in_order() -> None:
    boxes = parse_boxes([f"{i},{i},10,10" for i in range(8)], 96, 160)
    assert tuple(box.colour for box in boxes) == COLOURS
    assert len(set(COLOURS)) == len(COLOURS)
    assert boxes[3].edges == (3, 3, 13, 13)
    assert boxes[0].rgb == (213, 94, 0)


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    """A virtual screen of 640 x 480; window tests are skipped if there is none."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    for program in ("Xvfb", "xdotool"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    with os.fdopen(read) as file:
        number = file.readline().strip()
    if not number:
        server.wait(10)
        pytest.skip("Xvfb does not start here")
    yield f":{number}"
    server.terminate()
    server.wait(10)


class Window:
    """The tool with its window open, and simulated mouse and keyboard."""

    def __init__(self, screen: str, folder: Path, *arguments: object) -> None:
        self.environment = {**os.environ, "DISPLAY": screen}
        names = ("hr.png", "lr.png", "soft.png")
        command = [
            sys.executable,
            CHECKOUT / "tools/crop_compare.py",
            *(folder / name for name in names),
            "--out",
            folder / "out",
            *arguments,
        ]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        search = self.do("search", "--sync", "--onlyvisible", "--name", "drag a box")
        self.id = search.split()[0]
        self.do("windowfocus", "--sync", self.id)

    def do(self, *arguments: object) -> str:
        result = subprocess.run(
            ["xdotool", *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return result.stdout

    def drag(self, left: int, top: int, right: int, bottom: int) -> None:
        self.do(
            "mousemove",
            "--window",
            self.id,
            left,
            top,
            "mousedown",
            1,
            "mousemove",
            "--window",
            self.id,
            left + 5,
            top + 5,
            "mousemove",
            "--window",
            self.id,
            right,
            bottom,
            "mouseup",
            1,
        )

    def finish(self, *keys: str) -> subprocess.CompletedProcess[str]:
        for key in keys:
            self.do("key", key)
        try:
            stdout, stderr = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return subprocess.CompletedProcess([], self.process.returncode, stdout, stderr)


def drawn(folder: Path, name: str = "out/boxes.json") -> list[tuple[int, int, int, int]]:
    boxes = json.loads((folder / name).read_text())["boxes"]
    return [(box["x"], box["y"], box["width"], box["height"]) for box in boxes]


def test_boxes_drawn_with_the_mouse_are_saved(results: Path, screen: str) -> None:
    window = Window(screen, results, "--coords", results / "c.json")
    window.drag(10, 20, 50, 60)
    window.drag(150, 90, 100, 50)  # from the bottom-right corner
    window.drag(60, 5, 90, 30)  # undone
    window.do("key", "BackSpace")
    window.drag(60, 5, 62, 7)  # a click and not a box
    window.drag(120, 10, 300, 40)  # beyond the edge of the image
    run = window.finish("Return")
    assert run.returncode == 0, run.stderr
    assert (
        drawn(results)
        == drawn(results, "c.json")
        == [(10, 20, 40, 40), (100, 50, 50, 40), (120, 10, 40, 30)]
    )
    assert (results / "out/comparison.png").is_file()


def test_a_large_image_is_drawn_on_in_its_own_pixels(results: Path, screen: str) -> None:
    large = encoded(photograph(576, 960), "png")  # 288 rows fit the screen: the factor is 0.5
    write_files(
        results,
        {"hr.png": large, "lr.png": encoded(photograph(144, 240), "png"), "soft.png": large},
    )
    window = Window(screen, results)
    window.drag(10, 20, 110, 70)
    window.do("key", "Return")
    assert window.finish().returncode == 0
    assert drawn(results) == [(20, 40, 200, 100)]


def test_escape_and_closing_write_nothing(results: Path, screen: str) -> None:
    before = stamped_tree(results)
    window = Window(screen, results, "--coords", results / "c.json")
    window.drag(10, 20, 50, 60)
    run = window.finish("Escape")
    assert (run.returncode, run.stderr) == (130, "cancelled; nothing written\n")
    window = Window(screen, results)
    window.do("key", "Return")  # no box yet, so the window stays open
    time.sleep(0.3)
    assert window.process.poll() is None
    window.process.send_signal(2)
    run = window.finish()
    assert run.returncode == 130
    assert re.fullmatch("stopped\n", run.stderr)
    assert stamped_tree(results) == before
