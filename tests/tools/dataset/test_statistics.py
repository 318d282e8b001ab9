"""tools/dataset/statistics.py and its counters: exact numbers in fixed memory."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_python
from dataset_corpus import CHECKOUT
from pipeline.data.image_files import MANIFEST
from tools.crops.manifest import CropRecord, format_line
from tools.dataset.sampling import (
    MAX_KINDS,
    HashSample,
    Histogram,
    KeySet,
    LowestOfGroups,
    Tally,
    path_key,
)
from tools.dataset.sources import GATE_EDGES
from tools.dataset.statistics import gather
from tools.report.charts import gate_chart, photos_chart

FAST = settings(deadline=None, max_examples=50)


def record(number: int, photo: str, **gates: float) -> CropRecord:
    """A crop whose file does not exist."""
    return CropRecord(
        f"{photo}/{number}.npy",
        photo,
        1,
        0,
        0,
        512,
        786560,
        f"{number:064x}",
        "test 1",
        gates,
        1,
        1,
        1,
    )


def write_manifest(folder: Path, records: list[CropRecord]) -> None:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("".join(map(format_line, records)))


@FAST
@given(st.sets(st.text()), st.sets(st.text()))
def test_a_key_set_is_a_set(inside, asked):
    keys = KeySet()
    for name in [*inside, *inside]:
        keys.add(path_key(repr(name)))
    assert len(keys) == len(inside)
    assert {name for name in asked | inside if path_key(repr(name)) in keys} == inside


@FAST
@given(
    st.lists(st.text("abc", min_size=1), unique=True),
    st.integers(0, 8),
    st.integers(0, 3),
    st.randoms(),
)
def test_a_sample_does_not_depend_on_order_or_parts(names, size, seed, rng):
    def drawn(names):
        sample = HashSample(size, seed)
        for name in names:
            sample.add(name, name)
        return list(sample)

    whole = drawn(names)
    assert len(whole) == min(size, len(names))
    assert drawn(rng.sample(names, len(names))) == whole
    assert drawn(drawn(names[::2]) + drawn(names[1::2])) == whole


def test_a_sample_is_uniform():
    counts = Counter()
    for seed in range(400):
        sample = HashSample(5, seed)
        for number in range(50):
            sample.add(f"photo_{number}", number)
        counts.update(sample)
    assert sum(counts.values()) == 2000
    assert min(counts.values()) >= 15  # 40 expected, with a standard deviation of 6
    assert max(counts.values()) <= 65


@FAST
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 9)), max_size=60),
    st.integers(0, 5),
)
def test_lowest_of_groups_is_what_sorting_gives(entries, size):
    lowest = LowestOfGroups(size)
    best: dict[str, tuple[float, str]] = {}
    for number, (group, value) in enumerate(entries):
        lowest.add(group, value, f"{number:03d}", f"{number:03d}")
        best[group] = min(best.get(group, (math.inf, "")), (value, f"{number:03d}"))
    assert list(lowest) == sorted(best.values())[:size]


def test_histograms_count_like_numpy():
    values = np.random.default_rng(0).lognormal(0, 1, 5000)
    for edges in GATE_EDGES.values():
        histogram = Histogram(edges, threshold=1.1)
        for value in values:
            histogram.add(float(value))
        histogram.add(math.nan)
        assert histogram.counts == np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist()
        assert (histogram.below, histogram.above) == (
            (values < edges[0]).sum(),
            (values > edges[-1]).sum(),
        )
        assert (histogram.total, histogram.under) == (5000, (values < 1.1).sum())
        inside = float(np.median(values.clip(edges[0], edges[-1])))
        bin_width = np.diff(edges)[np.searchsorted(edges, inside) - 1]
        assert abs(histogram.quantile(0.5) - inside) <= bin_width
        assert sum(histogram.coarser(4).counts) == 5000


def test_a_tally_has_an_end():
    tally = Tally()
    for number in range(10_000):
        tally.add(str(number))
    assert len(tally) == MAX_KINDS + 1
    assert sum(tally.values()) == 10_000


def test_photographs_are_counted_wherever_their_crops_stand(tmp_path):
    rng = random.Random(0)
    photos = [f"photo_{min(int(rng.expovariate(0.2)), 30):02d}" for _ in range(500)]
    write_manifest(tmp_path / "a", [record(number, photo) for number, photo in enumerate(photos)])
    write_manifest(tmp_path / "b", [record(0, "photo_00"), record(1, "photo_00")])
    first, second = gather(tmp_path).sources
    counts = Counter(photos)
    assert first.photos.photographs == len(counts)
    assert sorted(first.photos.largest) == sorted(
        (count, f"a/{photo}") for photo, count in counts.most_common(10)
    )
    assert first.photos.by_size == Counter(count.bit_length() - 1 for count in counts.values())
    assert (second.photos.photographs, second.photos.largest) == (1, [(2, "b/photo_00")])
    assert first.missing == 500


def test_charts_hold_every_image():
    histogram = Histogram(GATE_EDGES["gradient"], threshold=1.3)
    for value in (0.1, 1.5, 1.5, 1.5, 900):
        histogram.add(value)
    chart = gate_chart("gradient", histogram)
    assert len(chart.bars) == 3
    tallest = max(chart.bars, key=lambda bar: bar.height)
    assert [round(tallest.height / bar.height) for bar in chart.bars] == [3, 1, 3]
    assert "1 below 0.25 and 1 above 64" in chart.summary
    assert "1 are below the line" in chart.summary
    assert chart.bars[0].x < chart.threshold.at < chart.bars[1].x + chart.bars[1].width
    floors = {round(bar.y + bar.height, 6) for bar in chart.bars}
    assert len(floors) == 1
    photos = photos_chart({0: 5, 3: 40})
    assert [bar.text for bar in photos.bars] == [
        "1 crops: 5 photographs",
        "8 to 15 crops: 40 photographs",
    ]
    assert [tick.text for tick in photos.x_ticks] == ["1", "2+", "4+", "8+"]


def test_memory_hardly_grows_with_the_crops(tmp_path):
    """A record takes about 3 KB of Python objects, so holding 25000 would take 75 MB."""

    def peak(count: int) -> int:
        records = [
            record(number, f"photo_{number // 20}", gradient=5.0, sharpness=0.7)
            for number in range(count)
        ]
        write_manifest(tmp_path / str(count) / "source", records)
        code = (
            "import resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
            "from tools.dataset.statistics import gather; statistics = gather(Path(sys.argv[2]), "
            "48); "
            "print(statistics.sources[0].images, "
            "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = run_python(code, str(CHECKOUT), str(tmp_path / str(count)))
        assert done.returncode == 0, done.stderr
        images, kilobytes = map(int, done.stdout.split())
        assert images == count
        return kilobytes // 1024

    assert peak(25_000) - peak(250) < 12
