"""Training on every kind of dataset as real processes: errors, skips, counts and reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest

from conftest import assert_one_line, command, photograph, run
from pipeline.checkpoint.progress import read_progress
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.data.dataset import read_dataset
from pipeline.data.image_files import MANIFEST
from pipeline.data.sampling import Sampler
from pipeline.run_folder import checkpoint_steps


def make_dataset(root: Path, names: list[str], first: int = 0) -> Path:
    """Create files with these names; the last one is for validation."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = photograph(first + i, 72, 64)
        np.save(root / name, pixels) if name.endswith(".npy") else cv2.imwrite(
            str(root / name), pixels
        )
    (root / "training_file_list.txt").write_text(
        "".join(f"{name}\n" for name in sorted(names[:-1]))
    )
    (root / "validation_file_list.txt").write_text(f"{names[-1]}\n")
    return root


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [
        line
        for line in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
        if line["event"] == kind
    ]


@pytest.mark.parametrize("procs", [1, 2])
def test_bad_files_are_skipped_counted_and_reported_at_the_end_of_an_epoch(
    tmp_path: Path, procs: int
) -> None:
    root = make_dataset(tmp_path / "data", [f"{i}.png" for i in range(9)])
    for bad in ("2.png", "5.png"):
        (root / bad).write_bytes((root / bad).read_bytes()[:700])
    # 16 samples: two epochs of 8
    skipping = ("data.on_error=skip", "data.max_bad_files=0.5", "steps=4")
    done = run(command(root, tmp_path / "run", *skipping, procs=procs))
    assert done.returncode == 0, done.stderr
    report = "replaced samples whose files are bad: 2 (bad files so far: 2)"
    assert done.stdout.count(report) == 2, done.stdout
    assert done.stdout.count(f"{root}/2.png: ") == done.stdout.count(f"{root}/5.png: ") == 1
    assert [
        (line["step"], line["samples"], line["bad_files"])
        for line in events(tmp_path / "run", "skipped")
    ] == [(2, 2, 2), (4, 2, 2)]
    done = run(
        command(
            root,
            tmp_path / "strict",
            *skipping[:1],
            "data.max_bad_files=0.1",
            "steps=4",
            procs=procs,
        )
    )
    assert done.returncode == 2
    assert "2 of 8 files are bad, but data.max_bad_files 0.1 allows only 1" in done.stderr


def test_a_run_that_a_bad_file_stopped_goes_on_with_skip(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", [f"{i}.png" for i in range(9)])
    (root / "5.png").write_bytes((root / "5.png").read_bytes()[:700])
    done = run(command(root, tmp_path / "run", "steps=4"))
    assert_one_line(done, f"{root}/5.png: ", "(sample ")
    done = run(command(root, tmp_path / "run", "steps=4", "data.on_error=skip"))
    assert done.returncode == 0, done.stderr
    assert f"(bad files so far: 1)\n  {root}/5.png: " in done.stdout


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_ranks_stop_together_saved_and_with_one_line(tmp_path: Path, on_error: str) -> None:
    """One rank meets the bad files in the middle of a run; the others must not wait for it."""
    root = make_dataset(tmp_path / "data", [f"{i}.png" for i in range(41)])
    started = run(command(root, tmp_path / "run", "steps=3", procs=2))
    assert started.returncode == 0, started.stderr
    order = Sampler([40], 0).draw(0, 40).files
    names = sorted(f"{i}.png" for i in range(40))
    for number in (28, 29):  # in the 8th step
        bad = root / names[order[number]]
        bad.write_bytes(bad.read_bytes()[:500])
    done = run(command(root, tmp_path / "run", "steps=20", f"data.on_error={on_error}", procs=2))
    assert_one_line(done, "truncated" if on_error == "stop" else "2 of 40 files are bad")
    assert checkpoint_steps(tmp_path / "run")[-1] == 7
    # these steps need no bad file
    done = run(command(root, tmp_path / "short", "steps=7", f"data.on_error={on_error}"))
    assert done.returncode == 0, done.stderr


def test_other_lr_and_folders_in_another_order_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_dataset(tmp_path / name, ["0.npy", "1.npy", "2.npy"])
        for i in range(3):
            (tmp_path / f"{name}_lr").mkdir(exist_ok=True)
            np.save(tmp_path / f"{name}_lr" / f"{i}.npy", photograph(60 + i, 36, 32))

    def training(run_dir: str, roots: list[str], lr_roots: list[str], *more: str) -> Any:
        folders = [
            argument
            for flag, names in (("--dataset-dir", roots[1:]), ("--lr-dir", lr_roots))
            for name in names
            for argument in (flag, str(tmp_path / name))
        ]
        return run([*command(tmp_path / roots[0], tmp_path / run_dir, *more), *folders])

    assert training("both", ["one", "two"], [], "steps=1").returncode == 0
    assert_one_line(
        training("both", ["two", "one"], [], "steps=2"),
        "dataset folders: one, two in the run, two, one asked for",
    )
    assert (
        training("paired", ["one"], ["one_lr"], "steps=1", "data.degradation=paired").returncode
        == 0
    )
    assert_one_line(
        training("paired", ["one"], ["two_lr"], "steps=2", "data.degradation=paired"),
        "dataset folders: one, one_lr in the run, one, two_lr asked for",
    )


def test_several_folders_pairs_and_degradations_train(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a", [f"{i}.npy" for i in range(5)])
    second = make_dataset(tmp_path / "b", [f"{i}.png" for i in range(4)], first=20)
    done = run(
        [
            *command(
                first,
                tmp_path / "run",
                "steps=2",
                "data.weights=[1,3]",
                "data.degradation=realesrgan",
                "data.lr_noise.probability=0.5",
                "data.brightness.probability=0.2",
            ),
            "--dataset-dir",
            str(second),
            "--dataset-multiplier",
            "2",
        ]
    )
    assert done.returncode == 0, done.stderr
    assert f"7 training and 2 validation files in {first}, {second}" in done.stdout
    assert events(tmp_path / "run", "train")[-1]["epoch"] == round(2 * 4 / 14, 4)
    assert read_progress(tmp_path / "run", 2).cpu_degradation == "host"
    for i in range(5):
        np.save(first / f"{i}_lr2.npy", photograph(90 + i, 36, 32))
    done = run(command(first, tmp_path / "pairs", "steps=2", "data.degradation=paired", procs=2))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("data.weights=[1,2]",),
            "data.weights has 2 numbers for 1 dataset folders; give one for each --dataset-dir",
        ),
        (
            ("data.degradation=paired",),
            "_lr2.npy: no such file, but data.degradation=paired needs it; make pairs with",
        ),
        (
            ("--lr-dir", "/nowhere"),
            "--lr-dir has no effect unless LR is read; set data.degradation=paired",
        ),
        (
            ("--lr-dir", "/nowhere", "data.degradation=paired"),
            "/nowhere: No such file or directory; --lr-dir must be",
        ),
        (("data.degradation=gausian",), "no degradation named 'gausian'; did you mean 'gaussian'?"),
        (("data.degradation.sigma=2",), "data.degradation.sigma: unknown key"),
        (
            ("data.brightness.range=[1.5,0.5]",),
            "data.brightness.range: [1.5, 0.5] is not a range [low, high]",
        ),
        (
            ("--dataset-multiplier", "0"),
            "data.multiplier: input should be greater than or equal to 1, not 0",
        ),
        (
            ("--dataset-multiplier", "100000000"),
            "data.multiplier: input should be less than or equal to 100000",
        ),
        (
            ("data.degradation={name: gaussian, sigma: 100000}",),
            "is not a range [low, high] of numbers within 0.001..50",
        ),
        (("losses.l3=1",), "no loss named 'l3'; did you mean 'l1'?"),
        (("losses.l1=-1",), "the weight of 'l1' is -1.0, but must be a number above 0"),
        (
            ("data.on_error=ignore",),
            "data.on_error: input should be 'stop' or 'skip', not 'ignore'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    dataset: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert_one_line(run([*command(dataset, tmp_path / "run"), *arguments]), message)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_changed_dataset_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", [f"{i}.npy" for i in range(9)])
    record = '{"path": "%s", "sha256": "%s"}\n'
    (root / MANIFEST).write_text("".join(record % (f"{i}.npy", "0" * 64) for i in range(9)))
    assert run(command(root, tmp_path / "run", "steps=2")).returncode == 0
    names = (root / "training_file_list.txt").read_text().splitlines()
    shutil.copy(root / "3.npy", root / "new.npy")
    (root / "training_file_list.txt").write_text("\n".join([*names[2:], "new.npy"]) + "\n")
    done = run(command(root, tmp_path / "run", "steps=4"))
    assert_one_line(
        done,
        "training_file_list.txt of",
        "1 new (new.npy), 2 gone (0.npy, …)",
        "dataset training_files: 8 in the run, 7 asked for",
    )
    (root / "training_file_list.txt").write_text("\n".join(names) + "\n")
    (root / MANIFEST).write_text(
        "".join(record % (f"{i}.npy", ("1" if i == 4 else "0") * 64) for i in range(9))
    )
    assert_one_line(run(command(root, tmp_path / "run", "steps=4")), "dataset contents_sha256: ")
    changes = (
        "seed=3",
        "ds.train_batch_size=8",
        "data.multiplier=2",
        "data.weights=[1]",
        "data.augment=false",
    )
    done = run(command(root, tmp_path / "run", "steps=4", *changes))
    assert_one_line(
        done, *(f"{change.split('=')[0]}: " for change in changes), " in the run, ", " asked for"
    )


def test_the_hash_of_the_contents_follows_the_manifests(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, [f"photos/{i}/x1_0_0.npy" for i in range(4)])
    plain = read_dataset([root]).identity()
    for i in range(4):
        (root / "photos" / MANIFEST).write_text(
            "".join(f'{{"path": "{j}/x1_0_0.npy", "sha256": "{j}"}}\n' for j in range(i + 1))
            + "torn {\n"
        )
        known = read_dataset([root]).identity()
        assert known["contents_sha256"] != plain["contents_sha256"]
        assert known["lists_sha256"] == plain["lists_sha256"]
        plain = known
    # the manifest counts, so a good copy may replace the file
    (root / "photos/2/x1_0_0.npy").write_bytes(b"damaged")
    assert read_dataset([root]).identity() == plain


def test_a_run_in_16_bits_trains_validates_draws_and_names_its_depths(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", [f"{i}.npy" for i in range(4)])
    deep = np.load(root / "0.npy").astype(np.uint16) * 256 + 77
    np.save(root / "0.npy", deep)
    (root / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    (root / "validation_file_list.txt").write_text("deep.png\n")
    arguments = command(root, tmp_path / "run", "steps=2", "validate_every=2", "previews.count=1")
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "mixed depths: 2 files have 16 bits per value" in said
    assert "validation at step 2" in said
    (sheet,) = (tmp_path / "run/samples").glob("*/step-00000002.png")
    assert imagecodecs.png_decode(sheet.read_bytes()).dtype == np.uint16
    (root / "0.npy").unlink()  # now the run would work in 8 bits
    np.save(root / "0.npy", photograph(0, 64, 64))
    (root / "deep.png").write_bytes(imagecodecs.png_encode(photograph(0, 64, 64)))
    refused = run([*arguments, "steps=4"])
    assert refused.returncode == 2
    assert "data.depth: 16 in the run, 8 asked for" in refused.stdout + refused.stderr


def test_the_share_of_waiting_for_data_is_logged(dataset: Path, tmp_path: Path) -> None:
    assert run(command(dataset, tmp_path / "run", "steps=8", "log_every=4")).returncode == 0
    lines = events(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [4, 8]
    assert all(0 <= line["data_wait"] <= line["data_wait_worst"] <= 1 for line in lines)


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, ["0.npy", "1.npy"])
    with pytest.raises(
        UserError, match=r"names a folder twice; to sample it more often, set data\.weights"
    ):
        read_dataset([root, root])


def test_the_published_defaults_of_realesrgan() -> None:
    """The defaults of options/train_realesrnet_x4plus.yml in Real-ESRGAN."""
    spec = load_recipe("vapsr_x4", {"data.degradation": "realesrgan"}).data.degradation
    first, second = spec.first, spec.second
    assert (first.resize_prob, first.resize_range) == ((0.2, 0.7, 0.1), (0.15, 1.5))
    assert (second.resize_prob, second.resize_range) == ((0.3, 0.4, 0.3), (0.3, 1.2))
    assert (first.noise_range, second.noise_range) == ((1, 30), (1, 25))
    assert (first.poisson_scale_range, second.poisson_scale_range) == ((0.05, 3), (0.05, 2.5))
    assert (first.blur_sigma, second.blur_sigma) == ((0.2, 3), (0.2, 1.5))
    assert (first.blur_prob, second.blur_prob, spec.final_sinc_prob) == (1, 0.8, 0.8)
    assert 256 + spec.surroundings == 400
    for part in (first, second):
        assert [*part.kernel_prob.values()] == [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
        assert (part.blur_kernel_size, part.sinc_prob) == (21, 0.1)
        assert (part.betag_range, part.betap_range) == ((0.5, 4), (1, 2))
        assert (part.gaussian_noise_prob, part.gray_noise_prob, part.jpeg_range) == (
            0.5,
            0.4,
            (30, 95),
        )
