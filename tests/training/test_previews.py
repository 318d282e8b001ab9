"""Previews: which pictures are shown, when, and that training is unaffected."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from comparison import checkpoint_differences
from conftest import photograph
from lives import train
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe, parse_overrides
from pipeline.data.dataset import Dataset, Folder
from pipeline.images import to_bytes
from pipeline.models import build_generator
from pipeline.models.weights import read_network
from pipeline.run_folder import checkpoint_dir
from pipeline.training.previews import CAPTION, GAP, Previews, every_nth, read_previews
from pipeline.training.validation import ValidationPair, enlarged_input, read_pair


def panels(sheet: Path, size: tuple[int, int], zoom: int) -> list[np.ndarray]:
    """Return the three images of a sheet at their original size: uint8 HWC."""
    pixels = np.asarray(Image.open(sheet))
    height, width = (side * zoom for side in size)
    assert pixels.shape == (height + GAP + CAPTION, 3 * (width + GAP) + GAP, 3)
    return [
        pixels[GAP : GAP + height : zoom, x : x + width : zoom]
        for x in range(GAP, 3 * (width + GAP), width + GAP)
    ]


def as_array(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()


def sets(run_dir: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.glob("samples/*/step-*.png")
    }


def test_every_epoch_shows_the_same_photographs_and_training_does_not_feel_it(
    dataset: Path, tmp_path: Path
) -> None:
    """10 files in batches of 4: epochs end in steps 3, 5 and 8, and steps 4 and 8 are validated."""
    run_dir = tmp_path / "run"
    assert "warning" not in train(
        dataset, run_dir, "steps=8", "keep=9", "histograms=3", "previews.count=3"
    )
    first = sets(run_dir)
    assert sorted(first) == [
        f"samples/photos-{photo}/step-{step:08d}.png"
        for photo in (10, 11, 12)
        for step in (0, 3, 4, 5, 8)
    ]
    # A sheet shows the averaged network's output.
    saved = read_network(checkpoint_dir(run_dir, 8) / "generator_ema.safetensors")
    network = build_generator(saved.name, saved.scale, **saved.params).eval()
    network.load_state_dict(saved.state_dict)
    pair = read_pair(
        Dataset((Folder(dataset, [], ["photos/10.npy"], None),)).validation[0],
        0,
        load_recipe("demo"),
    )
    with torch.inference_mode():
        expected = [enlarged_input(pair), to_bytes(network(pair.lr)), pair.hr]
    shown = panels(run_dir / "samples/photos-10/step-00000008.png", (84, 66), 3)
    for image, wanted in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(image, as_array(wanted))

    # as the key was once called
    train(dataset, tmp_path / "plain", "steps=8", "keep=9", "samples=off")
    assert not (tmp_path / "plain" / "samples").exists()
    assert checkpoint_differences(tmp_path / "plain", run_dir, 8) == []

    # Lost work is repeated, and so are its previews.
    for step in (4, 6, 8):
        shutil.rmtree(checkpoint_dir(run_dir, step))
    later = run_dir / "samples/photos-12/step-00000007.png"  # of a set that is not repeated
    shutil.copy(run_dir / "samples/photos-12/step-00000008.png", later)
    assert "continuing from step 3 of 8" in train(
        dataset, run_dir, "steps=8", "keep=9", "previews.count=3"
    )
    assert sets(run_dir) == first


def test_named_photographs_are_shown_by_the_first_of_two_ranks(
    dataset: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), photograph(30, 200, 150)[..., ::-1])
    run_dir = tmp_path / "run"
    train(
        dataset,
        run_dir,
        "steps=3",
        f"previews={{files: [{tmp_path / 'a.png'}], side: 64, keep: 1}}",
        procs=2,
    )
    assert sorted(sets(run_dir)) == [f"samples/a/step-{step:08d}.png" for step in (0, 3)]
    hr = panels(run_dir / "samples/a/step-00000003.png", (64, 64), 5)[2]
    # the middle, even on LR's grid
    np.testing.assert_array_equal(hr, photograph(30, 200, 150)[68:132, 42:106])


def test_a_folder_that_cannot_be_written_stops_nothing(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("in the way\n")
    printed = train(dataset, tmp_path / "run", "steps=4", "previews.count=3")
    assert printed.count("warning: samples cannot be written") == 1
    assert "finished at step 4" in printed


def chosen(dataset: Dataset, *overrides: str) -> list[ValidationPair]:
    return read_previews(load_recipe("demo", parse_overrides(overrides)[0]), dataset)


@pytest.fixture
def listed(tmp_path: Path) -> Dataset:
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", photograph(i, 70 + i, 90))
    return Dataset((Folder(tmp_path, [], [f"{i}.npy" for i in range(5)], None),))


def test_which_pictures_are_shown(listed: Dataset, tmp_path: Path) -> None:
    assert [pair.name for pair in chosen(listed)] == ["0.npy", "1.npy", "3.npy"]
    assert [pair.name for pair in chosen(listed, "previews.count=1")] == ["0.npy"]
    assert chosen(listed, "previews=off") == []
    assert [pair.name for pair in chosen(listed, f"previews={tmp_path}", "previews.count=4")] == [
        f"{i}.npy" for i in range(4)
    ]
    pair = chosen(listed, f"previews=[{tmp_path / '4.npy'}]", "previews.side=64")[0]
    whole = read_pair(listed.validation[4], 0, load_recipe("demo"))
    assert pair.hr.shape[-2:] == (64, 64)
    # LR is made of the whole picture, and cut
    assert torch.equal(pair.lr, whole.lr[..., 2:34, 6:38])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("previews=nowhere.png",), "previews.files: nowhere.png: no such file"),
        (("previews={here}/text.txt",), "text.txt: not an image that training can read"),
        (
            ("previews={here}/small.npy",),
            "small.npy: 20x20 is too small to validate at scale 2; name a larger picture",
        ),
        (
            ("previews={here}", "data.degradation=paired"),
            "this recipe reads LR files, so its previews are taken from",
        ),
        (
            ("previews={here}/many",),
            "17 images are too many to upscale repeatedly; name at most 16, or set previews.count",
        ),
        (("previews.cuont=2",), "previews.cuont: unknown key; did you mean 'count'?"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    listed: Dataset, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    (tmp_path / "text.txt").write_text("not an image\n")
    np.save(tmp_path / "small.npy", photograph(0, 20, 20))
    (tmp_path / "many").mkdir()
    for i in range(17):
        (tmp_path / "many" / f"{i:02d}.npy").symlink_to(tmp_path / "0.npy")
    with pytest.raises(UserError) as caught:
        chosen(listed, *(text.replace("{here}", str(tmp_path)) for text in overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pairs = [
        ValidationPair(name, image, image[..., ::2, ::2])
        for name in ("a/1.png", "a 1.jpg", "../..")
    ]
    Previews(tmp_path, pairs, 2, 0).write(5, [image] * 3)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == [
        "a-1-2/step-00000005.png",
        "a-1/step-00000005.png",
        "picture/step-00000005.png",
    ]


@pytest.mark.parametrize(
    ("count", "most"), [(0, 50), (1, 50), (50, 50), (51, 50), (1000, 50), (7, 3)]
)
def test_a_long_run_shows_every_nth(count: int, most: int) -> None:
    nth = every_nth(count, most)
    shown = [i for i in range(1, count + 1) if i % nth == 0]
    assert len(shown) <= most
    assert nth == 1 or len([i for i in range(1, count + 1) if i % (nth - 1) == 0]) > most, (
        "no fewer than necessary"
    )
