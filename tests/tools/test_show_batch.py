"""The sheet of training pairs: training's own pixels, replay by number, text and JSON, errors."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset_corpus import assert_user_error, encoded, npy, photograph, run_tool, write_files
from fabricate import seal
from pipeline.cli import run as run_command
from pipeline.config.recipe import write_recipe
from pipeline.data.image_pixels import read_rgb
from pipeline.data.loader import Loader
from pipeline.data.reader import training_pipeline
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import DataSpec
from pipeline.training.options import TrainOptions, make_plan
from tools import show_batch
from tools.show_batch import (
    GAP,
    DrawnPair,
    Options,
    describe,
    main,
    make_pairs,
    panels_of,
    positionals_last,
    side_by_side,
    step_words,
)

CROP = 32
SMALL = "data.crop=32"
DEGRADED = (
    SMALL,
    "data.degradation=realesrgan",
    "data.degradation.surroundings=16",
    "data.brightness.probability=0.5",
    "data.lr_noise.probability=0.5",
)


def write_lists(root: Path, names: list[str]) -> None:
    for kind in ("training", "validation"):
        (root / f"{kind}_file_list.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six crops, the last one a PNG, each with its half size beside it."""
    root, files = tmp_path / "data", {}
    for i in range(6):
        pixels = photograph(50 + 4 * i, 72, i)
        half = cv2.resize(pixels, (36, 25 + 2 * i), interpolation=cv2.INTER_AREA)
        suffix, content = (".png", encoded) if i == 5 else (".npy", lambda image, _: npy(image))
        files |= {
            f"photo/{i}{suffix}": content(pixels, "png"),
            f"photo/{i}_lr2{suffix}": content(half, "png"),
        }
    write_files(root, files)
    write_lists(root, [name for name in files if "_lr2" not in name])
    return root


def show(data: Path, *words: object, out: str = "sheet.png") -> subprocess.CompletedProcess[str]:
    """Run the command on `data` in this process, which saves seconds; writes next to `data`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    line = [str(word) for word in (data.parent / out, "--dataset-dir", data, *words)]
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        run_command(Options, main, positionals_last(line))
    return subprocess.CompletedProcess(line, stop.value.code, stdout.getvalue(), stderr.getvalue())


def pairs_of(data: Path, numbers: list[int] | range, *overrides: str) -> list[DrawnPair]:
    return make_pairs(make_plan(TrainOptions(overrides, dataset_dir=(data,))), numbers)


def trained_on(
    data: Path, micro_batch: int, batches: int, *overrides: str, degrades_on_host: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(HR, LR) of a run's first samples, HWC, from its micro-batches."""
    plan = make_plan(TrainOptions(overrides, dataset_dir=(data,)))
    source = CropSource.of_dataset(
        plan.dataset,
        plan.recipe.data,
        scale=plan.recipe.scale,
        seed=plan.recipe.seed,
        position=Position(0, 1, micro_batch),
        degrades_on_host=degrades_on_host,
    )
    pipeline = training_pipeline(source, 0, device_id=None, threads=2, prefetch=2)
    made = [
        [np.array(output.as_tensor()).transpose(0, 2, 3, 1) for output in pipeline.run()]
        for _ in range(batches)
    ]
    return [pair for hr, lr in made for pair in zip(hr, lr, strict=True)]


def sheet_of(data: Path, name: str = "sheet.png") -> np.ndarray:
    return np.asarray(Image.open(data.parent / name))


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` occurs in `picture`, byte for byte."""
    distance = cv2.matchTemplate(picture, part, cv2.TM_SQDIFF)
    y, x = np.unravel_index(distance.argmin(), distance.shape)
    return np.array_equal(picture[y : y + part.shape[0], x : x + part.shape[1]], part)


@pytest.mark.parametrize(
    "overrides",
    [
        (SMALL,),
        (SMALL, "data.degradation=gaussian"),
        (SMALL, "data.degradation=paired"),
        DEGRADED,
        (*DEGRADED, "data.cache_gb=0.1"),
    ],
    ids=["bicubic", "gaussian", "paired", "realesrgan", "cached"],
)
def test_pixels_are_those_of_training(data: Path, overrides: tuple[str, ...]) -> None:
    expected = trained_on(data, 8, 2, *overrides)
    numbers = [13, 0, 1, 2, 7, 8, 13]  # in any order, with repeats
    for number, pair in zip(numbers, pairs_of(data, numbers, *overrides), strict=True):
        assert pair.sample.number == number
        np.testing.assert_array_equal(pair.hr, expected[number][0])
        np.testing.assert_array_equal(pair.lr, expected[number][1])
    assert not np.array_equal(expected[0][0], expected[1][0])


MIXING = "data.mixing={probability: 0.8, side: [0.3, 0.9]}"


def loaded(
    data: Path, micro_batch: int, batches: int, *overrides: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(HR, LR) of a run's first samples, HWC, from its loader."""
    plan = make_plan(TrainOptions(overrides, dataset_dir=(data,)))
    source = CropSource.of_dataset(
        plan.dataset,
        plan.recipe.data,
        scale=plan.recipe.scale,
        seed=plan.recipe.seed,
        position=Position(0, 1, micro_batch),
        degrades_on_host=True,
    )
    loader = Loader(source, 0, torch.device("cpu"), threads=1, prefetch=2)
    try:
        made = [next(loader) for _ in range(batches)]
    finally:
        loader.close()
    return [
        (hr.permute(1, 2, 0).numpy(), lr.permute(1, 2, 0).numpy())
        for batch in made
        for hr, lr in zip(batch.hr, batch.lr, strict=True)
    ]


def test_mixed_pixels_are_those_of_training(data: Path) -> None:
    overrides = (*DEGRADED, MIXING)
    expected, unmixed = loaded(data, 4, 4, *overrides), loaded(data, 4, 4, *DEGRADED)
    numbers = [13, 0, 1, 2, 7, 8, 13, 15]
    pairs = pairs_of(data, numbers, *overrides)
    kinds = set()
    for number, pair in zip(numbers, pairs, strict=True):
        assert pair.sample.number == number
        np.testing.assert_array_equal(pair.hr, expected[number][0])
        np.testing.assert_array_equal(pair.lr, expected[number][1])
        plain = pair.unmixed or (pair.hr, pair.lr)
        np.testing.assert_array_equal(plain[0], unmixed[number][0])
        np.testing.assert_array_equal(plain[1], unmixed[number][1])
        words = describe(pair, plan_data(data), 2)[-1]
        if pair.mix:
            kinds.add(pair.mix["kind"])
            assert words.startswith(f"{pair.mix['kind']}: ")
            assert (f"sample {number ^ 1}" in words) == (pair.mix["kind"] != "cutblur")
    assert len(kinds) > 1
    done = show(data, "--count", 6, "--json", *overrides)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    drawn = {pair.sample.number: pair.mix for pair in pairs}
    assert [record["number"] for record in records] == list(range(6))
    assert all(drawn[number] == records[number].get("mix") for number in (0, 1, 2))


def test_single_steps_end_with_the_mixed_sample(data: Path) -> None:
    overrides = (*CHAIN, MIXING.replace("0.8", "1"))
    plan = make_plan(TrainOptions(overrides, dataset_dir=(data,)))
    (pair,) = make_pairs(plan, [5], keeps_regions=True)
    *_, (_, lr), (last_hr, mixed_hr), (last_lr, mixed_lr) = panels_of(pair, CROP)
    assert (last_hr, last_lr) == ("mixed HR", "mixed LR")
    np.testing.assert_array_equal(mixed_hr, pair.hr)
    np.testing.assert_array_equal(mixed_lr, pair.lr.repeat(2, 0).repeat(2, 1))
    assert not np.array_equal(mixed_lr, lr)
    assert show(data, "--sample", 5, *overrides).returncode == 0


def test_sheet_holds_every_pair_in_blocks(data: Path) -> None:
    done = show(data, "--first", 3, "--count", 5, "--panel", 70, *DEGRADED)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"written to {data.parent / 'sheet.png'}: samples 3 to 7; an epoch has 6\n"
    )
    picture = sheet_of(data)
    for hr, lr in trained_on(data, 8, 1, *DEGRADED)[3:8]:
        assert holds(picture, hr.repeat(2, 0).repeat(2, 1))
        assert holds(picture, lr.repeat(4, 0).repeat(4, 1))
        assert holds(
            picture,
            np.concatenate(
                [
                    lr.repeat(4, 0).repeat(4, 1),
                    np.full((64, 4, 3), 255, np.uint8),
                    hr.repeat(2, 0).repeat(2, 1),
                ],
                1,
            ),
        )


def test_single_samples_are_large_and_replay_exactly(data: Path) -> None:
    assert show(data, "--sample", 9, *DEGRADED, out="one.png").returncode == 0
    assert show(data, "--sample", 9, *DEGRADED, out="again.png").returncode == 0
    assert (data.parent / "one.png").read_bytes() == (data.parent / "again.png").read_bytes()
    picture = sheet_of(data, "one.png")
    assert picture.shape[1] == 2 * 768 + 4 + 2 * GAP
    (pair,) = pairs_of(data, [9], *DEGRADED)
    # below the title
    top = next(row for row in range(len(picture)) if (picture[row, GAP:-GAP] != 255).mean() > 0.8)
    np.testing.assert_array_equal(picture[top : top + 768, GAP:-GAP], side_by_side(pair, 2, 768))


def test_words_and_json_tell_what_was_drawn(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        show_batch, "_write", lambda draw, left, top, lines, letters: written.extend(lines)
    )
    done = show(data, "--sample", 4, "--sample", 11, "--json", *DEGRADED)
    assert done.returncode == 0
    assert "samples 4, 11" in done.stderr
    text = " ".join(" ".join(written).split())
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["number"] for record in records] == [4, 11]
    for record, pair in zip(records, pairs_of(data, [4, 11], *DEGRADED), strict=True):
        assert record == json.loads(json.dumps(pair.sample.as_dict()))
        first = record["degradation"]["first"]
        assert f"sample {record['number']}: {Path(record['path']).relative_to(data)}" in text
        assert f"row {record['top']}, column {record['left']} |" in text
        assert f"{first['mode']}, {first['size'][0]}x{first['size'][1]} |" in text
        assert f"| JPEG {first['jpeg']} 2: " in text
        assert f"JPEG {record['degradation']['second']['jpeg']}" in text
        assert ("sigma" in first["blur"]) == (
            f", sigma {first['blur'].get('sigma', [0])[0]:.2f}" in text
        )


@pytest.mark.parametrize(
    ("degradation", "words"),
    [
        ("bicubic", "bicubic to 1/2"),
        ("gaussian", "gaussian to 1/2, sigma 1.6"),
        ("paired", "_lr2.npy"),
    ],
)
def test_words_of_simple_degradations(data: Path, degradation: str, words: str) -> None:
    plan = make_plan(
        TrainOptions(
            (
                SMALL,
                f"data.degradation={degradation}",
                "data.lr_noise={probability: 1, sigma: 7}",
                "data.brightness={probability: 1, range: 0.75}",
            ),
            dataset_dir=(data,),
        )
    )
    pair = next(pair for pair in make_pairs(plan, range(3)) if pair.name.endswith(".npy"))
    lines = describe(pair, plan.recipe.data, 2)
    assert lines[2].endswith(words)
    assert lines[1].endswith(" | brightness x0.750")
    assert lines[3:] == ["noise on LR: sigma 7.00"]


CHAIN = (
    SMALL,
    "data.degradation={name: chain, surroundings: 8, steps: [{blur: {kind: box, radius: 1}}, "
    "{resize: {factor: 0.7, kind: linear}}, {noise: {gray: 0.5}}, {resize: {to: lr, kind: area}}]}",
)


def test_every_step_of_a_chain_is_drawn(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        show_batch, "_write", lambda draw, left, top, lines, letters: written.extend(lines)
    )
    done = show(data, "--sample", 3, "--sample", 4, "--panel", 64, "--json", *CHAIN)
    assert (done.returncode, done.stderr[:8]) == (0, "written ")
    picture, records = sheet_of(data), [json.loads(line) for line in done.stdout.splitlines()]
    for (hr, lr), record in zip(trained_on(data, 5, 1, *CHAIN)[3:], records, strict=True):
        assert holds(picture, hr.repeat(2, 0).repeat(2, 1))
        assert holds(picture, lr.repeat(4, 0).repeat(4, 1))
        # What the first step made, flipped and transposed like HR.
        top, left, height, width = record["region"]
        image = (
            np.load(record["path"]) if record["path"].endswith(".npy") else read_rgb(record["path"])
        )
        blurred = cv2.blur(
            image[top : top + height, left : left + width],
            (3, 3),
            borderType=cv2.BORDER_REFLECT_101,
        )
        first, before = record["top"] - top, record["left"] - left
        part = blurred[first : first + CROP, before : before + CROP]
        part = part[:: -1 if record["flip_vertical"] else 1]
        part = part[:, :: -1 if record["flip_horizontal"] else 1]
        part = part.transpose(1, 0, 2) if record["transpose"] else part
        made, expected = picture.astype(int), part.repeat(2, 0).repeat(2, 1)
        distance = cv2.matchTemplate(picture, expected, cv2.TM_SQDIFF)
        y, x = np.unravel_index(distance.argmin(), distance.shape)
        assert abs(made[y : y + 64, x : x + 64] - expected).max() <= 1
    text = " ".join(" ".join(written).split())
    for record in records:
        for number, step in enumerate(record["degradation"]["steps"], 1):
            assert f"{number}: {step['step']}({step['kind']})" in text
        assert f"level {record['degradation']['steps'][2]['level']:.3g}" in text
        assert str(record["degradation"]["steps"][2]["words"][0]) not in text


def test_the_last_step_of_a_chain_is_lr(data: Path) -> None:
    pairs = make_pairs(
        make_plan(TrainOptions(CHAIN, dataset_dir=(data,))), range(6), keeps_regions=True
    )
    assert {pair.sample.transpose for pair in pairs} == {0, 1}
    for pair in pairs:
        (first, hr), *steps, (last, lr) = panels_of(pair, 64)
        assert (first, last) == ("HR", "LR, 16x16")
        np.testing.assert_array_equal(hr, pair.hr.repeat(2, 0).repeat(2, 1))
        np.testing.assert_array_equal(lr, pair.lr.repeat(4, 0).repeat(4, 1))
        assert [words for words, _ in steps] == [
            line for line in describe(pair, plan_data(data), 2) if line[0].isdigit()
        ]
        np.testing.assert_array_equal(steps[-1][1], lr)


def plan_data(data: Path) -> DataSpec:
    return make_plan(TrainOptions(CHAIN, dataset_dir=(data,))).recipe.data


def test_a_folder_of_pairs_beside_a_chain(data: Path) -> None:
    other = data.parent / "other"
    shutil.copytree(data, other)
    mixed = (SMALL, "data.degradation=[paired, {name: chain, steps: [blur]}]")
    done = show(
        data,
        "--dataset-dir",
        other,
        "--json",
        *mixed,
        *(word for number in range(12) for word in ("--sample", number)),
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(record["folder"], "steps" in record["degradation"]) for record in records} == {
        (0, False),
        (1, True),
    }


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        (
            {"step": "blur", "kind": "lens", "radius": 2.34567, "angle": -12.0},
            "blur(lens): radius 2.35, angle -12",
        ),
        ({"step": "resize", "kind": "area", "size": [48, 60]}, "resize(area): to 48x60"),
        (
            {"step": "noise", "level": 1.0, "gray": True, "flat": False, "words": [2**60, 5]},
            "noise: level 1, gray",
        ),
        (
            {"step": "compress", "kind": "video", "codec": "hevc", "motion": [[1, 2.5], [0, 1]]},
            "compress(hevc): motion (1/2.5)/(0/1)",
        ),
        ({"step": "any", "of": {"first_name": "x", "seed": 3}}, "any: of (first name x)"),
        ({"step": "any", "levels": [1, 2, 3, 4, 5]}, "any: levels 1/2/3/4/..."),
        (
            {"step": "any", "matrix": "bt601", "decoded_matrix": "bt709", "decoded_range": "full"},
            "any: matrix bt601, decoded matrix bt709, decoded range full",
        ),
        ({"step": "any", "range": "full", "decoded_range": "full"}, "any: range full"),
    ],
)
def test_any_step_is_told_in_words(drawn: dict, words: str) -> None:
    assert step_words(drawn) == words


def test_paired_lr_from_a_folder_of_its_own(data: Path) -> None:
    lr_dir = data.parent / "lr"
    lr_dir.mkdir()
    for path in (data / "photo").glob("*_lr2.*"):
        shutil.move(path, lr_dir / path.name.replace("_lr2", "x2"))
    done = show(data, "--lr-dir", lr_dir, "--json", SMALL, "data.degradation=paired", "--count", 6)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        sample = json.loads(line)
        assert Path(sample["lr_path"]).parent == lr_dir
        assert Path(sample["lr_path"]).stem == Path(sample["path"]).stem + "x2"


def test_a_run_shows_its_own_samples(data: Path) -> None:
    run_dir = data.parent / "run"
    run_dir.mkdir()
    plan = make_plan(
        TrainOptions((*DEGRADED, "seed=5", "ds.train_batch_size=3"), dataset_dir=(data,))
    )
    write_recipe(plan.recipe, run_dir / "recipe.yaml")
    (run_dir / "ds_config.json").write_text(json.dumps(plan.ds_config))
    plan.dataset.write_lists(run_dir / "file_lists")
    done = show(data, "--run", run_dir, "--step", 3, "--json", "--panel", 64)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["number"] for line in done.stdout.splitlines()] == [6, 7, 8]
    picture = sheet_of(data)
    for hr, _ in trained_on(data, 3, 3, *DEGRADED, "seed=5")[6:]:
        assert holds(picture, hr.repeat(2, 0).repeat(2, 1))

    # A run from before LR was made on the host continues with DALI, and is shown that way.
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    for state, on_host in (({}, False), ({"cpu_degradation": "host"}, True)):
        (checkpoint / "state.json").write_text(json.dumps(state))
        seal(checkpoint, 2)
        assert show(data, "--run", run_dir, "--step", 3, "--panel", 64).returncode == 0
        shown = sheet_of(data)
        for _, lr in trained_on(data, 3, 3, *DEGRADED, "seed=5", degrades_on_host=on_host)[6:]:
            assert any(holds(shown, lr.repeat(factor, 0).repeat(factor, 1)) for factor in (2, 4, 8))

    assert_user_error(show(data, "--run", run_dir, "--recipe", "vapsr_x2"), "its own recipe")
    assert_user_error(show(data, "--run", data), "not a run folder", "recipe.yaml")
    other = data.parent / "other"
    shutil.copytree(data, other)
    assert_user_error(
        show(data, "--run", run_dir, "--dataset-dir", other), "1 dataset folders, not 2"
    )
    write_lists(data, ["photo/0.npy", "photo/1.npy"])
    assert_user_error(show(data, "--run", run_dir), "lists have changed", "4 gone (photo/2.npy, …)")


def damage(data: Path, kind: str) -> Path:
    """Damage one of the six files."""
    if kind == "npy":
        path = data / "photo/2.npy"
        path.write_bytes(path.read_bytes()[:-9])
    # A filter that does not exist: an intact stream, so only decoding detects it.
    else:
        path = data / "photo/5.png"
        path.write_bytes(_png(72, 70, b"".join(bytes([9]) + bytes(72 * 3) for _ in range(70))))
    return path


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def pairs_of_others(data: Path, bad: Path) -> list[DrawnPair]:
    """Samples of the first epoch that are not from the bad file."""
    plan = make_plan(TrainOptions((SMALL,), dataset_dir=(data,)))
    source = CropSource.of_dataset(
        plan.dataset, plan.recipe.data, scale=2, seed=plan.recipe.seed, position=Position(0, 1, 1)
    )
    return make_pairs(
        plan, [number for number in range(6) if source.files_of(number) != [str(bad)]]
    )


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_a_bad_file_is_named_and_no_picture_is_left(data: Path, kind: str) -> None:
    bad = damage(data, kind)
    (data.parent / "sheet.png").write_bytes(b"of before")
    assert_user_error(show(data, SMALL, "--count", 6), str(bad))
    assert (data.parent / "sheet.png").read_bytes() == b"of before"
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "sheet.png"]
    numbers = [pair.sample.number for pair in pairs_of_others(data, bad)]
    assert len(numbers) == 5  # all other samples can still be shown


def test_what_stands_in_for_a_bad_file_is_shown(data: Path) -> None:
    bad = damage(data, "png")
    done = show(
        data,
        "--first",
        6,
        "--count",
        6,
        "--panel",
        64,
        "--json",
        SMALL,
        "data.on_error=skip",
        "data.max_bad_files=0.5",
        "data.augment=false",
    )
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sample["number"] for sample in samples] == list(range(6, 12))
    assert not samples[0]["skipped"]  # the decoder fails midway, not at the start
    assert [skip["path"] for sample in samples for skip in sample["skipped"]] == [str(bad)]
    picture = sheet_of(data)
    for sample in samples:
        hr = np.load(sample["path"])[
            sample["top"] : sample["top"] + CROP, sample["left"] : sample["left"] + CROP
        ]
        assert holds(picture, hr.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", 0], "--count 0: must be at least 1"),
        (["--first", -1], "sample -1: must be 0"),
        (["--sample", 3, "--sample", -2], "sample -2: must be 0"),
        (["--sample", 10**30], "sample 1000000000000000000000000000000: must be 0"),
        (["--sample", 3, "--count", 2], "--sample and --count 2"),
        (["--step", 0], "--step 0: must be at least 1"),
        (["--step", 2, "--first", 7], "--first 7 and --step 2"),
        (["--panel", 5], "--panel 5: must be 32 to 4096"),
        (["--count", 100_000], "megapixels"),
        (["--count", 10**12], "megapixels"),
        (["--sample", 1, "data.crop=8000"], "use a smaller data.crop"),
        (["second.png"], "only one OUT"),
        (["data.corp=64"], "unknown key; did you mean 'crop'?"),
        (["data.degradation=realesgran"], "did you mean 'realesrgan'?"),
        (["--recipe", "vapsr_x9"], "no recipe 'vapsr_x9'"),
        (["--lr-dir", "/nowhere"], "--lr-dir has no effect unless LR is read"),
        (["data.crop=64"], "smaller than data.crop 64"),
        (["--frist", 3], "did you mean '--first'?"),
    ],
)
def test_wrong_input_is_said_in_one_line(data: Path, words: list[object], message: str) -> None:
    assert_user_error(show(data, *words), message)
    assert not (data.parent / "sheet.png").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("sheet.jpg", "must end in .png"),
        ("none/sheet.png", "no such folder"),
        ("folder.png", "a folder"),
    ],
)
def test_out_that_cannot_be_written(data: Path, out: str, message: str) -> None:
    (data.parent / "folder.png").mkdir()
    assert_user_error(show(data, SMALL, out=out), message)


def test_names_that_the_font_lacks_and_long_ones(data: Path) -> None:
    name = f"photo/{'long_' * 30}Größe.npy"
    np.save(data / name, photograph(64, 64))
    write_lists(data, [name])
    assert show(data, SMALL, "--count", 2).returncode == 0
    picture = sheet_of(data)
    assert picture.shape[1] == 2 * 256 + 4 + 2 * GAP
    assert (picture[:, -GAP:] == 255).all()  # the text stays in its cell


def test_as_a_command_with_words_anywhere(data: Path) -> None:
    done = run_tool(
        "show_batch",
        "--json",
        SMALL,
        "--count",
        3,
        data.parent / "x.png",
        "data.augment=false",
        "--dataset-dir",
        data,
    )
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert [
        (sample["flip_vertical"], sample["flip_horizontal"], sample["transpose"])
        for sample in samples
    ] == [(0, 0, 0)] * 3
    assert done.stderr.startswith(f"written to {data.parent / 'x.png'}")
    assert_user_error(
        run_tool("show_batch", data.parent / "x.png", "--dataset-dir", data.parent / "nowhere"),
        "no such file list",
    )
