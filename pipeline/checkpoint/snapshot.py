"""Copy a run's state to host memory, from which a checkpoint is written while training continues.

The training thread may wait only for the copy. Engines hand over nested structures of tensors and
plain values, which `Snapshot.add` records; `Snapshot.copy` copies the memory of all their tensors
at once; the writing thread gets the structures back from `Frozen.thaw`, with the copies in place of
the tensors. Memory that tensors share is copied once and stays shared, so torch.save writes the
same file as from the originals.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes: a cache line, and larger than any element


class HostMemory:
    """Memory that successive snapshots reuse.

    It stays allocated, because fresh pages cost more than the copy itself.
    """

    def __init__(self) -> None:
        self._room, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def room(self, size: int, *, is_pinned: bool) -> Tensor:
        """Return at least `size` bytes (uint8) of undefined content; pinned for copies from a GPU.

        Raises `OSError` or `RuntimeError` if there is not enough memory.
        """
        if len(self._room) < size or is_pinned != self._is_pinned:
            # Free the old memory before allocating the new.
            self._room = torch.empty(0, dtype=torch.uint8)
            self._room = (
                # A copy from a GPU is only queued if the memory is pinned. Otherwise the training
                # thread would wait for it.
                torch.empty(size, dtype=torch.uint8, pin_memory=True)
                if is_pinned
                else _huge_pages(size)
            )
            self._is_pinned = is_pinned
        return self._room


def _huge_pages(size: int) -> Tensor:
    """Allocate zeroed memory, in pages of 2 MiB where the kernel has them.

    Page faults for small pages take longer than the copy.
    """
    memory = mmap.mmap(-1, size)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(memory, dtype=torch.uint8)


class Frozen:
    """A structure that was added to a snapshot; see `thaw`."""

    def __init__(self, pickled: bytes, snapshot: Snapshot, tensors: list[int]) -> None:
        self._pickled, self._snapshot, self._tensors = pickled, snapshot, tensors

    def thaw(self) -> Any:
        """Return the structure with its tensors copied to the CPU.

        The copies are valid until the memory's next snapshot.
        """
        return _Thawer(
            io.BytesIO(self._pickled), [self._snapshot.copies[number] for number in self._tensors]
        ).load()


class Snapshot:
    """The tensors of all added structures, with their content at the time of `copy`."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._tensors: list[Tensor] = []
        # id of a tensor -> its index in the list, which keeps the tensor alive
        self._numbers: dict[int, int] = {}
        self._room = torch.empty(0, dtype=torch.uint8)
        self._places: list[_CopiedTensor] = []  # where each tensor's copy is
        self._copied: torch.cuda.Event | None = None
        self.size = 0  # of the copy, in bytes

    def add(self, state: Any) -> Frozen:
        """Record a structure of tensors and other picklable values.

        Everything except the tensors' content is recorded as it is now; their content must not
        change until `copy`.
        """
        file, used = io.BytesIO(), []
        _Freezer(file, self, used).dump(state)
        return Frozen(file.getvalue(), self, used)

    def index_of(self, tensor: Tensor) -> int:
        """Return the index of `tensor` in this snapshot, adding it if it is new."""
        number = self._numbers.setdefault(id(tensor), len(self._tensors))
        if number == len(self._tensors):
            self._tensors.append(tensor)
        return number

    def reserve(self) -> None:
        """Allocate the memory for a copy of this size and touch its pages ahead of `copy`."""
        _, size, gpu = self._sources()
        with _on(gpu):
            room = self._memory.room(size, is_pinned=gpu is not None)
        # Allocating reserves addresses only. The kernel provides a page when it is first written,
        # which takes several times as long as the copy (0.25 s against 0.04 for a checkpoint of 335
        # MB).
        ctypes.memset(room.data_ptr(), 0, size)

    def copy(self) -> None:
        """Copy the tensors' content. Copies from a GPU are only queued, in its current stream.

        Raises `OSError` or `RuntimeError` if the host does not have enough memory.
        """
        sources, size, gpu = self._sources()
        self.size = size
        # This is the memory of the previous snapshot, whose file must be complete: `Saver` waits
        # for it. An earlier copy would mix two steps in one file, whose hashes would still match.
        self._room = self._memory.room(size, is_pinned=gpu is not None)
        for tensor, start in sources:
            storage = tensor.untyped_storage()
            if tensor.get_device() < 0:
                # torch would share each copy among all threads. There are thousands of small
                # copies, and with the threads waiting for each other at every one, they took 1.3 to
                # 2.7 CPU seconds instead of 0.04.
                ctypes.memmove(self._room.data_ptr() + start, storage.data_ptr(), storage.nbytes())
            else:
                # The storage's bytes, whatever the dtype, shape and strides of the tensors in it.
                content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._room[start : start + len(content)].copy_(content, non_blocking=True)
        if gpu is not None:
            # Later work in the stream, such as the next update, runs after the copies; readers on
            # the host wait for this event.
            self._copied = torch.cuda.Event()
            self._copied.record()
        # Let go of the originals: held until the file is written, they would occupy memory of the
        # device that training may have given up meanwhile.
        self._tensors, self._numbers = [], {}

    def _sources(self) -> tuple[list[tuple[Tensor, int]], int, torch.device | None]:
        """Return (tensor, offset) for each storage to copy, the bytes in all, and the GPU if any.

        There are thousands of tensors: whatever can be done while training continues is left to
        `copies`.
        """
        starts: dict[tuple[int, int, int], int] = {}
        sources: list[tuple[Tensor, int]] = []
        size, gpu = 0, None
        self._places = []
        for tensor in self._tensors:
            storage = tensor.untyped_storage()
            length, device = storage.nbytes(), tensor.get_device()
            # Tensors that share a storage, such as views of ZeRO's flat buffers, are copied once.
            start = starts.setdefault((device, storage.data_ptr(), length), size)
            if start == size and length:
                sources.append((tensor, start))
                size += -(-length // ALIGNMENT) * ALIGNMENT
                gpu = tensor.device if device >= 0 else gpu
            self._places.append(
                _CopiedTensor(
                    start,
                    length,
                    tensor.dtype,
                    tensor.storage_offset(),
                    tensor.size(),
                    tensor.stride(),
                    tensor.requires_grad,
                    isinstance(tensor, nn.Parameter),
                )
            )
        return sources, size, gpu

    def wait(self) -> None:
        """Wait until the copies are complete. Not for the training thread."""
        if self._copied is not None:
            with _on(self._copied.device):
                self._copied.synchronize()

    @cached_property
    def copies(self) -> list[Tensor]:
        """The copied tensors on the CPU, in the order in which they were added."""
        storages: dict[int, torch.UntypedStorage] = {}
        for place in self._places:
            if place.length and place.start not in storages:
                # A storage of exactly these bytes, because torch.save writes a storage whole, even
                # if a tensor uses only a part of it.
                content = self._room[place.start : place.start + place.length].numpy()
                storages[place.start] = torch.frombuffer(
                    memoryview(content), dtype=torch.uint8
                ).untyped_storage()
        return [
            place.tensor(storages[place.start] if place.length else torch.UntypedStorage(0))
            for place in self._places
        ]


def _on(gpu: torch.device | None) -> AbstractContextManager[Any]:
    """Make `gpu` current: a new thread starts on the first GPU, which may be another rank's."""
    return nullcontext() if gpu is None else torch.cuda.device(gpu)


class _CopiedTensor(NamedTuple):
    """Where a tensor's copy is in the memory, and its dtype, shape and strides."""

    start: int  # of its storage, in bytes from the start of the memory
    length: int  # of its storage, in bytes
    dtype: torch.dtype
    offset: int  # of the tensor in its storage, in elements
    size: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool
    is_parameter: bool

    def tensor(self, storage: torch.UntypedStorage) -> Tensor:
        copy = torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)
        return (
            nn.Parameter(copy, self.requires_grad)
            if self.is_parameter
            else copy.requires_grad_(self.requires_grad)
        )


class _Freezer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, snapshot: Snapshot, used: list[int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._snapshot, self._used = snapshot, used

    def persistent_id(self, value: Any) -> int | None:
        """Return a tensor's index among those of the structure; None for other, pickled values."""
        if not isinstance(value, Tensor):
            return None
        self._used.append(self._snapshot.index_of(value))
        return len(self._used) - 1


class _Thawer(pickle.Unpickler):
    """Unpickles what this process pickled a moment ago, and nothing else."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
