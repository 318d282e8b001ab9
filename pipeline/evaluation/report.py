"""An evaluation as a table to read and as JSON to keep."""

from __future__ import annotations

import platform
from typing import Any

import torch

from pipeline.evaluation.scoring import DRIFTS, Evaluation
from pipeline.evaluation.tables import finite
from pipeline.metrics.psnr_ssim import CONVENTION

# "+12.345" must fit below "gain".
COLUMNS = ("PSNR-Y bicubic", "PSNR-Y model", "   gain", "SSIM-Y bicubic", "SSIM-Y model")


def format_table(evaluation: Evaluation) -> str:
    """A row per image and their mean, then the convention, and the means in the other conventions."""
    width = max(len("image"), *(len(image.name) for image in evaluation.images))
    rule = "-" * (width + sum(len(column) + 2 for column in COLUMNS))

    def row(name: str, cells: tuple[str, ...]) -> str:
        return f"{name:<{width}}" + "".join(f"  {cell:>{len(column)}}"
                                            for cell, column in zip(cells, COLUMNS, strict=True))

    return "\n".join([
        row("image", COLUMNS), rule,
        *(row(image.name, _cells(image.model, image.bicubic)) for image in evaluation.images), rule,
        row("mean", _cells(evaluation.model, evaluation.bicubic)), "",
        *_conventions(evaluation)])


def as_json(evaluation: Evaluation, model: dict[str, Any]) -> dict[str, Any]:
    """The evaluation as plain JSON values: `model` (what was evaluated), every image, the means, the versions.

    An infinite PSNR (equal images) is null, because JSON has no infinity.
    """
    images = [{"name": image.name, "model": finite(image.model), "bicubic": finite(image.bicubic)}
              for image in evaluation.images]
    return {
        "model": model,
        "scale": evaluation.scale,
        "convention": CONVENTION,
        "mean": {"model": finite(evaluation.model), "bicubic": finite(evaluation.bicubic)},
        "images": images,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _cells(model: dict[str, float], bicubic: dict[str, float]) -> tuple[str, ...]:
    """What stands under `COLUMNS`."""
    gain = model["psnr_y"] - bicubic["psnr_y"]
    return (f"{bicubic['psnr_y']:.3f}", f"{model['psnr_y']:.3f}", f"{gain:+.3f}", f"{bicubic['ssim_y']:.4f}",
            f"{model['ssim_y']:.4f}")


def _conventions(evaluation: Evaluation) -> list[str]:
    model, bicubic = evaluation.model, evaluation.bicubic

    def means(title: str, key: str) -> str:
        return (f"  {title:<29} bicubic {bicubic[f'psnr_{key}']:.3f} dB / {bicubic[f'ssim_{key}']:.4f}   "
                f"model {model[f'psnr_{key}']:.3f} dB / {model[f'ssim_{key}']:.4f}")

    return [f"Y is BT.601 luma rounded to uint8, as in the papers; {evaluation.scale} pixels cut from every border; "
            "PSNR in dB.",
            "Means in other conventions:",
            means("Y not rounded, as in BasicSR", "y_float"),
            means("RGB", "rgb"),
            *([f"  {'LPIPS, lower is better':<29} bicubic {bicubic['lpips']:.4f}   model {model['lpips']:.4f}"]
              if "lpips" in model else []),
            f"  {'colour drift, levels R G B':<29} bicubic {_drift(bicubic)}   model {_drift(model)}"]


def _drift(means: dict[str, float]) -> str:
    return " ".join(f"{means[key]:+.2f}" for key in DRIFTS)

