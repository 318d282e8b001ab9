"""Plot the curves of one or more runs from their training logs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import UserError, run
from pipeline.files import parse_json, write_atomically
from pipeline.metrics import METRICS
from pipeline.run_folder import LOG_FILE, find_run
from tools.files import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
# Inches, and dots per inch.
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_HEIGHT, DOTS_PER_INCH = 5.2, 3.2, 0.35, 110
LARGEST = 1e300  # larger numbers do not fit into what matplotlib computes with
MAX_COLUMNS = 3
REFERENCES = ("bicubic", "input")
"""Events with the validation scores of what a network is compared with; the latter at x1."""
AUTO_SMOOTHED = 15  # default averaging window, as a fraction of a curve's values


class Curve(NamedTuple):
    """A value in the log, with label and line style to distinguish curves of the same run."""

    key: str
    label: str = ""
    style: str = "-"


class Panel(NamedTuple):
    """One plot: values of one event over the steps."""

    title: str
    event: str
    curves: tuple[Curve, ...]
    is_logarithmic: bool = False
    is_noisy: bool = True  # noisy between log lines, so it may be smoothed
    best: Callable[[Sequence[float]], float] | None = None  # selects the value to mark
    unit: str = ""  # shown after the marked value
    from_zero: bool = False


PANELS = (
    Panel("training loss", "train", (Curve("loss"),)),
    *(
        Panel(
            f"validation {metric.title}{metric.unit and f', {metric.unit}'}",
            "validation",
            (Curve(name),),
            is_noisy=False,
            best=min if metric.lower_is_better else max,
            unit=metric.unit and f" {metric.unit}",
        )
        for name, metric in METRICS.items()
    ),
    Panel("throughput, images/s", "train", (Curve("images_per_second"),), from_zero=True),
    Panel(
        "time of a step, s",
        "train",
        (Curve("step_seconds", "all"), Curve("data_seconds", "waiting for data", ":")),
        from_zero=True,
    ),
    Panel(
        "mean logit of the discriminator",
        "train",
        (Curve("d_real", "HR"), Curve("d_fake", "SR", "--")),
    ),
    Panel(
        "share of the discriminator's turns skipped",
        "train",
        (Curve("d_turns_skipped"),),
        from_zero=True,
    ),
    Panel(
        "gradient norm",
        "train",
        (
            Curve("gradient_norm", "generator"),
            Curve("discriminator_gradient_norm", "discriminator", "--"),
        ),
        True,
    ),
    Panel(
        "colour drift of SR, levels",
        "train",
        (
            Curve("colour_drift_red", "red"),
            Curve("colour_drift_green", "green", "--"),
            Curve("colour_drift_blue", "blue", ":"),
        ),
    ),
    Panel("learning rate", "train", (Curve("lr"),), True, is_noisy=False),
)


@dataclass(frozen=True)
class Options:
    """Plot the curves of runs as one picture: loss, PSNR, throughput, and whatever else they log.

    Only what a run has logged is drawn, for every stage if it has stages. The best validation is
    marked. TensorBoard shows the same and more; this is for a report, an email, or a machine
    without a browser.

    Example: python tools/plot_run.py runs/vapsr_x2 runs/msrresnet_x2 --out curves.png
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run folders, their --log-dir, or log.jsonl files. Default: the newest run in runs/."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("training.png")
    """The picture: .png, .svg or .pdf. An existing one is replaced."""
    names: tuple[str, ...] = ()
    """Names of the runs in the picture, one per run. Default: the folder names."""
    smooth: int | None = None
    """Average this many log lines around each one (training only; the single values stay visible in
    a paler colour); 1 disables it. Default: a fifteenth of the lines."""


def main(options: Options) -> int:
    """Write the picture."""
    if options.out.suffix not in SUFFIXES:
        raise UserError(f"--out {options.out}: the name must end in {', '.join(SUFFIXES)}")
    if options.smooth is not None and options.smooth < 1:
        raise UserError(f"--smooth {options.smooth}: must be at least 1 log line")
    logs = find_logs(options.runs or (find_run(),), options.names)
    lines = {name: read_log(path) for name, path in logs.items()}
    panels = [
        panel
        for panel in PANELS
        if any(
            points(log, panel.event, curve.key)[0]
            for log in lines.values()
            for curve in panel.curves
        )
    ]
    if not panels:
        raise UserError(
            f"{', '.join(map(str, logs.values()))}: nothing to plot yet; the first line is logged "
            "after log_every steps"
        )
    write_atomically(
        options.out.expanduser(), draw(lines, panels, options.smooth, options.out.suffix[1:])
    )
    print(f"{options.out}: {', '.join(panel.title for panel in panels)} of {', '.join(lines)}")
    return 0


def find_logs(runs: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Map a name to the log.jsonl of every run, or of every stage in the order they ran."""
    if names and len(names) != len(runs):
        raise UserError(f"--names has {len(names)} names for {len(runs)} runs; give one per run")
    found: dict[str, Path] = {}
    for number, path in enumerate(path.expanduser() for path in runs):
        folder = path.parent if path.is_file() else path
        logs = [path] if path.is_file() else _logs_of(path)
        if not logs:
            raise UserError(
                f"{path}: contains no {LOG_FILE}; give the folder of a run that has logged, or "
                "its --log-dir"
            )
        for log in logs:
            name = names[number] if names else folder.resolve().name
            if log.parent != folder:
                name += f" {log.parent.name}"
            if name in found:
                raise UserError(
                    f"two runs have the name {name!r}; give different ones with --names"
                )
            found[name] = log
    return found


def _logs_of(folder: Path) -> list[Path]:
    if (folder / LOG_FILE).is_file():
        return [folder / LOG_FILE]
    return sorted(folder.glob(f"*/{LOG_FILE}"), key=lambda log: (log.stat().st_mtime_ns, str(log)))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, except an incomplete last line.

    Raises `UserError` if it is not a training log.
    """
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1].splitlines()
    for number, line in enumerate(complete, start=1):
        try:
            entry = parse_json(line)
            if not _is_entry(entry):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}: line {number} is not a line of a training log; give the {LOG_FILE} of a "
                "run"
            ) from None
        lines.append(entry)
    return lines


def _is_entry(entry: Any) -> bool:
    """Whether a line's step, event and curves are what a run logs."""
    if not isinstance(entry, dict) or type(entry.get("event")) is not str:
        return False
    values = [entry.get(curve.key) for panel in PANELS for curve in panel.curves]
    numbers = [entry.get("step"), *(value for value in values if value is not None)]
    return type(entry.get("step")) is int and all(
        type(number) in (int, float) and not abs(number) > LARGEST for number in numbers
    )


def points(log: Sequence[dict[str, Any]], event: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` in the lines of `event`.

    Values that are not finite, which are null in the log, are omitted.
    """
    found = [
        (line["step"], line[key])
        for line in log
        if line["event"] == event and line.get(key) is not None and math.isfinite(line[key])
    ]
    return [step for step, _ in found], [value for _, value in found]


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each value, of fewer at both ends."""
    before, after = (width - 1) // 2, width // 2
    around = [values[max(0, i - before) : i + after + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in around]


def draw(
    logs: dict[str, list[dict[str, Any]]], panels: Sequence[Panel], smooth: int | None, kind: str
) -> bytes:
    """Draw the picture and return its bytes."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if len(panels) == 4 else min(MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        squeeze=False,
        dpi=DOTS_PER_INCH,
        layout="constrained",
        figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT + LEGEND_HEIGHT),
    )
    for panel, axes in zip(panels, grid.flat, strict=False):
        _draw_panel(axes, panel, logs, smooth)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    if len(logs) > 1:
        names = [
            # matplotlib omits labels that begin with `_`, hence the space.
            pyplot.Line2D([], [], color=_colour(number), linewidth=2.5, label=f" {_text(name)}")
            for number, name in enumerate(logs)
        ]
        figure.legend(
            handles=names,
            loc="outside upper left",
            ncols=min(len(logs), 2 * columns),
            fontsize=9,
            frameon=False,
        )
    else:
        figure.suptitle(_text(next(iter(logs))), fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    pyplot.close(figure)
    return picture.getvalue()


def _text(name: str) -> str:
    """Return a run's name as matplotlib draws it unchanged: `$` would begin a formula."""
    return printable(name).replace("$", r"\$")


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _draw_panel(
    axes: Axes, panel: Panel, logs: dict[str, list[dict[str, Any]]], smooth: int | None
) -> None:
    labels: dict[str, str] = {}  # of the curves of one run, with their styles
    for number, log in enumerate(logs.values()):
        for curve in panel.curves:
            steps, values = points(log, panel.event, curve.key)
            if not steps:
                continue
            labels.setdefault(curve.label, curve.style)
            _draw_curve(axes, panel, curve.style, _colour(number), steps, values, smooth)
            for reference in REFERENCES if panel.event == "validation" else ():
                _, before = points(log, reference, curve.key)
                if before:
                    _draw_reference(axes, reference, _colour(number), before[-1])
    axes.margins(x=0.02, y=0.15 if panel.best else 0.05)
    if panel.is_logarithmic:
        axes.set_yscale("log")
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(labels) > 1:
        from matplotlib.lines import Line2D

        axes.legend(
            handles=[
                Line2D([], [], color="0.3", linestyle=style, label=label)
                for label, style in labels.items()
            ],
            fontsize=7,
            frameon=False,
        )


def _draw_reference(axes: Axes, name: str, colour: str, value: float) -> None:
    """Draw a dashed line at the value of the upscaled input, with its name at the right end."""
    axes.axhline(value, linestyle="--", color=colour, linewidth=0.9, alpha=0.7)
    axes.annotate(
        name,
        (1, value),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-2, 2),
        fontsize=7,
        color=colour,
        ha="right",
    )


def _draw_curve(
    axes: Axes,
    panel: Panel,
    style: str,
    colour: str,
    steps: Sequence[int],
    values: Sequence[float],
    smooth: int | None,
) -> None:
    width = smooth or max(1, len(values) // AUTO_SMOOTHED)
    marker = "o" if panel.event == "validation" or len(steps) == 1 else None
    if panel.is_noisy and width > 1:
        axes.plot(steps, values, style, color=colour, alpha=0.25, linewidth=0.8)
        values = moving_mean(values, width)
    axes.plot(steps, values, style, color=colour, marker=marker, markersize=3, linewidth=1.5)
    if panel.best:
        place = values.index(panel.best(values))
        axes.plot(
            steps[place], values[place], "*", color=colour, markersize=11, markeredgecolor="white"
        )
        decimals = 2 if panel.unit else 4
        axes.annotate(
            f"{values[place]:.{decimals}f}{panel.unit} at {steps[place]:,}",
            (steps[place], values[place]),
            textcoords="offset points",
            xytext=(0, 8 if panel.best is max else -14),
            fontsize=7,
            color=colour,
            ha="right" if place > len(steps) / 2 else "left",
        )


if __name__ == "__main__":
    run(Options, main)
