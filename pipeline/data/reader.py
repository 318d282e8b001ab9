"""From files to batches: the crop source on the host and the DALI graph behind it.

The host draws which crop (`sampling`) and copies just that crop out of the memory-mapped `.npy`, or reads an encoded
file's bytes; DALI decodes what is encoded, turns, flips, makes the low-resolution side and lays out NCHW. One graph for
both devices: with `device_id=None` it runs on the CPU. After `nvidia.dali` 2.4; no operator is newer than 1.50.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import UserError
from pipeline.data.image_files import is_npy, npy_layout
from pipeline.data.sampling import Sampler, anchor

OPEN_MAPS = 512  # memory maps kept open per rank; each holds a file descriptor

Bytes = NDArray[np.uint8]


class Position(NamedTuple):
    """A rank's place in the run's stream of samples: which micro-batches are its own."""

    rank: int
    world_size: int
    micro_batch: int

    def first_sample(self, index: int) -> int:
        """Number of the first sample of this rank's `index`-th micro-batch since the run began."""
        return (index * self.world_size + self.rank) * self.micro_batch


class CropSource:
    """Makes the host side of micro-batches, in order, from any starting point."""

    def __init__(self, root: Path, names: Sequence[str], sampler: Sampler, *, crop: int, scale: int,
                 position: Position) -> None:
        self.paths = [os.path.join(root, name) for name in names]
        self.encoded = np.array([not is_npy(name) for name in names])
        self.all_encoded, self.any_encoded = bool(self.encoded.all()), bool(self.encoded.any())
        self.sampler, self.crop, self.scale, self.position = sampler, crop, scale, position
        self._map = lru_cache(maxsize=OPEN_MAPS)(self._open_map)
        self._size = lru_cache(maxsize=65536)(self._encoded_size)

    def files_of(self, index: int) -> list[str]:
        """The files that micro-batch `index` reads, for messages."""
        first = self.position.first_sample(index)
        return [self.paths[file] for file in self.sampler.draw(first, self.position.micro_batch).files]

    def micro_batches(self, index: int) -> Iterator[tuple[Any, ...]]:
        """Endless, from micro-batch `index` on: pixels, encoded bytes, corners, flips and transpose of every sample.

        Pixels and encoded bytes are present only if some file of the dataset needs them.
        """
        while True:
            yield self.make(index)
            index += 1

    def make(self, index: int) -> tuple[Any, ...]:
        draws = self.sampler.draw(self.position.first_sample(index), self.position.micro_batch)
        count, crop = len(draws.files), self.crop
        all_encoded, any_encoded = self.all_encoded, self.any_encoded
        corners = np.zeros((count, 2), np.int32)
        pixels: Any = [_NO_PIXELS] * count if any_encoded else np.empty((count, crop, crop, 3), np.uint8)
        streams: list[Bytes] = [_NO_BYTES] * count
        for i, file in enumerate(draws.files.tolist()):
            if self.encoded[file]:
                height, width = self._size(file)
                streams[i] = np.fromfile(self.paths[file], np.uint8)
            else:
                image = self._map(file)
                height, width = image.shape[:2]
            if min(height, width) < crop:
                raise UserError(f"{self.paths[file]}: {height}x{width} is smaller than data.crop {crop}; remove such "
                                f"files with `python tools/check_training_data.py --clean --min-size {crop}` and "
                                "select anew, or lower data.crop")
            top = anchor(draws.top[i], height, crop, self.scale)
            left = anchor(draws.left[i], width, crop, self.scale)
            corners[i] = top, left
            if not self.encoded[file]:
                cut = image[top:top + crop, left:left + crop]
                pixels[i] = np.ascontiguousarray(cut) if any_encoded else cut  # a list item keeps its strides
        host = [] if all_encoded else [pixels]
        if any_encoded:
            host += [streams, corners]
        if any_encoded and not all_encoded:
            host.append(~self.encoded[draws.files])
        return (*host, draws.flip_vertical, draws.flip_horizontal, draws.transpose.astype(bool))

    def _open_map(self, file: int) -> Bytes:
        layout = npy_layout(self.paths[file])
        return np.memmap(self.paths[file], np.uint8, "r", layout.offset, (layout.height, layout.width, 3))

    def _encoded_size(self, file: int) -> tuple[int, int]:
        return encoded_size(self.paths[file])


_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
_NO_BYTES = np.zeros(1, np.uint8)


def encoded_size(path: str) -> tuple[int, int]:
    """(height, width) of an encoded image as decoding gives it, its EXIF orientation applied. Reads only headers."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; select anew with `python tools/select_training_files.py`") from None
    except (UnidentifiedImageError, SyntaxError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault says nothing about the file; the message names it
        raise UserError(f"{path}: not an image ({' '.join(str(error).split())}); judge the dataset with "
                        "`python tools/check_training_data.py --clean` and select anew") from error
    return (width, height) if turned else (height, width)


def training_pipeline(source: CropSource, index: int, *, device_id: int | None, threads: int, prefetch: int) -> Any:
    """The DALI pipeline that yields (hr, lr), uint8 NCHW, from micro-batch `index` on.

    hr: (micro-batch, 3, crop, crop); lr: (micro-batch, 3, crop / scale, crop / scale).
    """
    from nvidia.dali import fn, pipeline_def, types

    crop, low = source.crop, source.crop // source.scale
    all_encoded, any_encoded = source.all_encoded, source.any_encoded
    pixels_only, mixed = not any_encoded, any_encoded and not all_encoded
    layouts = ([] if all_encoded else ["HWC"]) + ([] if pixels_only else ["", ""]) + ([""] if mixed else []) + [""] * 3
    decoder = "cpu" if device_id is None else "mixed"

    @pipeline_def(batch_size=source.position.micro_batch, num_threads=threads, device_id=device_id,
                  prefetch_queue_depth=prefetch, enable_conditionals=True)
    def graph() -> Any:
        host = fn.external_source(source.micro_batches(index), num_outputs=len(layouts), layout=layouts, batch=True)
        vertical, horizontal, transposed = host[-3], host[-2], host[-1]
        if all_encoded:
            hr = decoded(host[0], host[1])
        elif mixed:
            stream, corner, is_pixels = host[1], host[2], host[3]
            if is_pixels:
                hr = on_device(host[0])
            else:
                hr = decoded(stream, corner)
        else:
            hr = on_device(host[0])
        hr = fn.flip(hr, vertical=vertical, horizontal=horizontal)
        # The low-resolution side is made of HWC bytes (twice as fast as of CHW) and before the transpose, which then
        # comes free with the change to CHW. Flips commute with the cubic exactly, and so both sides stay in step.
        lr = cubic_lr(fn, types, hr, low, low)
        if transposed:
            hr_out = channels_first(hr, [2, 1, 0])
            lr_out = channels_first(lr, [2, 1, 0])
        else:
            hr_out = channels_first(hr, [2, 0, 1])
            lr_out = channels_first(lr, [2, 0, 1])
        return hr_out, lr_out

    def channels_first(images: Any, order: list[int]) -> Any:
        return fn.transpose(images, perm=order, transpose_layout=False, output_layout="CHW")

    def on_device(pixels: Any) -> Any:
        return pixels if device_id is None else pixels.gpu()

    def decoded(stream: Any, corner: Any) -> Any:
        image = fn.decoders.image(stream, device=decoder, output_type=types.RGB)
        return fn.slice(image, start=corner, shape=[crop, crop], axes=[0, 1])

    return graph()


def cubic_lr(fn: Any, types: Any, hr: Any, height: int, width: int) -> Any:
    """DALI nodes: antialiased cubic (Keys, a = -0.5), edges repeated, rounded to the nearest byte.

    MATLAB's imresize but for the outermost pixels, where that mirrors the image instead.
    """
    return fn.resize(hr, resize_y=height, resize_x=width, interp_type=types.INTERP_CUBIC, antialias=True)
