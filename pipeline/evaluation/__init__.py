"""Compare networks with bicubic and nearest upscaling (at x1, with their input) on image pairs.

The results are numbers, tables, pictures and an HTML page.
"""

from __future__ import annotations

from pipeline.evaluation.image_sets import find_folder, find_pairs
from pipeline.evaluation.scoring import upscaler_of
from pipeline.evaluation.spread import Work, measure_sets
from pipeline.evaluation.tables import format_table

__all__ = ["Work", "find_folder", "find_pairs", "format_table", "measure_sets", "upscaler_of"]
