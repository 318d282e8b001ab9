"""tools/select_training_files.py: the split by photograph."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_corpus import (
    assert_user_error,
    encoded,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    write_files,
)
from pipeline.cli import UserError
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST, lists_hash, read_file_list
from tools.crops.manifest import CropRecord, format_lines
from tools.select_training_files import Options, choose_validation, group_by_photo

CROP = npy(photograph(32, 32))


def manifest(crops: dict[str, str]) -> bytes:
    """Write the manifest of crops (path -> photo)."""
    records = [
        CropRecord(path, photo, 1, 0, 0, 32, len(CROP), "0" * 64, "numpy", {}, 1, 1, 1)
        for path, photo in crops.items()
    ]
    return format_lines(records).encode()


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Two sources with equal photo names and 4 crops per photograph, and 5 loose files."""
    crops = {f"{photo}.png/{crop}.npy": f"{photo}.png" for photo in "abcdefgh" for crop in range(4)}
    for source in ("one", "two"):
        write_files(
            tmp_path / source, {**dict.fromkeys(crops, CROP), "manifest.jsonl": manifest(crops)}
        )
    write_files(
        tmp_path, {f"loose/{number}.png": encoded(photograph(40, 40), "png") for number in range(5)}
    )
    return tmp_path


def lists(folder: Path) -> tuple[list[str], list[str]]:
    """The training and the validation list."""
    return tuple(read_file_list(folder / name, folder) for name in (TRAINING_LIST, VALIDATION_LIST))


def photo(name: str) -> str:
    """The photograph that a file of `dataset` belongs to."""
    return name if name.startswith("loose/") else os.path.dirname(name)


def test_lists_are_whole_disjoint_and_by_photograph(dataset):
    result = run_tool("select_training_files", "--data-dir", dataset, "--validation-fraction", 0.3)
    assert (result.returncode, result.stderr) == (0, "")
    training, validation = lists(dataset)
    images = {
        path.relative_to(dataset).as_posix()
        for path in dataset.rglob("*.*")
        if path.suffix in (".npy", ".png") and path.is_file()
    }
    assert {*training, *validation} == images
    assert not {*map(photo, training)} & {*map(photo, validation)}
    assert len({*map(photo, validation)}) == 6  # round(0.3 * 21)
    assert lists_hash(training, validation) in result.stdout
    assert "training:   15 photographs" in result.stdout
    assert "validation: 6 photographs" in result.stdout
    before = stamped_tree(dataset)
    again = run_tool("select_training_files", "--data-dir", dataset, "--validation-fraction", 0.3)
    assert again.stdout == result.stdout
    assert {name: stamp[0] for name, stamp in stamped_tree(dataset).items()} == {
        name: stamp[0] for name, stamp in before.items()
    }


def test_seed_and_count(dataset):
    chosen = set()
    for seed in range(4):
        assert (
            run_tool(
                "select_training_files",
                "--data-dir",
                dataset,
                "--validation-count",
                2,
                "--seed",
                seed,
            ).returncode
            == 0
        )
        validation = lists(dataset)[1]
        assert len({*map(photo, validation)}) == 2
        chosen.add(tuple(validation))
    assert len(chosen) > 1


def test_photographs_by_name(dataset):
    result = run_tool(
        "select_training_files", "--data-dir", dataset, "--validation-photo", "*/c.png", "loose/3*"
    )
    assert result.returncode == 0, result.stderr
    assert {*map(photo, lists(dataset)[1])} == {"one/c.png", "two/c.png", "loose/3.png"}
    before = stamped_tree(dataset)
    assert_user_error(
        run_tool(
            "select_training_files", "--data-dir", dataset, "--validation-photo", "one/cc.png"
        ),
        "matches none of the 21 photographs",
        "did you mean 'one/c.png'",
    )
    assert_user_error(
        run_tool("select_training_files", "--data-dir", dataset, "--validation-photo", "*"),
        "leaving none for training",
    )
    assert stamped_tree(dataset) == before


def test_quarantine_hidden_files_and_stale_entries(dataset):
    write_files(
        dataset,
        {
            "quarantine/x.npy": CROP,
            "one/quarantine/y.npy": CROP,
            ".z.npy": CROP,
            "loose/._0.png": b"mac",
        },
    )
    (dataset / "one/a.png/0.npy").unlink()
    with open(dataset / "one/manifest.jsonl", "a") as file:
        file.write('{"path": "torn')
    assert run_tool("select_training_files", "--data-dir", dataset).returncode == 0
    names = {name for chosen in lists(dataset) for name in chosen}
    assert len(names) == 2 * 32 + 5 - 1
    assert not any("quarantine" in name or "/." in f"/{name}" for name in names)
    assert "one/a.png/0.npy" not in names


def test_min_size_looks_into_the_files(dataset):
    result = run_tool("select_training_files", "--data-dir", dataset, "--min-size", 33)
    assert "omitted 64 files smaller than 33" in result.stdout
    assert {photo(name) for names in lists(dataset) for name in names} == {
        f"loose/{number}.png" for number in range(5)
    }
    write_files(dataset, {"loose/9.png": b"text"})
    assert_user_error(
        run_tool("select_training_files", "--data-dir", dataset, "--min-size", 33),
        "loose/9.png",
        "check_training_data.py",
    )


def test_bad_usage(tmp_path):
    def select(*arguments):
        return run_tool("select_training_files", "--data-dir", tmp_path, *arguments)

    assert_user_error(
        run_tool("select_training_files", "--data-dir", tmp_path / "gone"), "no such folder"
    )
    assert_user_error(select(), "no images below this folder", "images_to_data.py")
    write_files(tmp_path, {"a.npy": CROP})
    assert_user_error(select(), "1 of 1 photographs", "leaving none for training")
    assert not (tmp_path / TRAINING_LIST).exists()
    write_files(tmp_path, {"b.npy": CROP})
    assert_user_error(select("--validation-count", 2), "2 of 2 photographs")
    assert_user_error(select("--validation-fraction", 1), "--validation-fraction 1")
    assert_user_error(select("--validation-count", 0), "--validation-count 0")
    assert_user_error(
        select("--validation-count", 1, "--validation-photo", "a.npy"), "use only one of them"
    )
    assert select().returncode == 0
    assert select("--validation-photos", "a.npy").returncode == 2


NAMES = st.lists(st.text("abcdefgh/", min_size=1, max_size=6), min_size=2, max_size=60, unique=True)


@settings(max_examples=100, deadline=None)
@given(NAMES, st.integers(0, 5), st.floats(0.01, 0.5), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_no_photo_is_on_both_sides(
    names, seed, fraction, order: random.Random
):
    photo_of = {f"{name}_{crop}": name for name in names for crop in range(3)}
    files = [*photo_of, *(f"loose_{number}" for number in range(3))]
    photos = group_by_photo(files, photo_of)
    options = Options(seed=seed, validation_fraction=fraction)
    validation = choose_validation(photos, options)
    assert 0 < len(validation) < len(photos)
    training = {name for photo in photos.keys() - validation for name in photos[photo]}
    held = {name for photo in validation for name in photos[photo]}
    assert training | held == {*files}
    assert not {photo_of.get(name, name) for name in training} & {
        photo_of.get(name, name) for name in held
    }
    shuffled = order.sample(files, len(files))
    assert choose_validation(group_by_photo(shuffled, photo_of), options) == validation


def test_new_photographs_move_hardly_any_other():
    names = [f"{number}.png" for number in range(1000)]
    old = choose_validation(names, Options())
    new = choose_validation([*names, *(f"new_{number}.png" for number in range(100))], Options())
    assert len(old) == 50
    assert len(new) == 55
    # The 50 old ones compete with 100 newcomers for 55 places, of which the latter win about 5.
    moved = old ^ {name for name in new if not name.startswith("new_")}
    assert len(moved) <= 8
    with pytest.raises(UserError):
        choose_validation(["one.png"], Options())
