"""Evaluation: a network against bicubic on pairs of images, as numbers, a table and pictures."""

from __future__ import annotations

from pipeline.evaluation.pairs import Pair, find_pairs
from pipeline.evaluation.pictures import write_picture
from pipeline.evaluation.report import as_json, format_table
from pipeline.evaluation.scoring import Compared, Evaluation, ImageScore, evaluate, upscale

__all__ = ["Compared", "Evaluation", "ImageScore", "Pair", "as_json", "evaluate", "find_pairs", "format_table",
           "upscale", "write_picture"]
