"""Training runs in processes forked from a server with all imports done: ten times as fast as
fresh ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm
from conftest import ROOT, SMALL, environment


def _rank(
    dataset: str, run_dir: str, overrides: tuple[str, ...], rank: int, world_size: int, port: int
) -> None:
    import torch

    from pipeline.cli import UserError
    from pipeline.training.options import TrainOptions
    from pipeline.training.run import main

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with open(output_of(Path(run_dir)), "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    options = TrainOptions(
        overrides=(*SMALL, *overrides),
        recipe="demo",
        dataset_dir=(Path(dataset),),
        output_dir=Path(run_dir),
    )
    try:
        sys.exit(main(options))
    except UserError as error:  # as pipeline.cli does
        print(f"error: {error}")
        sys.exit(2)


def output_of(run_dir: Path) -> Path:
    """Return the file with the output of a run's ranks, over all its starts."""
    return run_dir.parent / f"{run_dir.name}.output"


def start(dataset: Path, run_dir: Path, *overrides: str, procs: int = 1) -> list[warm.Fork]:
    """Start the ranks of a small run."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [
        warm.Fork(_rank, str(dataset), str(run_dir), overrides, rank, procs, port)
        for rank in range(procs)
    ]


def train(dataset: Path, run_dir: Path, *overrides: str, procs: int = 1) -> str:
    """Run to the end, which must succeed; return what was printed since this start."""
    output = output_of(run_dir)
    before = output.stat().st_size if output.exists() else 0
    ranks = start(dataset, run_dir, *overrides, procs=procs)
    for process in ranks:
        process.join(120)
    printed = output.read_text()[before:]
    statuses = [process.exitcode for process in ranks]
    assert statuses == [0] * procs, f"the ranks ended with {statuses}: {printed}"
    return printed


def in_a_fresh_process(code: str) -> dict:
    """Run code that prints one JSON object, in a new process: DeepSpeed starts its process group
    only once."""
    prelude = """
        import json, torch
        from pipeline.engine.engine import (build_engine, backward_and_step, resolve_ds_config)
        from pipeline.distributed.ranks import start_distributed
        ranks = start_distributed()
        def engine_for(module, **changes):
            config = {"train_batch_size": 4, "gradient_clipping": 1.0,
                      "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}} | changes
            resolved, *_ = resolve_ds_config(
                config, world_size=1, total_steps=10, device=ranks.device
            )
            if "fp16" in changes:  # DeepSpeed refuses FP16 on most CPUs, though it works on all
                from deepspeed.accelerator import get_accelerator
                type(get_accelerator()).is_fp16_supported = lambda self: True
                resolved["fp16"] = changes["fp16"]
            return build_engine(module, resolved, ranks)
        torch.manual_seed(0)
    """
    code = warm.MARK + textwrap.dedent(prelude) + textwrap.dedent(code)
    done = subprocess.run(
        [warm.python(), "-c", code],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_ranks(function: Callable[..., Any], folder: Path, procs: int, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` in `procs` ranks; return what each returns, through JSON."""
    ranks = start_in_ranks(function, folder, procs, *arguments)
    for process in ranks:
        process.join(120)
        process.kill()
    printed = "".join((folder / f"{rank}.output").read_text() for rank in range(procs))
    statuses = [process.exitcode for process in ranks]
    assert statuses == [0] * procs, f"the ranks ended with {statuses}: {printed}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(procs)]


def start_in_ranks(
    function: Callable[..., Any], folder: Path, procs: int, *arguments: Any
) -> list[warm.Fork]:
    """Start ranks that run `function(*arguments)` and write what it returns to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [
        warm.Fork(_in_rank, function, folder, rank, procs, port, arguments) for rank in range(procs)
    ]


def _in_rank(
    function: Callable[..., Any], folder: Path, rank: int, procs: int, port: int, arguments: tuple
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(procs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with open(folder / f"{rank}.output", "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    (folder / f"{rank}.json").write_text(json.dumps(function(*arguments)))
