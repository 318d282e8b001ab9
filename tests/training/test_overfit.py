"""Every network can learn: it overfits eight crops of photographs to above 40 dB in a bounded
number of steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.images import cubic_resize, unit_range
from pipeline.losses import Criterion
from pipeline.metrics.psnr_ssim import psnr
from pipeline.models import GENERATORS, build_generator

# The published networks, but shallower and narrower; parameters not named here keep their values.
SMALL = {
    "vapsr": {
        "num_features": 32,
        "num_attention_features": 48,
        "num_blocks": 3,
        "global_residual": "bicubic",
    },
    "srresnet": {"num_features": 32, "num_blocks": 3},
    "msrresnet": {"num_features": 32, "num_blocks": 3},
    "rrdbnet": {"num_features": 48, "num_grow_ch": 24, "num_blocks": 1},
    "compact": {"num_features": 48, "num_conv": 4},
    "spandrel": {"arch": "PLKSR", "dim": 32, "n_blocks": 3},
}
STEPS, RATE = {"rrdbnet": 600}, {"rrdbnet": 4e-3}  # its initial output is nearly zero
HR, SCALE = 16, 2


def eight_crops() -> tuple[Tensor, Tensor]:
    """LR and HR, uint8 (8, 3, 8, 8) and (8, 3, 16, 16): a badge, spokes, wood, fur, a scaffold."""
    places = {
        skimage.data.astronaut: ((384, 144), (456, 264)),
        skimage.data.coffee: ((192, 0), (240, 24)),
        skimage.data.chelsea: ((24, 192), (168, 168)),
        skimage.data.rocket: ((216, 312), (336, 0)),
    }
    crops = [load()[y : y + HR, x : x + HR] for load, two in places.items() for y, x in two]
    hr = (
        torch.stack([torch.from_numpy(crop.copy()) for crop in crops])
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    small = cubic_resize(unit_range(hr, torch.float32), (HR // SCALE, HR // SCALE))
    return small.mul(255).round().clamp(0, 255).to(torch.uint8), hr


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: operators this small gain nothing from more, and lose much if other processes
    need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_eight_crops_are_learnt_by_heart(name: str) -> None:
    torch.manual_seed(7)
    lr, hr = eight_crops()
    target = unit_range(hr, torch.float32)
    network = build_generator(name, SCALE, **SMALL.get(name, {})).train()
    criterion, steps = Criterion({"l1": 1.0}, torch.device("cpu")), STEPS.get(name, 400)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE.get(name, 3e-3), total_steps=steps
    )
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(network(lr), target)["l1"].backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        sr = network.eval()(lr).clamp(0, 1).mul(255).round()
    untrained = F.interpolate(lr.float(), scale_factor=SCALE, mode="bicubic", antialias=False)
    assert psnr(untrained, hr.float()) < 23, "the crops must have detail that has to be learnt"
    assert psnr(sr, hr.float()) > 40
