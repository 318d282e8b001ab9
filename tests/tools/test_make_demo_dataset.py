"""tools/make_demo_dataset.py: from installed packages to a dataset with lists."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_corpus import assert_user_error, run_tool, stamped_tree
from pipeline.cli import UserError
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST, npy_layout, read_file_list
from tools import make_demo_dataset as demo

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("skimage") and importlib.util.find_spec("sklearn")),
    reason="the demo's photographs come with scikit-image and scikit-learn, which are not "
    "installed",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A demo that no test changes."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_tool("make_demo_dataset", folder)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def test_photographs_are_on_the_right_side(out):
    training, validation = (
        read_file_list(out / "dataset" / name, out / "dataset")
        for name in (TRAINING_LIST, VALIDATION_LIST)
    )
    assert {name.split("/")[1] for name in validation} == {"chelsea.png"}
    assert {name.split("/")[1] for name in training} == {
        "astronaut.png",
        "rocket.jpg",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "china.jpg",
    }
    assert all(
        npy_layout(out / "dataset" / name)[1:3] == (128, 128) for name in training + validation
    )
    assert len(training) > 80


def test_every_clean_pixel_is_in_a_crop(out):
    astronaut = np.asarray(Image.open(out / "photographs/astronaut.png").convert("RGB"))
    crops = [
        np.load(out / f"dataset/demo/astronaut.png/x1_{row:03}_{column:03}.npy")
        for row in range(4)
        for column in range(4)
    ]
    rows = [np.concatenate(crops[4 * row : 4 * row + 4], 1) for row in range(4)]
    assert np.array_equal(np.concatenate(rows), astronaut)


def test_held_out_images_fit_every_scale_and_are_in_no_list(out):
    sizes = {path.name: Image.open(path).size for path in (out / "held_out").iterdir()}
    assert sizes == {"coffee.png": (600, 400), "flower.png": (320, 212)}
    dataset = " ".join(path.as_posix() for path in (out / "dataset").rglob("*"))
    assert "coffee" not in dataset
    assert "flower" not in dataset
    coffee = next(photograph for photograph in demo.HELD_OUT if photograph.name == "coffee.png")
    source = np.asarray(Image.open(io.BytesIO(demo._read(coffee))).convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(out / "held_out/coffee.png")), source)


def test_licences_name_every_photograph(out):
    lines = (out / "photographs/LICENCES.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in lines} == {
        photograph.name for photograph in demo.DATASET + demo.HELD_OUT
    }
    assert sum("CC BY 2.0" in line for line in lines) == 2


def test_second_call_writes_no_crop_anew(out):
    before = stamped_tree(out)
    result = run_tool("make_demo_dataset", out)
    assert result.returncode == 0
    assert "already there: 6 photos" in result.stdout
    after = stamped_tree(out)
    lists = {f"dataset/{TRAINING_LIST}", f"dataset/{VALIDATION_LIST}"}
    assert {name: stamp for name, stamp in after.items() if name not in lists} == {
        name: stamp for name, stamp in before.items() if name not in lists
    }
    assert all(after[name][0] == before[name][0] for name in lists)


def test_a_damaged_demo_is_completed(tmp_path):
    first = demo.make_demo_dataset(tmp_path)
    whole = {name: digest for name, (digest, _) in stamped_tree(tmp_path).items()}
    (first.dataset_dir / "demo/chelsea.png/x1_000_000.npy").unlink()
    (first.held_out_dir / "flower.png").unlink()
    (first.dataset_dir / VALIDATION_LIST).unlink()
    assert (
        demo.make_demo_dataset(tmp_path)
        == first
        == demo.DemoDataset(tmp_path / "dataset", tmp_path / "held_out")
    )
    restored = {name: digest for name, (digest, _) in stamped_tree(tmp_path).items()}
    manifest = "dataset/demo/manifest.jsonl"  # chelsea's lines are last now
    assert {**whole, manifest: ""} == {**restored, manifest: ""}


def test_a_missing_package_is_named():
    with pytest.raises(
        UserError, match="in pictures, which is not installed; `pip install --upgrade pictures`"
    ):
        demo._read(demo.DemoPhotograph("no_such_package", "pictures", "data/a.png", "CC0"))
    with pytest.raises(UserError, match=r"scikit-image, which has no data/a\.png"):
        demo._read(demo.DemoPhotograph("skimage", "scikit-image", "data/a.png", "CC0"))


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert_user_error(
        run_tool("make_demo_dataset", tmp_path / "file"), "cannot be written", "choose another OUT"
    )
