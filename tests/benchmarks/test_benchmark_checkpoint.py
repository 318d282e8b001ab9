"""benchmarks/checkpoint.py saves what training saves, and computes its ratios correctly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import Row, _table
from lives import in_ranks


def _measure(folder: str) -> list[Any]:
    from benchmarks.checkpoint import Options, main
    from pipeline.checkpoint import saving
    from pipeline.checkpoint_index import damage
    from pipeline.run_folder import checkpoint_dir

    found, commit = [], saving._commit

    def watched(aside: Path, final: Path, *arguments: Any) -> None:
        commit(aside, final, *arguments)
        found.append(
            damage(checkpoint_dir(final.parents[1], int(final.name.removeprefix("step-"))))
        )

    saving._commit = watched
    options = Options(
        ("num_features=4", "num_blocks=1"),
        network="srresnet",
        scale=2,
        patch=8,
        rounds=2,
        folder=Path(folder),
        json=Path(folder) / "out.json",
    )
    return [main(options), found]


def test_every_way_is_measured_in_turns(tmp_path: Path) -> None:
    assert in_ranks(_measure, tmp_path / "ranks", 1, str(tmp_path)) == [[0, [""] * 6]]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(len(row["stalls"]), len(row["steps"])) for row in report["rows"]] == [(2, 2)] * 3
    assert all(
        seconds > 0
        for row in report["rows"]
        for seconds in row["stalls"] + row["cpu"] + row["steps"]
    )
    assert report["bytes"] > 4 * 4 * report["parameters"]
    # No checkpoints are left behind.
    assert {path.name for path in tmp_path.iterdir()} == {"ranks", "out.json"}
    assert "a checkpoint of 0 MB" in (tmp_path / "ranks" / "0.output").read_text()


def test_ratios_are_of_the_same_round() -> None:
    table = _table(
        [
            Row("first", [2.0, 4.0, 8.0], [1.0, 1.0, 2.0], [1.0]),
            Row("other", [1.0, 1.0, 4.0], [0.5, 0.25, 0.5], [0.5]),
        ]
    )
    assert table.splitlines()[2:] == [
        "| first | 4000 | 2000 to 8000 | 1.000 | 1000 | 1.000 | 1000 |",
        "| other | 1000 | 1000 to 4000 | 0.500 | 500 | 0.250 | 500 |",
    ]
