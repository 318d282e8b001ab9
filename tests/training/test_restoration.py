"""Networks of scale 1, which restore an image without enlarging it, from training to use."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export_trained_model
import upscale
from comparison import checkpoint_differences, logged
from conftest import photograph
from fabricate import run_command
from lives import train
from pipeline.export import spandrel_plugin
from pipeline.models.weights import read_network
from pipeline.run_folder import checkpoint_dir, checkpoint_steps
from pipeline.training import previews
from pipeline.training.validation import ValidationPair

NETWORKS = {
    "VapSR": "name: vapsr, num_features: 8, num_attention_features: 8, num_blocks: 1, "
    "global_residual: bicubic",
    "SRResNet": "name: srresnet, num_features: 8, num_blocks: 1",
    "Compact": "name: compact, num_features: 8, num_conv: 1",
    "ESRGAN": "name: rrdbnet, num_features: 8, num_blocks: 1",
    "NAFNet": "name: spandrel, arch: NAFNet, width: 8, middle_blk_num: 1, enc_blk_nums: [1], "
    "dec_blk_nums: [1]",
}
"""Name in spandrel -> a small network, as a recipe says it."""
LOSSY = (
    "scale=1",
    "data.degradation={name: gaussian, sigma: [0.8, 1.6]}",
    "data.lr_noise={probability: 1, sigma: [5, 15]}",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_from_training_to_a_restored_image(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_dir = tmp_path / "run"
    overrides = (*LOSSY, f"generator={{{NETWORKS[name]}}}", "steps=5", "keep=9", "previews.count=1")
    assert "warning" not in train(dataset, run_dir, *overrides)
    assert checkpoint_steps(run_dir) == [3, 4, 5]
    assert all(np.isfinite(loss) for _, loss in logged(run_dir, "train", "loss"))
    # What a run is that was killed after its first checkpoint.
    shutil.copytree(run_dir, tmp_path / "killed")
    for step in (4, 5):
        shutil.rmtree(checkpoint_dir(tmp_path / "killed", step))
    assert "continuing from step 3 of 5" in train(dataset, tmp_path / "killed", *overrides)
    assert checkpoint_differences(run_dir, tmp_path / "killed", 5) == []

    assert run_command(capsys, export_trained_model, run_dir)[0] == 0
    for suffix in (".pth", ".safetensors"):
        file = run_dir / f"export/demo_x1{suffix}"
        found = opened_elsewhere(file)
        assert (str(found.architecture.id), found.scale, found.purpose) == (name, 1, "Restoration")
    network = read_network(file).build()
    lr = torch.from_numpy(photograph(1, 40, 52)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        restored = network(lr)
        torch.testing.assert_close(found(lr / 255), restored.clamp(0, 1), rtol=0, atol=1e-5)
    assert restored.shape == lr.shape

    Image.fromarray(photograph(2, 110, 150)).save(tmp_path / "photo.png")
    large = {}
    for tile in (0, 64):
        options = ("--model", file, "-o", tmp_path / f"{tile}.png", "--tile", tile, "--exact")
        command = (tmp_path / "photo.png", *options, "--backend", "torch", "--device", "cpu")
        assert run_command(capsys, upscale, *command)[0] == 0
        large[tile] = np.asarray(Image.open(tmp_path / f"{tile}.png")).astype(int)
    assert large[0].shape == (110, 150, 3)
    assert np.abs(large[64] - large[0]).max() <= 1


def opened_elsewhere(path: Path):
    """Open a file as programs do that use spandrel with our plugin."""
    spandrel_plugin.register()
    from spandrel import ModelLoader

    return ModelLoader(device="cpu").load_from_file(path)


def test_the_border_counts_and_the_input_is_shown(tmp_path, monkeypatch):
    hr = torch.from_numpy(photograph(3, 24, 30)).permute(2, 0, 1)[None]
    pair = ValidationPair("a.png", hr, hr.clone())
    worse = hr.clone()
    worse[..., 0, :] = 255 - worse[..., 0, :]  # only in the border
    shown = []
    monkeypatch.setattr(previews, "_sheet", lambda panels: shown.append(panels) or b"")
    for scale in (1, 2):
        sheets = previews.Previews(tmp_path / str(scale), [pair], scale, 0)
        sheets.write(1, [worse])
    (first, after, _), (_, after_x2, _) = shown
    assert first[1] == "input  100.00 dB"
    assert torch.equal(first[0], pair.lr)
    assert float(after[1].split()[-2]) < 30
    assert after_x2[1] == "step 1  100.00 dB"
    assert shown[1][0][1].startswith("bicubic  ")
