"""The loader's use of a GPU, with fakes for CUDA streams and DALI; needs no GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import types
from test_loader import images, source

from pipeline.cli import UserError
from pipeline.data import loader as loader_module
from pipeline.data import reader
from pipeline.data.loader import Loader
from pipeline.data.reader import batches

# The loader's own CUDA stream.


class Calls(list[tuple[Any, ...]]):
    """Records calls in order."""


class FakeStream:
    def __init__(self, calls: Calls, name: str) -> None:
        self.calls, self.name = calls, name

    def record_event(self) -> str:
        self.calls.append(("record", self.name))
        return f"event {sum(call[0] == 'record' for call in self.calls)}"

    def wait_event(self, event: str) -> None:
        self.calls.append(("wait", self.name, event))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replace CUDA streams and DALI's copy with fakes that record each call and its stream."""
    found, current = Calls(), ["training"]

    @contextlib.contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    def copy(output: Any, target: Any, cuda_stream: Any = None) -> None:
        found.append(("copy", current[0], cuda_stream.name))

    def empty(*_: Any, **__: Any) -> Any:
        found.append(("allot", current[0]))
        return FakeTensor(found)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(found, "loader"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(found, current[0]))
    monkeypatch.setattr("nvidia.dali.plugin.pytorch.feed_ndarray", copy)
    monkeypatch.setattr(loader_module.torch, "empty", empty)
    return found


class FakeTensor:
    device = torch.device("cuda", 0)

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def record_stream(self, stream: FakeStream) -> None:
        self.calls.append(("keep", stream.name))


class FakeOutput:
    dtype = types.UINT8

    def as_tensor(self) -> FakeOutput:
        return self

    def shape(self) -> list[int]:
        return [1]


def test_a_batch_is_copied_on_a_stream_of_its_own_and_waited_for_on_the_consumers(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = []

    def fake_batches(
        crops: Any, index: int, *, stream: Any, **_: Any
    ) -> Iterator[tuple[int, Any, Any]]:
        streams.append(stream.name)
        crops._made[0] = crops._made[1] = []
        yield 0, FakeOutput(), FakeOutput()
        yield 1, FakeOutput(), FakeOutput()

    monkeypatch.setattr(loader_module, "batches", fake_batches)
    crops = source(tmp_path, images(tmp_path, ".npy", 2))
    made = Loader(crops, 0, torch.device("cuda", 0), threads=1, prefetch=2)
    made._thread.join()
    assert streams == ["loader"]
    one = [("allot", "loader"), ("copy", "loader", "loader")]
    assert calls == [
        ("device", 0),
        *one,
        *one,
        ("record", "loader"),
        *one,
        *one,
        ("record", "loader"),
    ]
    calls.clear()
    batch = next(made)
    assert batch.index == 0
    assert calls == [("wait", "training", "event 1"), ("keep", "training"), ("keep", "training")]
    made.close()


def test_on_a_cpu_nothing_of_cuda_is_called(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("a stream"))
    made = Loader(
        source(tmp_path, images(tmp_path, ".npy", 2)), 0, torch.device("cpu"), threads=1, prefetch=2
    )
    try:
        assert next(made).hr.device.type == "cpu"
    finally:
        made.close()
    assert not calls


# A file that the GPU's decoder rejects.


class Refusing:
    """Fake GPU pipelines that fail on a bad file if they decode on the GPU."""

    def __init__(self, crops: Any, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[tuple[int, bool]] = []
        make = reader.training_pipeline

        def stand_in(
            source: Any, index: int, *, device_id: Any, decodes_on_gpu: bool, **more: Any
        ) -> Any:
            assert device_id == 0
            self.built.append((index, decodes_on_gpu))
            return _Checked(
                make(source, index, device_id=None, **more),
                crops,
                index,
                bad if decodes_on_gpu else "",
            )

        monkeypatch.setattr(reader, "training_pipeline", stand_in)


class _Checked:
    def __init__(self, pipeline: Any, crops: Any, index: int, bad: str) -> None:
        self.pipeline, self.crops, self.index, self.bad = pipeline, crops, index, bad

    def run(self) -> Any:
        outputs = self.pipeline.run()
        if any(path.endswith(self.bad) for path in self.crops.files_of(self.index)) and self.bad:
            raise RuntimeError("nvJPEG: bad Huffman table\nsome stack")
        self.index += 1
        return outputs


def test_what_the_gpus_decoder_alone_refuses_is_decoded_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = images(tmp_path, ".jpg", count=12)
    plain = batches(source(tmp_path, names), 0, device_id=None, threads=1, prefetch=2)
    expected = [np.array(hr.as_array()) for _, hr, _ in itertools.islice(plain, 12)]
    crops = source(tmp_path, names)
    bad = names[crops.sampler.draw(17, 1).files[0]]  # of the fifth of micro-batches of four
    stand_in = Refusing(crops, bad, monkeypatch)
    got = []
    for index, hr, _ in itertools.islice(batches(crops, 0, device_id=0, threads=1, prefetch=2), 12):
        assert index == len(got)
        got.append(np.array(hr.as_array()))
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, other)
    shown = [
        index for index in range(12) if any(path.endswith(bad) for path in crops.files_of(index))
    ]
    on_cpu = {
        index for built, on_gpu in stand_in.built if not on_gpu for index in range(built, built + 3)
    }
    assert shown
    assert {*shown} <= on_cpu | {shown[-1]}
    assert stand_in.built[0] == (0, True)
    assert (shown[0], False) in stand_in.built
    assert (shown[0] + 3, True) in stand_in.built
    note = crops.notes[0]
    assert note.startswith(
        f"the GPU decoder rejects a file that the CPU decoder accepts; micro-batches {shown[0]} to "
    )
    assert "nvJPEG: bad Huffman table some stack" in note
    assert not crops.bad


def test_what_the_cpus_decoder_refuses_too_is_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = images(tmp_path, ".png", count=4)
    data = bytearray((tmp_path / names[0]).read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / names[0]).write_bytes(data)
    crops = source(tmp_path, names)
    stand_in = Refusing(crops, names[0], monkeypatch)
    with pytest.raises(UserError, match=rf"{names[0]}: "):
        for _ in batches(crops, 0, device_id=0, threads=1, prefetch=2):
            pass
    assert all(on_gpu for _, on_gpu in stand_in.built)


def test_where_the_cpu_fails_as_well_the_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    class Broken:
        def run(self) -> None:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(
        reader,
        "training_pipeline",
        lambda *_, decodes_on_gpu, **__: built.append(decodes_on_gpu) or Broken(),
    )
    # .npy files are not decoded
    for suffix, expected in ((".jpg", [True, False]), (".npy", [True])):
        built.clear()
        (tmp_path / suffix[1:]).mkdir()
        crops = source(tmp_path / suffix[1:], images(tmp_path / suffix[1:], suffix, count=3))
        with pytest.raises(
            RuntimeError,
            match=r"micro-batch 5, although each of its files decodes separately: out of memory",
        ):
            next(batches(crops, 5, device_id=0, threads=1, prefetch=2))
        assert built == expected


@pytest.mark.parametrize("exec_dynamic", [True, False])
def test_outputs_come_on_the_stream_where_dali_can_do_that(
    tmp_path: Path, exec_dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    stand_in = SimpleNamespace(
        exec_dynamic=exec_dynamic, run=lambda *stream: asked.append(stream) or ("hr", "lr")
    )
    monkeypatch.setattr(reader, "training_pipeline", lambda *_, **__: stand_in)
    crops = source(tmp_path, images(tmp_path, ".npy", 2))
    assert next(batches(crops, 7, device_id=0, threads=1, prefetch=2, stream="loader")) == (
        7,
        "hr",
        "lr",
    )
    assert next(batches(crops, 7, device_id=0, threads=1, prefetch=2)) == (7, "hr", "lr")
    assert asked == [("loader",) if exec_dynamic else (), ()]
