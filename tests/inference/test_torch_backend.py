"""The PyTorch backend: one copy to the host per batch, a stream for copies, compiled shapes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fabricate import picture, tiny_network
from pipeline.images import to_bytes
from pipeline.inference import torch_backend
from pipeline.inference.backends import NotFiniteError, to_levels
from pipeline.inference.devices import CPU
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import TorchBackend, Transfers, begin


def nothing(_: float) -> None:
    pass


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_batch_is_read_by_one_copy_and_nothing_else_waits(kind):
    backend = TorchBackend(tiny_network(0), CPU)
    copies = []
    download = backend.transfers.download
    backend.transfers.download = lambda values: copies.append(values) or download(values)
    images = np.stack([picture(20, 24, seed) for seed in (0, 1)])
    with Waits() as waits:
        levels = backend.start(images, "fp32", np.dtype(kind))()
    assert waits.calls == {}
    assert [values.numel() for values in copies] == [2 * 40 * 48 * 3 * np.dtype(kind).itemsize + 1]
    np.testing.assert_array_equal(levels, to_levels(backend.floats(images), np.dtype(kind)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_anywhere(value):
    for place in ((0, 0, 0, 0), (1, 2, 39, 47), (0, 1, 20, 3)):
        sr = torch.rand(2, 3, 40, 48)
        np.testing.assert_array_equal(
            begin(sr, np.dtype(np.uint8), Transfers(torch.device("cpu")))(),
            to_bytes(sr).permute(0, 2, 3, 1),
        )
        sr[place] = value
        with pytest.raises(NotFiniteError):
            begin(sr, np.dtype(np.uint8), Transfers(torch.device("cpu")))()
        with pytest.raises(NotFiniteError):
            to_levels(sr.numpy(), np.dtype(np.uint8))


def test_levels_by_numpy_are_those_by_torch():
    values = torch.cat([torch.linspace(-0.3, 1.3, 200_000), torch.arange(511) / 510]).reshape(
        1, 1, 1, -1
    )
    sr = values.repeat(1, 3, 1, 1)
    for kind in (np.uint8, np.uint16):
        found = begin(sr, np.dtype(kind), Transfers(torch.device("cpu")))()
        np.testing.assert_array_equal(to_levels(sr.numpy(), np.dtype(kind)), found)


class Stream:
    """A fake GPU stream that records in `order` what is done on it."""

    def __init__(self, order, name):
        self.order, self.name = order, name

    def wait_stream(self, other):
        self.order.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.order.append(f"{self.name} waits for {event.of.name}")


@pytest.fixture
def gpu(monkeypatch):
    """Fake what `Transfers` uses of torch.cuda, on the CPU; return the order of events."""
    order = []
    main = Stream(order, "network")
    current = [main]

    class Event:
        of = None

        def record(self, stream):
            self.of = stream

        def synchronize(self):
            if self.of is not None:
                order.append("host waits")

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, *_):
            current.pop()

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(order, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: order.append(f"kept for {stream.name}"),
    )
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, pin_memory=False, **more: (
            (order.append("pinned") if pin_memory else None) or empty(*size, **more)
        ),
    )
    return order


def on_gpu(network):
    """Return a backend that copies as for a GPU, but runs the network on the CPU."""
    backend = TorchBackend(network, CPU)
    transfers = Transfers(torch.device("cpu"))
    transfers._is_gpu, transfers._stream = True, torch.cuda.Stream(None)
    transfers.in_flight = backend.in_flight = 1
    to = transfers._to_gpu
    transfers._to_gpu = lambda host: to(host).clone()  # a real transfer also makes a copy
    backend.transfers = transfers
    return backend


def test_copies_have_a_stream_of_their_own_and_the_host_waits_once_a_batch(gpu):
    network = tiny_network(1, num_blocks=1)
    images = np.stack([picture(25, 20, seed) for seed in range(12)])
    expected = Upscaler(TorchBackend(network, CPU))(
        images, np.dtype(np.uint8), is_deep=False, advance=nothing
    )
    backend = on_gpu(network)
    backend.max_pixels = lambda _: 2 * 25 * 20
    del gpu[:]
    found = Upscaler(backend)(images, np.dtype(np.uint8), is_deep=False, advance=nothing)
    np.testing.assert_array_equal(found, expected)
    steps = [step for step in gpu if step != "pinned"]
    batch = [
        "network waits for copies",
        "kept for network",
        "copies waits for network",
        "kept for copies",
    ]
    assert steps[:8] == batch * 2  # the second batch starts before the first is read
    assert steps[8] == "host waits"
    # 6 results are read, and 4 uploads wait for the copy out of their buffer, two batches ago.
    assert steps.count("host waits") == 6 + 4
    assert gpu.count("pinned") == 2 * 2


def test_frequent_shapes_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda network, dynamic: compiled.append(dynamic) or network
    )
    monkeypatch.setattr(torch_backend, "COMPILED_AFTER", 3)
    for compiles, count in ((True, 1), (False, 0)):
        del compiled[:]
        backend = TorchBackend(tiny_network(0), CPU, compiles=compiles)
        for side in (16, 20, 16, 20, 16, 16, 16):
            backend.floats(picture(side, side)[None])
        assert compiled == [False] * count


def test_bf16_is_near(monkeypatch):
    network, image = tiny_network(2, num_blocks=1), picture(30, 40)[None]
    full, half = (
        Upscaler(TorchBackend(network, CPU, precision))(
            image, image.dtype, is_deep=False, advance=nothing
        )
        for precision in ("fp32", "bf16")
    )
    difference = np.abs(full.astype(int) - half.astype(int))
    assert 0 < difference.max() <= 8
