"""A snapshot holds one moment: later changes of the tensors do not reach it."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from comparison import differences
from pipeline.checkpoint.snapshot import HostMemory, Snapshot


class Scaler:
    """An object of a runtime that is not a tensor and changes in place."""

    def __init__(self) -> None:
        self.scale, self.history = 8.0, [1, 2]


def state() -> dict[str, Any]:
    """Return every kind of value that engines save: views of shared memory, halves, counters,
    parameters, empty tensors, objects."""
    torch.manual_seed(0)
    flat = torch.randn(1000)
    moments = torch.randn(3, 5, 7, 9).contiguous(memory_format=torch.channels_last)
    return {
        "module": OrderedDict(first=flat[:10].view(2, 5), second=flat[500:], whole=flat),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": moments, "again": moments}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
        },
        "half": torch.randn(33).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.randn(4)),
        "wanted": torch.randn(2, requires_grad=True),
        "text": "ü",
        "none": None,
        "scaler": Scaler(),
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
    }


def saved(content: Any) -> Any:
    """Save to a file and load it again."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def spoil(content: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in (
            content["module"]["whole"],
            content["optimizer"]["state"][0]["exp_avg"],
            content["half"],
            content["optimizer"]["state"][0]["step"],
            content["parameter"],
            content["wanted"],
        ):
            tensor.add_(1)
        content["flags"].logical_not_()
    content["scaler"].scale, content["text"] = 1.0, "other"
    content["scaler"].history.append(3)
    content["optimizer"]["param_groups"][0]["lr"] = 0.5


def test_what_is_done_afterwards_does_not_reach_it() -> None:
    content, snapshot = state(), Snapshot(HostMemory())
    frozen = snapshot.add(content)
    snapshot.copy()
    spoil(content)
    snapshot.wait()
    assert differences(saved(frozen.thaw()), saved(state())) == []
    assert differences(saved(frozen.thaw()), saved(content)) != []


def test_shared_memory_is_copied_once_and_stays_shared() -> None:
    content, snapshot = state(), Snapshot(HostMemory())
    first, second = snapshot.add(content), snapshot.add({"weights": content["module"]["first"]})
    snapshot.copy()
    taken = first.thaw()
    storages = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*taken["module"].values(), second.thaw()["weights"])
    }
    assert len(storages) == 1
    assert storages != {content["module"]["whole"].untyped_storage().data_ptr()}
    moments = taken["optimizer"]["state"][0]
    assert moments["exp_avg"] is moments["again"]
    assert moments["exp_avg"].stride() == content["optimizer"]["state"][0]["exp_avg"].stride()
    assert type(taken["parameter"]) is nn.Parameter
    assert taken["wanted"].requires_grad
    assert len(io_bytes(taken)) == len(io_bytes(content)), (
        "copies of shared memory must not enlarge the file"
    )


def io_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_memory_is_reserved_and_kept_for_the_next_one() -> None:
    memory = HostMemory()
    reserving = Snapshot(memory)
    reserving.add({"weights": torch.zeros(100_000)})
    reserving.reserve()
    places = [memory.room(400_000, is_pinned=False).data_ptr()]
    for number in range(3):
        snapshot, content = Snapshot(memory), {"weights": torch.full((100_000,), float(number))}
        frozen = snapshot.add(content)
        snapshot.copy()
        weights = frozen.thaw()["weights"]
        assert (weights == number).all()
        places.append(weights.data_ptr())
    assert len({*places}) == 1


def test_too_little_memory_is_an_error_and_the_next_snapshot_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, content = HostMemory(), {"weights": torch.ones(10)}

    def none(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    snapshot = Snapshot(memory)
    snapshot.add(content)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checkpoint.snapshot._huge_pages", none)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            snapshot.copy()
    snapshot = Snapshot(memory)
    frozen = snapshot.add(content)
    snapshot.copy()
    assert torch.equal(frozen.thaw()["weights"], content["weights"])
