#!/usr/bin/env python
"""Train a super-resolution network. Usually started by ./launch_local_train.sh; `python train.py --help` teaches."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own notes to its developers
sys.path.insert(0, str(Path(__file__).resolve().parent))

from pipeline import cli
from pipeline.distributed.gpus import settle
from pipeline.training.options import TrainOptions, overrides_last


def main(options: TrainOptions) -> int:
    settle(options.device)
    from pipeline.training.run import main as train  # torch and DeepSpeed take seconds to import; --help need not wait

    return train(options)


if __name__ == "__main__":
    # The deepspeed launcher may add --local_rank=N, which it also puts into the environment.
    own = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    cli.run(TrainOptions, main, overrides_last(own))
