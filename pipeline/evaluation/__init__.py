"""Evaluation: networks against bicubic and nearest on pairs of images, as numbers, tables, pictures and a page."""

from __future__ import annotations

from pipeline.evaluation.image_sets import Pair, find_pairs
from pipeline.evaluation.pictures import write_picture
from pipeline.evaluation.scoring import Compared, Evaluation, ImageScore, evaluate, measure_methods, upscale
from pipeline.evaluation.tables import as_json, format_table

__all__ = ["Compared", "Evaluation", "ImageScore", "Pair", "as_json", "evaluate", "find_pairs", "format_table",
           "measure_methods", "upscale", "write_picture"]
