"""The DALI graph: from the host's arrays to batches of HR and LR bytes, NCHW, on the device.

It decodes what is encoded, changes brightness, flips, makes LR and adds noise to it, transposes. One graph for both
devices: with `device_id=None` it runs on the CPU, all but the symmetries of HR crops of `.npy` files. After
`nvidia.dali` 2.4; no operator is newer than 1.50.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.cli import UserError
from pipeline.data.decoding import BadFileError, decoding_fault
from pipeline.data.degradations import build_degradation
from pipeline.data.degradations.base import KEYS, WORDS, Degradation, DegradationSpec
from pipeline.data.image_access import ImageFiles
from pipeline.data.sampling import VALIDATION, random_words, uniforms
from pipeline.data.source import CropSource


def batches(source: CropSource, index: int, *, device_id: int | None, threads: int,
            prefetch: int) -> Iterator[tuple[int, Any, Any]]:
    """(number of a micro-batch, hr, lr) from micro-batch `index` on, DALI's outputs, good until the next is asked for.

    Files that DALI cannot decode are passed over, or named in a `UserError` after the last good micro-batch, whichever
    the recipe wants; a disk at fault is an `OSError`.
    """
    pipeline = None
    while True:
        pipeline = pipeline or training_pipeline(source, index, device_id=device_id, threads=threads, prefetch=prefetch)
        try:
            hr, lr = pipeline.run()
        except StopIteration:
            if source.failure:
                raise source.failure from None
            return
        except RuntimeError as error:
            _find_culprits(source, range(index, index + prefetch + 1), error)
            pipeline = None  # DALI's is of no use any more; a new one begins with the same micro-batch
            continue
        yield index, hr, lr
        index += 1


def _find_culprits(source: CropSource, ahead: range, error: RuntimeError) -> None:
    """Reject the files that DALI cannot decode, or end the micro-batches before the first of them.

    DALI does not say which file of which micro-batch ahead it failed on: they are decoded one by one.
    """
    is_found = False
    for index in ahead:
        for file in dict.fromkeys(source.files_of(index)):
            if fault := decoding_fault(file):
                is_found = True
                try:
                    source.reject(BadFileError(file, fault))
                except UserError as refusal:
                    return source.fail(index, refusal)
    if not is_found:
        raise RuntimeError(f"DALI failed in micro-batch {ahead[0]}, though each of its files decodes alone: "
                           f"{error}") from error
    return None


def training_pipeline(source: CropSource, index: int, *, device_id: int | None, threads: int, prefetch: int) -> Any:
    """The DALI pipeline that yields (hr, lr), uint8 NCHW, from micro-batch `index` on.

    hr: (micro-batch, 3, crop, crop); lr: (micro-batch, 3, crop / scale, crop / scale).
    """
    from nvidia.dali import fn, pipeline_def

    parts = _TrainingGraph(source, device_id)

    @pipeline_def(batch_size=source.position.micro_batch, num_threads=threads, device_id=device_id,
                  prefetch_queue_depth=prefetch, enable_conditionals=True)
    def graph() -> Any:
        arrays = fn.external_source(parts.host_arrays(index), num_outputs=len(parts.columns), layout=parts.layouts,
                                    batch=True)
        return parts.hr_and_lr({column: arrays[i] for i, column in enumerate(parts.columns)})

    return graph()


class _TrainingGraph:
    """The parts of the training graph, from the host's arrays to HR and LR. Their order is measured, step by step.

    Nodes are DALI's. Where an `if` asks a node, DALI makes it a branch of the graph, which each sample takes or not.
    """

    def __init__(self, source: CropSource, device_id: int | None) -> None:
        self.source, self.device_id = source, device_id
        self.size = source.crop, source.crop
        # On a CPU, DALI takes several times as long as OpenCV to cut the crop out of its region, to turn it and to lay
        # it out.
        self.turns_on_host = device_id is None and source.has_margin and not source.hr.has_streams
        self.columns = (*source.columns, "crop") if self.turns_on_host else source.columns
        self.layouts = [{"hr": "HWC", "lr": "HWC", "crop": "CHW"}.get(column, "") for column in self.columns]
        # Where bad files are passed over, which of them are bad must not depend on where crops were cut.
        self.decodes_whole = source.spec.on_error == "skip"

    def host_arrays(self, index: int) -> Iterator[tuple[Any, ...]]:
        """The arrays of `columns`, micro-batch by micro-batch, from `index` on."""
        room = np.empty((self.source.position.micro_batch, 3, *self.size), np.uint8)
        for arrays in self.source.micro_batches(index):
            yield (*arrays, turned_crops(self.source, arrays, room)) if self.turns_on_host else arrays

    def hr_and_lr(self, nodes: dict[str, Any]) -> tuple[Any, Any]:
        """The graph's outputs, of the nodes of `columns`."""
        source = self.source
        region = self.brightened(self.pixels(source.hr, "hr", nodes), nodes)
        if source.lr:
            nodes["lr"] = self.brightened(self.pixels(source.lr, "lr", nodes), nodes)
        # LR is made of HWC bytes (twice as fast as of CHW) and before the symmetry: so both sides are turned in exactly
        # the same way, whatever the degradation.
        lr = source.degradation.lr(nodes, region, self.size, self.on_device, as_float=source.lr_noise is not None)
        if source.lr_noise:
            lr = source.lr_noise.add(nodes, lr, self.on_device)
        return self.hr(nodes, region), self.turned(lr, nodes)

    def hr(self, nodes: dict[str, Any], region: Any) -> Any:
        """The crop of a region that is HR already; where the host has turned it, brightness alone is missing."""
        from nvidia.dali import fn

        if self.turns_on_host:
            # Brightness refuses CHW, though it is all the same to it.
            hr = self.brightened(fn.reinterpret(nodes["crop"], layout="HWC"), nodes)
        else:
            crop = region
            if self.source.has_margin:
                crop = fn.slice(region, start=nodes["start"], shape=self.size, axes=[0, 1])
            hr = self.turned(crop, nodes)
        return hr

    def pixels(self, side: ImageFiles, name: str, nodes: dict[str, Any]) -> Any:
        """What was read of one side's file, HWC bytes on the device: decoded, where it is encoded."""
        if not side.has_streams:
            return self.on_device(nodes[name])
        part = nodes[f"{name}_stream"], nodes[f"{name}_corner"], nodes[f"{name}_shape"], self.device_id
        if not side.has_pixels:
            return decoded(*part, whole=self.decodes_whole)
        is_pixels = nodes[f"{name}_is_pixels"]
        if is_pixels:
            image = self.on_device(nodes[name])
        else:
            image = decoded(*part, whole=self.decodes_whole)
        return image

    def brightened(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return fn.brightness(image, brightness=nodes["brightness"]) if self.source.has_brightness else image

    def turned(self, image: Any, nodes: dict[str, Any]) -> Any:
        """Flipped, then transposed, and CHW.

        Flipping rows is cheap, mirroring them is not. So columns are mirrored by the operator that changes to CHW
        anyway, or after the transpose, when they have become rows.
        """
        from nvidia.dali import fn, types

        is_transposed, horizontal = nodes["transpose"], nodes["flip_horizontal"]
        rows = fn.flip(image, horizontal=0, vertical=nodes["flip_vertical"])
        if is_transposed:
            columns = fn.transpose(rows, perm=[2, 1, 0], transpose_layout=False, output_layout="CHW")
            planes = fn.flip(columns, horizontal=0, vertical=horizontal)
        else:
            planes = fn.crop_mirror_normalize(rows, mirror=horizontal, dtype=types.UINT8, output_layout="CHW")
        return planes

    def on_device(self, node: Any) -> Any:
        return node if self.device_id is None else node.gpu()


def turned_crops(source: CropSource, arrays: tuple[Any, ...], room: np.ndarray) -> np.ndarray:
    """`room`, (micro-batch, 3, crop, crop) bytes, filled with the crops in the regions of `source.make`, turned."""
    size, regions = source.crop, arrays[source.columns.index("hr")]
    turns = (arrays[source.columns.index(name)] for name in ("start", "flip_vertical", "flip_horizontal", "transpose"))
    flipped, transposed = np.empty((2, size, size, 3), np.uint8)
    for i, ((top, left), vertical, horizontal, is_transposed) in enumerate(zip(*turns, strict=True)):
        crop = regions[i][top:top + size, left:left + size]
        if vertical or horizontal:
            cv2.flip(crop, _FLIP_CODES[vertical, horizontal], dst=flipped)
        else:
            flipped[...] = crop
        turned = cv2.transpose(flipped, dst=transposed) if is_transposed else flipped
        cv2.split(turned, [*room[i]])
    return room


_FLIP_CODES = {(1, 0): 0, (0, 1): 1, (1, 1): -1}  # (vertical, horizontal) -> OpenCV's


def decoded(stream: Any, corner: Any, shape: Any, device_id: int | None, *, whole: bool) -> Any:
    """DALI nodes: the part of an encoded image from `corner` on, HWC RGB bytes.

    Where the format allows, only that part is decoded, with the same pixels; damage elsewhere then goes unseen. With
    `whole`, a file is bad or good wherever its crop lies.
    """
    from nvidia.dali import fn, types

    device = "cpu" if device_id is None else "mixed"
    if whole:
        image = fn.decoders.image(stream, device=device, output_type=types.RGB)
        return fn.slice(image, start=corner, shape=shape, axes=[0, 1])
    return fn.decoders.image_slice(stream, device=device, output_type=types.RGB, start=corner, shape=shape, axes=[0, 1])


def low_resolution(pixels: np.ndarray, spec: DegradationSpec, scale: int, *, seed: int, number: int) -> np.ndarray:
    """LR of a whole image by a degradation, on the CPU: HWC uint8, 1 / `scale` of the size, a multiple of `scale`.

    What is random comes from `seed` and `number` alone, as for training samples but of a stream of its own.
    """
    graph = _whole_image_graph(type(spec), spec.model_dump_json(), scale, pixels.shape[:2])
    words = random_words(seed, VALIDATION, number, 1, WORDS)[0]
    drawn = graph.degradation.draw(iter(uniforms(words[:-KEYS]).tolist()), *pixels.shape[:2])
    arrays = graph.degradation.arrays(drawn, words[-KEYS:].tolist())
    graph.feed[:] = [np.ascontiguousarray(pixels), np.zeros(2, np.int32),
                     *(arrays[column] for column in graph.degradation.columns)]
    return np.array(graph.pipeline.run()[0].at(0))


class _WholeImageGraph(NamedTuple):
    degradation: Degradation
    feed: list[np.ndarray]  # what the next run takes in
    pipeline: Any


@lru_cache(maxsize=4)
def _whole_image_graph(kind: type[DegradationSpec], spec: str, scale: int, size: tuple[int, int]) -> _WholeImageGraph:
    """The graph for images of one size: building one takes longer than running it."""
    from nvidia.dali import fn, pipeline_def

    degradation = build_degradation(kind.model_validate_json(spec), scale)
    feed: list[np.ndarray] = []
    columns = ("region", "start", *degradation.columns)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def graph() -> Any:
        made = fn.external_source(lambda: [[array] for array in feed], num_outputs=len(columns),
                                  layout=["HWC" if column == "region" else "" for column in columns], batch=True)
        nodes = {column: made[i] for i, column in enumerate(columns)}
        return degradation.lr(nodes, nodes["region"], size, lambda node: node, as_float=False)

    return _WholeImageGraph(degradation, feed, graph())
