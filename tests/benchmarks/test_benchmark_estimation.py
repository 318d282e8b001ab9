"""benchmarks/estimation.py: what its table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import estimation
from dataset_corpus import wheel_photograph
from pipeline.cli import UserError


def test_a_row_is_share_median_error_and_bias() -> None:
    row = estimation.Row("blur 2", 2, [1.5, None, 2.25, 2.0])
    assert str(row) == "| blur 2 | 2 | 75 % | 2.00 | 0.25 | -0.08 |"
    assert str(estimation.Row("x", 1, [None])) == "| x | 1 | 0 % | | | |"


def test_degradations_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    gray = np.full((64, 64, 3), 128, np.uint8)
    noisy = estimation.noise(5, is_gray=True)(gray, rng)
    assert noisy.std() == pytest.approx(5, rel=0.1)
    assert (np.ptp(noisy, axis=2) == 0).all()
    assert np.ptp(estimation.noise(5, is_gray=False)(gray, rng), axis=2).max() > 0
    assert estimation.jpeg(50)(gray, rng).shape == gray.shape
    assert estimation.shrunk(0.75)(gray, rng).shape == (48, 48, 3)
    assert estimation.enlarged(2, "cubic")(gray, rng).shape == gray.shape
    assert estimation.webp_file(50)(gray, rng)[8:12] == b"WEBP"


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(wheel_photograph("coffee.png")).save(tmp_path / "a.png")
    options = estimation.Options(photos=(tmp_path,), only=("webp",), threads=1)
    assert estimation.main(options) == 0
    printed = capsys.readouterr().out
    assert "| degradation | true | recognised | median | mean absolute error | bias |" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| WebP ")]
    assert [row[1] for row in rows] == ["20", "50", "75", "90"]
    assert all(row[2] == "100 %" and float(row[4]) <= 1 for row in rows)


def test_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no photographs"):
        estimation.main(estimation.Options(photos=(tmp_path,)))
    Image.fromarray(wheel_photograph("coffee.png")[:300]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="300 pixels on a side; 400 are needed"):
        estimation.main(estimation.Options(photos=(tmp_path,)))
