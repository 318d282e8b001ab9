"""Evaluation: networks against bicubic and nearest on pairs of images, as numbers, tables, pictures
and a page."""

from __future__ import annotations

from pipeline.evaluation.image_sets import find_folder, find_pairs
from pipeline.evaluation.scoring import upscaler_of
from pipeline.evaluation.spread import Work, measure_sets
from pipeline.evaluation.tables import format_table

__all__ = ["Work", "find_folder", "find_pairs", "format_table", "measure_sets", "upscaler_of"]
