"""Choose among weights of a finished or stopped run by its own validation.

The images, their LR, the metrics and the rule for the best are those of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from pipeline.checkpoint.averages import (
    Reconstructed,
    chosen_width,
    reconstruct,
    stored_averages,
    usable_widths,
)
from pipeline.checkpoint.progress import read_progress
from pipeline.cli import bar_options
from pipeline.config.recipe import recipe_of
from pipeline.distributed.gpus import torch_gpus
from pipeline.distributed.ranks import Ranks
from pipeline.engine.layout import LAYOUTS
from pipeline.metrics import METRICS, metric_of
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import (
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    checkpoint_dir,
    checkpoint_steps,
    newest_stage,
)
from pipeline.training.saved_run import plan_of_run
from pipeline.training.validation import ValidationSet, is_better

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A line of a table of candidates."""

    title: str
    scores: Scores
    note: str = ""


class Judge:
    """Scores networks on a run's validation list.

    Args:
        run_dir: the run; of one with stages, the newest stage.
        dataset_dir, lr_dir: its dataset, as for training.
        metric: judge by this metric instead of by the run's rule.

    Raises:
        UserError: the run or its dataset cannot be read, or the metric cannot be measured.
    """

    def __init__(
        self,
        run_dir: Path,
        dataset_dir: tuple[Path, ...] = (),
        lr_dir: tuple[Path, ...] = (),
        metric: str | None = None,
    ) -> None:
        run_dir = newest_stage(run_dir)
        plan = plan_of_run(run_dir, dataset_dir, lr_dir)
        recipe = plan.recipe
        if metric is not None:
            best = {"metric": metric_of(metric).key}
            values = {**recipe.model_dump(mode="json"), "best": best}
            recipe = recipe_of(values, f"--metric {metric}")
        steps = checkpoint_steps(run_dir)
        layout = read_progress(run_dir, steps[-1]).layout if steps else ""
        device = torch.device("cuda" if torch_gpus() else "cpu")
        self.recipe = recipe
        self._validation = ValidationSet(
            plan.dataset.validation,
            recipe,
            Ranks(device=device),
            LAYOUTS.get(layout, torch.contiguous_format),
        )
        self._device = device

    @property
    def images(self) -> int:
        """Number of images that each network upscales."""
        return self._validation.count

    def enlarged(self) -> dict[str, float]:
        """Return the scores of bicubic upscaling; at x1, of the input itself."""
        found = self._validation.measure_reference()
        assert found is not None
        return found

    def scores(self, network: nn.Module, bar: tqdm) -> dict[str, float]:
        """Return the mean scores of `network`; `bar` counts its images."""

        def count(done: int, share: int) -> bool:
            bar.update(min(done, 1))
            return True

        found = self._validation.measure(network.to(self._device), count)
        assert found is not None
        bar.update(1)
        return found

    def is_better(self, new: Scores, old: Scores | None) -> bool:
        return is_better(new, old, self.recipe.best)

    def enlarged_row(self) -> Row:
        return Row(self._validation.reference, self.enlarged())

    def rule(self) -> str:
        """Return a description of the rule for the best."""
        best = self.recipe.best
        row = metric_of(best.metric)
        floor = "" if best.psnr_floor is None else f" above {best.psnr_floor:g} dB PSNR-Y"
        if best.weights:
            terms = [
                f"{weight:g} x {METRICS[name].title}"
                for name, weight in zip(best.metrics, best.weights.values(), strict=True)
            ]
            return f"highest {' + '.join(terms)}{floor}"
        return f"{'lowest' if row.lower_is_better else 'highest'} {row.title}{floor}"


def table(rows: Sequence[Row], chosen: Row) -> str:
    """Return the rows with their scores in columns; an arrow marks the chosen one."""
    names = list(rows[0].scores)
    width = max(len(row.title) for row in rows)
    columns = [max(len(METRICS[name].title), 8) for name in names]
    head = "  ".join(
        METRICS[name].title.rjust(column) for name, column in zip(names, columns, strict=True)
    )
    lines = [f"  {'':{width}}  {head}"]
    for row in rows:
        values = "  ".join(
            METRICS[name].text(row.scores[name]).rjust(column)
            for name, column in zip(names, columns, strict=True)
        )
        mark = "->" if row is chosen else "  "
        lines.append(f"{mark}{row.title:{width}}  {values}  {row.note}".rstrip())
    return "\n".join(lines)


def chosen_average(
    run_dir: Path,
    step: int,
    ema: str,
    dataset_dir: tuple[Path, ...] = (),
    lr_dir: tuple[Path, ...] = (),
) -> SavedNetwork:
    """Return the average that `--ema` asks for, ending at the checkpoint of `step`.

    With "auto", a table of the lengths that were measured is printed. The metadata hold the choice.
    Raises `UserError`.
    """
    stored = stored_averages(run_dir, step)
    if ema == "auto":
        return _best_average(
            Judge(run_dir, dataset_dir, lr_dir),
            checkpoint_dir(newest_stage(run_dir), step),
            reconstruct(run_dir, step, stored, usable_widths(stored)),
        )
    (found,) = reconstruct(run_dir, step, stored, [chosen_width(ema, stored)])
    return replace(found.saved, metadata={**found.saved.metadata, **found.metadata()})


def _best_average(judge: Judge, folder: Path, found: Sequence[Reconstructed]) -> SavedNetwork:
    """Return the best of the run's own average in `folder` and of those `found`, by validation."""
    tracked = read_network(folder / GENERATOR_EMA_FILE)
    decay = judge.recipe.ema_decay
    candidates = {
        "raw": (read_network(folder / GENERATOR_FILE), {}, "for comparison"),
        "tracked": (tracked, {"weights": "averaged (EMA)"}, f"ema_decay {decay:g}"),
    }
    for one in found:
        note = f"{one.length} updates, error {one.error:.1%}"
        candidates[f"{one.width:.2f}"] = (one.saved, one.metadata(), note)
    rows = {"enlarged": judge.enlarged_row()}
    with tqdm(
        total=len(candidates) * judge.images, desc="measuring", unit="image", **bar_options()
    ) as bar:
        for name, (saved, _, note) in candidates.items():
            rows[name] = Row(name, judge.scores(saved.build(), bar), note)
    best = "tracked"
    for name in candidates:
        if name != "raw" and judge.is_better(rows[name].scores, rows[best].scores):
            best = name
    print(table(list(rows.values()), rows[best]))
    print(f"chosen: {best}, by the {judge.rule()} on {judge.images} validation images of the run")
    saved, metadata, _ = candidates[best]
    measured = {row.title: row.scores for row in rows.values()}
    return replace(
        saved,
        metadata={
            **saved.metadata,
            **metadata,
            "ema_chosen_by": f"{judge.rule()} on the run's {judge.images} validation images",
            "ema_measured": json.dumps(measured, sort_keys=True),
            "validation": json.dumps(rows[best].scores, sort_keys=True),
        },
    )
