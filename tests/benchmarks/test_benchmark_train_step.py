"""benchmarks/train_step.py: its errors, its conclusions from figures, and one real case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import train_step
from benchmarks.train_step import Case, Options, floors, main, report, verdict
from conftest import SMALL
from pipeline.cli import UserError

ROW = {
    "step": 0.3,
    "least": 0.29,
    "greatest": 0.31,
    "images": 8,
    "memory": 3 << 28,
    "first_step": 5.0,
    "parts": {"waiting for data": 0.001, "forward": 0.1, "backward": 0.18, "optimizer": 0.01},
    "device": "cpu",
    "ours_in_parts_of_bare": {"channels_last": 1.02, "contiguous": 0.9, "plain": 0.5},
    "layout": "channels_last",
    "kernel": "native",
    "world_size": 1,
    "macs": 20e9,
    "bytes": 3e9,
    "calls": 1000,
    "macs_per_second": 100e9,
    "bytes_per_second": 20e9,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "bound by compute (67% of the step"),
        ({"bytes": 5e9}, "bound by memory (83% of the step"),
        (
            {"macs": 5e9, "bytes": 1e9},
            "bound by its kernels: compute would allow 6.0 times the speed; backward takes 62%",
        ),
        (
            {"parts": {"waiting for data": 0.1, "backward": 0.2}},
            "bound by the loader (33% of the step)",
        ),
        ({"parts": {"communication": 0.1, "backward": 0.2}}, "bound by communication (33%)"),
        ({"device": "cuda", "calls": 50_000}, "bound by kernel launches (50000)"),
    ],
)
def test_the_verdict_follows_from_the_figures(changes: dict, words: str) -> None:
    assert verdict(ROW | changes).startswith(words)


def test_the_table_compares_with_the_better_bare_loop() -> None:
    assert floors(ROW) == (0.2, 0.15)
    row = report({Case("vapsr_x4", "eager", "fp32", "auto", 8): ROW}).splitlines()[4]
    assert row == (
        "| vapsr_x4 | 8 | fp32, eager, channels_last, native | 300 | 26.7 | 0.980 | 2.00 | 768 | "
        "5.0 | 200, 150 | 1.5 |"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(networks=("vapsr",)), "--networks vapsr: choose from vapsr_x2, "),
        (Options(batches=(0,)), "must be above 0"),
        (Options(precisions=("fp16",)), "fp16 needs a GPU"),
        (Options(ways=("reduce-overhead",)), "reduce-overhead needs a GPU"),
    ],
)
def test_bad_options_are_refused(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)


def test_a_case_is_a_real_run(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny = tuple(
        word
        for word in SMALL
        if "batch_size" not in word and not word.startswith(("compile", "channels"))
    )
    monkeypatch.setitem(train_step.NETWORKS, "vapsr_x2", ("demo", tiny))
    main(
        Options(
            networks=("vapsr_x2",),
            batches=(2,),
            seconds=0.1,
            native_kernels="off",
            layouts=("channels_last",),
            json=tmp_path / "figures.json",
        )
    )
    (row,) = json.loads((tmp_path / "figures.json").read_text())
    assert (row["kernel"], row["layout"], row["images"], row["windows"]) == (
        "torch",
        "channels_last",
        2,
        5,
    )
    assert {"waiting for data", "forward", "losses", "backward", "optimizer", "EMA"} <= row[
        "parts"
    ].keys()
    assert set(row["ours_in_parts_of_bare"]) == {"channels_last", "contiguous"}
    # The first layer: 3 -> 8 channels, 3x3, 2 images of 16x16; counted in the forward pass and for
    # the gradient of its weights.
    assert row["macs"] > 2 * 2 * 16 * 16 * 8 * 27
    assert "| vapsr_x2 | 2 | fp32, eager, channels_last, torch |" in capsys.readouterr().out
