"""DeepSpeed and Accelerate under torchrun, srun and `accelerate launch`: the same network except
for rounding."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import warm
from comparison import (
    BF16,
    SCHEDULE_FREE,
    UNET,
    assert_resumed_is_straight,
    checkpoint_differences,
    differences,
    logged,
)
from conftest import ROOT, SMALL, assert_one_line, command, environment, run, run_python
from lives import in_ranks
from pipeline.checkpoint.engine_state import read_module
from pipeline.checkpoint_index import read_index
from pipeline.cli import UserError
from pipeline.config.ds_config import check_accelerate, choose_runtime, load_ds_config
from pipeline.distributed.launcher import FIRST_PORT, NUM_PORTS
from pipeline.engine.schedules import build_schedule
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

ACCELERATE = ("--runtime", "accelerate")


def arguments(dataset: Path, run_dir: Path, *extra: str) -> list[str]:
    """Return arguments of train.py for a small run."""
    return [
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(run_dir),
        *SMALL,
        *extra,
    ]


def free_port(candidates: Iterable[int] = (0,)) -> int:
    """Return the first of `candidates` that is free; 0 stands for any port."""
    for port in candidates:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise AssertionError("there is no free port")


# --- Launchers ---


@dataclass
class Started:
    """A run that a launcher has finished."""

    statuses: list[int]
    printed: str
    run_dir: Path


LAUNCHERS = {
    "torchrun": (2, "FP32", "torchrun"),
    "torchrun-accelerate": (2, "FP32 (Accelerate)", "torchrun"),
    "srun": (2, "FP32", "srun of Slurm (job N)"),
    "accelerate": (1, "FP32 (Accelerate)", "accelerate launch"),
}
"""Name -> number of ranks, and how the introduction names precision and launcher."""


@pytest.fixture(scope="module")
def started(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """The same run of four steps under each launcher."""
    job = free_port(range(FIRST_PORT + os.getpid() % 9000, FIRST_PORT + NUM_PORTS)) - FIRST_PORT
    slurms = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node07",
        "SLURM_NTASKS": "2",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    starts: dict[str, tuple[list[str], Sequence[dict[str, str]]]] = {
        "torchrun": (torchrun, [{}]),
        "torchrun-accelerate": ([*torchrun, *ACCELERATE], [{}]),
        "srun": (
            ["train.py"],
            [{**slurms, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)],
        ),
        "accelerate": (
            ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "train.py"],
            [{}],
        ),
    }
    run_dirs = {name: tmp_path_factory.mktemp(name) / "run" for name in starts}
    processes = {
        name: [
            subprocess.Popen(
                [warm.python(), *start, *arguments(dataset, run_dirs[name], "steps=4")],
                env={**environment(), **more},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for more in environments
        ]
        for name, (start, environments) in starts.items()
    }
    printed = {
        name: "".join(process.communicate(timeout=180)[0] for process in group).replace(
            f"job {job}", "job N"
        )
        for name, group in processes.items()
    }
    return {
        name: Started([process.returncode for process in group], printed[name], run_dirs[name])
        for name, group in processes.items()
    }


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_launcher_trains_and_is_named(started: dict[str, Started], name: str) -> None:
    this, (ranks, precision, launcher) = started[name], LAUNCHERS[name]
    assert set(this.statuses) == {0}, this.printed
    (introduction,) = (
        line for line in this.printed.splitlines() if line.startswith(f"{ranks} x CPU, ")
    )
    assert introduction.startswith(f"{ranks} x CPU, {precision} (there is no GPU")
    assert introduction.endswith(f"; started by {launcher}")
    assert this.printed.count("finished at step 4") == 1, "only one rank reports"
    assert "Traceback" not in this.printed
    assert checkpoint_steps(this.run_dir) == [3, 4]
    assert read_index(checkpoint_dir(this.run_dir, 4))["world_size"] == ranks
    assert [step for step, *_ in logged(this.run_dir)] == [1, 2, 3, 4]


def test_all_learn_the_same_but_for_rounding(started: dict[str, Started]) -> None:
    wanted = started["torchrun"].run_dir
    weights = load_file(checkpoint_dir(wanted, 4) / "generator.safetensors")
    for name, this in started.items():
        for event, keys in (
            ("train", ("loss", "lr", "gradient_norm")),
            ("validation", ("psnr_y",)),
        ):
            for found, reference in zip(
                logged(this.run_dir, event, *keys), logged(wanted, event, *keys), strict=True
            ):
                assert found == pytest.approx(reference, rel=1e-5), (
                    f"{name}: {event} of step {reference[0]}"
                )
        for key, tensor in load_file(
            checkpoint_dir(this.run_dir, 4) / "generator.safetensors"
        ).items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-4, atol=1e-5)
    assert checkpoint_differences(started["srun"].run_dir, wanted, 4) == [], (
        "the launcher changes no bit"
    )
    losses = [loss for _, loss in logged(wanted, "train", "loss")]
    assert len(set(losses)) == 4
    assert all(math.isfinite(loss) for loss in losses)


def test_no_launcher_brings_warnings(started: dict[str, Started]) -> None:
    assert {name for name, this in started.items() if "Warning: " in this.printed} == set()


def test_several_processes_of_accelerate_without_a_gpu_are_refused(tmp_path: Path) -> None:
    """Accelerate starts only one, assuming that mpirun started the others."""
    variables = {
        **environment(),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    done = run_python(
        "from pipeline import cli; from pipeline.distributed import launcher\n"
        "cli.run(dict, lambda _: launcher.find_rank_info() and 0, [])",
        env=variables,
    )
    assert_one_line(
        done, "`accelerate launch` was asked for several processes and started one", "torchrun"
    )


# --- Runs under Accelerate ---


def _live(
    words: list[str], output: Path, variables: dict[str, str], missing: tuple[str, ...]
) -> None:
    """Run `python train.py WORDS` in a process with `variables` set and the packages `missing`
    hidden."""
    from pipeline import cli
    from pipeline.training.options import TrainOptions, overrides_last
    from train import main

    torch.set_num_threads(1)
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.split(".")[0] in missing]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    cli.run(TrainOptions, main, overrides_last(words))


def live(
    words: list[str], folder: Path, procs: int = 1, missing: tuple[str, ...] = ()
) -> tuple[list[int | None], str]:
    """Return the exit statuses of the ranks and what they printed."""
    folder.mkdir(parents=True, exist_ok=True)
    output, port = folder / f"output-{len(list(folder.glob('output-*')))}", str(free_port())
    ranks = [
        warm.Fork(
            _live,
            words,
            output,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(procs),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            missing,
        )
        for rank in range(procs)
    ]
    for process in ranks:
        process.join(120)
        process.kill()
    return [process.exitcode for process in ranks], output.read_text()


def train(dataset: Path, run_dir: Path, *extra: str, procs: int = 1) -> str:
    """Train to the end under Accelerate, successfully; return what was printed."""
    statuses, printed = live(
        arguments(dataset, run_dir, *ACCELERATE, *extra), run_dir.parent, procs
    )
    assert statuses == [0] * procs, printed
    assert "(Accelerate)" in printed
    return printed


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on two ranks."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(dataset, run_dir, "steps=8", "keep=9", procs=2)
    return run_dir


def copy_up_to(run_dir: Path, step: int, copy: Path) -> None:
    """Copy `run_dir` as it was after `step`."""
    newer = [
        checkpoint_dir(run_dir, other).name for other in checkpoint_steps(run_dir) if other > step
    ]
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns(*newer))


@pytest.mark.parametrize(
    ("procs", "extra"),
    [
        (2, ()),
        (1, SCHEDULE_FREE),
        (
            2,
            (
                "generator={name: srresnet, num_features: 8, num_blocks: 2}",
                "ds.gradient_accumulation_steps=2",
                *BF16,
                *UNET,
            ),
        ),
    ],
    ids=["fp32-2", "schedule-free", "gan-batch-norm-bf16-accumulation-2"],
)
def test_resume_is_exact(
    request: pytest.FixtureRequest,
    dataset: Path,
    tmp_path: Path,
    procs: int,
    extra: tuple[str, ...],
) -> None:
    broken = tmp_path / "broken"
    if extra:
        whole = tmp_path / "straight"
        train(dataset, whole, "steps=8", "keep=9", *extra, procs=procs)
    else:
        whole = request.getfixturevalue("straight")
    train(dataset, broken, "steps=3", "keep=9", *extra, procs=procs)
    assert checkpoint_steps(broken) == [3]
    assert "continuing from step 3 of 8" in train(
        dataset, broken, "steps=8", "keep=9", *extra, procs=procs
    )
    assert_resumed_is_straight(whole, broken)


def test_another_number_of_ranks_continues(dataset: Path, straight: Path, tmp_path: Path) -> None:
    copy_up_to(straight, 6, tmp_path / "run")
    printed = train(dataset, tmp_path / "run", "steps=8", "keep=9")
    assert "note: step 6 was saved by 2 ranks and continues on 1:" in printed
    keys = ("train", "loss", "lr", "gradient_norm")
    for found, wanted in zip(logged(tmp_path / "run", *keys), logged(straight, *keys), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_run_of_the_other_runtime_is_refused(dataset: Path, straight: Path) -> None:
    before = checkpoint_steps(straight)
    statuses, printed = live(
        arguments(dataset, straight, "--runtime", "deepspeed", "steps=9", "keep=9"),
        straight.parent,
        2,
    )
    assert statuses == [2, 2]
    assert "precision: FP32 (Accelerate) in the run, FP32 asked for" in printed
    assert printed.count("\n") == 1
    assert checkpoint_steps(straight) == before


def test_a_run_continues_where_deepspeed_is_not_installed(
    dataset: Path, straight: Path, tmp_path: Path
) -> None:
    copy_up_to(straight, 6, tmp_path / "run")
    statuses, printed = live(
        arguments(dataset, tmp_path / "run", "steps=8", "keep=9"), tmp_path, 2, ("deepspeed",)
    )
    assert statuses == [0, 0], printed
    assert checkpoint_differences(straight, tmp_path / "run", 8) == []


def test_a_run_begins_where_deepspeed_is_not_installed(dataset: Path, tmp_path: Path) -> None:
    statuses, printed = live(
        arguments(dataset, tmp_path / "run", "steps=1"), tmp_path, 1, ("deepspeed",)
    )
    assert statuses == [0], printed
    assert "1 x CPU, FP32 (Accelerate)" in printed
    statuses, printed = live(
        arguments(dataset, tmp_path / "run", "steps=1", "--runtime", "deepspeed"),
        tmp_path,
        1,
        ("deepspeed",),
    )
    assert (statuses, printed) == (
        [2],
        "error: --runtime deepspeed: package deepspeed is not installed; pip "
        "install -r requirements.txt\n",
    )


STAGES = """
base: demo
name: two
stages:
  psnr: {steps: 2}
  gan:
    steps: 4
    ds_config: DS_CONFIG
    losses: {l1: 0.1}
    adversarial: {weight: 0.01, discriminator: {name: attention_unet, num_features: 4}}
"""


def test_a_gan_stage_at_bf16_follows_one_at_fp32(dataset: Path, tmp_path: Path) -> None:
    ds_config = tmp_path / "bf16.json"
    ds_config.write_text(
        json.dumps(
            {
                **json.loads((ROOT / "recipes" / "demo_ds_config.json").read_text()),
                "fp16": {"enabled": False},
                "bf16": {"enabled": True},
            }
        )
    )
    recipe, home = tmp_path / "two.yaml", tmp_path / "run"
    recipe.write_text(STAGES.replace("DS_CONFIG", str(ds_config)))
    words = [
        str(recipe) if word == "demo" else word for word in arguments(dataset, home, *ACCELERATE)
    ]
    statuses, printed = live(words, tmp_path)
    assert statuses == [0], printed
    first, second = (line for line in printed.splitlines() if line.startswith("1 x CPU, "))
    assert first.startswith("1 x CPU, FP32 (Accelerate)")
    assert second.startswith("1 x CPU, BF16 autocast (Accelerate)")
    assert (checkpoint_steps(home / "psnr")[-1], checkpoint_steps(home / "gan")[-1]) == (2, 4)
    lines = logged(
        home / "gan",
        "train",
        "loss",
        "loss_adversarial",
        "discriminator",
        "discriminator_gradient_norm",
    )
    assert [step for step, *_ in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in lines for value in line)
    assert all(line[-1] > 0 for line in lines)
    begun, after = (
        read_module(checkpoint_dir(home / "gan", step), "discriminator") for step in (3, 4)
    )
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert not torch.equal(*(next(iter(weights.values())) for weights in (begun, after)))
    generator = read_module(checkpoint_dir(home / "gan", 4), "generator")
    assert {tensor.dtype for tensor in generator.values()} == {torch.float32}, (
        "BF16 is used by autocast, not for weights"
    )


# --- What Accelerate does not support ---


def test_zero_is_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    sharded = (*ACCELERATE, "ds.zero_optimization.stage=1")
    line = (
        "error: zero_optimization.stage 1 needs DeepSpeed, but the runtime is accelerate; set "
        "ds.zero_optimization.stage=0 or use --runtime deepspeed\n"
    )
    assert_one_line(run(command(dataset, tmp_path / "run", *sharded)), line)
    assert live(arguments(dataset, tmp_path / "run", *sharded), tmp_path, 2) == ([2, 2], line), (
        "one rank reports it"
    )
    assert not (tmp_path / "run").exists()


def ds_config(**changes: Any) -> dict[str, Any]:
    return {**load_ds_config(ROOT / "ds_config.json"), **changes}


FP32 = {"fp16": {"enabled": False}}


@pytest.mark.parametrize(
    ("changes", "variables", "parts"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            {},
            ["zero_optimization.stage 2", "ds.zero_optimization.stage=0"],
        ),
        (
            {"fp16": {"enabled": True, "hysteresis": 2}},
            {},
            ["fp16.hysteresis needs DeepSpeed", "omit it"],
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": 128}},
            {},
            ["fp16.loss_scale needs DeepSpeed", "--runtime deepspeed"],
        ),
        ({"prescale_gradients": True}, {}, ["prescale_gradients needs DeepSpeed", "omit it"]),
        ({"communication_data_type": "fp16"}, {}, ["communication_data_type needs DeepSpeed"]),
        (
            {"scheduler": {"type": "OneCycle", "params": {}}},
            {},
            ["schedule OneCycle", "such as CyclicLR"],
        ),
        (
            {},
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            ["to use DeepSpeed", "`accelerate config`", "./launch_local_train.sh"],
        ),
        ({}, {"ACCELERATE_USE_FSDP": "1"}, ["to use FSDP", "`accelerate config`"]),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "yes"}, ["to use Megatron-LM"]),
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ["mixed_precision is bf16, but the ds_config's is FP16", "ds.bf16.enabled"],
        ),
        (
            FP32,
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            ["mixed_precision is fp16, but the ds_config's is FP32", "accelerate's to no"],
        ),
        (
            {},
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ["dynamo_backend is INDUCTOR", "compile key"],
        ),
        (
            {},
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            ["gradient_accumulation_steps is 8", "omit it"],
        ),
    ],
)
def test_what_accelerate_cannot_do_is_named_with_the_way_out(
    changes: dict[str, Any], variables: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check_accelerate(ds_config(**changes), variables)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "variables"),
    [
        ({}, {}),
        (FP32, {"ACCELERATE_MIXED_PRECISION": "no"}),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}),
        (
            {},
            {
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DYNAMO_BACKEND": "NO",
                "ACCELERATE_USE_DEEPSPEED": "false",
                "ACCELERATE_USE_FSDP": "",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            },
        ),
        ({"fp16": {"enabled": False, "hysteresis": 2}}, {}),
        ({"gradient_accumulation_steps": 4}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
    ],
    ids=range(6),
)
def test_what_accelerate_can_do_is_let_through(
    changes: dict[str, Any], variables: dict[str, str]
) -> None:
    check_accelerate(ds_config(**changes), variables)


def test_the_runtime_follows_the_launcher_unless_it_is_given() -> None:
    under_accelerate = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert choose_runtime("auto", {}) == "deepspeed"
    assert choose_runtime("auto", under_accelerate) == "accelerate"
    assert choose_runtime("deepspeed", under_accelerate) == "deepspeed"
    assert choose_runtime("accelerate", {}) == "accelerate"


# --- The engine ---


class TwoHeads(torch.nn.Module):
    """A network with a weight that is used only after training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.PReLU(), torch.nn.Conv2d(4, 3, 3)
        )
        self.other = torch.nn.Conv2d(4, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def _images(update: int, part: int, rank: int) -> torch.Tensor:
    return torch.randn(
        2, 3, 8, 8, generator=torch.Generator().manual_seed(100 * update + 10 * part + rank)
    )


def _loss(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Like a discriminator's: two passes, one loss."""
    return (network(images) - 0.5).square().mean() + network(images.flip(3) * 0.3).abs().mean()


def _against_autograd(
    ranks: Any, optimizer: str, precision: str, clipping: float
) -> dict[str, Any]:
    """Compare three updates with accumulation 2 with plain PyTorch on all ranks' samples, then make
    one with a NaN on one rank."""
    from pipeline.engine.engine import backward_and_step, build_engine, step_was_skipped

    torch.manual_seed(0)
    network, reference = TwoHeads(), TwoHeads()
    reference.load_state_dict(network.state_dict())
    begun = deepcopy(network.state_dict())
    params = {"SGD": {"lr": 1.0}}.get(optimizer, {"lr": 0.01})
    config = {
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clipping,
        "optimizer": {"type": optimizer, "params": params},
        precision: {"enabled": True},
    }
    engine = build_engine(network, config, ranks, "accelerate")
    inner = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RAdam": torch.optim.RAdam}[
        optimizer
    ](reference.parameters(), **params)

    def judge(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return reference(images).float()

    dtypes: set[str] = set()
    network.body[0].register_forward_hook(lambda *values: dtypes.add(str(values[-1].dtype)))
    norms, wanted, rest = [], [], []
    for update in range(3):
        for part in range(2):
            backward_and_step(engine, _loss(engine, _images(update, part, ranks.rank)))
        norms.append(float(engine.gradient_norm))
        for part in range(2):
            for rank in range(ranks.world_size):
                (_loss(judge, _images(update, part, rank)) / (2 * ranks.world_size)).backward()
        wanted.append(
            float(torch.nn.utils.clip_grad_norm_(reference.parameters(), clipping or math.inf))
        )
        inner.step()
        inner.zero_grad()
        rest.append(step_was_skipped([engine]).item())
    moved, target = (
        torch.cat([(tensor - begun[name]).flatten() for name, tensor in of.state_dict().items()])
        for of in (network, reference)
    )
    before = deepcopy((network.state_dict(), engine.optimizer.state_dict()))
    for part in range(2):  # a NaN in the second rank's first micro-batch, or the only rank's
        broken = math.nan if part == 0 and ranks.rank == ranks.world_size - 1 else 1.0
        backward_and_step(engine, _loss(engine, _images(9, part, ranks.rank) * broken))
    after = deepcopy((network.state_dict(), engine.optimizer.state_dict()))
    was_skipped = step_was_skipped([engine]).item()
    for part in range(2):
        backward_and_step(engine, _loss(engine, _images(3, part, ranks.rank)))
    found = {
        "error": ((moved - target).norm() / target.norm()).item(),
        "norms": norms,
        "wanted": wanted,
        "idle": bool(torch.equal(network.other.weight, begun["other.weight"])),
        "rest": rest,
        "nan": differences(before, after),
        "was_skipped": was_skipped,
        "skipped": engine.skipped_steps,
        "goes_on": bool(differences(after[0], network.state_dict())),
        "dtypes": sorted(dtypes),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in network.parameters()),
        "sum": [tensor.double().sum().item() for tensor in network.parameters()],
        "weights": str({tensor.dtype for tensor in network.parameters()}),
        "moments": len(engine.optimizer.state_dict()["state"]),
    }
    engine.destroy()
    return found


def _all_against_autograd(cases: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Run the cases one after the other, as stages do."""
    from pipeline.distributed.ranks import start_distributed, stop_distributed

    ranks = start_distributed()
    found = [_against_autograd(ranks, *case) for case in cases]
    stop_distributed()
    return found


CASES = [
    ("SGD", "fp32", 0.05),
    ("SGD", "bf16", 0.05),
    ("SGD", "fp32", 0.0),
    ("AdamW", "fp32", 0.2),
    ("AdamW", "bf16", 0.2),
    ("RAdam", "fp32", 0.2),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    """Number of ranks -> each rank's findings in each case."""
    folder = tmp_path_factory.mktemp("engines")
    return {
        procs: in_ranks(_all_against_autograd, folder / str(procs), procs, CASES)
        for procs in (1, 2)
    }


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=["-".join(str(part) for part in case) for case in CASES]
)
def test_updates_are_autograds_and_a_nan_makes_none(
    engines: dict[int, list[list[dict[str, Any]]]], case: int, procs: int
) -> None:
    optimizer, precision, clipping = CASES[case]
    found = [rank[case] for rank in engines[procs]]
    for rank in found:
        assert rank["norms"] == pytest.approx(
            rank["wanted"], rel=1e-5 if precision == "fp32" else 1e-3
        )
        assert min(rank["norms"]) > clipping, "clipping must have taken effect"
        assert rank["error"] < (1e-5 if precision == "fp32" else 1e-3)
        assert rank["idle"], "a weight without a gradient must not change"
        assert rank["rest"] == [False] * 3
        assert rank["nan"] == [], "neither weights nor moments may change"
        assert (rank["was_skipped"], rank["skipped"], rank["goes_on"], rank["finite"]) == (
            True,
            1,
            True,
            True,
        )
        assert rank["dtypes"] == ["torch.bfloat16" if precision == "bf16" else "torch.float32"]
        assert rank["weights"] == "{torch.float32}"
        assert rank["moments"] == (0 if optimizer == "SGD" else 5)
        assert rank["sum"] == found[0]["sum"], "ranks must have the same weights"


# --- Warm-up ---

WARMUPS: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 5}),
    (
        "WarmupLR",
        {
            "warmup_num_steps": 6,
            "warmup_min_lr": 0.001,
            "warmup_max_lr": 0.3,
            "warmup_type": "linear",
        },
    ),
    ("WarmupLR", {"warmup_num_steps": 1}),
    ("WarmupLR", {}),
    ("WarmupDecayLR", {"total_num_steps": 11, "warmup_num_steps": 4}),
    (
        "WarmupDecayLR",
        {
            "total_num_steps": 30,
            "warmup_num_steps": 4,
            "warmup_min_lr": 0.01,
            "warmup_max_lr": 0.1,
            "warmup_type": "linear",
        },
    ),
    ("WarmupDecayLR", {"total_num_steps": 3, "warmup_num_steps": 7}),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 12,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
            "warmup_min_ratio": 0.05,
            "cos_min_ratio": 0.01,
        },
    ),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 3}),
    ("WarmupCosineLR", {"total_num_steps": 5, "warmup_num_steps": 8, "cos_min_ratio": 0.2}),
    ("WarmupCosineLR", {"total_num_steps": 2, "warmup_num_steps": 1, "warmup_min_ratio": 0.5}),
]


def _rates(
    cases: list[tuple[str, dict[str, Any]]], more: dict[str, Any]
) -> dict[str, list[list[list[float]]]]:
    """Return runtime -> per schedule, for each update, how far it moved the weights and the rate
    after it."""
    from pipeline.distributed.ranks import start_distributed, stop_distributed
    from pipeline.engine.engine import backward_and_step, build_engine

    ranks = start_distributed()
    found: dict[str, list[list[list[float]]]] = {"deepspeed": [], "accelerate": []}
    for runtime, all_rates in found.items():
        for name, params in cases:
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "steps_per_print": 1 << 60,
                "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
                "scheduler": {"type": name, "params": params},
                **more,
            }
            engine, moves, rates = (
                build_engine(torch.nn.Linear(2, 1), config, ranks, runtime),
                [],
                [],
            )
            for _ in range(16):
                before = engine.module.bias.item()
                # each of three gradients is 1
                backward_and_step(engine, engine(torch.ones(1, 2)).sum())
                moves.append(before - engine.module.bias.item())
                rates.append(engine.get_lr()[0])
            all_rates.append([moves, rates])
            engine.destroy()
    stop_distributed()
    return found


@pytest.mark.parametrize("case", range(len(WARMUPS)))
def test_warmups_are_deepspeeds_own_to_the_last_bit(case: int) -> None:
    """Their states are equal as well: either loads the other's, so that runs begun with DeepSpeed's
    objects continue."""
    from deepspeed.runtime import lr_schedules

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)

    name, params = WARMUPS[case]
    optimizers = [optimizer(), optimizer()]
    theirs = getattr(lr_schedules, name)(optimizers[0], **params)
    ours = build_schedule({"type": name, "params": params}, optimizers[1], writes_as_deepspeed=True)
    found: list[list[float]] = [[], []]
    for update in range(40):
        for rates, schedule, stepped in zip(found, (theirs, ours), optimizers, strict=True):
            rates.append(stepped.param_groups[0]["lr"])
            stepped.step()
            schedule.step()
        assert ours.state_dict() == theirs.state_dict()
        if update == 4:
            kept = theirs.state_dict()
    assert found[0] == found[1]
    assert len(set(found[1])) > 1
    assert "initial_lr" not in optimizers[1].param_groups[0]
    plain = {"count": 5, "rates": [found[0][5]], "inner": {"last_epoch": 5}}
    for state in (kept, plain):  # DeepSpeed's form, and the form of runs under Accelerate
        later = build_schedule({"type": name, "params": params}, optimizer())
        later.load_state_dict(state)
        assert later.get_last_lr() == [found[0][5]]


def test_both_runtimes_follow_a_warmup(tmp_path: Path) -> None:
    (found,) = in_ranks(_rates, tmp_path, 1, WARMUPS, {"gradient_clipping": 0.0})
    for case, ours, theirs in zip(WARMUPS, found["accelerate"], found["deepspeed"], strict=True):
        assert ours[1] == theirs[1], case
        for moves, rates in (ours, theirs):
            assert moves[1:] == pytest.approx(rates[:-1], rel=1e-4, abs=1e-6), case
            assert len(set(rates)) > 1


def test_without_a_word_on_clipping_both_do_the_same(tmp_path: Path) -> None:
    (found,) = in_ranks(_rates, tmp_path, 1, WARMUPS[:1], {})
    assert found["accelerate"][0][0] == pytest.approx(found["deepspeed"][0][0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "WarmupLR",
            {"warmup_num_step": 5},
            "no parameter 'warmup_num_step'; did you mean 'warmup_num_steps'",
        ),
        ("WarmupLR", {"total_num_steps": 5}, "WarmupLR has no parameter 'total_num_steps'"),
        (
            "WarmupCosineLR",
            {"total_num_steps": 9, "warmup_min_lr": 0.1},
            "WarmupCosineLR has no parameter 'warmup_min_lr'",
        ),
        ("WarmupDecayLR", {}, "total_num_steps must be a whole number, 1 or above, not None"),
        (
            "WarmupLR",
            {"warmup_num_steps": 0},
            "warmup_num_steps must be a whole number, 1 or above, not 0",
        ),
        (
            "WarmupLR",
            {"warmup_num_steps": 2.5},
            "warmup_num_steps must be a whole number, 1 or above, not 2.5",
        ),
        (
            "WarmupLR",
            {"warmup_num_steps": True},
            "warmup_num_steps must be a whole number, 1 or above, not True",
        ),
        ("WarmupLR", {"warmup_type": "cubic"}, "warmup_type must be log or linear, not 'cubic'"),
        (
            "WarmupLR",
            {"warmup_max_lr": "high"},
            "warmup_max_lr must be a number, 0 or above, not 'high'",
        ),
        ("WarmupLR", {"warmup_min_lr": -1}, "warmup_min_lr must be a number, 0 or above, not -1"),
    ],
)
def test_a_warmup_that_cannot_be_is_refused(
    name: str, params: dict[str, Any], message: str
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(UserError) as caught:
        build_schedule({"type": name, "params": params}, optimizer)
    assert message in str(caught.value)
