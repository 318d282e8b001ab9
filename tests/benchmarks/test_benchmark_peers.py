"""benchmarks/peers.py: options are checked first, and loops take turns and are ended."""

from __future__ import annotations

from pathlib import Path

import cv2
import psutil
import pytest

from benchmarks import peers
from benchmarks.peers_loops import IN_BASICSR, NETWORKS
from conftest import photograph
from pipeline.cli import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ways": "ours,theirs"},
            "--ways: unknown 'theirs'; choose from ours, ours2, basicsr, plain, ancestor, ddp, "
            "lightning",
        ),
        (
            {"network": "vaspr"},
            "--network: unknown 'vaspr'; choose from vapsr, msrresnet, compact, rrdbnet",
        ),
        ({"crop": 90}, "--crop a multiple of 4 up to 480"),
        ({"ways": "basicsr"}, "basicsr needs --basicsr-python"),
        ({"basicsr_network": Path("none.py")}, "--basicsr-network: there is no file none.py"),
        ({"photos": ()}, "no photographs"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peers.main(peers.Options(**{"photos": (Path(),), **change}))


def test_basicsrs_networks_are_this_projects() -> None:
    """Except for VapSR, which it lacks. Other sizes would compare networks instead of loops."""
    assert NETWORKS.keys() - IN_BASICSR.keys() == {"vapsr"}
    assert IN_BASICSR["rrdbnet"]["num_block"] == NETWORKS["rrdbnet"]["num_blocks"]


def test_a_loop_is_run_in_windows_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), photograph(0, 490, 500))
    options = peers.Options(
        (tmp_path,),
        network="compact",
        ways="plain,plain",
        batch=2,
        crop=32,
        steps=1,
        rounds=2,
        threads=1,
    )
    assert peers.main(options) == 0
    printed = capsys.readouterr().out
    assert "compact x4, crops of 32, batch 2, 1 files of 480x480" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("plain")]
    assert len(rows) == 2
    # A loop that takes hardly any time is printed as 0.
    assert all(float(value) >= 0 for row in rows for value in row[1:])
    assert not [
        process
        for process in psutil.Process().children(recursive=True)
        if any("peers_loops.py" in word for word in process.cmdline())
    ]
