"""The DALI graph: from the host's arrays to batches of HR and LR bytes, NCHW, on the device.

It decodes what is encoded, changes brightness, flips, makes LR and adds noise to it, transposes. One graph for both
devices: with `device_id=None` it runs on the CPU. After `nvidia.dali` 2.4; no operator is newer than 1.50.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.data.degradations import build_degradation
from pipeline.data.degradations.base import KEYS, WORDS
from pipeline.data.sampling import VALIDATION, random_words, uniforms
from pipeline.data.source import CropSource, ImageFiles
from pipeline.data_spec import DegradationSpec


def training_pipeline(source: CropSource, index: int, *, device_id: int | None, threads: int, prefetch: int) -> Any:
    """The DALI pipeline that yields (hr, lr), uint8 NCHW, from micro-batch `index` on.

    hr: (micro-batch, 3, crop, crop); lr: (micro-batch, 3, crop / scale, crop / scale).
    """
    from nvidia.dali import fn, pipeline_def

    size = source.crop, source.crop
    layouts = ["HWC" if column in ("hr", "lr") else "" for column in source.columns]

    @pipeline_def(batch_size=source.position.micro_batch, num_threads=threads, device_id=device_id,
                  prefetch_queue_depth=prefetch, enable_conditionals=True)
    def graph() -> Any:
        arrays = fn.external_source(source.micro_batches(index), num_outputs=len(layouts), layout=layouts, batch=True)
        nodes = {column: arrays[i] for i, column in enumerate(source.columns)}
        region = prepared(source.hr, "hr", nodes)
        if source.lr:
            nodes["lr"] = prepared(source.lr, "lr", nodes)
        # LR is made of HWC bytes (twice as fast as of CHW) and before the transpose, which then comes free with the
        # change to CHW; after the flips, with which every degradation commutes.
        lr = source.degradation.lr(nodes, region, size, on_device, as_float=source.lr_noise is not None)
        if source.lr_noise:
            lr = source.lr_noise.add(nodes, lr, on_device)
        hr = fn.slice(region, start=nodes["start"], shape=size, axes=[0, 1]) if source.has_margin else region
        is_transposed = nodes["transpose"]
        if is_transposed:
            hr_out = channels_first(hr, [2, 1, 0])
            lr_out = channels_first(lr, [2, 1, 0])
        else:
            hr_out = channels_first(hr, [2, 0, 1])
            lr_out = channels_first(lr, [2, 0, 1])
        return hr_out, lr_out

    is_skipping = source.spec.on_error == "skip"  # then which files are bad must not depend on where crops were cut

    def prepared(side: ImageFiles, name: str, nodes: dict[str, Any]) -> Any:
        image = pixels_of(side, name, nodes)
        if source.has_brightness:
            image = fn.brightness(image, brightness=nodes["brightness"])
        return fn.flip(image, vertical=nodes["flip_vertical"], horizontal=nodes["flip_horizontal"])

    def pixels_of(side: ImageFiles, name: str, nodes: dict[str, Any]) -> Any:
        if not side.has_streams:
            return on_device(nodes[name])
        part = nodes[f"{name}_stream"], nodes[f"{name}_corner"], nodes[f"{name}_shape"], device_id
        if not side.has_pixels:
            return decoded(*part, whole=is_skipping)
        is_pixels = nodes[f"{name}_is_pixels"]
        if is_pixels:
            image = on_device(nodes[name])
        else:
            image = decoded(*part, whole=is_skipping)
        return image

    def channels_first(images: Any, order: list[int]) -> Any:
        return fn.transpose(images, perm=order, transpose_layout=False, output_layout="CHW")

    def on_device(node: Any) -> Any:
        return node if device_id is None else node.gpu()

    return graph()


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
    from nvidia.dali import fn, pipeline_def

    degradation = build_degradation(spec, scale)
    words = random_words(seed, VALIDATION, number, 1, WORDS)[0]
    drawn = degradation.draw(iter(uniforms(words[:-KEYS]).tolist()), *pixels.shape[:2])
    arrays = {"region": pixels, "start": np.zeros(2, np.int32), **degradation.arrays(drawn, words[-KEYS:].tolist())}
    columns, layouts = list(arrays), ["HWC", *[""] * (len(arrays) - 1)]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def graph() -> Any:
        made = fn.external_source(lambda: [[array] for array in arrays.values()], num_outputs=len(columns),
                                  layout=layouts, batch=True)
        nodes = {column: made[i] for i, column in enumerate(columns)}
        return degradation.lr(nodes, nodes["region"], pixels.shape[:2], lambda node: node, as_float=False)

    return np.array(graph().run()[0].at(0))
