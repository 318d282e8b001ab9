"""Chains of steps: what a recipe may say, what is drawn for a sample, and where LR comes from."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pydantic import ValidationError
from test_degradations import photographs, undone

from conftest import photograph
from pipeline.cli import UserError
from pipeline.config.recipe import (
    Recipe,
    degradation_of,
    load_stages,
    recipe_differences,
    recipe_of,
)
from pipeline.data.dataset import Dataset, Folder, read_dataset
from pipeline.data.degradations import build_degradation, host
from pipeline.data.degradations.chain import Chain, ChainSpec, label, run
from pipeline.data.degradations.host import Workspace
from pipeline.data.degradations.steps import STEPS
from pipeline.data.degradations.steps.base import Names
from pipeline.data.degradations.steps.sharpen import sharpened_hr
from pipeline.data.image_files import write_file_list
from pipeline.data.reader import low_resolution, training_pipeline
from pipeline.data.sampling import random_words, uniforms
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import DataSpec
from pipeline.installation import recipe_names

STEPS_OF_ALL_KINDS: list[Any] = [
    {"blur": {"sigma": [0.3, 2], "probability": 0.7}},
    {"resize": {"factor": [0.4, 1.3]}},
    {
        "one_of": [
            {"probability": 0.25, "noise": {"sigma": 4}},
            {"probability": 0.5, "steps": ["blur", {"shuffle": ["noise", "blur"]}]},
            {"probability": 0.25, "steps": []},
        ]
    },
    {"sometimes": {"probability": 0.5, "steps": [{"resize": {"to": "lr"}}, "noise"]}},
]


def drawn(chain: Chain, sample: int, size: tuple[int, int] = (96, 80)) -> dict[str, Any]:
    return chain.draw(numbers(sample), *size)


def numbers(sample: int) -> Iterator[float]:
    return iter(uniforms(random_words(0, 9, sample, 1, 32))[0].tolist())


def chain_of(*steps: Any, scale: int = 2, **keys: Any) -> Chain:
    chain = build_degradation(ChainSpec.model_validate({"steps": steps, **keys}), scale)
    assert isinstance(chain, Chain)
    return chain


def names_of(plan: dict[str, Any]) -> list[str]:
    return [step["step"] for step in plan["steps"]]


# Recipes.


def test_a_recipe_that_a_run_keeps_says_the_same() -> None:
    spec = ChainSpec.model_validate({"steps": STEPS_OF_ALL_KINDS})
    assert ChainSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert ChainSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what recipes may say of each step: nothing, and every name of a table of shares."""
    for step, row in STEPS.items():
        yield step, {}
        main = "codec" if "codec" in row.Spec.model_fields else "kind"
        for key, field in row.Spec.model_fields.items():
            for mark in field.metadata:
                for name in mark.names if isinstance(mark, Names) else ():
                    yield step, {key: name}
                    if key == main:
                        default = row.Spec.model_fields["probability"].default
                        yield step, {main: name, "probability": default}
    yield "banding", {"bits": [3, 5]}
    yield "compress", {"codec": ["jxl", "webp"]}
    yield "resize", {"to": "lr", "detour": {"down": 0.5, "kind": "nearest"}}


def test_every_section_of_a_recipe_that_a_run_keeps_says_the_same() -> None:
    tried = 0
    for step, section in sections():
        try:
            spec = ChainSpec.model_validate({"steps": [{step: section}]})
        except ValidationError:
            assert step in ("compress", "noise"), (step, section)  # what needs another key too
            continue
        assert ChainSpec.model_validate(spec.model_dump(mode="json")) == spec, (step, section)
        tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["blurr"], "no step named 'blurr'; did you mean 'blur'"),
        ([{"blur": {}, "noise": {}}], "is not a step; write one step or group per item"),
        ([{"blur": {"sigmaa": 3}}], "sigmaa"),
        ([{"noise": {"sigma": 300}}], r"\[300, 300\] is not a range .* within 0..255"),
        ([{"noise": {"kind": "gausian"}}], "no kind named 'gausian'; did you mean 'gaussian'"),
        ([{"noise": {"kind": {"gaussian": 0}}}], "needs a share above 0"),
        ([{"noise": {"probability": 1.5}}], "probability"),
        (
            [{"one_of": [{"probability": 0.4, "noise": {}}, {"probability": 0.4, "blur": {}}]}],
            r"0.4 \+ 0.4 = 0.8; they must sum to 1",
        ),
        ([{"one_of": [{"probability": 0.4, "noise": {}}, "blur"]}], "of every choice"),
        ([{"one_of": []}], r"one_of: at least 1 item is needed, not \[\];"),
        ([{"one_of": {"blur": {}}}], "one_of: a list is needed"),
        ([{"blur": 3}], "blur: keys and values are needed, .* not 3"),
        ([{"blur": {"sigma": [True, True]}}], "neither a number nor a range"),
        ([{"blur": {"kind": {"lens": True}}}], "true is not a number"),
        ([{"sometimes": {"steps": ["blur"]}}], "sometimes.probability"),
        ([{"sometimes": {"probability": 1, "steps": ["blurr"]}}], "did you mean 'blur'"),
        (["blur"] * 201, "201 steps and groups; at most 200"),
    ],
)
def test_a_bad_list_is_refused_by_name(steps: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of({"data": {"degradation": {"name": "chain", "steps": steps}}}, "recipe")


def test_an_unknown_degradation_names_the_presets() -> None:
    with pytest.raises(UserError, match=r"no degradation named 'web_foto'.*'web_photo'"):
        recipe_of({"data": {"degradation": "web_foto"}}, "recipe")
    with pytest.raises(UserError, match=r"a step or group, .*\{name: chain, steps: \[blur\]\}"):
        recipe_of({"data": {"degradation": ["blur", "noise"]}}, "recipe")
    with pytest.raises(UserError, match=r"None is not a degradation; give its name"):
        recipe_of({"data": {"degradation": None}}, "recipe")


@pytest.mark.parametrize("name", recipe_names("recipes/degradations"))
def test_every_preset_loads_and_makes_lr(name: str) -> None:
    (recipe,) = load_stages("vapsr_x2", {"data.degradation": {"name": name, "surroundings": 16}})
    spec = recipe.data.degradation
    assert isinstance(spec, ChainSpec)
    assert (spec.preset, spec.surroundings) == (name, 16)
    kept = Recipe.model_validate(json.loads(recipe.model_dump_json()))
    assert kept.data.degradation == spec
    pixels = photograph(3, 66, 50)
    for number in range(6):
        lr = low_resolution(pixels, spec, 2, seed=1, number=number)
        assert (lr.shape, lr.dtype) == ((33, 25, 3), np.uint8)
        # Still the same picture.
        small = pixels.reshape(33, 2, 25, 2, 3).mean((1, 3))
        assert np.corrcoef(lr.mean(2).ravel(), small.mean(2).ravel())[0, 1] > 0.3


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n- blur: {sigma: 2}\nsurroundings: 8\n")
    assert degradation_of(str(path)) == {
        "name": "chain",
        "preset": "mine",
        "steps": [{"blur": {"sigma": 2}}],
        "surroundings": 8,
    }
    with pytest.raises(UserError, match=r"other\.yaml: no such file"):
        degradation_of(str(tmp_path / "other.yaml"))
    path.write_text("- blur\n")
    with pytest.raises(UserError, match=r"mine\.yaml must contain keys and .*`steps: \[blur\]`"):
        degradation_of(str(path))


def test_a_preset_may_change_keys_of_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: dvd\nsurroundings: 8\n")
    dvd = degradation_of("dvd")
    assert degradation_of(str(path)) == {**dvd, "preset": "mine", "surroundings": 8}
    path.write_text(f"name: {path}\n")
    with pytest.raises(UserError, match=r"mine\.yaml is its own preset: mine -> mine"):
        degradation_of(str(path))


def test_differences_of_chains_name_the_step(tmp_path: Path) -> None:
    def recipe(text: str, name: str = "mine.yaml") -> Recipe:
        (tmp_path / name).write_text(text)
        return load_stages("demo", {"data.degradation": str(tmp_path / name)})[0]

    old = recipe("steps: [blur, noise, {one_of: [blur, {compress: {quality: 40}}]}]")
    assert recipe_differences(old, old) == []
    changed = recipe("steps: [{blur: {sigma: 2}}, sharpen, {one_of: [blur, compress]}, noise]")
    key = "data.degradation.steps"
    assert recipe_differences(old, changed) == [
        f"{key}.0.blur.sigma: [0.2, 3.0] in the run, [2.0, 2.0] asked for",
        f"{key}.1: noise in the run, sharpen asked for",
        f"{key}.2.one_of.1.steps.0.compress.quality.all: [40.0, 40.0] in the run, unset asked for",
        f"{key}.3: unset in the run, noise asked for",
    ]
    # Another name of the same steps is no difference.
    assert recipe_differences(changed, recipe((tmp_path / "mine.yaml").read_text(), "b.yaml")) == []
    folders = [
        load_stages("demo", {"data.degradation": ["dvd", {"name": "dvd", "surroundings": side}]})[0]
        for side in (8, 16)
    ]
    assert recipe_differences(*folders) == [
        "data.degradation.folders.1.surroundings: 8 in the run, 16 asked for"
    ]


def test_keys_beside_a_preset_and_another_name(tmp_path: Path) -> None:
    dvd = load_stages("demo", {"data.degradation": "dvd"})[0].data.degradation
    # Another name leaves none of the steps of the recipe.
    named = load_stages("dejpeg_x1", {"data.degradation.name": "dvd"})[0].data.degradation
    assert named == dvd
    (tmp_path / "base.yaml").write_text("base: demo\ndata: {degradation: dvd}\n")
    own = tmp_path / "own.yaml"
    own.write_text(f"base: {tmp_path}/base.yaml\ndata: {{degradation: {{surroundings: 8}}}}\n")
    assert load_stages(str(own))[0].data.degradation == dvd.model_copy(update={"surroundings": 8})


# Draws.


def test_a_sample_is_a_function_of_its_numbers() -> None:
    chain = chain_of(*STEPS_OF_ALL_KINDS)
    plans = [drawn(chain, sample) for sample in range(200)]
    assert drawn(pickle.loads(pickle.dumps(chain)), 7) == plans[7]
    assert plans == [drawn(chain_of(*STEPS_OF_ALL_KINDS), sample) for sample in range(200)]
    assert json.loads(json.dumps(plans)) == plans
    assert len({json.dumps(plan) for plan in plans}) == 200


def test_each_step_has_random_numbers_of_its_own() -> None:
    """A step that uses more numbers, or is left out, does not change what others draw."""
    with_many = chain_of({"blur": {"kind": "generalized"}}, "noise", scale=1)
    with_few = chain_of({"blur": {"probability": 0}}, "noise", scale=1)
    for sample in range(20):
        assert drawn(with_many, sample)["steps"][-1] == drawn(with_few, sample)["steps"][-1]


def test_groups_draw_with_their_probabilities() -> None:
    group = {
        "one_of": [
            {"probability": 0.2, "blur": {}},
            {"probability": 0.5, "noise": {}},
            {"probability": 0.3, "steps": ["noise", "blur"]},
        ]
    }
    shuffled = {"sometimes": {"probability": 0.4, "steps": [{"shuffle": ["noise", "blur"]}]}}
    chain = chain_of(group, shuffled, scale=1)
    seen: Counter[tuple[str, ...]] = Counter()
    rest: Counter[tuple[str, ...]] = Counter()
    for sample in range(2000):
        names = names_of(drawn(chain, sample))
        first = 2 if names[:2] == ["noise", "blur"] and len(names) in (2, 4) else 1
        seen[tuple(names[:first])] += 1
        rest[tuple(names[first:])] += 1
    for names, share in ((("blur",), 0.2), (("noise",), 0.5), (("noise", "blur"), 0.3)):
        assert seen[names] / 2000 == pytest.approx(share, abs=0.035)
    assert rest[()] / 2000 == pytest.approx(0.6, abs=0.035)
    assert rest["noise", "blur"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert rest["blur", "noise"] / 2000 == pytest.approx(0.2, abs=0.03)


def test_lr_has_its_size_whatever_the_steps_did() -> None:
    for scale in (1, 2, 3, 4):
        chain = chain_of(*STEPS_OF_ALL_KINDS, scale=scale)
        for sample in range(30):
            plan = drawn(chain, sample, (96, 84))
            image = run(photograph(sample % 4, 96, 84), plan["steps"], Workspace())
            assert image.shape == (96 // scale, 84 // scale, 3), plan


def test_the_seconds_of_each_kind_of_step_are_counted() -> None:
    workspace = Workspace()
    plan = drawn(chain_of("blur", "noise", scale=1), 3)
    run(photograph(0, 96, 80), plan["steps"], workspace)
    assert [*workspace.seconds] == [label(step) for step in plan["steps"]]
    assert label(plan["steps"][1]).startswith("noise(")
    assert all(seconds > 0 for seconds in workspace.seconds.values())


# Samples of a run.


def source(
    folders: list[Folder], *, micro_batch: int, world: int = 1, rank: int = 0, **data: Any
) -> CropSource:
    return CropSource.of_dataset(
        Dataset(tuple(folders)),
        DataSpec.model_validate({"crop": 32, **data}),
        scale=2,
        seed=4,
        position=Position(rank, world, micro_batch),
        degrades_on_host=True,
    )


def batches(crops: CropSource, count: int, threads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    pipeline = training_pipeline(crops, 0, device_id=None, threads=threads, prefetch=2)
    made = [[np.array(side.as_array()) for side in pipeline.run()] for _ in range(count)]
    return np.concatenate([hr for hr, _ in made]), np.concatenate([lr for _, lr in made])


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_samples_do_not_depend_on_batches_ranks_or_threads(tmp_path: Path, suffix: str) -> None:
    names = photographs(tmp_path, (60, 70), (90, 48), (50, 50), suffix=suffix)
    folder = [Folder(tmp_path, names, [])]
    data = {"degradation": {"name": "chain", "steps": STEPS_OF_ALL_KINDS}, "crop": 32}
    hr, lr = batches(source(folder, micro_batch=12, **data), 1)
    for micro_batch, threads in ((1, 1), (4, 3)):
        other = batches(source(folder, micro_batch=micro_batch, **data), 12 // micro_batch, threads)
        np.testing.assert_array_equal(other[0], hr)
        np.testing.assert_array_equal(other[1], lr)
    by_rank = [
        batches(source(folder, micro_batch=3, world=2, rank=rank, **data), 2)[1] for rank in (0, 1)
    ]
    merged = np.concatenate([by_rank[0][:3], by_rank[1][:3], by_rank[0][3:], by_rank[1][3:]])
    np.testing.assert_array_equal(merged, lr)


def test_lr_shows_what_hr_shows(tmp_path: Path) -> None:
    """In the same place and in the same orientation, for every symmetry and placement."""
    names = photographs(tmp_path, (80, 90), (64, 100))
    degradation = {"name": "chain", "steps": [{"resize": {"to": "lr", "kind": "area"}}]}
    crops = source([Folder(tmp_path, names, [])], micro_batch=24, degradation=degradation)
    hr, lr = batches(crops, 1)
    mean = hr.reshape(24, 3, 16, 2, 16, 2).mean((3, 5))
    assert np.abs(lr - mean).max() <= 1  # a whole ratio: exactly the mean of the pixels
    assert (
        len(
            {
                (one.transpose, one.flip_vertical, one.flip_horizontal)
                for one in crops.samples(0, 24)
            }
        )
        >= 6
    )


def test_steps_keep_their_direction_in_turned_samples(tmp_path: Path) -> None:
    """Scan lines are horizontal, however the photograph is flipped and transposed."""
    np.save(tmp_path / "white.npy", np.full((60, 70, 3), 255, np.uint8))
    steps = [{"resize": {"to": "lr"}}, {"scanlines": {"strength": 1, "period": 4}}]
    crops = source(
        [Folder(tmp_path, ["white.npy"], [])],
        micro_batch=12,
        degradation={"name": "chain", "steps": steps},
    )
    lr = batches(crops, 1)[1]
    assert {sample.transpose for sample in crops.samples(0, 12)} == {0, 1}
    assert np.ptp(lr, axis=3).max() == 0
    assert np.ptp(lr, axis=2).min() > 150


def test_each_folder_has_a_degradation_of_its_own(tmp_path: Path) -> None:
    """Photographs through a chain, real pairs, and a plain bicubic, mixed by weight."""
    folders = []
    for number, suffix in enumerate((".npy", ".png", ".npy")):
        root = tmp_path / str(number)
        root.mkdir()
        names = photographs(root, (60, 70), (52, 48), suffix=suffix)
        write_file_list(root / "training_file_list.txt", names)
        write_file_list(root / "validation_file_list.txt", names[:1])
        folders.append((root, names))
    for name in folders[1][1]:  # LR that no degradation would make
        stem = name.rsplit(".", 1)[0]
        pixels = cv2.imread(str(folders[1][0] / name))
        assert cv2.imwrite(str(folders[1][0] / f"{stem}_lr2.png"), 255 - pixels[::2, ::2])
    spec = DataSpec.model_validate(
        {
            "crop": 32,
            "weights": [0.25, 0.5, 0.25],
            "multiplier": 8,
            "degradation": [
                {"name": "chain", "steps": [{"color": {"brightness": 40}}]}
                if "color" in STEPS
                else {"name": "chain", "steps": [{"noise": {"sigma": 40}}]},
                "paired",
                "gaussian",
            ],
        }
    )
    dataset = read_dataset(
        [root for root, _ in folders],
        paired_scale=2,
        paired_folders=spec.degradation.paired_folders,
    )
    crops = CropSource.of_dataset(
        dataset, spec, scale=2, seed=0, position=Position(0, 1, 48), degrades_on_host=True
    )
    hr, lr = batches(crops, 1)
    samples = crops.samples(0, 48)
    assert Counter(sample.folder for sample in samples) == {0: 12, 1: 24, 2: 12}
    for i, sample in enumerate(samples):
        if sample.folder == 1:
            assert str(sample.lr_path).endswith("_lr2.png")
            np.testing.assert_array_equal(lr[i], 255 - _first_of_four(hr[i], sample))
        else:
            assert sample.lr_path is None
    assert [image.lr_path is not None for image in dataset.validation] == [False, True, False]
    with pytest.raises(UserError, match="lists 3 degradations for 2 dataset folders"):
        read_dataset(
            [root for root, _ in folders[:2]],
            paired_scale=2,
            paired_folders=spec.degradation.paired_folders,
        )
    with pytest.raises(UserError, match="2 --lr-dir for 1 --dataset-dir whose degradation is"):
        read_dataset(
            [root for root, _ in folders],
            paired_scale=2,
            lr_roots=[tmp_path, tmp_path],
            paired_folders=spec.degradation.paired_folders,
        )


def _first_of_four(hr: np.ndarray, sample: Any) -> np.ndarray:
    """Return every other pixel of an HR crop, as it lies in the file, turned as the sample is."""
    image = undone(hr, sample)[::2, ::2]
    if sample.flip_vertical:
        image = image[::-1]
    if sample.flip_horizontal:
        image = image[:, ::-1]
    return image.transpose(2, 1, 0) if sample.transpose else image.transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_hr_is_sharpened_before_lr_is_made(tmp_path: Path, suffix: str) -> None:
    """By the host and by the graph, which agree up to rounding; LR is made of what HR shows."""
    names = photographs(tmp_path, (200, 230), (240, 190), suffix=suffix)
    folder = [Folder(tmp_path, names, [])]
    steps = [{"resize": {"to": "lr", "kind": "area"}}]
    chain = {"degradation": {"name": "chain", "steps": steps}, "sharpen_hr": True}
    crops = source(folder, micro_batch=12, **chain)
    hr, lr = batches(crops, 1)
    for i, sample in enumerate(crops.samples(0, 12)):
        path = Path(sample.path)
        pixels = np.load(path) if suffix == ".npy" else cv2.imread(str(path))[..., ::-1]
        whole_image = host.rounded(sharpened_hr(pixels, Workspace()), Workspace())
        expected = whole_image[sample.top : sample.top + 32, sample.left : sample.left + 32]
        # Sums of a filter may be rounded differently in another place of an image.
        assert np.abs(undone(hr[i], sample).astype(int) - expected).max() <= 1
        plain = pixels[sample.top : sample.top + 32, sample.left : sample.left + 32]
        assert np.abs(expected.astype(int) - plain).max() > 3
    assert np.abs(lr - hr.reshape(12, 3, 16, 2, 16, 2).mean((3, 5))).max() <= 1
    graph = source(folder, micro_batch=12, degradation="bicubic", sharpen_hr=True)
    assert not graph.degrades_on_host
    by_graph, low = batches(graph, 1)
    assert np.abs(by_graph.astype(int) - hr).max() <= 1
    assert np.abs(low - by_graph.reshape(12, 3, 16, 2, 16, 2).mean((3, 5))).mean() < 2
    with pytest.raises(ValueError, match="sharpen_hr needs LR that is made"):
        DataSpec.model_validate({"degradation": "paired", "sharpen_hr": True})
