"""Weights & Biases with its real package, offline: it never stops a run and gets the numbers of
log.jsonl."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comparison import checkpoint_differences, logged
from conftest import ROOT, command, environment
from lives import train
from pipeline.monitor.wandb_tracker import WandbTracker

# its import takes seconds, which only the tests here shall spend
if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _without_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def records(folder: Path) -> Iterator[Any]:
    """Yield what an offline run has stored."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        yield record


def history(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            line: dict[str, Any] = {}
            for item in record.history.item:
                *outer, key = item.nested_key
                place = line
                for name in outer:
                    place = place.setdefault(name, {})
                place[key] = json.loads(item.value_json)
            lines.append(line)
    return lines


def test_an_offline_run_has_the_numbers_of_the_log(dataset: Path, tmp_path: Path) -> None:
    arguments = [
        *command(dataset, tmp_path / "run", "steps=4", "keep=9", "previews.count=3"),
        "--wandb",
        "vastscale-test",
    ]
    done = subprocess.run(
        arguments,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "W&B: " in done.stdout
    assert (
        "no key for https://api.wandb.ai; set one with `wandb login` or WANDB_API_KEY"
        in done.stdout
    )
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"W&B: not sent yet; send it with `wandb login` and `wandb sync {folder}`" in done.stdout
    run_id = (tmp_path / "run" / "wandb" / "run_id").read_text().strip()
    assert folder.name.endswith(f"-{run_id}")
    lines = history(folder)
    for event, key in (("train", "loss"), ("train", "lr"), ("validation", "psnr_y")):
        tag = f"{event}/{key}"
        assert [(line["step"], line[tag]) for line in lines if tag in line] == logged(
            tmp_path / "run", event, key
        )
    pictures = [line for line in lines if "photos/10.npy/output" in line]
    assert [line["step"] for line in pictures] == [0, 3, 4]
    assert (
        pictures[0]["photos/10.npy/output"]["height"],
        pictures[0]["photos/10.npy/output"]["width"],
    ) == (84, 66)
    (config,) = (
        record.run.config for record in records(folder) if record.WhichOneof("record_type") == "run"
    )
    values = {item.key: json.loads(item.value_json) for item in config.update}
    assert values["recipe"]["generator"]["num_features"] == 8
    assert values["ds_config"]["train_batch_size"] == 4
    train(dataset, tmp_path / "plain", "steps=4", "keep=9")
    assert checkpoint_differences(tmp_path / "plain", tmp_path / "run", 4) == []


def track(folder: Path, said: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    tracker = WandbTracker(folder, "vastscale-test", "run", {"steps": 2}, said.append)
    said.append(tracker.introduction)
    tracker.scalars(1, {"train/loss": 0.5})
    tracker.histogram(1, "weights/w", np.array([0.0, 0.0, 1.0], np.float32))
    tracker.finish()


class _Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "not you"}]}')

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None: ...


def test_a_server_that_is_gone_or_refuses_is_no_obstacle_and_the_run_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    track(tmp_path / "logs", said)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        track(tmp_path / "logs", said)
        server.shutdown()
    assert "http://127.0.0.1:9 cannot be reached" in said[0]
    assert "wandb could not start online: " in said[2]
    assert not any("warning" in line or "0123456789" in line for line in said), said
    ids = {
        folder.name.rpartition("-")[2]
        for folder in (tmp_path / "logs" / "wandb").glob("offline-run-*")
    }
    assert ids == {(tmp_path / "logs" / "wandb" / "run_id").read_text().strip()}
    for folder in (tmp_path / "logs" / "wandb").glob("offline-run-*"):
        assert history(folder)[0]["train/loss"] == 0.5
        assert sum(history(folder)[1]["weights/w"]["values"]) == 3


def test_trouble_within_wandb_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(wandb, "init", fail)
    said: list[str] = []
    track(tmp_path / "logs", said)
    assert said == ["warning: W&B: no such luck; training continues without it", "W&B: not used"]


def test_without_the_package_nothing_begins(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "wandb.py").write_text("raise ImportError('No module named wandb')\n")
    variables = environment() | {"PYTHONPATH": f"{tmp_path / 'lacking'}:{ROOT}"}
    done = subprocess.run(
        [*command(dataset, tmp_path / "run", "steps=4"), "--wandb", "p"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: --wandb needs the package wandb (No module named wandb); run `pip install wandb` "
        "in this environment, or omit --wandb\n"
    )
    assert not (tmp_path / "run").exists()
