"""The HTML page of an evaluation: a single self-contained file that works in a real browser."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
import torch
from PIL import Image

from browser import browser
from evaluate import Options
from fabricate import picture, tiny_saved, write_images
from pipeline.evaluation.command import run_evaluation
from pipeline.evaluation.page import STAGE, Gallery, _Axis, data_uri
from pipeline.evaluation.scoring import ImageScores, Views
from pipeline.models.weights import write_network

HOSTILE = "<script>alert(1)</script>&'"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two models on seven images, one of them with a hostile name."""
    folder = tmp_path_factory.mktemp("page")
    for seed, name in ((1, "first"), (2, "a model with a rather long name, step 100000")):
        saved = tiny_saved(seed, scale=2)
        saved.metadata = {"recipe": "demo", "license": "CC0-1.0", "dataset_lists_sha256": "ab" * 32}
        write_network(folder / f"{name}.pth", saved)
    names = ["a", "b", "c", "d", "e", "f" * 60, HOSTILE.replace("/", "\u2215")]
    hr = write_images(
        folder / "hr",
        {
            f"{name}.png": picture(90 + 10 * seed, 200 - 15 * seed, seed)
            for seed, name in enumerate(names)
        },
    )
    models = (folder / "first.pth", folder / "a model with a rather long name, step 100000.pth")
    run_evaluation(Options(hr=hr, model=models, out=folder / "out", html=folder / "html"))
    return folder / "html" / "index.html"


def test_it_is_one_file_that_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.findall(r"url\(|@import|https?://", text)
    assert text.count("<script>") == 1  # the page's own
    assert html.escape(HOSTILE.replace("/", "\u2215"), quote=False).replace("'", "&#39;") in text
    assert "not significant" in text or "better" in text or "worse" in text
    assert text.count('class="compare"') == 6  # three best, three worst of seven
    assert "paired" in text
    assert text.count("recipe demo, license CC0-1.0") == 2
    assert "dataset_lists_sha256" not in text  # only the metadata in `SHOWN`


def test_pictures_in_the_page_are_lossless():
    import base64
    import io

    pixels = torch.from_numpy(picture(33, 21)).permute(2, 0, 1)[None]
    with Image.open(io.BytesIO(base64.b64decode(data_uri(pixels).partition(",")[2]))) as found:
        np.testing.assert_array_equal(np.asarray(found), pixels[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("order", [range(8), (7, 6, 3, 5, 0, 2, 4, 1)])
def test_the_gallery_keeps_the_best_and_the_worst_images(order):
    gallery = Gallery(num_sets=1)
    gains = [0.5, -1.0, 3.0, 2.0, 0.1, 1.0, -2.0, 1.0]
    for index in order:
        hr = torch.full((1, 3, 500, 600), 100, dtype=torch.uint8)
        bicubic, model = hr.clone(), hr.clone()
        bicubic[..., 400:460, 500:560] = 160  # where the model gains
        model[..., 20:80, 30:90] = 150  # where its error is largest
        scores = {"bicubic": {"psnr_y": 30.0}, "model": {"psnr_y": 30.0 + gains[index]}}
        gallery.visit(
            "set",
            index,
            Views(ImageScores(str(index), scores), hr, {"bicubic": bicubic, "model": model}),
        )
    # Images 5 and 7 have equal gains: the first is kept.
    assert [shown.scores.name for shown in gallery.best("set")] == ["2", "3", "5"]
    assert [shown.scores.name for shown in gallery.worst("set")] == ["6", "1", "4"]
    best, worst = gallery.best("set")[0], gallery.worst("set")[0]
    assert best.place[0] >= 392
    assert best.place[1] >= 492
    assert worst.place[0] <= 32
    assert (best.crop["bicubic"] == 160).float().mean() > 0.7
    assert tuple(best.stage["HR"].shape[-2:]) == (STAGE, STAGE)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 6.9], ["0", "+2", "+4", "+6", "+8"]),
        ([0.0], ["-0.6", "+0.6"]),
        ([-0.013, 0.02], ["-0.02", "-0.01", "0.00", "+0.01", "+0.02"]),
    ],
)
def test_axes_have_round_ticks(values, ticks):
    axis = _Axis(values)
    found = [axis.text(tick, "+") for tick in axis.ticks]
    assert found == ticks or (found[0], found[-1]) == tuple(ticks)
    assert all(0 <= axis.share(value) <= 1 for value in values)


BORDER = """const stage = document.querySelector('.stage'), box = stage.getBoundingClientRect();
    const border = stage.querySelector('.border').getBoundingClientRect();
    return [(border.left + 1 - box.left) / box.width, stage.querySelector('.over') === null ? null :
            getComputedStyle(stage.querySelector('.over')).clipPath]"""


def test_the_slider_moves_in_a_browser(page, tmp_path):
    with browser(tmp_path) as chromium:
        chromium.open(page, 1280, 900)
        images = chromium.run(
            "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
        )
        assert len(images) == 6 * 4 + 6 * 4
        assert all(images)
        place, clip = chromium.run(BORDER)
        assert place == pytest.approx(0.5, abs=0.01)
        assert clip.startswith("inset(0px")
        chromium.drag(".stage", 0.5, 0.2)
        assert chromium.run(BORDER)[0] == pytest.approx(0.2, abs=0.01)
        chromium.press(".stage input", "\ue014")  # right arrow
        assert chromium.run("return document.querySelector('.stage input').value") == "20.1"
        assert (
            chromium.run("return document.querySelector('.tag.on-left').textContent") == "bicubic"
        )
        left, right = _halves(chromium, tmp_path)
        chromium.press(".compare select", "HR")
        assert chromium.run("return document.querySelector('.tag.on-left').textContent") == "HR"
        assert (
            chromium.run("return document.querySelector('.left-score').textContent") == "original"
        )
        other_left, same_right = _halves(chromium, tmp_path)
        assert (np.abs(left - other_left) > 8).mean() > 0.01
        assert np.abs(right - same_right).max() <= 2
        chromium.run(
            "document.querySelectorAll('.compare select')[1].value = '3'; document.querySelector("
            "'.compare').querySelectorAll('select')[1].dispatchEvent(new Event('input'))"
        )
        assert chromium.run(BORDER)[1] is None  # HR on both sides: nothing is clipped
        assert chromium.console() == []


def _halves(chromium, folder):
    """Return the pixels left and right of the first slider's border, without labels and handle."""
    box = chromium.run(
        "document.activeElement.blur(); const s = document.querySelector('.stage'); "
        "s.scrollIntoView({"
        "block: 'center', behavior: 'instant'}); const b = s.getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]"
    )
    with Image.open(chromium.screenshot(folder / "window.png")) as window:
        left, top, width, height = (round(side) for side in box)
        pixels = np.asarray(window.convert("RGB")).astype(int)[
            top + 40 : top + height - 4, left : left + width
        ]
    return pixels[:, 4 : int(0.1 * width)], pixels[:, int(0.4 * width) : -4]


def test_it_fits_a_phone_in_light_and_dark(page, tmp_path):
    with browser(tmp_path) as chromium:
        for dark, paper in ((False, "rgb(247, 247, 245)"), (True, "rgb(18, 21, 24)")):
            chromium.open(page, 390, 844, dark)
            width, background, wide = chromium.run(
                "return [document.documentElement.scrollWidth, "
                "getComputedStyle(document.body).backgroundColor, "
                "[...document.querySelectorAll('body *')].filter(e => "
                "e.getBoundingClientRect().right > 390.5 "
                "&& !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))]"
            )
            assert (width, background, wide) == (390, paper, [])
            shot = chromium.screenshot(tmp_path / "phone.png")
            with Image.open(shot) as window:
                assert window.size == (390, 844)
                assert len(window.convert("RGB").getcolors(100_000)) > 20
        chromium.drag(".stage", 0.5, 0.8, "touch")
        assert chromium.run(BORDER)[0] == pytest.approx(0.8, abs=0.01)
        assert chromium.console() == []
