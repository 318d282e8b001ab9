"""LR made by threads of the host, for degradations whose OpenCV chain beats DALI on a CPU."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.degradations.host import Workspace, in_depth, levels_of
from pipeline.data.degradations.steps.sharpen import sharpened_hr
from pipeline.data.source import CropSource, Sample
from pipeline.libraries import cv2

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

_FLIP_CODES = {(1, 0): 0, (0, 1): 1, (1, 1): -1}  # (vertical, horizontal) -> OpenCV's


class HostDegraded:
    """Wraps a DALI pipeline of (hr, regions) to yield (hr, lr), with LR made by a pool of threads.

    DALI reads and decodes the next micro-batches meanwhile. If the source is split, the pipeline
    has made LR's first steps, possibly on a GPU, where HR then stays.
    """

    def __init__(self, pipeline: Any, source: CropSource, index: int, threads: int) -> None:
        self._pipeline, self._source, self._index = pipeline, source, index
        # Whether `run` may be given a stream.
        self.exec_dynamic = source.is_split and getattr(pipeline, "exec_dynamic", False)
        self._sharpens = source.spec.sharpen_hr and not source.is_split
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="degradation")
        self._workspaces = threading.local()
        self._all_workspaces: list[Workspace] = []
        cv2.setNumThreads(1)  # the pool's threads already use all cores
        self._hr: Any = None  # these keep the memory alive, which DALI's lists do not own
        self._lr: Any = None

    def run(self, stream: Any = None) -> tuple[Any, Any]:
        """Return (hr, lr) of the next micro-batch: NCHW, of the source's depth.

        They are valid until the next call. With a CUDA `stream`, HR is ready for work queued on it.
        """
        from nvidia.dali.tensors import TensorListCPU

        hr, regions, *read = self._pipeline.run(*(() if stream is None else (stream,)))
        if not isinstance(regions, TensorListCPU):
            if stream is not None:
                stream.synchronize()
            regions = regions.as_cpu()
        drawn = self._source.degraded(self._index)
        side = self._source.crop // self._source.scale
        kind = np.uint16 if self._source.depth == 16 else np.uint8
        lr = np.empty((len(drawn), 3, side, side), kind)
        # HR that the graph has cut out is replaced if it must be sharpened.
        sharpened = np.empty(
            (len(drawn), 3, self._source.crop, self._source.crop) if self._sharpens else 0,
            kind,
        )
        tasks = [
            self._pool.submit(
                self._fill,
                sharpened[i] if sharpened.size else None,
                lr[i],
                np.asarray(regions[i]),
                np.asarray(read[0][i]) if read else None,
                *drawn[i],
            )
            for i in range(len(drawn))
        ]
        for task in tasks:
            task.result()
        self._index, self._lr = self._index + 1, lr
        seconds: Counter[str] = Counter()
        for workspace in self._all_workspaces:
            seconds.update(workspace.seconds)
        self._source.step_seconds = seconds
        if sharpened.size:
            self._hr, hr = sharpened, TensorListCPU(sharpened, layout="CHW")
        return hr, TensorListCPU(lr, layout="CHW")

    def _fill(
        self,
        hr_planes: Pixels | None,
        planes: Pixels,
        region: Pixels,
        read: Pixels | None,
        sample: Sample,
        keys: Sequence[int],
    ) -> None:
        """Fill `planes`, (3, height, width), with the sample's LR, flipped and transposed.

        If HR is sharpened, `hr_planes` are filled with it in the same way.
        `read` is the LR that was read from a file, for samples that have one.
        """
        workspace = self._workspace()
        source = self._source
        start = sample.corner(source.crop, is_turned=False)
        turns = sample.transpose, sample.flip_vertical, sample.flip_horizontal
        if hr_planes is not None:
            began, (top, left), side = time.perf_counter(), start, source.crop
            # A copy, because steps use the workspace again.
            sharper = sharpened_hr(levels_of(region, workspace), workspace)
            region = in_depth(sharper, source.depth, workspace).copy()
            turn(region[top : top + side, left : left + side], *turns, hr_planes)
            workspace.took("sharpen_hr", time.perf_counter() - began)
        if sample.lr_path is not None and read is not None:
            lr = levels_of(read, workspace)
        else:
            degradation = source.degradation_of(sample.folder)
            if degradation.turns_first:
                if not source.is_split:  # the graph has turned it
                    region = turned(region, *turns)
                start, turns = sample.corner(source.crop, is_turned=True), (0, 0, 0)
            size = source.crop, source.crop
            if source.is_split:
                lr = degradation.rest_on_host(sample.degradation, region, start, size, workspace)
            else:
                lr = degradation.lr_on_host(
                    sample.degradation, keys, levels_of(region, workspace), start, size, workspace
                )
        if source.lr_noise:
            lr = source.lr_noise.add_on_host(sample.noise_sigma, keys[-2:], lr, workspace)
        turn(in_depth(lr, source.depth, workspace), *turns, planes)

    def _workspace(self) -> Workspace:
        """Return the calling thread's workspace."""
        own: Workspace | None = getattr(self._workspaces, "own", None)
        if own is None:
            own = self._workspaces.own = Workspace()
            self._all_workspaces.append(own)
        return own


def turn(image: Pixels, is_transposed: int, vertical: int, horizontal: int, planes: Pixels) -> None:
    """Fill `planes` (3, side, side) with `image` (side, side, 3): flipped, then transposed."""
    cv2.split(turned(image, is_transposed, vertical, horizontal), [*planes])


def turned(image: Pixels, is_transposed: int, vertical: int, horizontal: int) -> Pixels:
    """Return an image (height, width, 3): flipped, then transposed."""
    if vertical or horizontal:
        image = cv2.flip(image, _FLIP_CODES[vertical, horizontal])
    return cv2.transpose(image) if is_transposed else image
