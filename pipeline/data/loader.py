"""Batches for the training loop, prepared in advance by a thread that runs the DALI pipeline."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.cli import RunError
from pipeline.data import mixing
from pipeline.data.reader import batches
from pipeline.data.source import CropSource, Skip


class Batch(NamedTuple):
    """One rank's micro-batch: RGB, NCHW, on the device. LR is HR reduced by the scale.

    Both sides are uint8, or uint16 in a run of 16 bits (`data.depth`).
    """

    lr: Tensor
    hr: Tensor
    # Number of this micro-batch on its rank since the run began; with the seed it determines every
    # sample.
    index: int
    skipped: tuple[Skip, ...] = ()  # bad files that were replaced by other samples


class Loader:
    """Endless iterator of micro-batches, from micro-batch `index` on.

    The index is its whole state. Iterating blocks only while the next batch is not ready;
    `waited_seconds` is the total of these waits. A file that cannot be used for training raises a
    `UserError` that names it, or is replaced if the recipe allows it; a disk error raises a
    `RunError`. Close it when done.
    """

    def __init__(
        self, source: CropSource, index: int, device: torch.device, *, threads: int, prefetch: int
    ) -> None:
        self.source, self.device = source, device
        self.waited_seconds = 0.0
        # Threads that can degrade at the same time.
        self.num_workers = min(threads, source.position.micro_batch)
        # True as soon as a future batch cannot be made, some batches before `__next__` raises.
        self.failed = False
        # Numbers of batches. Only the loader's thread writes `_made` and only the training thread
        # writes `_taken`, so their difference can be read without a lock.
        self._made = self._taken = 0
        # The limit bounds the memory of finished batches: a loader that is faster than training
        # waits in `_put`.
        self._ready: queue.Queue[tuple[Batch, Any] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._produce, args=(index, threads, prefetch), daemon=True, name="loader"
        )
        self._thread.start()

    @property
    def step_seconds(self) -> Mapping[str, float]:
        """Seconds that each kind of degradation step has taken so far, over all threads."""
        return self.source.step_seconds

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
        """Wait until `count` batches are ready; return False if the loader failed before that."""
        began = time.perf_counter()
        while self._made - self._taken < count and not self.failed and self._thread.is_alive():
            time.sleep(0.001)
        self.waited_seconds += time.perf_counter() - began
        return self._made - self._taken >= count

    def failure(self) -> BaseException | None:
        """Return why the loader failed, discarding the good batches before it; None if it works."""
        # The error is behind the good batches, and may not be in the queue yet: `_fail` sets
        # `failed` before it adds the error.
        while self.failed:
            item = self._ready.get()
            if isinstance(item, BaseException):
                self.close()
                return item
        return None

    def close(self) -> None:
        """Stop the thread and drop prefetched batches, which their numbers can reproduce."""
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
                # A new thread starts with the first GPU, which may be another rank's.
                device_id = self.device.index or 0
                torch.cuda.set_device(device_id)
                # DALI gets its own stream. On the training stream it would wait for everything
                # queued there before reusing a batch's memory, and no degradation would overlap
                # with a training step.
                stream = torch.cuda.Stream(self.device)
            for made, *outputs in batches(
                self.source,
                index,
                device_id=device_id,
                threads=threads,
                prefetch=prefetch,
                stream=stream,
            ):
                # A copy: DALI reuses its own buffers for later batches while this one waits in the
                # queue.
                hr, lr = (to_torch(output.as_tensor(), self.device, stream) for output in outputs)
                with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                    lr, hr = mixed(self.source, made, lr, hr)
                # The copies are only queued. The training stream waits for this event on the
                # device; no thread of the host waits for it.
                copied = stream.record_event() if stream is not None else None
                self._made += 1
                self._put((Batch(lr, hr, made, self.source.take_skips(made)), copied))
                if self._closed.is_set():
                    return
        except OSError as error:
            # The disk or the network, since faults of a file are `BadFileError`s. It may work again
            # later, so the run ends with advice to resume it and does not skip the file.
            self._fail(
                RunError(
                    f"{error.filename or 'the dataset'}: {error.strerror or error}; the disk or "
                    "the network failed; run the same command again to resume from the last "
                    "checkpoint"
                )
            )
        except BaseException as error:
            # Raised again by `__next__` in the training thread. In this thread an error would go
            # unnoticed, and training would wait for batches forever.
            self._fail(error)
        finally:
            self.source.close()

    def _fail(self, error: BaseException) -> None:
        # Set the flag first, because the queue may be full: a rank must learn of the failure while
        # it still has batches for the steps in which the others learn of it.
        self.failed = True
        self._put(error)

    def _put(self, item: tuple[Batch, Any] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                # With a timeout, because training may have stopped taking batches: the thread must
                # then notice that the loader is closed.
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def mixed(source: CropSource, index: int, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixels of micro-batch `index` with its samples mixed as the recipe asks for."""
    spec = source.spec.mixing
    if not spec.probability:
        return lr, hr
    first, seed = source.first_sample(index), source.sampler.seed
    return mixing.mix(lr, hr, mixing.draw(spec, seed, first, len(hr), lr.shape[-1]))


def hand_over(batch: Batch, copied: Any) -> None:
    """Make the current stream wait for the event `copied` before it uses the batch.

    Recording the stream keeps the batch's memory allocated until that stream is done with it.
    """
    current = torch.cuda.current_stream(batch.hr.device)
    current.wait_event(copied)
    for side in (batch.lr, batch.hr):
        side.record_stream(current)


def to_torch(dali_tensor: Any, device: torch.device, stream: Any = None) -> Tensor:
    """Copy a DALI tensor, uint8 or uint16, to a torch tensor on `device` that outlives its buffer.

    On a GPU, the copy is allocated and made on `stream`.
    """
    from nvidia.dali import types
    from nvidia.dali.plugin.pytorch import feed_ndarray
    from nvidia.dali.tensors import TensorCPU

    is_deep = dali_tensor.dtype == types.UINT16
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        if device.type == "cuda" and isinstance(dali_tensor, TensorCPU):
            # What the host degraded. Pinned memory, so that the copy to the device is only queued.
            pixels = torch.from_numpy(np.asarray(dali_tensor))
            return pixels.pin_memory().to(device, non_blocking=True)
        copy = torch.empty(
            dali_tensor.shape(), dtype=torch.uint16 if is_deep else torch.uint8, device=device
        )
        if not is_deep:
            feed_ndarray(dali_tensor, copy, cuda_stream=stream)
        # `feed_ndarray` knows no uint16; this is what it calls.
        elif stream is None:
            dali_tensor.copy_to_external(ctypes.c_void_p(copy.data_ptr()))
        else:
            dali_tensor.copy_to_external(
                ctypes.c_void_p(copy.data_ptr()),
                ctypes.c_void_p(stream.cuda_stream),
                non_blocking=True,
            )
    return copy
