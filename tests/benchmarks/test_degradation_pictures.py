"""The pictures of docs/degradations.md: one per step, as the steps are now."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.degradation_pictures import (
    MAX_BYTES,
    OUT,
    Options,
    caption,
    encoded,
    main,
    picture,
)
from conftest import ROOT
from pipeline.cli import UserError
from pipeline.data.degradations.steps import STEPS

DRAWN = sorted(path.stem for path in OUT.glob("*.jpg"))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_shows_what_the_step_does_now(name: str) -> None:
    content = (OUT / f"{name}.jpg").read_bytes()
    assert len(content) <= MAX_BYTES
    kept, made = pixels(content), pixels(encoded(picture(name)))
    assert kept.shape == made.shape
    # Another version of a codec or of the font may change some pixels.
    assert abs(kept - made).mean() < 4, f"run python -m benchmarks.degradation_pictures {name}"


def test_the_page_shows_each_picture_below_its_step() -> None:
    page = (ROOT / "docs" / "degradations.md").read_text(encoding="utf-8")
    sections = {
        part.split("\n", 1)[0].strip(): part for part in re.split(r"^## ", page, flags=re.M)[1:]
    }
    assert sorted(STEPS) == DRAWN, "run python -m benchmarks.degradation_pictures"
    for name in DRAWN:
        assert f"](images/degradations/{name}.jpg)" in sections[name]
    assert len(re.findall(r"images/degradations/", page)) == len(DRAWN)


def test_a_step_that_changes_is_redrawn_alone(tmp_path: Path) -> None:
    main(Options(("pixelate",), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["pixelate.jpg"]
    with pytest.raises(UserError, match="no step named 'pixelat'; did you mean 'pixelate'"):
        main(Options(("pixelat",), tmp_path))


@pytest.mark.parametrize(
    ("section", "drawn", "words"),
    [
        ({"kind": "lens", "radius": 3}, {"radius": 3.0}, "lens, radius 3"),
        (
            {"kind": "anisotropic", "sigma": [0.5, 4]},
            {"sigma": [0.51, 3.9]},
            "anisotropic, sigma 0.51 and 3.9",
        ),
        (
            {"kind": "gaussian", "gray": True, "beta_plateau": 2},
            {"gray": True},
            "gaussian, gray, beta 2",
        ),
        ({}, {"step": "new", "kind": "first", "side": 2, "words": [1, 2]}, "new(first): side 2"),
    ],
)
def test_captions(section: dict, drawn: dict, words: str) -> None:
    assert caption(section, drawn) == words
