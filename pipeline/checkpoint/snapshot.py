"""A moment of a run in host memory: what a checkpoint is written from while training goes on.

A training thread may be kept waiting only for a copy. What engines hand over, nested structures of
tensors and plain values, is noted with `Snapshot.add`; `Snapshot.copy` then copies the memory
behind all tensors at once; and whoever writes takes the structures back with `Frozen.thaw`, in
which every tensor is the copy. Memory that tensors share is copied once and stays shared, so that
torch.save writes the very file that it would have written of the originals.
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

ALIGNMENT = 64  # bytes: a cache line, and more than any element has


class HostMemory:
    """Room for one snapshot after the other. It stays allocated: fresh pages cost more than the
    copy itself."""

    def __init__(self) -> None:
        self._room, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def room(self, size: int, *, is_pinned: bool) -> Tensor:
        """At least `size` bytes, uint8, whose content does not count any more; pinned for copies
        from a GPU.

        Raises `OSError` or `RuntimeError` where there is not so much memory.
        """
        if len(self._room) < size or is_pinned != self._is_pinned:
            self._room = torch.empty(
                0, dtype=torch.uint8
            )  # let go of the old before there is the new
            self._room = (
                torch.empty(size, dtype=torch.uint8, pin_memory=True)
                if is_pinned
                else _huge_pages(size)
            )
            self._is_pinned = is_pinned
        return self._room


def _huge_pages(size: int) -> Tensor:
    """Zeroed memory of the kernel's, in pages of 2 MiB where it has them: faults for small ones
    take longer than the copy."""
    memory = mmap.mmap(-1, size)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Frozen:
    """A structure that was added to a snapshot."""

    def __init__(self, pickled: bytes, snapshot: Snapshot, tensors: list[int]) -> None:
        self._pickled, self._snapshot, self._tensors = pickled, snapshot, tensors

    def thaw(self) -> Any:
        """The structure as it was, its tensors on the CPU. They are good until the memory's next
        snapshot."""
        return _Thawer(
            io.BytesIO(self._pickled), [self._snapshot.copies[number] for number in self._tensors]
        ).load()


class Snapshot:
    """All tensors of the structures that are added, as they are when `copy` is called."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._tensors: list[Tensor] = []
        self._numbers: dict[
            int, int
        ] = {}  # id of a tensor -> its place in the list, which keeps it alive
        self._room = torch.empty(0, dtype=torch.uint8)
        self._places: list[_Place] = []  # where the copies of the tensors are
        self._copied: torch.cuda.Event | None = None

    def add(self, state: Any) -> Frozen:
        """Note a structure of tensors and of what else can be pickled. All but the tensors' content
        is kept as of now.

        That content must not change until `copy`.
        """
        file, used = io.BytesIO(), []
        _Freezer(file, self, used).dump(state)
        return Frozen(file.getvalue(), self, used)

    def number_of(self, tensor: Tensor) -> int:
        """The place of `tensor` among those of this snapshot, which it joins."""
        number = self._numbers.setdefault(id(tensor), len(self._tensors))
        if number == len(self._tensors):
            self._tensors.append(tensor)
        return number

    def reserve(self) -> None:
        """Take the memory for a copy such as this one, and touch it, so that `copy` finds it
        there."""
        _, size, gpu = self._sources()
        with _on(gpu):
            room = self._memory.room(size, is_pinned=gpu is not None)
        ctypes.memset(room.data_ptr(), 0, size)

    def copy(self) -> None:
        """Copy what the tensors hold. Of a GPU's it is asked for alone, behind the work that is in
        its stream.

        Raises `OSError` or `RuntimeError` where the host has not enough memory for it.
        """
        sources, size, gpu = self._sources()
        self._room = self._memory.room(size, is_pinned=gpu is not None)
        for tensor, start in sources:
            storage = tensor.untyped_storage()
            if tensor.get_device() < 0:
                # Torch would share each copy among all threads, who would wait for each other
                # longer than it takes.
                ctypes.memmove(self._room.data_ptr() + start, storage.data_ptr(), storage.nbytes())
            else:
                content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._room[start : start + len(content)].copy_(content, non_blocking=True)
        if gpu is not None:
            # Later work in the stream, such as the next update, finds the copies done; whoever
            # reads waits for this.
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._tensors, self._numbers = [], {}

    def _sources(self) -> tuple[list[tuple[Tensor, int]], int, torch.device | None]:
        """(a tensor of each storage, and where its bytes go; how many bytes these are; the GPU that
        has some of them).

        Thousands of tensors: what need not be done while training waits is left to `copies`.
        """
        starts: dict[tuple[int, int, int], int] = {}
        sources: list[tuple[Tensor, int]] = []
        size, gpu = 0, None
        self._places = []
        for tensor in self._tensors:
            storage = tensor.untyped_storage()
            length, device = storage.nbytes(), tensor.get_device()
            start = starts.setdefault((device, storage.data_ptr(), length), size)
            if start == size and length:
                sources.append((tensor, start))
                size += -(-length // ALIGNMENT) * ALIGNMENT
                gpu = tensor.device if device >= 0 else gpu
            self._places.append(
                _Place(
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
        """Until the copies are there. Not for the training thread."""
        if self._copied is not None:
            with _on(self._copied.device):
                self._copied.synchronize()

    @cached_property
    def copies(self) -> list[Tensor]:
        """The tensors on the CPU, in the order in which they were met."""
        storages: dict[int, torch.UntypedStorage] = {}
        for place in self._places:
            if place.length and place.start not in storages:
                # A storage of just these bytes: torch.save writes all of a storage, whatever a
                # tensor shows of it.
                content = self._room[place.start : place.start + place.length].numpy()
                storages[place.start] = torch.frombuffer(
                    memoryview(content), dtype=torch.uint8
                ).untyped_storage()
        return [
            place.tensor(storages[place.start] if place.length else torch.UntypedStorage(0))
            for place in self._places
        ]


def _on(gpu: torch.device | None) -> AbstractContextManager[Any]:
    """Make it the current one: a thread begins with the first GPU, where another rank may be."""
    return nullcontext() if gpu is None else torch.cuda.device(gpu)


class _Place(NamedTuple):
    """Where the copy of a tensor is in the room, and how it lies there."""

    start: int  # of its storage, in bytes
    length: int
    dtype: torch.dtype
    offset: int  # in the storage, in elements
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
        """The tensor's place among those of the structure; None for all else, which is pickled."""
        if not isinstance(value, Tensor):
            return None
        self._used.append(self._snapshot.number_of(value))
        return len(self._used) - 1


class _Thawer(pickle.Unpickler):
    """Reads what this process has pickled a moment ago, and nothing else."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
