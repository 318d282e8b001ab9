"""tools.crops.leakage finds parts and copies of benchmark pictures, and no other photographs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from dataset_photographs import brightened, crops, photographs, recompressed, resized
from fabricate import shared, write_images
from pipeline.cli import UserError
from tools.crops.leakage import BenchmarkIndex

BENCHMARK = ("astronaut.png", "china.jpg", "coffee.png")
OTHERS = ("chelsea.png", "flower.jpg", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
PARTS = [(0, 0), (37, 101), (130, 64), (61, 5)]  # top-left corners


def _mirrored(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[:, ::-1])


CHANGES = {
    "exact": lambda pixels: pixels,
    "JPEG 75": lambda pixels: recompressed(pixels, 75),
    "brighter": lambda pixels: brightened(pixels, 5),
    "darker": lambda pixels: brightened(pixels, -5),
    "mirrored": _mirrored,
    "all": lambda pixels: _mirrored(recompressed(brightened(pixels, 5), 80)),
}


def _part(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    top, left = min(top, pixels.shape[0] - size), min(left, pixels.shape[1] - size)
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A benchmark of three photographs."""
    pictures = {name.replace(".jpg", ".png"): photographs()[name] for name in BENCHMARK}
    return write_images(tmp_path_factory.mktemp("benchmark") / "Set3", pictures)


@pytest.fixture(scope="module")
def index(folder):
    return BenchmarkIndex([folder], threads=1)


def _name(name: str) -> str:
    return "Set3/" + name.replace(".jpg", ".png")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("size", [128, 192])
def test_parts_are_found(index, change, size):
    for name in BENCHMARK:
        for top, left in PARTS:
            part = _part(photographs()[name], top, left, size)
            if cv2.Laplacian(part, cv2.CV_16S).std() > 5:
                assert index.find(change(part)) == _name(name)


@pytest.mark.parametrize("factor", [2, 4])
def test_parts_of_reduced_pictures_are_found(tmp_path, factor):
    large = {
        f"{name}.png": resized(photographs()[name], 2) for name in ("coffee.png", "astronaut.png")
    }
    index = BenchmarkIndex([write_images(tmp_path / "large", large)])
    for name, pixels in large.items():
        reduced = resized(pixels, 1 / factor)
        assert index.find(_part(reduced, 21, 33, 128)) == f"large/{name}"
        assert index.find(recompressed(_mirrored(_part(reduced, 5, 8, 128)), 75)) == f"large/{name}"


@pytest.mark.parametrize(("factor", "size"), [(2, 192), (4, 384)])
def test_parts_of_the_larger_original_are_found(tmp_path, factor, size):
    names = ("coffee.png", "astronaut.png")
    small = {name: resized(photographs()[name], 1 / factor) for name in names}
    index = BenchmarkIndex([write_images(tmp_path / "small", small)])
    for name in names:
        assert index.find(_part(photographs()[name], 3, 17, size)) == f"small/{name}"


@pytest.mark.parametrize("factor", [0.3, 0.77, 1.3, 2])
def test_whole_copies_are_found_at_any_size(index, factor):
    for name in BENCHMARK:
        copy = resized(photographs()[name], factor)
        assert index.find(recompressed(copy, 75)) == _name(name)
        assert index.find(_mirrored(copy)) == _name(name)


def test_a_picture_that_holds_a_benchmark_picture_is_found(tmp_path):
    pixels = photographs()["coffee.png"]
    index = BenchmarkIndex(
        [write_images(tmp_path / "parts", {"part.png": _part(pixels, 50, 90, 160)})]
    )
    assert index.find(pixels) == "parts/part.png"


def test_other_photographs_are_not_found(index):
    for name in OTHERS:
        pixels = photographs()[name]
        queries = [
            pixels,
            resized(pixels, 2),
            *crops(pixels, 128),
            *crops(np.ascontiguousarray(pixels[::-1]), 160),
        ]
        assert [index.find(query) for query in queries] == [None] * len(queries)


@pytest.mark.parametrize("shape", [(512, 512), (128, 128), (64, 64), (63, 300), (16, 16), (1, 1)])
def test_pictures_that_say_nothing_are_not_found(index, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    edge = np.zeros((*shape, 3), np.uint8)
    edge[:, shape[1] // 2 :] = 255
    assert [index.find(pixels) for pixels in (noise, edge, np.full_like(edge, 90))] == [None] * 3


def test_threads_get_the_same_answers(index):
    queries = [
        crop
        for name in ("astronaut.png", "chelsea.png")
        for crop in crops(photographs()[name], 128)
    ]
    expected = [index.find(query) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(index.find, queries)) == expected
    assert {"Set3/astronaut.png", None} == set(expected)


def test_unreadable_files_are_named_and_the_rest_is_used(tmp_path, folder):
    (tmp_path / "broken.png").write_bytes((folder / "coffee.png").read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "coffee.png").write_bytes((folder / "coffee.png").read_bytes())
    (tmp_path / "tiny.png").write_bytes(
        cv2.imencode(".png", np.zeros((3, 5, 3), np.uint8))[1].tobytes()
    )
    index = BenchmarkIndex([tmp_path, folder])
    assert len(index) == 5
    assert len(index.skipped) == 1
    assert "broken.png: " in index.skipped[0]
    assert index.find(photographs()["coffee.png"]) == f"{tmp_path.name}/coffee.png"


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    for folders, words in (
        ([], "no folder"),
        ([tmp_path], "empty file"),
        ([tmp_path / "gone"], "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            BenchmarkIndex(folders)


def test_a_benchmark_of_tiny_pictures_finds_whole_copies(tmp_path):
    """Below 64 pixels, only copies of the whole picture can be found."""
    tiny = {"tiny.png": resized(photographs()["coffee.png"], 0.08)}
    index = BenchmarkIndex([write_images(tmp_path / "tiny", tiny)])
    assert index.find(photographs()["coffee.png"]) == "tiny/tiny.png"
    assert index.find(photographs()["chelsea.png"]) is None


def test_benchmarks_do_not_find_one_another():
    index = BenchmarkIndex([shared("data/sunhays80")])
    for name in ("kodak", "t91"):
        for path in sorted(shared(f"data/{name}").glob("*.png"))[::3]:
            assert index.find(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)) is None
