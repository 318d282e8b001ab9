"""The DALI graph: from host arrays to batches of HR and LR pixels, NCHW, on the device.

It decodes encoded files, changes brightness, flips, makes LR, adds noise to LR and transposes. The
same graph serves both devices: with `device_id=None` it runs on the CPU, except that the host flips
and transposes HR crops of `.npy` files. In a run of 16 bits the pixels are uint16 and the host
decodes all files; LR is made from float levels v / 257, and rounded once, to 257 times its level.
No operator is newer than DALI 1.50.
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
from pipeline.data.degradations.base import (
    KEYS,
    WORDS,
    Degradation,
    DegradationSpec,
    to_levels,
    to_pixels,
)
from pipeline.data.degradations.chain import ChainSpec
from pipeline.data.degradations.host import Workspace, in_depth, levels_of
from pipeline.data.degradations.steps.sharpen import sharpened_hr_in_graph
from pipeline.data.degrading import HostDegraded, turn
from pipeline.data.image_access import ImageFiles
from pipeline.data.sampling import VALIDATION, random_words, uniforms
from pipeline.data.source import CropSource

TURNS = ("transpose", "flip_vertical", "flip_horizontal")
"""The columns that say how a sample is flipped and transposed."""


def batches(
    source: CropSource,
    index: int,
    *,
    device_id: int | None,
    threads: int,
    prefetch: int,
    stream: Any = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Yield (number of the micro-batch, hr, lr) from micro-batch `index` on.

    hr and lr are DALI's outputs, valid until the next ones are requested. With a CUDA `stream`, the
    outputs are ready for work queued on that stream later, without blocking the host. A file that
    DALI cannot decode is skipped or, depending on the recipe, raises a `UserError` after the last
    good micro-batch; a disk error raises `OSError`. Files that only the GPU's decoder rejects are
    decoded on the CPU.
    """
    pipeline, first_on_gpu = None, index  # micro-batches before this one are decoded on the CPU
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
            # DALI before 2.0 returns outputs that are ready, on any stream.
            is_async = stream is not None and getattr(pipeline, "exec_dynamic", False)
            hr, lr = pipeline.run(stream) if is_async else pipeline.run()
        except StopIteration:
            # The source ends its micro-batches before the one that it cannot make. The reason is
            # raised only now that all good ones have been handed out.
            if source.failure:
                raise source.failure from None
            return
        except RuntimeError as error:
            # A pipeline that raised is unusable; a new one starts with the same micro-batch.
            pipeline = None
            ahead = range(index, index + prefetch + 1)
            # The usual reason is a file that no decoder accepts. If there is none, the GPU's
            # decoder is suspected, which rejects some files that the CPU's accepts.
            if _reject_undecodable(source, ahead):
                continue
            message = (
                f"DALI failed in micro-batch {index}, although each of its files decodes "
                f"separately: {error}"
            )
            # The CPU has decoded these already, or there was nothing to decode: trying again would
            # not help.
            if not (on_gpu and source.has_streams):
                raise RuntimeError(message) from error
            # DALI does not say which of the micro-batches that it prepares in advance has failed,
            # so all of them are decoded on the CPU.
            first_on_gpu = ahead.stop
            source.notes.append(
                "the GPU decoder rejects a file that the CPU decoder accepts; micro-batches "
                f"{index} to {ahead.stop - 1} are decoded on the CPU, more slowly. DALI says: "
                f"{' '.join(str(error).split())}"
            )
            continue
        yield index, hr, lr
        index += 1
        if index == first_on_gpu:
            # The micro-batches around the rejected file are done: the GPU decodes again.
            pipeline = None


def _reject_undecodable(source: CropSource, ahead: range) -> bool:
    """Reject the files that DALI cannot decode; return whether there are any.

    If the recipe does not skip bad files, end the micro-batches before the first one. DALI does
    not report which file of which prefetched micro-batch failed, so all of them are decoded one by
    one on the CPU.
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
    """Build the pipeline whose `run` returns (hr, lr), NCHW, from micro-batch `index` on.

    hr: (micro-batch, 3, crop, crop); lr: (micro-batch, 3, crop / scale, crop / scale); both uint8,
    or uint16 if the source's depth is 16. It is a DALI pipeline, possibly followed by threads of
    the host. If these make all of LR, or its last steps, it is in the host's memory even if there
    is a GPU, and if they make all of it, so is HR. `decodes_on_gpu` matters only on a GPU.
    """
    from nvidia.dali import fn, pipeline_def

    if source.degrades_on_host:
        device_id = None
    parts = _TrainingGraph(source, device_id, decodes_on_gpu=decodes_on_gpu)

    @pipeline_def(
        batch_size=source.position.micro_batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph() -> Any:
        # DALI copies the arrays. `no_copy` would save 5 % of the time, but the source could then
        # reuse a buffer only once DALI has finished with it, and would have to count who still
        # needs which.
        arrays = fn.external_source(
            parts.host_arrays(index),
            num_outputs=len(parts.columns),
            layout=parts.layouts,
            batch=True,
        )
        return parts.outputs({column: arrays[i] for i, column in enumerate(parts.columns)})

    pipeline = without_leftovers(graph)
    uses_host = source.degrades_on_host or source.is_split
    return HostDegraded(pipeline, source, index, threads) if uses_host else pipeline


def without_leftovers(graph: Callable[[], Any]) -> Any:
    """Return the pipeline of `graph`, a function under `pipeline_def`, without files left by DALI.

    DALI translates the graph's conditionals into modules in the temporary folder and removes them
    only when Python exits normally, which ranks do not always do. Once imported, the files are not
    needed.
    """
    before = {*sys.modules}
    pipeline = graph()
    for name in {*sys.modules} - before:
        if name.startswith("__autograph_generated_file") and (file := sys.modules[name].__file__):
            Path(file).unlink(missing_ok=True)
            # Bytecode, in a folder beside the module.
            if compiled := getattr(sys.modules[name], "__cached__", None):
                Path(compiled).unlink(missing_ok=True)
    return pipeline


class _TrainingGraph:
    """The parts of the training graph, from host arrays to HR and LR.

    The order of the operators was chosen by measuring each step. Nodes are DALI's; an `if` on a
    node becomes a branch of the graph, taken or not by each sample.
    """

    def __init__(
        self, source: CropSource, device_id: int | None, *, decodes_on_gpu: bool = True
    ) -> None:
        self.source, self.device_id = source, device_id
        self.is_deep = source.depth == 16
        self.decoder = "mixed" if device_id is not None and decodes_on_gpu else "cpu"
        # On a GPU, fn.flip launches one kernel per sample; on a CPU it is the fastest way.
        self.flips_by_sampling = device_id is not None
        self.size = source.crop, source.crop
        # On a CPU, DALI takes several times as long as OpenCV to cut out the crop, to flip and
        # transpose it and to change its layout: 320 to 415 us for a crop of 256 (slice 190, flip
        # 25, conditional 50, layout 55 to 150) against 60. That is a fifth of the time of a whole
        # sample.
        self.turns_on_host = (
            device_id is None
            and source.has_margin
            and not source.hr.has_streams
            # The crop would be cut out before it is sharpened.
            and (source.degrades_on_host or not source.spec.sharpen_hr)
        )
        # If the host cuts out HR, no node reads these columns.
        unused: set[str] = set()
        if self.turns_on_host and source.degrades_on_host:
            unused = {*TURNS, "start"}
        elif self.turns_on_host and source.degradation.turns_first:
            unused = {"start"}
        self.columns = (
            *(column for column in source.columns if column not in unused),
            *(("crop",) if self.turns_on_host else ()),
        )
        self.layouts = [
            {"hr": "HWC", "lr": "HWC", "crop": "CHW"}.get(column, "") for column in self.columns
        ]
        # If bad files are skipped, which files count as bad must not depend on the crop positions.
        self.decodes_whole = source.spec.on_error == "skip"

    def host_arrays(self, index: int) -> Iterator[tuple[Any, ...]]:
        """Yield the arrays of `columns` for each micro-batch from `index` on."""
        # One buffer for all micro-batches, since DALI copies it before it asks for the next one.
        # New memory would cost a page fault for every 4 KiB, because the system must zero each
        # page.
        buffer = np.empty(
            (self.source.position.micro_batch, 3, *self.size),
            np.uint16 if self.is_deep else np.uint8,
        )
        places = [self.source.columns.index(column) for column in self.columns if column != "crop"]
        for arrays in self.source.micro_batches(index):
            selected = tuple(arrays[place] for place in places)
            yield (
                (*selected, turned_crops(self.source, arrays, buffer))
                if self.turns_on_host
                else selected
            )

    def outputs(self, nodes: dict[str, Any]) -> tuple[Any, ...]:
        """Return nodes of HR and LR.

        If the host degrades: of HR, the region to make LR from and, if LR is read for some samples,
        what was read. If it does so after the first steps, of HR and of the region after those.
        """
        if not self.source.degrades_on_host:
            return self.hr_and_lr(nodes)
        # The host makes LR from this region, so its brightness is changed first, as in `hr_and_lr`.
        region = self.brightened(self.pixels(self.source.hr, "hr", nodes), nodes)
        if self.source.lr is None:
            return self.hr(nodes, region), region
        lr = self.brightened(self.pixels(self.source.lr, "lr", nodes), nodes)
        return self.hr(nodes, region), region, lr

    def hr_and_lr(self, nodes: dict[str, Any]) -> tuple[Any, Any]:
        """Return the graph's HR and LR from the nodes of `columns`."""
        from nvidia.dali import fn

        source = self.source
        # Brightness belongs to the photograph: changed before LR is made, it reaches both sides. LR
        # that is read from a file was made from the unchanged HR, so it gets the same factor.
        region = self.brightened(self.pixels(source.hr, "hr", nodes), nodes)
        if source.spec.sharpen_hr:
            region = self.sharpened(region)
        if source.lr:
            nodes["lr"] = self.brightened(self.pixels(source.lr, "lr", nodes), nodes)
        # LR is made from HWC bytes: on CHW, after the transpose, the resize takes twice as long,
        # and it is most of a sample's time (without LR the graph is six times as fast). LR is made
        # before flipping and transposing, so that both sides get exactly the same symmetry with any
        # degradation: transposing before a resize does not give the same bytes as after it. Only
        # where steps have a direction, the region is turned first.
        is_turned = source.degradation.turns_first
        lr = made_lr(
            source.degradation,
            {**nodes, "start": nodes["turned_start"]} if "turned_start" in nodes else nodes,
            self.turned_region(region, nodes) if is_turned else region,
            self.size,
            self.on_device,
            is_deep=self.is_deep,
            as_levels=source.is_split or source.lr_noise is not None,
        )
        if source.is_split:
            return self.hr(nodes, region), lr
        # Noise is added to levels that are not rounded yet, so that LR is rounded only once.
        if source.lr_noise:
            lr = source.lr_noise.add(nodes, lr, self.on_device, is_deep=self.is_deep)
        low = self.source.crop // self.source.scale
        if is_turned:
            lr = fn.transpose(lr, perm=[2, 0, 1], transpose_layout=False, output_layout="CHW")
        else:
            lr = self.turned(lr, nodes, (low, low))
        return self.hr(nodes, region), lr

    def hr(self, nodes: dict[str, Any], region: Any) -> Any:
        """Return the HR crop of a brightened region.

        If the host has cut, flipped and transposed the crop, only its brightness is still to be
        changed.
        """
        from nvidia.dali import fn

        if self.turns_on_host:
            # fn.brightness rejects CHW, although the layout makes no difference to it.
            hr = self.brightened(fn.reinterpret(nodes["crop"], layout="HWC"), nodes)
        else:
            hr = self.turned(
                region, nodes, self.size, nodes["start"] if self.source.has_margin else None
            )
        return hr

    def pixels(self, side: ImageFiles, name: str, nodes: dict[str, Any]) -> Any:
        """Return a node of what was read of one side's file: HWC pixels on the device, decoded."""
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
        # A dataset may mix .npy and encoded files. Each sample takes one branch, so only encoded
        # samples are decoded.
        if is_pixels:
            image = self.on_device(nodes[name])
        else:
            image = self.on_device(decoded(*part, whole=self.decodes_whole))
        return image

    def brightened(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn, types

        if not self.source.has_brightness:
            return image
        if self.is_deep:  # fn.brightness rejects uint16
            levels = fn.cast(image, dtype=types.FLOAT)
            return fn.cast(
                fn.brightness(levels, brightness=nodes["brightness"]), dtype=types.UINT16
            )
        return fn.brightness(image, brightness=nodes["brightness"])

    def sharpened(self, image: Any) -> Any:
        """Return a node of HR pixels sharpened as by `steps.sharpen.sharpened_hr`."""
        sharpened = sharpened_hr_in_graph(to_levels(image, self.is_deep), self.on_device)
        return to_pixels(sharpened, self.is_deep)

    def turned(
        self, image: Any, nodes: dict[str, Any], size: tuple[int, int], start: Any = None
    ) -> Any:
        """Return a node of the part of `image` at `start`: flipped, then transposed, as CHW.

        `size` is (height, width) of the part. On a GPU, resizing with nearest sampling reads each
        flipped axis backwards at the pixel centres, in one kernel for all samples. On a CPU,
        flipping rows is cheap but mirroring them is not, so columns are mirrored by the operator
        that changes to CHW anyway, or after the transpose, as rows.
        """
        from nvidia.dali import fn, types

        # Two flips and a transpose make all eight symmetries as exact permutations. `fn.rotate`
        # makes a whole sample take 2.8 times as long and interpolates; with the nearest pixel it
        # takes 1.3 times as long.
        is_transposed, vertical, horizontal = (nodes[name] for name in TURNS)
        if self.flips_by_sampling:
            rows = _flipped_by_sampling(image, vertical, horizontal, np.float32(size), start)
            vertical = horizontal = 0
        else:
            part = image if start is None else fn.slice(image, start=start, shape=size, axes=[0, 1])
            rows = fn.flip(part, horizontal=0, vertical=vertical)
        if is_transposed:
            planes = fn.transpose(rows, perm=[2, 1, 0], transpose_layout=False, output_layout="CHW")
            if not self.flips_by_sampling:
                planes = fn.flip(planes, horizontal=0, vertical=horizontal)
        elif self.is_deep:  # fn.crop_mirror_normalize does not make uint16
            planes = fn.transpose(rows, perm=[2, 0, 1], transpose_layout=False, output_layout="CHW")
            if not self.flips_by_sampling:
                planes = fn.flip(planes, horizontal=horizontal, vertical=0)
        else:
            planes = fn.crop_mirror_normalize(
                rows, mirror=horizontal, dtype=types.UINT8, output_layout="CHW"
            )
        return planes

    def turned_region(self, region: Any, nodes: dict[str, Any]) -> Any:
        """Return a node of a whole region of any size: flipped, then transposed, as HWC."""
        from nvidia.dali import fn, types

        is_transposed, vertical, horizontal = (nodes[name] for name in TURNS)
        if self.flips_by_sampling:
            sides = fn.cast(region.shape()[0:2], dtype=types.FLOAT)
            turned = _flipped_by_sampling(region, vertical, horizontal, sides)
        else:
            turned = fn.flip(region, horizontal=horizontal, vertical=vertical)
        if is_transposed:
            turned = fn.transpose(turned, perm=[1, 0, 2], transpose_layout=False)
        return turned

    def on_device(self, node: Any) -> Any:
        return node if self.device_id is None or node.device == "gpu" else node.gpu()


def _flipped_by_sampling(
    image: Any, vertical: Any, horizontal: Any, size: Any, start: Any = None
) -> Any:
    """Return a node of the part of `image` (HWC) at `start` with `size`, both FP32, flipped."""
    from nvidia.dali import fn, types

    flips = fn.cast(fn.stack(vertical, horizontal), dtype=types.FLOAT)
    first = flips * size + (0 if start is None else fn.cast(start, dtype=types.FLOAT))
    return fn.resize(
        image,
        roi_start=first,
        roi_end=first + (1 - 2 * flips) * size,
        size=size,
        interp_type=types.INTERP_NN,
        antialias=False,
    )


def turned_crops(source: CropSource, arrays: tuple[Any, ...], buffer: np.ndarray) -> np.ndarray:
    """Fill `buffer`, (micro-batch, 3, crop, crop), with the flipped and transposed crops.

    `arrays` are those of `source.make`, of the buffer's type. Returns `buffer`.
    """
    size, regions = source.crop, arrays[source.columns.index("hr")]
    turns = (arrays[source.columns.index(name)] for name in ("start", *TURNS))
    for i, ((top, left), *how) in enumerate(zip(*turns, strict=True)):
        turn(regions[i][top : top + size, left : left + size], *how, buffer[i])
    return buffer


def decoded(stream: Any, corner: Any, shape: Any, device: str, *, whole: bool) -> Any:
    """Return DALI nodes of the part of an encoded image at `corner`, HWC RGB bytes.

    `device` is "cpu" or "mixed". If the format allows, only that part is decoded, with the same
    pixels; damage elsewhere in the file then goes unnoticed. With `whole`, the whole image is
    decoded, so that a file is bad or good regardless of the crop position.
    """
    from nvidia.dali import fn, types

    # By default, a GPU would repeat JPEG's chroma samples where libjpeg-turbo interpolates them,
    # and would pass some images of each batch to its JPEG engine, if it has one, whose rounding may
    # differ. A sample's pixels would then depend on the rest of its batch.
    options = {
        "device": device,
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        **({"hw_decoder_load": 0.0} if device == "mixed" else {}),
    }
    if whole:
        image = fn.decoders.image(stream, **options)
        return fn.slice(image, start=corner, shape=shape, axes=[0, 1])
    return fn.decoders.image_slice(stream, start=corner, shape=shape, axes=[0, 1], **options)


def made_lr(
    degradation: Degradation,
    nodes: dict[str, Any],
    region: Any,
    size: tuple[int, int],
    on_device: Callable[[Any], Any],
    *,
    is_deep: bool,
    as_levels: bool = False,
) -> Any:
    """Return a node of LR of `region`, pixels of its type, or with `as_levels` FP32 levels.

    `is_deep` says that the pixels are uint16. See `Degradation.lr` for the other arguments.
    """
    if not is_deep:
        return degradation.lr(nodes, region, size, on_device, as_float=as_levels)
    if degradation.is_linear:
        lr = degradation.lr(nodes, region, size, on_device, as_float=as_levels)
        return lr * (1 / 257) if as_levels else lr
    lr = degradation.lr(nodes, to_levels(region, is_deep), size, on_device, as_float=True)
    return lr if as_levels else to_pixels(lr, is_deep)


def low_resolution(
    pixels: np.ndarray, spec: DegradationSpec, scale: int, *, seed: int, number: int
) -> np.ndarray:
    """Degrade a whole HWC image, uint8 or uint16, on the CPU and return its LR of the same type.

    The sides of the image must be multiples of `scale`. Randomness depends only on `seed` and
    `number`, as for training samples, but comes from a separate stream.
    """
    # The words are divided as in `CropSource`: the last `KEYS` are keys of the noise, the others
    # give the uniform numbers.
    words = random_words(seed, VALIDATION, number, 1, WORDS)[0]
    numbers, size = iter(uniforms(words[:-KEYS]).tolist()), pixels.shape[:2]
    is_deep = pixels.dtype == np.uint16
    if isinstance(spec, ChainSpec):  # on every device, so that validation is the same on all
        degradation = build_degradation(spec, scale)
        drawn = degradation.draw(numbers, *size)
        keys = words[-KEYS:].tolist()
        workspace = Workspace()
        levels = levels_of(pixels, workspace)
        lr = degradation.lr_on_host(drawn, keys, levels, (0, 0), size, workspace)
        return in_depth(lr, 16 if is_deep else 8, workspace).copy()
    graph = _whole_image_graph(type(spec), spec.model_dump_json(), scale, size, is_deep)
    drawn = graph.degradation.draw(numbers, *size)
    arrays = graph.degradation.arrays(drawn, words[-KEYS:].tolist())
    graph.feed[:] = [
        np.ascontiguousarray(pixels),
        np.zeros(2, np.int32),
        *(arrays[column] for column in graph.degradation.columns),
    ]
    # A copy, because the next run overwrites DALI's own buffer.
    return np.array(graph.pipeline.run()[0].at(0))


class _WholeImageGraph(NamedTuple):
    degradation: Degradation
    feed: list[np.ndarray]  # input of the next run
    pipeline: Any


@lru_cache(maxsize=4)
def _whole_image_graph(
    kind: type[DegradationSpec], spec: str, scale: int, size: tuple[int, int], is_deep: bool
) -> _WholeImageGraph:
    """Build the graph for images of one size; cached, as building takes longer than running."""
    from nvidia.dali import fn, pipeline_def

    degradation = build_degradation(kind.model_validate_json(spec), scale)
    feed: list[np.ndarray] = []
    columns = ("region", "start", *degradation.columns)

    @pipeline_def(
        batch_size=1,
        num_threads=1,
        device_id=None,
        # With a deeper queue DALI would ask for the next image in advance, before `feed` has it.
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
        return made_lr(
            degradation, nodes, nodes["region"], size, lambda node: node, is_deep=is_deep
        )

    return _WholeImageGraph(degradation, feed, without_leftovers(graph))


# DALI's threads must end before the interpreter does, or the process may abort.
atexit.register(_whole_image_graph.cache_clear)
