#!/usr/bin/env python
"""Train a super-resolution network.

Usually started by ./launch_local_train.sh; see `python train.py --help`.
"""

from pipeline.signals import NOTHING_TO_SAVE, end_at_once

if __name__ == "__main__":
    end_at_once(NOTHING_TO_SAVE)

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no internal warnings from C++
sys.path.insert(0, str(Path(__file__).resolve().parent))

from pipeline import cli
from pipeline.distributed.gpus import apply_device
from pipeline.distributed.launcher import find_rank_info
from pipeline.run_folder import refuse_if_in_use
from pipeline.training.options import TrainOptions, overrides_last, plans_of_rank
from pipeline.training.saved_run import report_if_finished


def main(options: TrainOptions) -> int:
    apply_device(options.device)
    plans = plans_of_rank(options)
    if plans is None:
        return 2
    if report_if_finished(plans):
        return 0
    if find_rank_info().world_size == 1:
        refuse_if_in_use(plans[0].home, cli.say)
    # torch and DeepSpeed take seconds to import: --help, a finished run and one that is in use do
    # without.
    from pipeline.training.run import train

    return train(options, plans)


if __name__ == "__main__":
    # The deepspeed launcher may add --local_rank=N, which it also puts into the environment.
    own = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    cli.run(TrainOptions, main, overrides_last(own))
