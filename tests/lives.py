"""Training processes forked from a server that has done the imports: as fresh as new ones, in a tenth of the time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import SMALL

PRELOAD = ["torch", "deepspeed", "nvidia.dali.fn", "torch.utils.tensorboard", "pipeline.training.run"]


def _rank(dataset: str, run_dir: str, overrides: tuple[str, ...], rank: int, world_size: int, port: int) -> None:
    import torch

    from pipeline.cli import UserError
    from pipeline.training.options import TrainOptions
    from pipeline.training.run import main

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    with open(output_of(Path(run_dir)), "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    options = TrainOptions(overrides=(*SMALL, *overrides), recipe="demo", dataset_dir=(Path(dataset),),
                           output_dir=Path(run_dir))
    try:
        sys.exit(main(options))
    except UserError as error:  # as pipeline.cli does
        print(f"error: {error}")
        sys.exit(2)


def output_of(run_dir: Path) -> Path:
    """What the ranks of a run have printed, one life after the other."""
    return run_dir.parent / f"{run_dir.name}.output"


def start(dataset: Path, run_dir: Path, *overrides: str, procs: int = 1) -> list[BaseProcess]:
    """Start the ranks of a small run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(str(dataset), str(run_dir), overrides, rank, procs, port))
             for rank in range(procs)]
    for process in ranks:
        process.start()
    return ranks


def train(dataset: Path, run_dir: Path, *overrides: str, procs: int = 1) -> str:
    """Run to the end, which must be a good one; what was printed in this life."""
    output = output_of(run_dir)
    before = output.stat().st_size if output.exists() else 0
    ranks = start(dataset, run_dir, *overrides, procs=procs)
    for process in ranks:
        process.join(120)
    printed = output.read_text()[before:]
    assert [process.exitcode for process in ranks] == [0] * procs, printed
    return printed
