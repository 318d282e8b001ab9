"""Which models are evaluated, by what names, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cli import UserError
from pipeline.evaluation.scoring import BASELINES
from pipeline.inference.choosing import Model, choose_model


def choose_models(models: Sequence[Path], scale: int | None) -> list[Model]:
    """The models of those paths (none: the newest run's), all of one scale, with titles that differ."""
    chosen = [choose_model(model) for model in models] or [choose_model(None)]
    for model in chosen:
        if scale is not None and scale != model.saved.scale:
            raise UserError(f"--scale {scale} contradicts the model, which is x{model.saved.scale}: "
                            f"{str(model.file)!r}; leave --scale out or choose another --model")
        if model.saved.scale != chosen[0].saved.scale:
            raise UserError(f"models of several scales cannot be compared: {str(chosen[0].file)!r} is "
                            f"x{chosen[0].saved.scale}, {str(model.file)!r} is x{model.saved.scale}; evaluate them "
                            "one after the other")
    return _with_titles_that_differ(chosen)


def _with_titles_that_differ(models: list[Model]) -> list[Model]:
    """Equal titles get the folder in front, and a number behind where that is not enough."""
    count = Counter(model.title for model in models)
    models = [replace(model, title=f"{model.file.resolve().parent.name}/{model.title}") if count[model.title] > 1
              else model for model in models]
    taken = set(BASELINES) | {"HR"}
    titled = []
    for model in models:
        title, number = model.title, 2
        while title in taken:
            title, number = f"{model.title} ({number})", number + 1
        taken.add(title)
        titled.append(replace(model, title=title))
    return titled
