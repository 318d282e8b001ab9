"""A mistake in a command is found before the old run is moved and before anything is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import SMALL, assert_one_line, command, run
from fabricate import make_run
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.stopping import Watchdog
from pipeline.training.options import TrainOptions, make_plans
from pipeline.training.run import _train_all

GAN = "adversarial={weight: 0.01, discriminator: {name: unet, num_features: 4}}"
MISTAKES = {
    "no network": (["generator.name=vapsrr"], {}, "no network named 'vapsrr'; did you mean"),
    "no parameter": (["generator.num_block=2"], {}, "did you mean 'num_blocks'?"),
    "a value": (["generator.global_residual=cubic"], {}, "'cubic' is neither 'none' nor"),
    "no loss": (["losses={l3: 1}"], {}, "no loss named 'l3'; did you mean 'l1'?"),
    "a loss's value": (["losses={ms_ssim: {weight: 1, scales: 5}}"], {}, "ms_ssim"),
    "a loss without its average": (["losses={ldl: 1}", "ema_decay=0"], {}, "ema_decay=0.999"),
    "no weights of a loss": (
        ["losses={vgg_feature: {weight: 1, weights: gone.pth}}"],
        {},
        "no weights file 'gone.pth' for the trunk 'vgg19'",
    ),
    "no weights of a metric": (
        ["validation_lpips=alex", "lpips_weights=gone.pth"],
        {},
        "no weights file 'gone.pth' for the trunk 'alex'",
    ),
    "no optimizer": (["ds.optimizer.type=Adamm"], {}, "no optimizer 'Adamm'; did you mean 'Adam'?"),
    "no discriminator": ([GAN.replace("unet", "unett")], {}, "did you mean 'unet'?"),
    "no start file": ([], {"start": Path("gone.pth")}, "no weights file 'gone.pth'"),
    "its own folder": ([], {"start": Path("RUN")}, "which --reset moves away; give the new run"),
    "no other discriminator": ([f"{GAN[:-1]}, start: gone}}"], {}, "gone"),
    "too large crops": (
        ["data.crop=512"],
        {},
        "all 10 training files are smaller than data.crop 512: the largest is 76x78 (height x "
        "width); set data.crop=76 or less",
    ),
    "odd pairs": (
        ["data.mixing={probability: 1, kinds: mixup}", "ds.train_batch_size=3"],
        {},
        "mixes the samples of a micro-batch in pairs, but it has 3",
    ),
    "no photograph": (["previews.count=1", "previews.files=[gone.png]"], {}, "no such file"),
    "no batch norm": (
        ["activation_checkpointing=on", "generator={name: srresnet, num_blocks: 1}"],
        {},
        "activation_checkpointing: on, but srresnet has no blocks without batch norm",
    ),
}


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which a refused command leaves behind, with their bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_leaves_the_old_run_in_place(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, options, message = MISTAKES[name]
    home = make_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.training.setup.faster_layout", None)  # nothing is timed
    if options.get("start") == Path("RUN"):
        options = {"start": home}
    before = tree(tmp_path)
    asked = TrainOptions(
        (*SMALL, "channels_last=auto", *overrides),
        recipe="demo",
        dataset_dir=(dataset,),
        output_dir=home,
        reset=True,
        **options,
    )
    with pytest.raises(UserError) as refusal:
        _train_all(make_plans(asked), Ranks(), Watchdog(0))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert tree(tmp_path) == before


def test_a_validation_photograph_that_cannot_be_read_leaves_the_old_run_in_place(
    dataset: Path, tmp_path: Path
) -> None:
    """Through the command: the old run is still there, and stderr has one line."""
    home = make_run(tmp_path / "runs")
    broken = tmp_path / "dataset"
    broken.mkdir()
    for name in ("training", "validation"):
        lines = (dataset / f"{name}_file_list.txt").read_text().splitlines()
        (broken / f"{name}_file_list.txt").write_text("".join(f"{line}\n" for line in lines))
    (broken / "photos").mkdir()
    for file in (dataset / "photos").iterdir():
        (broken / "photos" / file.name).symlink_to(file)
    (broken / "photos" / "12.npy").unlink()
    (broken / "photos" / "12.npy").write_bytes(b"no image")
    before = tree(home)
    assert_one_line(run([*command(broken, home), "--reset"]), "12.npy")
    assert tree(home) == before
    assert list(home.parent.iterdir()) == [home]
