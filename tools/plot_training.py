"""Curves of one or more runs as a picture, from the lines that training writes down."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from pipeline.cli import UserError, run
from pipeline.files import write_atomically
from pipeline.run_folder import LOG_FILE, find_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
PANEL_WIDTH, PANEL_HEIGHT = 5.2, 3.2  # inches, of 110 pixels
MOST_COLUMNS = 3


class Curve(NamedTuple):
    """A value of the log, and how its line is told from others of the same run."""

    key: str
    label: str = ""
    style: str = "-"


class Panel(NamedTuple):
    """One diagram: values of the lines of one event, over the step."""

    title: str
    event: str
    curves: tuple[Curve, ...]
    is_logarithmic: bool = False
    is_noisy: bool = True  # from one line of the log to the next: may be smoothed


PANELS = (
    Panel("training loss", "train", (Curve("loss"),)),
    Panel("validation PSNR-Y, dB", "validation", (Curve("psnr_y"),), is_noisy=False),
    Panel("validation LPIPS", "validation", (Curve("lpips"),), is_noisy=False),
    Panel("mean logit of the discriminator", "train", (Curve("d_real", "HR"), Curve("d_fake", "SR", "--"))),
    Panel("gradient norm", "train", (Curve("gradient_norm", "generator"),
                                     Curve("discriminator_gradient_norm", "discriminator", "--")), True),
    Panel("colour drift of SR, levels", "train", (Curve("colour_drift_red", "red"),
                                                  Curve("colour_drift_green", "green", "--"),
                                                  Curve("colour_drift_blue", "blue", ":"))),
    Panel("learning rate", "train", (Curve("lr"),), True, is_noisy=False),
)


@dataclass(frozen=True)
class Options:
    """Draw the curves of runs, above each other, as one picture: losses, validation, discriminator, gradients, colour.

    Only what a run has is drawn. Of a run with stages every stage is drawn. TensorBoard shows the same and more; this
    is for a report, a mail, or a machine without a browser.

    Example: python tools/plot_training.py runs/vapsr_x2 runs/msrresnet_x2 --out curves.png
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run folders, their --log-dir, or log.jsonl files. Default: the newest run in runs/."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("training.png")
    """The picture: .png, .svg or .pdf. One that is there is replaced."""
    names: tuple[str, ...] = ()
    """What to call the runs in the picture, one for each. Default: their folders' names."""
    smooth: int = 1
    """Draw the mean of so many log lines around each (of training; the single lines stay, pale)."""


def main(options: Options) -> int:
    """Write the picture."""
    if options.out.suffix not in SUFFIXES:
        raise UserError(f"--out {options.out}: the name must end in {', '.join(SUFFIXES)}")
    if options.smooth < 1:
        raise UserError(f"--smooth {options.smooth}: must be 1 or more log lines")
    logs = find_logs(options.runs or (find_run(),), options.names)
    lines = {name: read_log(path) for name, path in logs.items()}
    panels = [panel for panel in PANELS
              if any(points(log, panel.event, curve.key)[0] for log in lines.values() for curve in panel.curves)]
    if not panels:
        raise UserError(f"{', '.join(map(str, logs.values()))}: nothing to draw yet; the first line comes after "
                        "log_every steps")
    write_atomically(options.out.expanduser(), draw(lines, panels, options.smooth, options.out.suffix[1:]))
    print(f"{options.out}: {', '.join(panel.title for panel in panels)} of {', '.join(lines)}")
    return 0


def find_logs(runs: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """Name -> log.jsonl of every run, of every stage of a run with stages in the order in which they ran."""
    if names and len(names) != len(runs):
        raise UserError(f"--names has {len(names)} names for {len(runs)} runs; give one for each")
    found: dict[str, Path] = {}
    for number, path in enumerate(path.expanduser() for path in runs):
        folder = path.parent if path.is_file() else path
        logs = [path] if path.is_file() else _logs_of(path)
        if not logs:
            raise UserError(f"{path}: no {LOG_FILE} in it; give the folder of a run that has logged, or its --log-dir")
        for log in logs:
            name = names[number] if names else folder.resolve().name
            if log.parent != folder:
                name += f" {log.parent.name}"
            if name in found:
                raise UserError(f"two runs would be called {name!r}; tell them apart with --names")
            found[name] = log
    return found


def _logs_of(folder: Path) -> list[Path]:
    if (folder / LOG_FILE).is_file():
        return [folder / LOG_FILE]
    return sorted(folder.glob(f"*/{LOG_FILE}"), key=lambda log: (log.stat().st_mtime_ns, str(log)))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line that is still being written is left out; `UserError` for what is no log."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[:text.rfind("\n") + 1].splitlines()
    for number, line in enumerate(complete, start=1):
        try:
            entry = json.loads(line)
            int(entry["step"]), str(entry["event"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is none that training writes; give the {LOG_FILE} of a run"
                            ) from None
        lines.append(entry)
    return lines


def points(log: Sequence[dict[str, Any]], event: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` in the lines of `event`; what was not finite was written as null and is left out."""
    found = [(line["step"], line[key]) for line in log if line["event"] == event and line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the `width` values around each, of fewer at both ends."""
    before, after = (width - 1) // 2, width // 2
    around = [values[max(0, i - before):i + after + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in around]


def draw(logs: dict[str, list[dict[str, Any]]], panels: Sequence[Panel], smooth: int, kind: str) -> bytes:
    """The picture's bytes."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if len(panels) == 4 else min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(rows, columns, squeeze=False, dpi=110, layout="constrained",
                                   figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT))
    for panel, axes in zip(panels, grid.flat, strict=False):
        _draw_panel(axes, panel, logs, smooth)
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    pyplot.close(figure)
    return picture.getvalue()


def _draw_panel(axes: Axes, panel: Panel, logs: dict[str, list[dict[str, Any]]], smooth: int) -> None:
    drawn = 0
    for number, (name, log) in enumerate(logs.items()):
        colour = f"C{number % 10}"
        for curve in panel.curves:
            steps, values = points(log, panel.event, curve.key)
            if not steps:
                continue
            if panel.is_noisy and smooth > 1:
                axes.plot(steps, values, curve.style, color=colour, alpha=0.25, linewidth=0.8)
                values = moving_mean(values, smooth)
            marker = "o" if panel.event == "validation" or len(steps) == 1 else None
            axes.plot(steps, values, curve.style, color=colour, marker=marker, markersize=3, linewidth=1.4,
                      label=f"{name} {curve.label}".strip())
            drawn += 1
    if panel.is_logarithmic:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3)
    if drawn > 1 or len(logs) > 1:
        axes.legend(fontsize=7)


if __name__ == "__main__":
    run(Options, main)
