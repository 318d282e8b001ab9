"""tools/dataset_report.py: the page is parsed and compared with the dataset, and rendered.

Rendering needs a browser and is skipped without one.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_corpus import (
    UNGATED,
    assert_user_error,
    dataset_hash,
    encoded,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    write_files,
)
from pipeline.data.image_files import MANIFEST, TRAINING_LIST
from tools.crops.manifest import CropRecord, format_lines, iterate_records
from tools.crops.quality import crop_gates, picture_gates

VOID = {"meta", "link", "img", "br"}
ALERT = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """Parses a page; fails if tags do not match."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self._open: list[str] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "figcaption":
            self.captions.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("line", "rect")
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self._open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
        if "figcaption" in self._open:
            self.captions[-1] = " ".join(f"{self.captions[-1]} {data}".split())

    def row(self, name: str) -> list[str]:
        """Cells of the first row whose first cell starts with `name`."""
        return next(row for row in self.rows if row[0].startswith(name))


def report(folder: Path, out: Path, *arguments: object) -> Page:
    result = run_tool("dataset_report", "--data-dir", folder, "--out", out, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    page = Page(out.read_bytes())
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    assert "url(" not in out.read_text()
    assert "@import" not in out.read_text()
    return page


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A dataset with two sources, loose images, lists and a quarantine.

    A broken photograph, a copy and flat crops are rejected.
    """
    folder = tmp_path_factory.mktemp("report")
    files = {
        f"{number}.png": encoded(photograph(130, 260, seed=number), "png") for number in range(6)
    }
    flat = photograph(130, 260, seed=9)
    flat[:, :140] = 90
    write_files(
        folder / "photos",
        {**files, "broken.png": files["0.png"][:-500], "flat.png": encoded(flat, "png")},
    )
    gates = ("--min-sharpness", "0", "--min-gradient", "1.75", "--keep-duplicates")
    for name, more in (("gated", gates), ("other", UNGATED)):
        made = run_tool(
            "images_to_data", folder / "photos", folder / "data" / name, "--size", 64, *more
        )
        assert made.returncode == 1, made.stderr
    loose = {
        f"loose/{number}.png": encoded(photograph(70, 90, seed=number), "png")
        for number in range(4)
    }
    write_files(
        folder / "data", {**loose, "loose/broken.png": b"none", "quarantine/loose/old.png": b"x"}
    )
    entry = {
        "path": "loose/old.png",
        "moved_to": "quarantine/loose/old.png",
        "reason": "an animation",
        "gate": "file",
    }
    (folder / "data/quarantine/report.jsonl").write_text(json.dumps(entry) + "\n")
    assert (
        run_tool(
            "select_training_files", "--data-dir", folder / "data", "--validation-count", 3
        ).returncode
        == 0
    )
    return folder / "data"


@pytest.fixture(scope="module")
def page_file(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(dataset, out, "--samples", 12)
    return out


@pytest.fixture(scope="module")
def page(page_file) -> Page:
    return Page(page_file.read_bytes())


def records(folder: Path) -> list[CropRecord]:
    return list(
        iterate_records(
            folder, [path.relative_to(folder).as_posix() for path in folder.rglob(MANIFEST)]
        )
    )


def test_counts_are_those_of_the_manifests(dataset, page, page_file):
    crops, text = records(dataset), page_file.read_text()
    for name in ("gated", "other"):
        mine = [record for record in crops if record.path.startswith(f"{name}/")]
        row = page.row(name)
        assert row[1] == str(len({record.photo for record in mine}))
        assert row[2].startswith(f"{len(mine)} ")
        assert row[-1] == dataset_hash(dataset / name)[:12]
        lines = (dataset / name / "rejects.jsonl").read_text().splitlines()
        assert row[7] == str(len(lines))
    assert page.row("gated")[0].endswith(
        "images_to_data --min-gradient 1.75 --min-sharpness 0 --keep-duplicates"
    )
    assert page.row("All 3")[2] == str(len(crops) + 5)
    assert dataset_hash(dataset, "gated", "other") in text
    assert page.row(TRAINING_LIST)[1] == str(
        len((dataset / TRAINING_LIST).read_text().splitlines())
    )
    assert f"{len(crops)} images: median" in " ".join(page.captions)


def test_rejects_have_counts_and_examples(dataset, page):
    rejects = [
        json.loads(line) for line in (dataset / "gated/rejects.jsonl").read_text().splitlines()
    ]
    flat = [reject for reject in rejects if reject["gate"] == "flat"]
    assert len(flat) >= 4
    row = page.row("flat")
    assert row[1:3] == ["0", str(len(flat))]
    assert "gated/flat.png, 1/" in row[3]
    assert "--min-gradient" in row[3]
    row = page.row("decode")
    assert row[1:3] == ["2", "0"]
    assert "gated/broken.png truncated" in row[3]
    assert page.row("file")[1:] == ["1", "loose/old.png an animation"]


def test_contact_sheet_shows_the_crops(dataset, page):
    by_path = {record.path: record for record in records(dataset)}
    assert len(page.images) > 12
    for image in page.images:
        path = image["title"].splitlines()[0]
        assert image["alt"] in (path, f"Centre of {path}")
        content = base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"))
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        pixels = (
            np.load(dataset / path)
            if path.endswith(".npy")
            else np.asarray(Image.open(dataset / path))
        )
        assert shown.shape == pixels.shape  # small enough to be shown as a whole
        assert np.abs(shown - pixels).mean() < 12
        if path in by_path:
            assert f"gradient {by_path[path].gates['gradient']:.3g}" in image["title"]
            assert by_path[path].photo in image["title"]
        else:
            assert f"gradient {crop_gates(pixels)['gradient']:.3g}" in image["title"]
            assert (
                f"source_sharpness {picture_gates(pixels)['source_sharpness']:.3g}"
                in image["title"]
            )


def test_extremes_are_the_lowest_of_each_photograph(dataset, tmp_path):
    shutil.copytree(dataset / "gated", tmp_path / "data/gated")
    page = report(tmp_path / "data", tmp_path / "report.html", "--samples", 8)
    lowest: dict[str, tuple[float, str]] = {}
    for record in records(tmp_path / "data"):
        entry = (record.gates["gradient"], record.path)
        lowest[record.photo] = min(lowest.get(record.photo, entry), entry)
    shown = [image["title"].splitlines()[0] for image in page.images]
    assert len(shown) == 8 + 3 * 4
    assert shown[-4:] == [path for _, path in sorted(lowest.values())[:4]]


def test_seed_decides_the_draw(dataset, page, tmp_path):
    def drawn(page: Page) -> list[str]:
        return [image["alt"] for image in page.images]

    assert drawn(report(dataset, tmp_path / "a.html", "--samples", 12, "--threads", 1)) == drawn(
        page
    )
    assert drawn(report(dataset, tmp_path / "b.html", "--samples", 12, "--seed", 1)) != drawn(page)
    assert report(dataset, tmp_path / "c.html", "--samples", 0).images == []


def test_images_in_no_manifest_are_measured(page_file, tmp_path):
    text = " ".join(page_file.read_text().split())
    assert "5 images are in no manifest" in text
    assert "4 of them, drawn at random with seed 0, were measured now; 1 more could not be" in text
    write_files(
        tmp_path / "plain",
        {f"{number:02d}.npy": npy(photograph(40, 50, seed=number)) for number in range(20)},
    )
    page = report(tmp_path / "plain", tmp_path / "report.html", "--samples", 6)
    assert "6 of them, drawn at random with seed 0," in " ".join(
        (tmp_path / "report.html").read_text().split()
    )
    assert len({image["title"].splitlines()[0] for image in page.images}) == 6
    assert page.row("All 1")[2] == "20"


def test_what_cannot_be_shown_is_said(tmp_path):
    records = [
        CropRecord(
            path, f"photo_{number}", 1, 0, 0, 32, 1, "0" * 64, "test", {"gradient": 2.0}, 1, 1, 1
        )
        for number, path in enumerate(("gone.npy", "cut.npy"))
    ]
    write_files(
        tmp_path,
        {
            f"data/source/{MANIFEST}": format_lines(records).encode(),
            "data/source/cut.npy": b"\x93NUMPY",
        },
    )
    page = report(tmp_path / "data", tmp_path / "report.html")
    assert page.images == []
    text = (tmp_path / "report.html").read_text()
    assert text.count(">missing<") == 2  # among the random images, and among the flattest
    assert text.count(">not an .npy array") == 2


@pytest.mark.parametrize("path", ["../secret.npy", "/etc/passwd", "a/../../secret.npy"])
def test_a_path_that_leads_out_of_the_dataset_is_refused(tmp_path, path):
    records = [
        CropRecord(name, "photo", 1, 0, 0, 32, 1, "0" * 64, "test", {"gradient": 2.0}, 1, 1, 1)
        for name in (path, "good.npy")
    ]
    write_files(
        tmp_path,
        {
            f"data/source/{MANIFEST}": format_lines(records).encode(),
            "secret.npy": npy(photograph(32, 32)),
        },
    )
    result = run_tool(
        "dataset_report", "--data-dir", tmp_path / "data", "--out", tmp_path / "report.html"
    )
    assert_user_error(result, MANIFEST, "line 1")
    assert not (tmp_path / "report.html").exists()


def test_hostile_names_stay_text(tmp_path):
    names = [
        f"{ALERT}.png",
        "line\nbreak.png",
        "\u202egnp.exe.png",
        os.fsdecode(b"not-utf8-\xff.png"),
        "{{ 7 * 7 }}.png",
    ]
    for name in names:
        write_files(
            tmp_path / "data",
            {f"{name}/{name}".replace("</", "<"): encoded(photograph(40, 40), "png")},
        )
    hostile = CropRecord(
        ALERT, f"{ALERT}\n\0\udcff", 1, 0, 0, 32, 1, "0" * 64, ALERT, {"gradient": 2.0}, 1, 1, 1
    )
    reject = {
        "photo": ALERT,
        "folder": "x",
        "gate": ALERT,
        "reason": ALERT,
        "photo_bytes": 1,
        "photo_mtime_ns": 1,
        "whole": True,
    }
    moved = {"path": ALERT, "moved_to": "source", "reason": ALERT * 1000, "gate": ALERT}
    write_files(
        tmp_path / "data",
        {
            f"source/{MANIFEST}": json.dumps(json.loads(format_lines([hostile]))).encode() + b"\n",
            "source/rejects.jsonl": json.dumps(reject).encode() + b"\n{torn",
            "source/dataset.json": json.dumps({"tool": ALERT, "min_gradient": ALERT}).encode(),
            "quarantine/source": b"x",
            "quarantine/report.jsonl": json.dumps(moved).encode() + b"\n[1]\n",
        },
    )
    page = report(tmp_path / "data", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert html.escape(ALERT, quote=False)[:20] in text
    assert page.row("source")[0] == f"source {ALERT} --min-gradient {ALERT}"
    assert "\u202e" not in text
    assert "49.png" not in text
    assert "{{ 7 * 7 }}.png" in text
    assert "not-utf8-\\udcff.png" in text
    assert len(page.images) >= len(names)


def test_page_is_accessible_and_its_colours_have_contrast(page, page_file):
    text = page_file.read_text()
    assert '<html lang="en">' in text
    assert all(image["alt"] for image in page.images)
    assert text.count("<svg") == text.count('<svg viewBox="0 0 420 250" role="img" aria-label="')
    for table in re.findall(r"<table.*?</table>", text, re.S):
        assert "<caption>" in table
        assert all('scope="' in head for head in re.findall(r"<th .*?>", table))
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    for colours in (light, {**light, **dark}):
        pairs = [
            (ink, paper)
            for ink in ("text", "muted", "accent", "alert")
            for paper in ("page", "card")
        ]
        for ink, paper in [*pairs, ("alert", "alert-soft"), ("text", "alert-soft")]:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)  # WCAG 2.2, AA


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours by WCAG 2.2, 1 to 21."""

    def luminance(colour: str) -> float:
        values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in values
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_user_errors_write_nothing(dataset, tmp_path):
    before = stamped_tree(dataset)
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("--data-dir", tmp_path / "none"), ("no such folder",)),
        (("--data-dir", tmp_path / "empty"), ("no images",)),
        (("--data-dir", dataset, "--samples", -1), ("--samples -1", "500")),
        (("--data-dir", dataset, "--samples", 501), ("--samples 501",)),
    ):
        assert_user_error(
            run_tool("dataset_report", "--out", tmp_path / "report.html", *arguments), *words
        )
    for out, words in (
        (tmp_path / "no/report.html", "no folder"),
        (tmp_path / "empty", "is a folder"),
    ):
        assert_user_error(run_tool("dataset_report", "--data-dir", dataset, "--out", out), words)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]
    assert stamped_tree(dataset) == before


def test_a_browser_shows_it_on_a_phone(page_file, tmp_path):
    """At 390 pixels: no horizontal scrolling, all pictures decode, the dark scheme applies."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no chromium on this machine")
    shutil.copy(page_file, tmp_path / "report.html")
    (
        tmp_path / "frame.html"
    ).write_text("""<!DOCTYPE html><iframe id="f" src="report.html" width="390" height="800"
        style="border:0"></iframe><p id="result"></p><script>
        const frame = document.getElementById('f');
        frame.onload = () => {
          const page = frame.contentDocument, images = [...page.images];
          const wide = [...page.querySelectorAll('body *')].filter(
            e => e.getBoundingClientRect().right > 390.5 && !e.closest('thead'));
          document.getElementById('result').textContent = JSON.stringify({
            width: page.documentElement.scrollWidth,
            wide: wide.map(e => e.tagName),
            images: images.filter(image => image.naturalWidth > 0).length,
            paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor}); };
        </script>""")
    for scheme, paper in ((0, "rgb(18, 21, 24)"), (1, "rgb(247, 247, 245)")):
        found = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--hide-scrollbars",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-quic",
                "--allow-file-access-from-files",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--blink-settings=preferredColorScheme={scheme}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                (tmp_path / "frame.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        result = json.loads(html.unescape(re.search(r'<p id="result">(.*?)</p>', found.stdout)[1]))
        assert result["width"] == 390
        assert result["wide"] == []
        assert result["images"] == len(Page(page_file.read_bytes()).images)
        assert result["paper"] == paper
