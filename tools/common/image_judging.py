"""Whether one file can be trained on: what check_training_data.py asks of every image."""

from __future__ import annotations

import enum
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.image_files import BadNpyError, is_npy, npy_layout
from tools.common.image_headers import BadImageError, ImageHeader, read_header
from tools.common.image_streams import check_complete, check_riff_length
from tools.common.manifest import CropRecord
from tools.common.photo_decoding import check_megapixels


class Verdict(enum.Enum):
    """What is known of a file."""

    GOOD = "good"
    BAD = "bad"
    UNREADABLE = "could not be read"  # says nothing about the file: never a reason to remove it


@dataclass(frozen=True)
class Judgement:
    """The verdict on one file (a path relative to the dataset), its reason, and how many bytes were read for it."""

    path: str
    verdict: Verdict
    reason: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Rules:
    """What a file must fulfil. Sizes are of both sides, in pixels."""

    min_size: int
    max_size: int | None
    max_megapixels: float
    decode: bool  # False: headers only


class DaliDecoder:
    """DALI's CPU image decoder, one file at a time: the decoder that training uses.

    One file a batch, since DALI raises for the whole batch and does not say which file it was. Not for several threads.
    """

    def __init__(self) -> None:
        self._pipeline = None

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 RGB (height, width, 3), EXIF orientation applied; raises `BadImageError` where DALI refuses."""
        if self._pipeline is None:
            self._pipeline = _build_pipeline()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
            (images,) = self._pipeline.run()
            return np.array(images.at(0))
        except Exception as error:  # RuntimeError for most files, IndexError or MemoryError for some
            self._pipeline = None  # "Current pipeline object is no longer valid"
            if isinstance(error, MemoryError) or "bad_alloc" in str(error):
                raise OSError(None, "not enough memory to decode it") from error
            raise BadImageError("DALI, which training reads images with, cannot decode it") from error


def _build_pipeline():  # DALI has no public type that could be named here without importing it
    """A pipeline of one decoder, run in the calling thread so that errors come out where they belong."""
    from nvidia.dali import fn, pipeline_def, types  # not at the top: an .npy dataset is checked without DALI

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False,
                  exec_pipelined=False)
    def decoder():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    pipeline = decoder()
    pipeline.build()
    return pipeline


class Judge:
    """Judges files on any number of threads."""

    def __init__(self, root: Path, rules: Rules, crops: dict[str, CropRecord]) -> None:
        self._root, self._rules, self._crops = root, rules, crops
        self._of_thread = threading.local()

    def __call__(self, name: str) -> Judgement:
        """The judgement on the file `name`, relative to the dataset. Raises nothing that a file could cause."""
        path = self._root / name
        try:
            size = self._judge_npy(path, name) if is_npy(name) else self._judge_encoded(path, name)
        except BadNpyError as error:
            return Judgement(name, Verdict.BAD, error.reason)
        except BadImageError as error:
            return Judgement(name, Verdict.BAD, str(error))
        except OSError as error:  # FileNotFoundError too: a link into nowhere, or a file that went while we looked
            return Judgement(name, Verdict.UNREADABLE, error.strerror or str(error))
        return Judgement(name, Verdict.GOOD, bytes=size)

    def _judge_npy(self, path: Path, name: str) -> int:
        if not path.exists():
            raise FileNotFoundError(None, "No such file (a link into nowhere?)")
        layout = npy_layout(path)
        self._check_size(layout.height, layout.width)
        if not self._rules.decode:
            return layout.offset
        with open(path, "rb") as file:
            file.seek(layout.offset)
            pixels = file.read()
        if name in self._crops:
            self._check_pixels(name, hashlib.sha256(pixels).hexdigest())
        return layout.offset + len(pixels)

    def _judge_encoded(self, path: Path, name: str) -> int:
        with open(path, "rb") as file:
            header = read_header(file)
            self._check_size(header.height, header.width)
            check_megapixels(header, self._rules.max_megapixels)
            file.seek(0)
            if not self._rules.decode:
                if header.format == "webp":
                    check_riff_length(file.read(8), os.fstat(file.fileno()).st_size)
                return file.tell()
            data = file.read()
        check_complete(data, header)
        pixels = self._decode(data, header)
        if name in self._crops:
            self._check_pixels(name, hashlib.sha256(pixels).hexdigest())
        return len(data)

    def _decode(self, data: bytes, header: ImageHeader) -> np.ndarray:
        decoder = getattr(self._of_thread, "decoder", None)
        if decoder is None:
            decoder = self._of_thread.decoder = DaliDecoder()
        pixels = decoder.decode(data)
        if {*pixels.shape[:2]} != {header.height, header.width} or pixels.shape[2:] != (3,):
            raise BadImageError(f"decoded to {pixels.shape} where its header says {header.height}x{header.width}")
        return pixels

    def _check_size(self, height: int, width: int) -> None:
        rules = self._rules
        if min(height, width) < rules.min_size:
            raise BadImageError(f"{height}x{width} is too small: both sides must be at least {rules.min_size} "
                                "(--min-size)")
        if rules.max_size is not None and max(height, width) > rules.max_size:
            raise BadImageError(f"{height}x{width} is too large: both sides may be at most {rules.max_size} "
                                "(--max-size)")

    def _check_pixels(self, name: str, digest: str) -> None:
        if digest != self._crops[name].sha256:
            raise BadImageError("its pixels are not those that the manifest recorded (bit rot, or somebody changed it)")
