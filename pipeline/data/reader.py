"""The DALI graph: from the host's arrays to batches of HR and LR bytes, NCHW, on the device.

It decodes what is encoded, changes brightness, flips, makes LR and adds noise to it, transposes.
One graph for both devices: with `device_id=None` it runs on the CPU, all but the symmetries of HR
crops of `.npy` files. After `nvidia.dali` 2.4; no operator is newer than 1.50.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli import UserError
from pipeline.data.decoding import BadFileError, decoding_fault
from pipeline.data.degradations import build_degradation
from pipeline.data.degradations.base import KEYS, WORDS, Degradation, DegradationSpec
from pipeline.data.degrading import HostDegraded, turn
from pipeline.data.image_access import ImageFiles
from pipeline.data.sampling import VALIDATION, random_words, uniforms
from pipeline.data.source import CropSource

TURNS = ("transpose", "flip_vertical", "flip_horizontal")
"""The columns that say how a sample is turned."""


def batches(
    source: CropSource,
    index: int,
    *,
    device_id: int | None,
    threads: int,
    prefetch: int,
    stream: Any = None,
) -> Iterator[tuple[int, Any, Any]]:
    """(number of a micro-batch, hr, lr) from micro-batch `index` on, DALI's outputs, good until the
    next is asked for.

    With a CUDA `stream` the outputs are ready for what comes later on that stream, and nobody waits
    for them here. Files that DALI cannot decode are passed over, or named in a `UserError` after
    the last good micro-batch, whichever the recipe wants; a disk at fault is an `OSError`. What the
    GPU's decoder alone refuses is decoded on the CPU.
    """
    pipeline, first_on_gpu = None, index  # the micro-batches before it are decoded on the CPU
    while True:
        on_gpu = device_id is not None and index >= first_on_gpu
        pipeline = pipeline or training_pipeline(
            source,
            index,
            device_id=device_id,
            threads=threads,
            prefetch=prefetch,
            decodes_on_gpu=on_gpu,
        )
        try:
            # DALI before 2.0 hands over what is ready, to whatever stream.
            is_async = stream is not None and getattr(pipeline, "exec_dynamic", False)
            hr, lr = pipeline.run(stream) if is_async else pipeline.run()
        except StopIteration:
            if source.failure:
                raise source.failure from None
            return
        except RuntimeError as error:
            pipeline = (
                None  # DALI's is of no use any more; a new one begins with the same micro-batch
            )
            ahead = range(index, index + prefetch + 1)
            if _reject_culprits(source, ahead):
                continue
            told = (
                f"DALI failed in micro-batch {index}, though each of its files decodes alone: "
                f"{error}"
            )
            if not (on_gpu and source.has_streams):
                raise RuntimeError(told) from error
            first_on_gpu = ahead.stop
            source.notes.append(
                f"the GPU's decoder refuses a file that the CPU's takes; micro-batches {index} to "
                f"{ahead.stop - 1} are decoded on the CPU, more slowly. DALI says: "
                f"{' '.join(str(error).split())}"
            )
            continue
        yield index, hr, lr
        index += 1
        if index == first_on_gpu:
            pipeline = None


def _reject_culprits(source: CropSource, ahead: range) -> bool:
    """Reject the files that DALI cannot decode, or end the micro-batches before the first; whether
    there are any.

    DALI does not say which file of which micro-batch ahead it failed on: they are decoded one by
    one, on the CPU.
    """
    is_found = False
    for index in ahead:
        for file in dict.fromkeys(source.files_of(index)):
            if fault := decoding_fault(file):
                is_found = True
                try:
                    source.reject(BadFileError(file, fault))
                except UserError as refusal:
                    source.fail(index, refusal)
                    return True
    return is_found


def training_pipeline(
    source: CropSource,
    index: int,
    *,
    device_id: int | None,
    threads: int,
    prefetch: int,
    decodes_on_gpu: bool = True,
) -> Any:
    """What yields (hr, lr), uint8 NCHW, from micro-batch `index` on, each time that its `run` is
    called.

    hr: (micro-batch, 3, crop, crop); lr: (micro-batch, 3, crop / scale, crop / scale). A DALI
    pipeline, or one with the host's threads behind it. `decodes_on_gpu` matters on a GPU alone.
    """
    from nvidia.dali import fn, pipeline_def

    parts = _TrainingGraph(source, device_id, decodes_on_gpu=decodes_on_gpu)

    @pipeline_def(
        batch_size=source.position.micro_batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph() -> Any:
        arrays = fn.external_source(
            parts.host_arrays(index),
            num_outputs=len(parts.columns),
            layout=parts.layouts,
            batch=True,
        )
        return parts.outputs({column: arrays[i] for i, column in enumerate(parts.columns)})

    pipeline = without_leftovers(graph)
    return HostDegraded(pipeline, source, index, threads) if source.degrades_on_host else pipeline


def without_leftovers(graph: Callable[[], Any]) -> Any:
    """The pipeline of `graph`, a function under `pipeline_def`, and none of the files that DALI
    writes to make it.

    It translates the graph's conditionals into modules in the folder for temporary files, and
    removes them when Python ends in an orderly way, which ranks do not always do. Once imported
    nothing needs them.
    """
    before = {*sys.modules}
    pipeline = graph()
    for name in {*sys.modules} - before:
        if name.startswith("__autograph_generated_file") and (file := sys.modules[name].__file__):
            Path(file).unlink(missing_ok=True)
            if compiled := getattr(
                sys.modules[name], "__cached__", None
            ):  # bytecode, in a folder beside it
                Path(compiled).unlink(missing_ok=True)
    return pipeline


class _TrainingGraph:
    """The parts of the training graph, from the host's arrays to HR and LR. Their order is
    measured, step by step.

    Nodes are DALI's. Where an `if` asks a node, DALI makes it a branch of the graph, which each
    sample takes or not.
    """

    def __init__(
        self, source: CropSource, device_id: int | None, *, decodes_on_gpu: bool = True
    ) -> None:
        if source.degrades_on_host and device_id is not None:
            raise ValueError("a source that degrades on the host is for graphs on the CPU")
        self.source, self.device_id = source, device_id
        self.decoder = "mixed" if device_id is not None and decodes_on_gpu else "cpu"
        # On a GPU, fn.flip launches a kernel for each sample; on a CPU it is the fastest way.
        self.flips_by_sampling = device_id is not None
        self.size = source.crop, source.crop
        # On a CPU, DALI takes several times as long as OpenCV to cut the crop out of its region, to
        # turn it and to lay it out.
        self.turns_on_host = device_id is None and source.has_margin and not source.hr.has_streams
        # Where the host turns and degrades, no node asks how.
        unasked = {*TURNS, "start"} if self.turns_on_host and source.degrades_on_host else set()
        self.columns = (
            *(column for column in source.columns if column not in unasked),
            *(("crop",) if self.turns_on_host else ()),
        )
        self.layouts = [
            {"hr": "HWC", "lr": "HWC", "crop": "CHW"}.get(column, "") for column in self.columns
        ]
        # Where bad files are passed over, which of them are bad must not depend on where crops were
        # cut.
        self.decodes_whole = source.spec.on_error == "skip"

    def host_arrays(self, index: int) -> Iterator[tuple[Any, ...]]:
        """The arrays of `columns`, micro-batch by micro-batch, from `index` on."""
        room = np.empty((self.source.position.micro_batch, 3, *self.size), np.uint8)
        places = [self.source.columns.index(column) for column in self.columns if column != "crop"]
        for arrays in self.source.micro_batches(index):
            fed = tuple(arrays[place] for place in places)
            yield (*fed, turned_crops(self.source, arrays, room)) if self.turns_on_host else fed

    def outputs(self, nodes: dict[str, Any]) -> tuple[Any, Any]:
        """HR and LR; where the host degrades, HR and the region (HWC) that LR is to be made of."""
        if not self.source.degrades_on_host:
            return self.hr_and_lr(nodes)
        region = self.brightened(self.pixels(self.source.hr, "hr", nodes), nodes)
        return self.hr(nodes, region), region

    def hr_and_lr(self, nodes: dict[str, Any]) -> tuple[Any, Any]:
        """The graph's outputs, of the nodes of `columns`."""
        source = self.source
        region = self.brightened(self.pixels(source.hr, "hr", nodes), nodes)
        if source.lr:
            nodes["lr"] = self.brightened(self.pixels(source.lr, "lr", nodes), nodes)
        # LR is made of HWC bytes (twice as fast as of CHW) and before the symmetry: so both sides
        # are turned in exactly the same way, whatever the degradation.
        lr = source.degradation.lr(
            nodes, region, self.size, self.on_device, as_float=source.lr_noise is not None
        )
        if source.lr_noise:
            lr = source.lr_noise.add(nodes, lr, self.on_device)
        low = self.source.crop // self.source.scale
        return self.hr(nodes, region), self.turned(lr, nodes, (low, low))

    def hr(self, nodes: dict[str, Any], region: Any) -> Any:
        """The crop of a region that is HR already; where the host has turned it, brightness alone
        is missing."""
        from nvidia.dali import fn

        if self.turns_on_host:
            # Brightness refuses CHW, though it is all the same to it.
            hr = self.brightened(fn.reinterpret(nodes["crop"], layout="HWC"), nodes)
        else:
            hr = self.turned(
                region, nodes, self.size, nodes["start"] if self.source.has_margin else None
            )
        return hr

    def pixels(self, side: ImageFiles, name: str, nodes: dict[str, Any]) -> Any:
        """What was read of one side's file, HWC bytes on the device: decoded, where it is
        encoded."""
        if not side.has_streams:
            return self.on_device(nodes[name])
        part = (
            nodes[f"{name}_stream"],
            nodes[f"{name}_corner"],
            nodes[f"{name}_shape"],
            self.decoder,
        )
        if not side.has_pixels:
            return self.on_device(decoded(*part, whole=self.decodes_whole))
        is_pixels = nodes[f"{name}_is_pixels"]
        if is_pixels:
            image = self.on_device(nodes[name])
        else:
            image = self.on_device(decoded(*part, whole=self.decodes_whole))
        return image

    def brightened(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        return (
            fn.brightness(image, brightness=nodes["brightness"])
            if self.source.has_brightness
            else image
        )

    def turned(
        self, image: Any, nodes: dict[str, Any], size: tuple[int, int], start: Any = None
    ) -> Any:
        """The part of `image` of `size` (height, width) from `start` on; flipped, then transposed,
        and CHW.

        By sampling, each flipped axis is read backwards at the middle of its pixels: in one kernel
        for all samples. Else, as flipping rows is cheap and mirroring them is not, columns are
        mirrored by the operator that changes to CHW anyway, or after the transpose, when they have
        become rows.
        """
        from nvidia.dali import fn, types

        is_transposed, vertical, horizontal = (nodes[name] for name in TURNS)
        if self.flips_by_sampling:
            flips = fn.cast(fn.stack(vertical, horizontal), dtype=types.FLOAT)
            sides = np.array(size, np.float32)
            first = flips * sides + (0 if start is None else fn.cast(start, dtype=types.FLOAT))
            rows = fn.resize(
                image,
                roi_start=first,
                roi_end=first + (1 - 2 * flips) * sides,
                size=size,
                interp_type=types.INTERP_NN,
                antialias=False,
            )
            vertical = horizontal = 0
        else:
            part = image if start is None else fn.slice(image, start=start, shape=size, axes=[0, 1])
            rows = fn.flip(part, horizontal=0, vertical=vertical)
        if is_transposed:
            planes = fn.transpose(rows, perm=[2, 1, 0], transpose_layout=False, output_layout="CHW")
            if not self.flips_by_sampling:
                planes = fn.flip(planes, horizontal=0, vertical=horizontal)
        else:
            planes = fn.crop_mirror_normalize(
                rows, mirror=horizontal, dtype=types.UINT8, output_layout="CHW"
            )
        return planes

    def on_device(self, node: Any) -> Any:
        return node if self.device_id is None or node.device == "gpu" else node.gpu()


def turned_crops(source: CropSource, arrays: tuple[Any, ...], room: np.ndarray) -> np.ndarray:
    """`room`, (micro-batch, 3, crop, crop) bytes, filled with the crops in the regions of
    `source.make`, turned."""
    size, regions = source.crop, arrays[source.columns.index("hr")]
    turns = (arrays[source.columns.index(name)] for name in ("start", *TURNS))
    for i, ((top, left), *how) in enumerate(zip(*turns, strict=True)):
        turn(regions[i][top : top + size, left : left + size], *how, room[i])
    return room


def decoded(stream: Any, corner: Any, shape: Any, device: str, *, whole: bool) -> Any:
    """DALI nodes: the part of an encoded image from `corner` on, HWC RGB bytes. device: cpu or
    mixed.

    Where the format allows, only that part is decoded, with the same pixels; damage elsewhere then
    goes unseen. With `whole`, a file is bad or good wherever its crop lies.
    """
    from nvidia.dali import fn, types

    # A GPU would repeat the chroma of JPEG, where libjpeg-turbo interpolates it, and leave a part
    # of each batch to its JPEG engine, where the GPU has one, whose rounding may be another: a
    # sample's pixels would depend on its neighbours.
    alike = {
        "device": device,
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        **({"hw_decoder_load": 0.0} if device == "mixed" else {}),
    }
    if whole:
        image = fn.decoders.image(stream, **alike)
        return fn.slice(image, start=corner, shape=shape, axes=[0, 1])
    return fn.decoders.image_slice(stream, start=corner, shape=shape, axes=[0, 1], **alike)


def low_resolution(
    pixels: np.ndarray, spec: DegradationSpec, scale: int, *, seed: int, number: int
) -> np.ndarray:
    """LR of a whole image by a degradation, on the CPU: HWC uint8, 1 / `scale` of the size, a
    multiple of `scale`.

    What is random comes from `seed` and `number` alone, as for training samples but of a stream of
    its own.
    """
    graph = _whole_image_graph(type(spec), spec.model_dump_json(), scale, pixels.shape[:2])
    words = random_words(seed, VALIDATION, number, 1, WORDS)[0]
    drawn = graph.degradation.draw(iter(uniforms(words[:-KEYS]).tolist()), *pixels.shape[:2])
    arrays = graph.degradation.arrays(drawn, words[-KEYS:].tolist())
    graph.feed[:] = [
        np.ascontiguousarray(pixels),
        np.zeros(2, np.int32),
        *(arrays[column] for column in graph.degradation.columns),
    ]
    return np.array(graph.pipeline.run()[0].at(0))


class _WholeImageGraph(NamedTuple):
    degradation: Degradation
    feed: list[np.ndarray]  # what the next run takes in
    pipeline: Any


@lru_cache(maxsize=4)
def _whole_image_graph(
    kind: type[DegradationSpec], spec: str, scale: int, size: tuple[int, int]
) -> _WholeImageGraph:
    """The graph for images of one size: building one takes longer than running it."""
    from nvidia.dali import fn, pipeline_def

    degradation = build_degradation(kind.model_validate_json(spec), scale)
    feed: list[np.ndarray] = []
    columns = ("region", "start", *degradation.columns)

    @pipeline_def(
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def graph() -> Any:
        made = fn.external_source(
            lambda: [[array] for array in feed],
            num_outputs=len(columns),
            layout=["HWC" if column == "region" else "" for column in columns],
            batch=True,
        )
        nodes = {column: made[i] for i, column in enumerate(columns)}
        return degradation.lr(nodes, nodes["region"], size, lambda node: node, as_float=False)

    return _WholeImageGraph(degradation, feed, without_leftovers(graph))


# DALI's threads must have ended before Python does, or the process may be aborted.
atexit.register(_whole_image_graph.cache_clear)
