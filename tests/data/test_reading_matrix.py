"""Every kind of image file in every command: the right pixels, or one rejection in the same words.

All files of `reading_corpus` are in one folder, and each command runs over it once.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_corpus import UNGATED, run_tool
from pipeline.cli import UserError
from pipeline.data.decoding import HostDecoder, decoding_fault
from pipeline.data.image_headers import BadImageError, read_header
from pipeline.data.image_pixels import (
    DecodedImage,
    decode_rgb,
    foreign_profile,
    read_rgb,
    to_8_bits,
    to_rgb,
)
from pipeline.evaluation.image_sets import find_folder
from pipeline.inference.pictures import read_picture
from pipeline.training.options import TrainOptions, make_plan
from pipeline.training.validation import read_pair
from reading_corpus import BAD, CASES, GOOD, HEIGHT, PHOTO, WIDTH, Case, opened
from tools import show_batch

SCALE = 2
UNREAD = {"a.heic": b"x", "b.gif": b"x", "c.GIF": b"x"}
SAID = "not read: 2 GIF (b.gif, c.GIF), 1 HEIC (a.heic); save them as PNG to use them"


@dataclass
class FolderReading:
    """Results of a command for all files."""

    pixels: dict[str, np.ndarray]  # of the files it read
    reasons: dict[str, str]  # of the files it rejected
    said: str = ""  # for the whole folder

    def mistakes(
        self, reads: Callable[[str, Case], bool] = lambda name, case: case.expected is not None
    ) -> list[str]:
        """Return one line per wrong result; `reads` says whether the command should read a file."""
        found = []
        for name, case in CASES.items():
            pixels, reason = self.pixels.get(name), self.reasons.get(name)
            if not reads(name, case):
                word = case.refusal or case.inexact
                if reason is None or pixels is not None:
                    found.append(f"{name}: not refused")
                elif word not in reason or "BytesIO" in reason or "\n" in reason:
                    found.append(f"{name}: refused with {reason!r}, without {word!r}")
            elif pixels is None:
                found.append(f"{name}: refused: {reason}")
            elif pixels.shape != case.expected.shape:
                found.append(f"{name}: {pixels.shape}")
            elif np.abs(pixels.astype(int) - case.expected).max() > case.tolerance:
                found.append(
                    f"{name}: off by {np.abs(pixels.astype(int) - case.expected).max()} levels"
                )
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create all files and a dataset's lists: the good ones for training, a few for validation."""
    root = tmp_path_factory.mktemp("files")
    for name, content in {**{name: case.content for name, case in CASES.items()}, **UNREAD}.items():
        (root / name).write_bytes(content)
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in GOOD))
    (root / "validation_file_list.txt").write_text(
        "".join(f"{name}\n" for name in list(GOOD)[::40])
    )
    return root


def crops_of(out: Path) -> tuple[dict[str, tuple[int, int, np.ndarray]], dict[str, str]]:
    """Return (photo -> corner and pixels of its HR crop, photo -> reason of its rejection)."""
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return (
        {
            record["photo"]: (record["top"], record["left"], np.load(out / record["path"]))
            for record in records
            if record.get("role") != "lr"
        },
        {reject["photo"]: reject["reason"] for reject in rejects},
    )


def with_crops(found: dict[str, tuple[int, int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Paste the crops into the expected image."""
    pixels = {}
    for name, (top, left, crop) in found.items():
        pixels[name] = np.array(CASES[name].expected)
        pixels[name][top : top + HEIGHT, left : left + HEIGHT] = crop
    return pixels


def images_to_data(folder: Path, out: Path) -> FolderReading:
    done = run_tool(
        "images_to_data",
        folder,
        out,
        "--size",
        HEIGHT,
        "--keep-lossy-size",
        "--num-scales",
        1,
        *UNGATED,
    )
    assert done.returncode == 1, done.stderr
    found, reasons = crops_of(out)
    return FolderReading(with_crops(found), reasons, done.stdout)


def pairs_to_data(folder: Path, out: Path) -> FolderReading:
    lr = out.with_name("lr")
    lr.mkdir()
    for name, case in CASES.items():
        Image.fromarray(PHOTO[::2, ::2] if case.expected is None else case.expected[::2, ::2]).save(
            lr / f"{Path(name).stem}.png"
        )
    done = run_tool(
        "pairs_to_data",
        folder,
        lr,
        "--scale",
        SCALE,
        "--out",
        out,
        "--size",
        HEIGHT,
        "--min-correlation",
        -1,
        *UNGATED,
    )
    assert done.returncode == 1, done.stderr
    found, reasons = crops_of(out)
    for name, reason in reasons.items():
        assert reason.startswith(f"{name}: "), reason  # the intended one of two files
    return FolderReading(with_crops(found), reasons, done.stdout)


def convert_dataset(folder: Path, out: Path) -> FolderReading:
    from tools import convert_dataset as command

    options = command.Options(folder, out, "npy")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "NUM_SHOWN", len(CASES))
        assert command.main(options) == 1
    lines = [
        line.removeprefix("not converted: ").split(": ", 1)
        for line in said.getvalue().splitlines()
        if line.startswith("not converted: ")
    ]
    by_stem = {path.stem: to_8_bits(np.load(path)) for path in out.glob("*.npy")}
    return FolderReading(
        {name: by_stem[Path(name).stem] for name in CASES if Path(name).stem in by_stem},
        dict(lines),
        said.getvalue(),
    )


def training(folder: Path, out: Path) -> FolderReading:
    """Read as training does, in show_batch.py: one crop of every good file."""
    overrides = (
        f"data.crop={HEIGHT}",
        "data.augment=false",
        "data.threads=1",
        "ds.train_batch_size=4",
    )
    plan = make_plan(TrainOptions(overrides, recipe="demo", dataset_dir=(folder,)))
    pairs = show_batch.make_pairs(plan, range(len(GOOD)))
    found = {pair.name: (pair.sample.top, pair.sample.left, pair.hr) for pair in pairs}
    return FolderReading(
        with_crops(found), {name: decoding_fault(str(folder / name)) for name in BAD}
    )


def cached_training(folder: Path, out: Path) -> FolderReading:
    """Decode as a cache (data.cache_gb) does; validation uses the same decoder."""
    with HostDecoder(threads=1, batch=8) as decoder:
        images = dict(
            zip(CASES, decoder.decode([str(folder / name) for name in CASES]), strict=True)
        )
    return FolderReading(
        {name: image for name, image in images.items() if isinstance(image, np.ndarray)},
        {name: image.reason for name, image in images.items() if not isinstance(image, np.ndarray)},
    )


def evaluate(folder: Path, out: Path) -> FolderReading:
    images = find_folder(folder, None, SCALE)
    reading = FolderReading({}, {}, images.note)
    for pair in images.pairs:
        try:
            pixels = pair.load(SCALE)[0][0].permute(1, 2, 0).numpy()
            # Evaluation keeps 16 bits; the expected pixels are rounded to 8.
            is_deep = pixels.dtype == np.uint16
            reading.pixels[pair.hr.name] = (
                np.rint(pixels / 257).astype(np.uint8) if is_deep else pixels
            )
        except UserError as error:
            reading.reasons[pair.hr.name] = str(error)
    assert all(
        f"image {str(folder / name)!r} cannot be read (" in reason
        for name, reason in reading.reasons.items()
    )
    return reading


def upscale(folder: Path, out: Path) -> FolderReading:
    """Read as upscale.py does, which keeps bits, alpha and profile; reduced here as elsewhere."""
    reading = FolderReading({}, {})
    for name in CASES:
        try:
            picture = read_picture(folder / name)
            reading.pixels[name] = to_rgb(DecodedImage(picture.pixels, picture.icc_profile))
        except UserError as error:
            reading.reasons[name] = str(error)
    return reading


def crop_compare(folder: Path, out: Path) -> FolderReading:
    done = run_tool(
        "crop_compare",
        *(folder / name for name in GOOD),
        "--box",
        f"0,0,{WIDTH},{HEIGHT}",
        "--panel",
        72,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    pixels = {}
    for number, name in enumerate(GOOD, 1):
        (path,) = out.glob(f"crops/box1_{number}_*.png")
        pixels[name] = opened(path.read_bytes())
    reading = FolderReading(pixels, {})
    for name in BAD:
        try:
            read_rgb(folder / name)
        except UserError as error:
            reading.reasons[name] = str(error)
    return reading


COMMANDS = {
    command.__name__: command
    for command in (
        images_to_data,
        pairs_to_data,
        training,
        cached_training,
        evaluate,
        upscale,
        crop_compare,
    )
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_is_read_right_or_refused(folder: Path, tmp_path: Path, command: str) -> None:
    reading = COMMANDS[command](folder, tmp_path / "out")
    if command == "upscale":  # the only command that reads GIF
        assert np.abs(reading.pixels.pop("foreign-gif.png").astype(int) - PHOTO).max() < 90
        reading.reasons["foreign-gif.png"] = "GIF"
    assert reading.mistakes() == []
    if command in ("images_to_data", "pairs_to_data"):
        assert SAID in reading.said
        assert "with a colour profile other than sRGB: " in reading.said
        assert "Wide test" in reading.said
    if command == "evaluate":
        assert "images with a colour profile other than sRGB: " in reading.said
        assert SAID in reading.said


def test_a_conversion_keeps_every_bit_or_refuses(folder: Path, tmp_path: Path) -> None:
    reading = convert_dataset(folder, tmp_path / "out")
    assert reading.mistakes(lambda name, case: case.expected is not None and not case.inexact) == []
    assert SAID in reading.said


@pytest.mark.parametrize("options", [(), ("--fast",)])
def test_the_checker_calls_bad_what_is_refused_and_nothing_else(
    folder: Path, options: tuple[str, ...]
) -> None:
    done = run_tool(
        "check_training_data", "--data-dir", folder, "--min-size", HEIGHT, *UNGATED, *options
    )
    assert done.returncode == 1, done.stderr
    lines = [
        line.removeprefix("bad: ").split(": ", 1)
        for line in done.stdout.splitlines()
        if line.startswith("bad: ")
    ]
    bad = dict(lines)
    reading = FolderReading(
        {name: case.expected for name, case in GOOD.items() if name not in bad}, bad
    )
    assert reading.mistakes() == []
    assert SAID in done.stdout
    assert "with a colour profile other than sRGB: " in done.stdout


@pytest.mark.parametrize("depth", [8, 16])
def test_validation_reads_as_training_does(folder: Path, depth: int) -> None:
    overrides = (
        f"data.crop={HEIGHT}",
        "data.threads=1",
        "ds.train_batch_size=4",
        f"data.depth={depth}",
    )
    plan = make_plan(TrainOptions(overrides, recipe="demo", dataset_dir=(folder,)))
    for number, image in enumerate(plan.dataset.validation):
        hr = read_pair(image, number, plan.recipe).hr
        found = hr[0].permute(1, 2, 0).numpy() / (1 if depth == 8 else 257)
        # the expected pixels are rounded to 8 bits
        tolerance = CASES[image.name].tolerance + (0 if depth == 8 else 0.51)
        assert np.abs(found - CASES[image.name].expected).max() <= tolerance, image.name


def test_hostile_bytes_end_in_pixels_of_the_size_of_the_header_or_in_a_reason() -> None:
    """Every kind of file, truncated anywhere and overwritten in places, mostly in the header."""
    chance, read, reasons = random.Random(3), 0, []
    contents = [case.content for case in CASES.values() if case.content]
    for number in range(3000):
        content = bytearray(contents[number % len(contents)])
        if chance.random() < 0.3:
            content = content[: 1 + chance.randrange(len(content))]
        for _ in range(chance.choice((1, 3, 10))):
            content[int(len(content) * chance.random() ** 4)] = chance.choice(
                (0, 1, 127, 255, chance.randrange(256))
            )
        try:
            header = read_header(bytes(content))
            foreign_profile(header)
            if header.height * header.width < 1e6:  # skip huge sizes caused by flipped bits
                assert decode_rgb(bytes(content), header).shape == (*header.size, 3)
                read += 1
        except BadImageError as error:
            reasons.append(str(error))
    assert [reason for reason in reasons if "\n" in reason or "BytesIO" in reason] == []
    assert min(read, len(reasons)) > 300
