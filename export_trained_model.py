"""Export a trained generator from a run folder to .pth and .safetensors files.

Needs no GPU and no DeepSpeed.
"""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Export a run's generator to .pth and .safetensors, and verify both files.

    Example: python export_trained_model.py runs/demo --half
    """

    run_dir: Annotated[Positional[Path | None], arg(help_behavior_hint="(default: newest run)")] = (
        None
    )
    """Run folder, or one of its checkpoints: runs/demo/checkpoints/step-00000400."""
    step: Literal["best", "newest"] | int = "best"
    """Checkpoint: best (by the run's validation), newest, or a step number."""
    raw: bool = False
    """Export the raw weights instead of their moving average (EMA)."""
    ema: str = "tracked"
    """Which average: tracked (the one with the recipe's ema_decay); or, of a run with posthoc_ema,
    one of another length: a share of the run (0.07) or a number of updates (500), each the standard
    deviation of its weights; auto measures a grid of lengths on the run's validation list."""
    dataset_dir: Annotated[tuple[Path, ...], UseAppendAction, arg(metavar="DIR")] = ()
    """For --ema auto: the run's dataset; repeat it as for the run. Default: ~/dataset."""
    lr_dir: Annotated[tuple[Path, ...], UseAppendAction, arg(metavar="DIR")] = ()
    """For --ema auto and data.degradation=paired: the folder of LR files, one per --dataset-dir.
    Default: beside HR."""
    half: bool = False
    """Store the parameters in float16, which halves the size."""
    license: str = ""
    """Licence of the weights, written into the files: an SPDX identifier such as CC-BY-4.0, or a
    line of text."""
    evaluation: Annotated[Path | None, arg(help_behavior_hint="(default: none)")] = None
    """The evaluation.json of these weights; its mean scores are written into the files."""
    output_dir: Annotated[Path | None, arg(help_behavior_hint="(default: <run_dir>/export)")] = None
    """Folder for the files."""


def main(options: Options) -> int:
    # Imported here, so that --help does not wait for torch.
    from pipeline.export.torch_file import checkpoint_apart, run_export
    from pipeline.run_folder import choose_step, find_run

    run_dir = find_run() if options.run_dir is None else options.run_dir
    step, average = options.step, None
    if options.ema != "tracked":
        for name in ("raw", "evaluation"):
            if getattr(options, name):
                raise cli.UserError(
                    f"--ema {options.ema} and --{name}: "
                    + (
                        "raw weights are no average; give only one"
                        if name == "raw"
                        else "a report is about a file of weights; export first and evaluate that"
                    )
                )
        from pipeline.training.judging import chosen_average

        run_dir, step = checkpoint_apart(run_dir, step)
        step = choose_step(run_dir, step)
        average = chosen_average(run_dir, step, options.ema, options.dataset_dir, options.lr_dir)
    return run_export(
        run_dir,
        step,
        options.raw,
        options.half,
        options.license,
        options.evaluation,
        options.output_dir,
        average,
    )


if __name__ == "__main__":
    cli.run(Options, main)
