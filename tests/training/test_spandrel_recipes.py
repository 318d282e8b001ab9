"""The recipes of spandrel's networks, at small sizes: 20 steps, continued bit for bit, and a file
that spandrel opens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.small_runs import photograph
from lives import in_ranks
from pipeline.checkpoint import checkpoint
from pipeline.checkpoint.progress import Progress
from pipeline.checkpoint.saving import Saver
from pipeline.config.ds_config import load_ds_config
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.data.loader import Batch
from pipeline.distributed.ranks import Ranks, start_distributed, stop_distributed
from pipeline.engine.engine import build_engine, resolve_ds_config
from pipeline.images import cubic_resize, to_bytes
from pipeline.libraries import import_torchvision
from pipeline.losses import Criterion
from pipeline.models import build_generator
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.training.trainers import ReconstructionTrainer

SMALL: dict[str, dict[str, Any]] = {
    "span_x4": {"feature_channels": 12},
    "realplksr_x4": {"dim": 16, "n_blocks": 2, "kernel_size": 5},
    "mosr_x4": {"dim": 16, "n_block": 2},
    "omnisr_x4": {"num_feat": 16, "res_num": 1},
    "rcan_x4": {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 16, "reduction": 4},
    "swinir_light_x4": {"embed_dim": 12, "depths": [2], "num_heads": [2], "img_size": 16},
    "hat_s_x4": {
        "embed_dim": 12,
        "depths": [2],
        "num_heads": [2],
        "window_size": 8,
        "compress_ratio": 4,
        "squeeze_factor": 4,
    },
    # One group has all pixels: on a CPU, spandrel's order is arbitrary, and so are its groups.
    "atd_light_x4": {
        "embed_dim": 24,
        "depths": [2],
        "num_heads": [4],
        "num_tokens": 8,
        "window_size": 8,
        "category_size": 256,
    },
    "dat2_x4": {"embed_dim": 32, "depth": [2], "num_heads": [2], "split_size": [4, 8]},
    "dat_light_x4": {"embed_dim": 32, "depth": [2], "num_heads": [2], "split_size": [4, 8]},
    "nafnet_x1": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]},
    "scunet_x1": {"dim": 16, "config": [0, 0, 1, 1, 1, 0, 0]},
}
"""Recipe -> parameters that make its network small; the others are the recipe's own."""
STEPS = 20


def small_recipe(name: str, scale: int) -> Recipe:
    small = {f"generator.{key}": value for key, value in SMALL[name].items()}
    return load_recipe(name, {**small, "scale": scale, "data.crop": 16 * scale})


def batches(scale: int) -> list[Batch]:
    """Return two batches of two photographs, LR 16x16."""
    hr = torch.stack(
        [
            torch.from_numpy(photograph(seed, 16 * scale, 16 * scale)).permute(2, 0, 1)
            for seed in range(4)
        ]
    )
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0)) * (scale == 1) / 20
    lr = to_bytes(cubic_resize(hr / 255 + noise, (16, 16)))
    return [Batch(lr[at : at + 2], hr[at : at + 2], at) for at in (0, 2)]


def begin(recipe: Recipe, ranks: Ranks) -> tuple[ReconstructionTrainer, checkpoint.Contents]:
    torch.manual_seed(recipe.seed)
    generator = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
    config = load_ds_config(
        recipe.ds_config_path(), {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2}
    )
    config["scheduler"]["params"].pop("warmup_num_steps", None)  # ATD's has 20,000 steps
    ds_config, *_ = resolve_ds_config(config, world_size=1, total_steps=STEPS, device=ranks.device)
    ema = ExponentialMovingAverage(generator, recipe.ema_decay)
    engine = build_engine(generator, ds_config, ranks)
    trainer = ReconstructionTrainer(engine, Criterion(recipe.losses), ema)
    described = SavedNetwork(
        recipe.generator.name, recipe.scale, recipe.generator.params, {}, {"recipe": recipe.name}
    )
    return trainer, checkpoint.Contents(trainer.engines, ema, described, {"recipe": recipe.name})


def differing(one: ReconstructionTrainer, other: ReconstructionTrainer) -> list[str]:
    """Return the names of the weights, FP32 weights and averages that differ in any bit."""

    def tensors(trainer: ReconstructionTrainer) -> dict[str, Tensor]:
        return {
            **trainer.generator.module.state_dict(),
            **{f"ema {k}": v for k, v in trainer.ema.network.state_dict().items()},
            **{f"fp32 {k}": v for k, v in enumerate(trainer.generator.weights)},
        }

    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def _train(cases: list[tuple[str, int]], folder: str) -> dict[str, dict[str, Any]]:
    ranks, found = start_distributed(), {}
    for name, scale in cases:
        recipe, data, run_dir = small_recipe(name, scale), batches(scale), Path(folder, name)
        trainer, contents = begin(recipe, ranks)
        fresh = [weights.clone() for weights in trainer.generator.weights]
        losses = []
        for number in range(STEPS):
            if number == STEPS // 2:
                saver = Saver(run_dir, contents, 2, ranks)
                saver.begin(Progress(step=number))
                assert saver.wait() is None
            losses.append(trainer.step(data[number % 2], number).losses)
        still = [
            key
            for (key, parameter), before, after in zip(
                trainer.generator.module.named_parameters(),
                fresh,
                trainer.generator.weights,
                strict=True,
            )
            # DAT's position networks are so small here that all of their units may be inactive, and
            # its biases before a batch norm have no effect.
            if parameter.requires_grad and parameter.dim() > 1 and ".pos." not in key
            if torch.equal(before, after)
        ]
        torch.manual_seed(999)
        continued, contents = begin(recipe, ranks)
        assert differing(trainer, continued) != []
        checkpoint.load(run_dir, STEPS // 2, contents, ranks)
        for number in range(STEPS // 2, STEPS):
            continued.step(data[number % 2], number)
        contents.generator.state_dict.update(trainer.ema.network.state_dict())
        write_network(Path(folder, f"{name}.safetensors"), contents.generator)
        found[name] = {
            "losses": [float(sum(terms.values())) for terms in losses],
            "still": still,
            "differing": differing(trainer, continued),
            "dtype": str(next(trainer.generator.module.parameters()).dtype),
        }
        for one in (trainer, continued):
            one.generator.destroy()
    stop_distributed()
    return found


def test_recipes_train_continue_bit_for_bit_and_open_elsewhere(tmp_path: Path) -> None:
    scales = itertools.cycle([4, 2, 1])
    cases = [(name, 1 if name.endswith("x1") else next(scales)) for name in SMALL]
    (found,) = in_ranks(_train, tmp_path / "rank", 1, cases, str(tmp_path))
    import_torchvision()
    from spandrel import ModelLoader

    for name, scale in cases:
        losses = found[name].pop("losses")
        is_bf16 = load_ds_config(load_recipe(name).ds_config_path()).get("bf16")
        assert found[name] == {
            "still": [],
            "differing": [],
            "dtype": "torch.bfloat16" if is_bf16 else "torch.float32",
        }, name
        assert sum(losses[-4:]) < sum(losses[:4]), (name, losses)
        file = tmp_path / f"{name}.safetensors"
        network, elsewhere = read_network(file).build(), ModelLoader().load_from_file(file)
        arch = small_recipe(name, scale).generator.params["arch"]
        assert (elsewhere.architecture.id, elsewhere.scale) == (
            "PLKSR" if arch == "RealPLKSR" else arch,
            scale,
        )
        lr = batches(scale)[0].lr[:1]
        with torch.inference_mode():
            torch.testing.assert_close(
                elsewhere(lr / 255), network(lr).clamp(0, 1), rtol=0, atol=1e-5
            )
