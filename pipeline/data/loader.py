"""Batches for the training loop: the DALI pipeline runs ahead in its own thread, the loop only
takes what is ready."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.cli import RunError
from pipeline.data.reader import batches
from pipeline.data.source import CropSource, Skip


class Batch(NamedTuple):
    """One rank's micro-batch. Bytes on the device, RGB, NCHW; LR is HR made smaller by the
    scale."""

    lr: Tensor
    hr: Tensor
    index: (
        int  # of this rank's micro-batches since the run began; with the seed it names every sample
    )
    skipped: tuple[Skip, ...] = ()  # bad files for which other samples stand in


class Loader:
    """Endless micro-batches from micro-batch `index` on.

    Its whole state is that index. Iterating blocks only while the next batch is not ready;
    `waited_seconds` adds up how long. A file that cannot be trained on is named here in a
    `UserError`, or passed over if the recipe says so; where the disk is at fault it is a
    `RunError`. Close it when done.
    """

    def __init__(
        self, source: CropSource, index: int, device: torch.device, *, threads: int, prefetch: int
    ) -> None:
        self.source, self.device = source, device
        self.waited_seconds = 0.0
        self.failed = (
            False  # a batch ahead cannot be made: true some batches before `__next__` raises
        )
        self._made = self._taken = 0  # batches; each is counted by one thread alone
        self._ready: queue.Queue[tuple[Batch, Any] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._produce, args=(index, threads, prefetch), daemon=True, name="loader"
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self.waited_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._taken += 1
        batch, copied = item
        if copied is not None:
            hand_over(batch, copied)
        return batch

    def is_ahead(self, count: int) -> bool:
        """Wait until `count` batches are ready; False if the loader has failed and they will not
        come."""
        began = time.perf_counter()
        while self._made - self._taken < count and not self.failed and self._thread.is_alive():
            time.sleep(0.001)
        self.waited_seconds += time.perf_counter() - began
        return self._made - self._taken >= count

    def failure(self) -> BaseException | None:
        """Why the loader has failed, skipping the batches that are still good; None if it has
        not."""
        while self.failed:
            item = self._ready.get()
            if isinstance(item, BaseException):
                self.close()
                return item
        return None

    def close(self) -> None:
        """Stop the thread; prefetched batches are dropped (they are made again from their
        numbers)."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(0.05)

    def _produce(self, index: int, threads: int, prefetch: int) -> None:
        try:
            device_id, stream = None, None
            if self.device.type == "cuda":
                device_id = self.device.index or 0
                torch.cuda.set_device(device_id)
                # Of its own: on the training's, DALI would wait for all that is queued there before
                # it could reuse the memory of a batch, and no degradation would run beside a step.
                stream = torch.cuda.Stream(self.device)
            for made, *outputs in batches(
                self.source,
                index,
                device_id=device_id,
                threads=threads,
                prefetch=prefetch,
                stream=stream,
            ):
                hr, lr = (to_torch(output.as_tensor(), self.device, stream) for output in outputs)
                copied = stream.record_event() if stream is not None else None
                self._made += 1
                self._put((Batch(lr, hr, made, self.source.take_skips(made)), copied))
                if self._closed.is_set():
                    return
        except OSError as error:
            self._fail(
                RunError(
                    f"{error.filename or 'the dataset'}: {error.strerror or error}; the disk or "
                    "the "
                    "network failed, and the same command goes on from the last checkpoint"
                )
            )
        except BaseException as error:  # handed to the loop, which raises it in the main thread
            self._fail(error)
        finally:
            self.source.close()

    def _fail(self, error: BaseException) -> None:
        self.failed = True
        self._put(error)

    def _put(self, item: tuple[Batch, Any] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def hand_over(batch: Batch, copied: Any) -> None:
    """Let the current stream of the batch's device wait for the event `copied`; the memory is kept
    until it is done."""
    current = torch.cuda.current_stream(batch.hr.device)
    current.wait_event(copied)
    for side in (batch.lr, batch.hr):
        side.record_stream(current)


def to_torch(dali_tensor: Any, device: torch.device, stream: Any = None) -> Tensor:
    """A copy of a DALI tensor of bytes, on `device`, that outlives DALI's own buffer. On a GPU it
    is made, and its memory allotted, on `stream`."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        copy = torch.empty(dali_tensor.shape(), dtype=torch.uint8, device=device)
        feed_ndarray(dali_tensor, copy, cuda_stream=stream)
    return copy
