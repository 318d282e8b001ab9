"""Results of a study: tables, parameter importances, a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from pipeline.metrics import metric_of
from tools.search.space import Range, Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
MAX_ROWS = 20
MIN_COMPLETE_TRIALS = 8  # to compute importances
PANEL_WIDTH, PANEL_HEIGHT = 4.4, 3.3  # inches, at 110 pixels per inch


def score_text(score: float, metric: str) -> str:
    row = metric_of(metric)
    return row.text(score) + (row.unit and f" {row.unit}")


def sign_of(metric: str) -> int:
    """-1 if the highest score is best, 1 if the lowest is."""
    return 1 if metric_of(metric).lower_is_better else -1


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """All trials: complete ones from best to worst, then pruned, running and failed ones."""
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    order = (
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.RUNNING,
        TrialState.WAITING,
        TrialState.FAIL,
    )

    def place(trial: FrozenTrial) -> tuple[int, float, int]:
        score = best_score(trial, sign)
        return order.index(trial.state), math.inf if score is None else sign * score, trial.number

    return sorted(study.trials, key=place)


def best_score(trial: FrozenTrial, sign: int) -> float | None:
    """Result of a trial, or the best score it reported if it was pruned or is running."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return min(trial.intermediate_values.values(), key=lambda score: sign * score, default=None)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each key to its last part, or to as many parts as make it unique."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(f".{other}".endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names


def trial_table(study: optuna.Study, space: Space, metric: str) -> str:
    """A table of the trials, best first, with at most `MAX_ROWS` rows."""
    keys = [parameter.key for parameter in space.parameters if parameter.is_searched]
    names, sign = short_names(keys), sign_of(metric)
    rows = [["trial", "state", metric_of(metric).title, "at step", *(names[key] for key in keys)]]
    trials = ranked(study)
    for trial in trials[:MAX_ROWS]:
        score = best_score(trial, sign)
        step = next(
            (step for step, value in trial.intermediate_values.items() if value == score), None
        )
        values = trial_values(trial, space)
        rows.append(
            [
                str(trial.number),
                STATES[trial.state],
                "-" if score is None else metric_of(metric).text(score),
                "-" if step is None else str(step),
                *(_number(values[key]) if key in values else "-" for key in keys),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    hidden = len(trials) - MAX_ROWS
    return "\n".join(
        [
            lines[0],
            "-" * len(lines[0]),
            *lines[1:],
            *([f"… and {hidden} more"] if hidden > 0 else []),
        ]
    )


def trial_values(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """Overrides of a trial as key -> value; incomplete if its creation was interrupted."""
    try:
        return space.suggest(FixedTrial(trial.params))
    except ValueError:  # raised by Optuna for a parameter without a value
        return dict(trial.params)


def _number(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )


def importances(study: optuna.Study, space: Space) -> dict[str, float]:
    """Share of each parameter in the variance of complete results (fANOVA), largest first.

    Empty if there are too few trials, or if all results are equal. Parameters that not all trials
    have are omitted.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < MIN_COMPLETE_TRIALS or len({trial.value for trial in complete}) == 1:
        return {}
    keys = [
        parameter.key
        for parameter in space.parameters
        if parameter.is_searched and not parameter.when
    ]
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def importance_lines(found: Mapping[str, float]) -> str:
    width = max(map(len, found))
    return "\n".join(
        f"{key.ljust(width)}  {share:4.0%}  {'#' * round(40 * share)}"
        for key, share in found.items()
    )


def draw(study: optuna.Study, space: Space, metric: str) -> bytes:
    """Draw a PNG: results by trial, parameter importances, and results by parameter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    searched = [parameter for parameter in space.parameters if parameter.is_searched]
    shares, names = (
        importances(study, space),
        short_names([parameter.key for parameter in searched]),
    )
    count = 1 + bool(shares) + len(searched)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        squeeze=False,
        dpi=110,
        layout="constrained",
        figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT),
    )
    panels = iter(grid.flat)
    _draw_history(next(panels), study, metric)
    if shares:
        _draw_importances(next(panels), {names[key]: share for key, share in shares.items()})
    for parameter in searched:
        logarithmic = isinstance(parameter.domain, Range) and parameter.domain.log
        _draw_parameter(next(panels), study, space, parameter.key, metric, logarithmic)
    for axes in panels:
        axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    return picture.getvalue()


def _points(study: optuna.Study, metric: str) -> list[tuple[FrozenTrial, float]]:
    scores = [(trial, best_score(trial, sign_of(metric))) for trial in study.trials]
    return [(trial, score) for trial, score in scores if score is not None]


def _draw_history(axes: Axes, study: optuna.Study, metric: str) -> None:
    points = _points(study, metric)
    for state, colour in ((TrialState.COMPLETE, "C0"), (TrialState.PRUNED, "0.6")):
        own = [(trial.number, score) for trial, score in points if trial.state == state]
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=colour, markersize=4, label=STATES[state])
    better = min if metric_of(metric).lower_is_better else max
    complete = [
        (trial.number, score) for trial, score in points if trial.state == TrialState.COMPLETE
    ]
    best = [
        (number, better(score for _, score in complete[: i + 1]))
        for i, (number, _) in enumerate(complete)
    ]
    if best:
        axes.step(
            *zip(*best, strict=True), where="post", color="C3", linewidth=1.2, label="best so far"
        )
    axes.legend(fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "trials", "trial", metric)


def _draw_importances(axes: Axes, shares: Mapping[str, float]) -> None:
    names = list(shares)[::-1]
    bars = axes.barh(names, [shares[name] for name in names], color="C0")
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], fontsize=8, padding=2)
    axes.set_xlim(0, 1.1 * max(shares.values()))
    axes.set_title("share of the variance (fANOVA)", fontsize=10)
    axes.tick_params(labelsize=8)


def _draw_parameter(
    axes: Axes, study: optuna.Study, space: Space, key: str, metric: str, logarithmic: bool
) -> None:
    domain = next(parameter.domain for parameter in space.parameters if parameter.key == key)
    labels = (
        {}
        if isinstance(domain, Range)
        else {_number(value): i for i, value in enumerate(domain.values)}
    )
    for state, colour in ((TrialState.PRUNED, "0.6"), (TrialState.COMPLETE, "C0")):
        own = [
            (values[key], score)
            for trial, score in _points(study, metric)
            if trial.state == state and key in (values := trial_values(trial, space))
        ]
        if own:
            axes.plot(
                [labels[_number(value)] if labels else value for value, _ in own],
                [score for _, score in own],
                "o",
                color=colour,
                markersize=4,
            )
    if labels:
        axes.set_xticks(list(labels.values()), list(labels), fontsize=8)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif logarithmic:
        axes.set_xscale("log")
    _finish(axes, key, "", metric)


def _finish(axes: Axes, title: str, below: str, metric: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=8)
    row = metric_of(metric)
    axes.set_ylabel(row.title + (row.unit and f", {row.unit}"), fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3)
