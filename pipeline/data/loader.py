"""Batches for the training loop: the DALI pipeline runs ahead in its own thread, the loop only takes what is ready."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.cli import UserError
from pipeline.data.reader import CropSource, training_pipeline


class Batch(NamedTuple):
    """One rank's micro-batch. Bytes on the device, RGB, NCHW; LR is HR made smaller by the scale."""

    lr: Tensor
    hr: Tensor
    index: int  # of this rank's micro-batches since the run began; with the seed it names every sample


class Loader:
    """Endless micro-batches from micro-batch `index` on.

    Its whole state is that index. Iterating blocks only while the next batch is not ready; `waited_seconds` adds up
    how long. An error of a file is raised here as `UserError` that names the file. Close it when done.
    """

    def __init__(self, source: CropSource, index: int, device: torch.device, *, threads: int, prefetch: int) -> None:
        self.source, self.device = source, device
        self.waited_seconds = 0.0
        self.failed = False  # a batch ahead cannot be made: true some batches before `__next__` raises
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(index, threads, prefetch), daemon=True,
                                        name="loader")
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        batch = self._ready.get()
        self.waited_seconds += time.perf_counter() - began
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def failure(self) -> BaseException | None:
        """Why the loader has failed, skipping the batches that are still good; None if it has not."""
        while self.failed:
            item = self._ready.get()
            if isinstance(item, BaseException):
                self.close()
                return item
        return None

    def close(self) -> None:
        """Stop the thread; prefetched batches are dropped (they are made again from their numbers)."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(0.05)

    def _produce(self, index: int, threads: int, prefetch: int) -> None:
        try:
            device_id = None
            if self.device.type == "cuda":
                device_id = self.device.index or 0
                torch.cuda.set_device(device_id)
            pipeline = training_pipeline(self.source, index, device_id=device_id, threads=threads, prefetch=prefetch)
            while not self._closed.is_set():
                hr, lr = self._run(pipeline, index)
                self._put(Batch(lr, hr, index))
                index += 1
        except BaseException as error:  # handed to the loop, which raises it in the main thread
            self.failed = True
            self._put(error)

    def _run(self, pipeline: Any, index: int) -> list[Tensor]:
        try:
            outputs = pipeline.run()
        except RuntimeError as error:
            raise self._explained(error, index) from error
        return [to_torch(output.as_tensor(), self.device) for output in outputs]

    def _explained(self, error: RuntimeError, index: int) -> Exception:
        """DALI's error with the file that caused it, found by decoding the batch's files one by one."""
        for ahead in range(index, index + self._ready.maxsize + 1):
            for file in dict.fromkeys(self.source.files_of(ahead)):
                fault = decoding_fault(file)
                if fault:
                    return UserError(f"{file}: cannot be decoded ({fault}); judge the dataset with "
                                     "`python tools/check_training_data.py --clean` and select anew")
        return RuntimeError(f"DALI failed in micro-batch {index}, though each of its files decodes alone: {error}")

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def to_torch(dali_tensor: Any, device: torch.device) -> Tensor:
    """A copy of a DALI tensor of bytes, on `device`, that outlives DALI's own buffer."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    copy = torch.empty(dali_tensor.shape(), dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dali_tensor, copy, cuda_stream=stream)
    return copy


def decoding_fault(file: str) -> str:
    """Why DALI cannot decode the encoded image `file`; empty if it can, and for `.npy`."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    from pipeline.data.image_files import is_npy

    if is_npy(file):
        return ""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        stream = fn.external_source(lambda: [np.fromfile(file, np.uint8)], batch=True)
        return fn.decoders.image(stream, device="cpu", output_type=types.RGB)

    try:
        graph().run()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "Assert" in line or "Failed" in line or "rror" in line), lines[0])[:200]
    return ""
