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

from tyro.conf import Positional, arg

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
    from pipeline.export.torch_file import run_export

    return run_export(**vars(options))


if __name__ == "__main__":
    cli.run(Options, main)
