"""The training loops of other projects for benchmarks/peers.py, which starts each in a process.

They are simple reimplementations of what the projects do, without their code. BasicSR itself is run
through its own `train_pipeline`, in an environment that needs none of this project's packages
except torch.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BASICSR = "basicsr"
NETWORKS: dict[str, dict[str, Any]] = {
    "vapsr": {"name": "vapsr"},
    "msrresnet": {"name": "msrresnet"},
    "compact": {"name": "compact"},
    "rrdbnet": {"name": "rrdbnet", "num_blocks": 6},
}
"""The networks as in a recipe, for x4."""
IN_BASICSR = {
    "msrresnet": {
        "type": "MSRResNet",
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": 64,
        "num_block": 16,
        "upscale": 4,
    },
    "compact": {
        "type": "SRVGGNetCompact",
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": 64,
        "num_conv": 16,
        "upscale": 4,
        "act_type": "prelu",
    },
    "rrdbnet": {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 6},
}
"""BasicSR's own networks. It has no VapSR, so it trains this project's."""


def _network(what: dict[str, Any]) -> Any:
    from pipeline.models import build_generator

    params = dict(NETWORKS[what["network"]])
    return build_generator(params.pop("name"), 4, **params).train()


def _setting(what: dict[str, Any], batch: int) -> Any:
    from benchmarks.loader_ways import Setting

    return Setting(Path(what["files"]), what["crop"], 4, batch, what["threads"])


def _window(what: dict[str, Any], step: int) -> None:
    """Report the end of a window if update `step`, counted from 1, is its last."""
    if step % what["steps"] == 0:
        with open(what["out"], "a") as file:
            file.write("window\n")


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain(what: dict[str, Any]) -> None:
    """Train as in tutorials: a DataLoader of PNG pairs, forward, L1, backward, Adam."""
    import torch
    import torch.nn.functional as F

    from benchmarks.loader_ways import torch_of_png

    device = _device()
    network = _network(what).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    for step, (hr, lr) in enumerate(torch_of_png(_setting(what, what["batch"])), 1):
        loss = F.l1_loss(network(lr.to(device)), hr.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda" and step % what["steps"] == 0:
            torch.cuda.synchronize()
        _window(what, step)


def ancestor(what: dict[str, Any]) -> None:
    """Train like `catid/upsampling`: DALI on PNG without overlap, torch.compile's backend "eager".

    It waits for the device in every step.
    """
    import torch
    import torch.nn.functional as F

    from benchmarks.loader_ways import dali_of_png

    device = _device()
    network = _network(what).to(device)
    network.compile(backend="eager")
    optimizer = torch.optim.AdamW(network.parameters(), 2e-4)
    total = 0.0
    for step, (hr, lr) in enumerate(dali_of_png(_setting(what, what["batch"])), 1):
        hr, lr = (torch.from_dlpack(part.as_tensor()).to(device).float() / 255 for part in (hr, lr))
        loss = F.l1_loss(network(lr), hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        _window(what, step)


def _in_two_ranks(what: dict[str, Any], train: Callable[[dict[str, Any], int], None]) -> None:
    import torch.multiprocessing as multiprocessing

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(what["port"]))
    multiprocessing.spawn(_rank, (what, train), nprocs=2)


def _rank(rank: int, what: dict[str, Any], train: Callable[[dict[str, Any], int], None]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    has_gpus = torch.cuda.device_count() > 1
    if has_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if has_gpus else "gloo", rank=rank, world_size=2)
    train(what, rank)


def ddp(what: dict[str, Any]) -> None:
    """Train with the plain loop on two ranks: DistributedDataParallel, half of the batch each."""
    _in_two_ranks(what, _train_ddp)


def lightning(what: dict[str, Any]) -> None:
    """Train as Lightning does by default on two ranks.

    It looks for unused parameters, and reduces and logs the loss in every step.
    """
    _in_two_ranks(what, _train_lightning)


def _train_ddp(what: dict[str, Any], rank: int, is_logged: bool = False) -> None:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from benchmarks.loader_ways import torch_of_png

    device = torch.device("cuda", rank) if torch.cuda.device_count() > 1 else torch.device("cpu")
    network = torch.nn.parallel.DistributedDataParallel(
        _network(what).to(device), find_unused_parameters=is_logged
    )
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    total = 0.0
    for step, (hr, lr) in enumerate(torch_of_png(_setting(what, what["batch"] // 2)), 1):
        loss = F.l1_loss(network(lr.to(device)), hr.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if is_logged:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            total += mean.item() / 2
        if rank == 0:
            _window(what, step)


def _train_lightning(what: dict[str, Any], rank: int) -> None:
    _train_ddp(what, rank, is_logged=True)


def basicsr(what: dict[str, Any]) -> None:
    """Run BasicSR's `train_pipeline` on the same files, with its dataset, model, EMA and logger."""
    import types

    import torch

    from pipeline.libraries import import_torchvision

    functional = import_torchvision().transforms.functional
    # BasicSR still imports this module, which newer torchvision has renamed.
    renamed = types.ModuleType("torchvision.transforms.functional_tensor")
    renamed.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules.setdefault(renamed.__name__, renamed)
    import yaml
    from basicsr.models.base_model import BaseModel
    from basicsr.train import train_pipeline
    from basicsr.utils.registry import ARCH_REGISTRY

    network = IN_BASICSR.get(what["network"])
    if what["basicsr_network"]:
        known = set(ARCH_REGISTRY.keys())
        runpy.run_path(what["basicsr_network"])
        (name,) = set(ARCH_REGISTRY.keys()) - known
        given = {"num_in_ch": 3, "num_out_ch": 3, "scale": 4, "upscale": 4}
        taken = inspect.signature(ARCH_REGISTRY.get(name)).parameters
        network = {"type": name, **{key: given[key] for key in given if key in taken}}
    elif network is None:

        @ARCH_REGISTRY.register()
        def ThisVapSR() -> Any:  # noqa: N802 - BasicSR's registry calls it like a class
            return _network(what)

        network = {"type": "ThisVapSR"}
    files = Path(what["files"])
    options = {
        "name": "peer",
        "model_type": "SRModel",
        "scale": 4,
        "num_gpu": torch.cuda.device_count() and 1,
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "crops",
                "type": "PairedImageDataset",
                "dataroot_gt": str(files / "png"),
                "dataroot_lq": str(files / "lr_png"),
                "filename_tmpl": "{}",
                "io_backend": {"type": "disk"},
                "gt_size": what["crop"],
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": what["threads"],
                "batch_size_per_gpu": what["batch"],
                "dataset_enlarge_ratio": 1000,
                "prefetch_mode": None,
            }
        },
        "network_g": network,
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [10**9], "gamma": 0.5},
            "total_iter": 10**9,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "logger": {
            "print_freq": what["steps"],
            "save_checkpoint_freq": 10**9,
            "use_tb_logger": False,
            "wandb": None,
        },
        "dist_params": {"backend": "gloo", "port": what["port"]},
    }
    path = Path(what["folder"]) / "options.yml"
    path.write_text(yaml.safe_dump(options))
    # The only hook into its loop is the log, which it writes every `print_freq` steps.
    current_log, step = BaseModel.get_current_log, itertools.count(1)

    def report_window(model: Any) -> Any:
        _window(what, next(step) * what["steps"])
        return current_log(model)

    BaseModel.get_current_log = report_window
    sys.argv = ["train.py", "-opt", str(path)]
    os.chdir(what["folder"])
    train_pipeline(what["folder"])


LOOPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "plain": plain,
    "ancestor": ancestor,
    "ddp": ddp,
    "lightning": lightning,
}

if __name__ == "__main__":
    _what = json.loads(sys.argv[1])
    {**LOOPS, BASICSR: basicsr}[_what["loop"]](_what)
