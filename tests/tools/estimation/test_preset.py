"""Presets are degradations of recipes, with the shares and ranges that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from dataset_corpus import encoded, wheel_photograph
from pipeline.config.recipe import degradation_of
from pipeline.data.degradations import host
from pipeline.data.degradations.chain import Chain, ChainSpec, run
from pipeline.data.image_headers import ImageHeader, read_header
from pipeline.data.image_pixels import decode_rgb
from tools.crops.grid import halved
from tools.estimation.measurement import Jpeg, Measurement, measure
from tools.estimation.preset import MARK, document, spread, steps, summary

CLEAN = Measurement(
    name="a.png",
    height=300,
    width=400,
    format="png",
    is_lossy=False,
    depth=8,
    jpeg=None,
    webp_quality=None,
    subsampling="444",
    luma_noise=0.3,
    visible_noise=0.0,
    chroma_noise=0.1,
    enlargement=None,
    is_repeated=False,
    blur=0.1,
    levels=256,
    bars=(0, 0, 0, 0),
    combed=0.0,
)
JPEG = replace(
    CLEAN,
    format="jpeg",
    is_lossy=True,
    jpeg=Jpeg(70, "420", (0, 0), True),
    subsampling="420",
    luma_noise=0.0,
    visible_noise=3.0,
    chroma_noise=None,
)
WEBP = replace(CLEAN, format="webp", is_lossy=True, webp_quality=55, subsampling="420")
AVIF = replace(CLEAN, format="avif", is_lossy=True, subsampling="420")
KINDS = {
    "noisy": replace(CLEAN, luma_noise=4.0, chroma_noise=2.5),
    "noisy jpeg": replace(JPEG, luma_noise=6.0),
    "soft": replace(CLEAN, blur=1.3),
    "enlarged": replace(CLEAN, enlargement=2.0, blur=0.5),
    "repeated": replace(CLEAN, enlargement=4.0, is_repeated=True),
    "video": replace(CLEAN, subsampling="420"),
    "posterised": replace(CLEAN, levels=32),
    "interlaced": replace(CLEAN, combed=0.3),
    "quarter chroma": replace(JPEG, jpeg=Jpeg(30, "410", (0, 0), True)),
    "jpeg": JPEG,
    "webp": WEBP,
    "avif": AVIF,
}


def loaded(images: list[Measurement], folder: Path) -> ChainSpec:
    """The preset made from some images, read as a recipe reads it."""
    (folder / "preset.yaml").write_text(document(summary(images), "lr"))
    return ChainSpec.model_validate(degradation_of(str(folder / "preset.yaml")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_takes_the_preset_of_every_kind_of_image(kind: str, tmp_path: Path) -> None:
    assert loaded([KINDS[kind]], tmp_path).steps
    assert len(loaded([KINDS[kind], CLEAN, CLEAN], tmp_path).steps) >= 1


def test_a_recipe_takes_a_preset_of_all_kinds_at_once(tmp_path: Path) -> None:
    spec = loaded([*KINDS.values()], tmp_path)
    names = [next(iter(type(step).model_fields)) for step in spec.steps]
    assert names == ["one_of", "noise", "banding", "chroma", "interlace", "one_of"]
    shares = [choice.probability for choice in spec.steps[-1].one_of]
    assert shares == [0.25, 0.083, 0.083, 0.584]
    assert (tmp_path / "preset.yaml").read_text().startswith(MARK)


def test_a_preset_makes_images_like_the_measured_ones(tmp_path: Path) -> None:
    photograph = wheel_photograph("coffee.png")
    soft = cv2.GaussianBlur(halved(photograph), (0, 0), 1.2).astype(np.float32)
    soft += np.random.default_rng(0).normal(0, 7, (200, 300, 1))
    data = encoded(np.clip(np.rint(soft), 0, 255).astype(np.uint8), "jpeg", quality=82)
    header = read_header(data)
    real = measure("real.jpg", decode_rgb(data, header), header, data)
    chain = Chain(loaded([real], tmp_path), 2)
    drawn = chain.draw(iter(np.random.default_rng(1).random(64).tolist()), 400, 600)
    workspace = host.Workspace()
    made = host.rounded(run(photograph, drawn["steps"], workspace), workspace)
    found = measure("made.png", np.array(made), ImageHeader("png", *made.shape[:2]), b"")
    assert (found.jpeg.quality, found.jpeg.subsampling) == (82, "420")
    assert found.luma_noise == pytest.approx(real.luma_noise, rel=0.15)
    assert found.blur == pytest.approx(real.blur, abs=0.25)


def test_shares_are_those_of_the_images() -> None:
    images = [JPEG, replace(JPEG, jpeg=Jpeg(90, "444", (3, 0), False)), CLEAN, CLEAN]
    section = yaml.safe_load(document(summary(images), "lr"))["steps"][-1]["one_of"]
    assert section == [
        {
            "probability": 0.5,
            "steps": [
                {
                    "compress": {
                        "codec": "jpeg",
                        "quality": [72, 88],
                        "subsampling": {"420": 1.0, "444": 1.0},
                    }
                }
            ],
        },
        {"probability": 0.5, "steps": []},
    ]


def test_images_whose_noise_jpeg_hides_are_not_counted() -> None:
    found = summary([JPEG, JPEG, replace(JPEG, luma_noise=6.0), CLEAN])
    assert (found.noise_known, found.luma_noise.count) == (2, 1)
    noise = next(step for step in steps(found) if "noise" in step.section)
    assert noise.section["noise"]["probability"] == 0.5
    assert "JPEG hides that of chroma" in noise.reason


def test_rare_degradations_are_left_out() -> None:
    found = summary([CLEAN] * 99 + [replace(CLEAN, blur=2.0, luma_noise=9.0, combed=0.5)])
    assert [step.section for step in steps(found)] == [{"resize": {"to": "lr"}}]


def test_percentiles() -> None:
    found = spread(range(101))
    assert (found.count, found.low, found.median, found.high) == (101, 10, 50, 90)
    assert spread([]) is None
