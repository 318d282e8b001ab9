"""The models to evaluate: weights files, or the best weights of run folders, all of one scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cli import UserError, say
from pipeline.evaluation.scoring import BASELINES
from pipeline.files import file_sha256, short_path
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import find_run, run_network_file


@dataclass(frozen=True)
class Model:
    """A model to evaluate: its weights file, its title in the results, and the loaded network."""

    file: Path
    title: str
    saved: SavedNetwork

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal digits."""
        return file_sha256(self.file)

    def describe(self) -> dict[str, Any]:
        """Return what identifies this model, as JSON values."""
        return {
            "file": str(self.file),
            "sha256": self.sha256,
            "name": self.saved.name,
            "params": self.saved.params,
            "metadata": self.saved.metadata,
        }


def choose_model(model: Path | None) -> Model:
    """Load a weights file, or the best averaged weights of a run folder (`None`: the newest)."""
    if model is not None and not model.is_dir():
        return Model(model, model.stem, read_network(model))
    run_dir = model if model is not None else find_run()
    file = run_network_file(run_dir, "best", ema=True)
    return Model(file, run_dir.resolve().name, read_network(file))


def choose_models(models: Sequence[Path], scale: int | None) -> list[Model]:
    """Load the models at the given paths, or the newest run's if there are none.

    Returns them with unique titles. `UserError` unless they all have the same scale, and `scale`
    if that is given.
    """
    if not models:
        models = [find_run()]
        say(f"model: none is named, so the newest run: {short_path(models[0])}")
    chosen = [choose_model(model) for model in models]
    for model in chosen:
        if scale is not None and scale != model.saved.scale:
            raise UserError(
                f"--scale {scale} contradicts the model, which is x{model.saved.scale}: "
                f"{str(model.file)!r}; omit --scale or choose another --model"
            )
        if model.saved.scale != chosen[0].saved.scale:
            raise UserError(
                f"models of different scales cannot be compared: {str(chosen[0].file)!r} is "
                f"x{chosen[0].saved.scale}, {str(model.file)!r} is x{model.saved.scale}; evaluate "
                "them one at a time"
            )
    return _with_unique_titles(chosen)


def _with_unique_titles(models: list[Model]) -> list[Model]:
    """Prefix equal titles with their folder, and number those that are then still equal."""
    count = Counter(model.title for model in models)
    models = [
        replace(model, title=f"{model.file.resolve().parent.name}/{model.title}")
        if count[model.title] > 1
        else model
        for model in models
    ]
    taken = set(BASELINES) | {"HR"}
    titled = []
    for model in models:
        title, number = model.title, 2
        while title in taken:
            title, number = f"{model.title} ({number})", number + 1
        taken.add(title)
        titled.append(replace(model, title=title))
    return titled
