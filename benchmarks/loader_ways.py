"""The ways of making training batches that benchmarks/loader.py compares: endless generators.

Those of other projects are simple reimplementations of what the projects do, without their code.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.config.recipe import degradation_of, degradation_spec
from pipeline.data.degradations import build_degradation, host
from pipeline.data.degradations.base import KEYS, Degradation
from pipeline.data.image_access import Part
from pipeline.data.reader import training_pipeline, turned_crops
from pipeline.data.sampling import Sampler
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import PRESETS, DataSpec
from pipeline.installation import recipe_names

PREFETCH = 3  # batches made in advance, where that is configurable

Batch = Sequence[Any]
WayFunction = Callable[["Setting"], Iterator[Batch]]


@dataclass(frozen=True)
class Setting:
    """The input of every way: the same images in several folders, and the batches to make.

    `folder`/npy and /png contain the same uint8 RGB images (height, width, 3); /lr_npy and /lr_png
    contain them downscaled by `scale`.
    """

    folder: Path
    crop: int
    scale: int
    micro_batch: int
    threads: int  # of DALI, and processes of the torch DataLoader
    device_id: int | None = None

    def files(self, form: str) -> list[Path]:
        """Return the images of `folder`/`form`, in the same order for each form."""
        return sorted((self.folder / form).iterdir())


@dataclass(frozen=True)
class Way:
    """A way of making batches.

    `batches` yields (hr, lr) in NCHW, where LR is the bicubic version of HR if `is_cubic`. Without
    `pairs` it yields (hr, ...) in NHWC and no LR.
    """

    batches: WayFunction
    pairs: bool = True
    is_cubic: bool = True


class _CropAlone(Degradation):
    """Makes LR from the crop alone, as if the photograph ended there."""

    surroundings = 0


def _our_source(
    setting: Setting, form: str = "npy", *, on_host: bool = True, **spec: Any
) -> CropSource:
    """Return this project's source of crops from the files of a form.

    `spec` adds to the recipe's data section. On a CPU, LR is made by the host's own chain if the
    degradation has one and `on_host` is set.
    """
    files, is_paired = setting.files(form), spec.get("degradation") == "paired"
    return CropSource(
        [str(file) for file in files],
        Sampler([len(files)], seed=0),
        DataSpec(crop=setting.crop, threads=setting.threads, **spec),
        scale=setting.scale,
        position=Position(0, 1, setting.micro_batch),
        lr_paths=[str(file) for file in setting.files(f"lr_{form}")] if is_paired else None,
        degrades_on_host=on_host and setting.device_id is None,
    )


def _our_arrays(
    setting: Setting, *, has_margin: bool = True, cut: str = "", read: str = "rows"
) -> tuple[tuple[str, ...], Iterator[Batch]]:
    """Return what this project's source passes to DALI: the arrays' names and their batches.

    Without `has_margin` only the crop is read. `cut` tells whether the crop is cut out of its
    region here: "" (no), "plain" or "turned". `read` tells how files are read: the "rows" of a
    region, through "kept maps" or "new maps" of the files, or "whole files".
    """
    source = _our_source(setting)
    if not has_margin:
        source.degradation = _CropAlone(None, setting.scale)
        source.degradations = [source.degradation]
    if read != "rows":
        whole = {
            "kept maps": lru_cache(partial(np.load, mmap_mode="r")),
            "new maps": partial(np.load, mmap_mode="r"),
            "whole files": np.load,
        }[read]
        source.hr.part = lambda opened, region, _: Part(
            region, pixels=_region(whole(opened._path), region)
        )
    kept = [i for i, column in enumerate(source.columns) if has_margin or column != "start"]
    columns = (*(source.columns[i] for i in kept), *["crop"] * bool(cut))
    size = setting.crop, setting.crop
    room = np.empty(
        (setting.micro_batch, *((3, *size) if cut == "turned" else (*size, 3))), np.uint8
    )
    crops = {"plain": _crops, "turned": turned_crops}.get(cut)
    return columns, (
        (*(batch[i] for i in kept), *([crops(source, batch, room)] if crops else []))
        for batch in source.micro_batches(0)
    )


def _crops(source: CropSource, arrays: Batch, room: np.ndarray) -> np.ndarray:
    size, regions = source.crop, arrays[source.columns.index("hr")]
    for i, (top, left) in enumerate(arrays[source.columns.index("start")]):
        room[i] = regions[i][top : top + size, left : left + size]
    return room


def _region(image: np.ndarray, region: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = region
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _given(columns: tuple[str, ...], batches: Iterator[Batch]) -> dict[str, Any]:
    """Return DALI nodes for the arrays, by name."""
    from nvidia.dali import fn

    nodes = fn.external_source(
        batches,
        num_outputs=len(columns),
        batch=True,
        layout=["HWC" if column in ("hr", "crop") else "" for column in columns],
    )
    return {column: nodes[i] for i, column in enumerate(columns)}


def _runs(pipeline: Any) -> Iterator[Batch]:
    while True:
        yield pipeline.run()


def ours(
    setting: Setting, form: str = "npy", prefetch: int = PREFETCH, **spec: Any
) -> Iterator[Batch]:
    """This project's DALI pipeline, driven by the caller's thread."""
    source = _our_source(setting, form, **spec)
    try:
        yield from _runs(
            training_pipeline(
                source, 0, device_id=setting.device_id, threads=setting.threads, prefetch=prefetch
            )
        )
    finally:
        source.close()


def ours_in_torch(setting: Setting) -> Iterator[Batch]:
    """This project's loader as training uses it: torch tensors from its own thread."""
    import torch

    from pipeline.data.loader import Loader

    device = (
        torch.device("cpu")
        if setting.device_id is None
        else torch.device("cuda", setting.device_id)
    )
    loader = Loader(_our_source(setting), 0, device, threads=setting.threads, prefetch=PREFETCH)
    try:
        for batch in loader:
            yield batch.hr, batch.lr
    finally:
        loader.close()


def our_host_work(setting: Setting) -> Iterator[Batch]:
    """The CPU's work when a GPU does the rest: this project's source without any operator."""
    from nvidia.dali import pipeline_def

    arrays = _our_arrays(setting)

    @pipeline_def(
        batch_size=setting.micro_batch,
        num_threads=setting.threads,
        device_id=None,
        prefetch_queue_depth=PREFETCH,
    )
    def graph() -> Any:
        return tuple(_given(*arrays).values())

    return _runs(graph())


def dali_of_png(setting: Setting) -> Iterator[Batch]:
    """The graph of `catid/upsampling` on the CPU.

    It decodes, crops and mirrors, changes the brightness, rotates, transposes and resizes,
    synchronously as in that project. Random mirroring and rotation give the eight symmetries.
    """
    from nvidia.dali import fn, pipeline_def, types

    crop, low = setting.crop, setting.crop // setting.scale

    @pipeline_def(
        batch_size=setting.micro_batch,
        num_threads=setting.threads,
        device_id=None,
        seed=1,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        streams, _ = fn.readers.file(
            files=[str(file) for file in setting.files("png")], random_shuffle=True
        )
        images = fn.decoders.image(streams, device="cpu", output_type=types.RGB)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.UINT8,
            crop=(crop, crop),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            output_layout="HWC",
        )
        is_changed = fn.random.coin_flip(probability=0.2)
        factor = 1 + is_changed * (fn.random.uniform(range=(0.5, 1.2)) - 1)
        images = fn.brightness(images, brightness=factor)
        images = fn.rotate(images, angle=fn.random.uniform(values=[0.0, 90.0, 180.0, 270.0]))
        hr = fn.transpose(images, perm=[2, 0, 1])
        return hr, fn.resize(hr, size=[low, low], interp_type=types.INTERP_CUBIC)

    return _runs(graph())


def dali_numpy_reader(setting: Setting) -> Iterator[Batch]:
    """DALI's own reader of random regions of `.npy` files, without any operator."""
    from nvidia.dali import fn, pipeline_def, types

    files = setting.files("npy")
    height, width = np.load(files[0], mmap_mode="r").shape[:2]
    room = [height - setting.crop, width - setting.crop]

    @pipeline_def(
        batch_size=setting.micro_batch,
        num_threads=setting.threads,
        device_id=None,
        seed=1,
        prefetch_queue_depth=PREFETCH,
    )
    def graph() -> Any:
        corner = fn.stack(*(fn.random.uniform(range=(-0.499, side + 0.499)) for side in room))
        corner = fn.cast(corner, dtype=types.INT32)  # rounds to the nearest integer
        return fn.readers.numpy(
            files=[str(file) for file in files],
            random_shuffle=True,
            dont_use_mmap=False,
            cache_header_information=True,
            roi_start=corner,
            roi_axes=[0, 1],
            roi_shape=[setting.crop, setting.crop],
        )

    return _runs(graph())


class PairedImages:
    """PNG pairs like those of BasicSR's PairedImageDataset: float32 RGB in [0, 1], CHW.

    Both images of a pair are cropped and flipped in the same way.
    """

    def __init__(self, setting: Setting) -> None:
        self.hr, self.lr = setting.files("png"), setting.files("lr_png")
        self.crop, self.scale = setting.crop, setting.scale

    def __len__(self) -> int:
        return len(self.hr)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        hr, lr = (
            cv2.imread(str(files[index])).astype(np.float32) / 255 for files in (self.hr, self.lr)
        )
        low = self.crop // self.scale
        top, left = random.randint(0, lr.shape[0] - low), random.randint(0, lr.shape[1] - low)
        lr = lr[top : top + low, left : left + low]
        top, left = top * self.scale, left * self.scale
        hr = hr[top : top + self.crop, left : left + self.crop]
        turns = [random.random() < 0.5 for _ in range(3)]
        return self._turned(hr, *turns), self._turned(lr, *turns)

    @staticmethod
    def _turned(image: np.ndarray, horizontal: bool, vertical: bool, transposed: bool) -> Any:
        import torch

        if horizontal:
            image = cv2.flip(image, 1)
        if vertical:
            image = cv2.flip(image, 0)
        if transposed:
            image = image.transpose(1, 0, 2)
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2RGB)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class WrittenImages(PairedImages):
    """The same pairs, with LR that is degraded and written as PNG before it is read.

    A preset's chain degrades the whole image, and each file is read once. The steps are this
    project's own; offline tools take longer for most of them.
    """

    def __init__(self, setting: Setting, preset: str) -> None:
        super().__init__(setting)
        self.degradation = build_degradation(degradation_spec(preset, preset), setting.scale)
        self.written = setting.folder / f"written_{preset}"

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        hr = cv2.cvtColor(cv2.imread(str(self.hr[index])), cv2.COLOR_BGR2RGB)
        uniform = iter(random.random, None)
        drawn = self.degradation.draw(uniform, *hr.shape[:2])
        keys = [random.getrandbits(64) for _ in range(KEYS)]
        lr = self.degradation.lr_on_host(drawn, keys, hr, (0, 0), hr.shape[:2], host.Workspace())
        folder = self.written / str(os.getpid())  # each process of the DataLoader has its own
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.lr[index].name
        cv2.imwrite(str(path), cv2.cvtColor(lr, cv2.COLOR_RGB2BGR))
        self.lr[index] = path
        return super().__getitem__(index)


def torch_of_written_png(setting: Setting, preset: str) -> Iterator[Batch]:
    """A torch DataLoader over `WrittenImages`."""
    return torch_of_png(setting, WrittenImages(setting, preset))


def torch_of_png(setting: Setting, images: PairedImages | None = None) -> Iterator[Batch]:
    """A torch DataLoader over `PairedImages`, with one process per thread and no epoch breaks."""
    from torch.utils.data import DataLoader, RandomSampler

    images = images or PairedImages(setting)
    sampler = RandomSampler(images, num_samples=1 << 40)
    return iter(
        DataLoader(
            images,
            setting.micro_batch,
            sampler=sampler,
            num_workers=setting.threads,
            worker_init_fn=_one_thread,
        )
    )


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)


def variant(
    setting: Setting,
    *,
    margin: str = "left out",
    lr: str = "before",
    antialias: bool = True,
    turn: str = "host",
    read: str = "rows",
    cut: str = "host",
) -> Iterator[Batch]:
    """This project's graph for `.npy` files, rewritten here so that one thing can be changed.

    Args:
        setting: the images and the batches.
        margin: LR is also made from HR pixels around the crop, which are "left out" of LR by the
            resize itself or "cut" off its result; or there are "none".
        lr: LR is made "before" or "after" the transpose to CHW, or not at all ("none").
        antialias: whether LR is antialiased.
        turn: HR is turned and transposed by the "host", or by DALI in the same way as LR: "rows"
            are flipped and the next operator mirrors, "flips" and a transpose, "rotate", or
            "rotate nearest".
        read: see `_our_arrays`.
        cut: the crop is cut out of its region by the "host" or by DALI's "slice".
    """
    from nvidia.dali import fn, pipeline_def, types

    crop, low = setting.crop, setting.crop // setting.scale
    has_margin = margin != "none"
    is_cut = cut == "host" and (has_margin or turn == "host")
    cut_as = ("turned" if turn == "host" else "plain") if is_cut else ""
    # Outside graph(), because DALI would convert the code that graph() calls.
    arrays = _our_arrays(setting, has_margin=has_margin, cut=cut_as, read=read)

    @pipeline_def(
        batch_size=setting.micro_batch,
        num_threads=setting.threads,
        device_id=None,
        prefetch_queue_depth=PREFETCH,
        enable_conditionals=True,
    )
    def graph() -> Any:
        nodes = _given(*arrays)
        region, start = nodes["hr"], nodes.get("start")
        if "crop" in nodes:
            hr = nodes["crop"]
        else:
            hr = (
                fn.slice(region, start=start, shape=[crop] * 2, axes=[0, 1])
                if has_margin
                else region
            )
        planes = hr if turn == "host" else turned(hr, nodes)
        if lr == "before":
            return planes, turned(smaller(region, start), nodes)
        return (planes, smaller(planes, start)) if lr == "after" else planes

    def turned(image: Any, nodes: dict[str, Any]) -> Any:
        vertical, horizontal, is_transposed = (
            nodes[name] for name in ("flip_vertical", "flip_horizontal", "transpose")
        )
        if turn.startswith("rotate"):
            angle = vertical * 90.0 + fn.cast(is_transposed, dtype=types.FLOAT) * 180.0
            method = types.INTERP_NN if turn == "rotate nearest" else types.INTERP_LINEAR
            rotated = fn.rotate(
                fn.flip(image, horizontal=horizontal), angle=angle, interp_type=method
            )
            return channels_first(rotated, [2, 0, 1])
        is_mirrored_late = turn in {"host", "rows"}
        image = fn.flip(image, vertical=vertical, horizontal=0 if is_mirrored_late else horizontal)
        if is_transposed:
            planes = channels_first(image, [2, 1, 0])
            if is_mirrored_late:
                planes = fn.flip(planes, horizontal=0, vertical=horizontal)
        else:
            if is_mirrored_late:
                planes = fn.crop_mirror_normalize(
                    image, mirror=horizontal, dtype=types.UINT8, output_layout="CHW"
                )
            else:
                planes = channels_first(image, [2, 0, 1])
        return planes

    def channels_first(image: Any, order: list[int]) -> Any:
        return fn.transpose(image, perm=order, transpose_layout=False, output_layout="CHW")

    def smaller(region: Any, start: Any) -> Any:
        resize = partial(fn.resize, interp_type=types.INTERP_CUBIC, antialias=antialias)
        if margin == "none":
            return resize(region, size=[low] * 2)
        if margin == "left out":
            first = fn.cast(start, dtype=types.FLOAT)
            return resize(region, size=[low] * 2, roi_start=first, roi_end=first + np.float32(crop))
        wide = resize(region, size=[low + _SURROUNDINGS] * 2)
        return fn.slice(wide, start=start // setting.scale, shape=[low] * 2, axes=[0, 1])

    return _runs(graph())


_SURROUNDINGS = 4  # LR pixels of both margins together that cubic resizing needs


def _with_one_thread(setting: Setting) -> Iterator[Batch]:
    return ours(replace(setting, threads=1))


def _source_alone(setting: Setting) -> Iterator[Batch]:
    return _our_arrays(setting)[1]


OURS, OURS_TORCH, OURS_PNG = (
    "this loader, npy",
    "this loader, npy, as torch tensors",
    "this loader, PNG",
)
HOST, DALI_PNG, TORCH_PNG = (
    "this loader's host work",
    "DALI, PNG, as catid/upsampling",
    "torch, PNG, as BasicSR",
)
WRITTEN_PRESET = "web_photo"
TORCH_WRITTEN = f"torch, {WRITTEN_PRESET} written as PNG, then read"
OURS_PRESET = f"this loader, npy, {WRITTEN_PRESET}"
DALI_NUMPY, WRITTEN_HERE = "DALI's numpy reader alone", "its graph, written here"

CHAIN = {"name": "chain", "steps": ["blur", "noise", {"resize": {"to": "lr"}}, "sharpen"]}
"""A GPU makes it alone."""

OUR_WAYS = {
    OURS: Way(ours),
    OURS_TORCH: Way(ours_in_torch),
    OURS_PNG: Way(partial(ours, form="png")),
    "this loader, PNG, from its cache": Way(partial(ours, form="png", cache_gb=64)),
    "this loader, npy, paired LR": Way(partial(ours, degradation="paired")),
    "this loader, npy, brightness of 20 %": Way(partial(ours, brightness={"probability": 0.2})),
    "this loader, npy, noise on LR": Way(
        partial(ours, lr_noise={"probability": 1.0}), is_cubic=False
    ),
    "this loader, npy, gaussian": Way(partial(ours, degradation="gaussian"), is_cubic=False),
    "this loader, npy, realesrgan": Way(partial(ours, degradation="realesrgan"), is_cubic=False),
    "this loader, npy, a chain of four steps": Way(
        partial(ours, degradation=CHAIN), is_cubic=False
    ),
    "this loader, npy, realesrgan by DALI alone": Way(
        partial(ours, degradation="realesrgan", on_host=False), is_cubic=False
    ),
    **{
        f"this loader, npy, {preset}": Way(
            partial(ours, degradation=degradation_of(preset)), is_cubic=False
        )
        for preset in recipe_names(PRESETS)
    },
}
"""These follow `Setting.device_id`; all others stay on the CPU."""

DEEP_FORMS = {"npy": "npy16", "png": "png16"}
"""Folder of the 8-bit files of a form -> folder of the same photographs in 16 bits."""
DEPTHS = {
    OURS: Way(ours),
    "this loader, npy of 16 bits": Way(partial(ours, form="npy16", depth=16)),
    OURS_PNG: Way(partial(ours, form="png")),
    "this loader, PNG of 16 bits": Way(partial(ours, form="png16", depth=16)),
    "this loader, npy, gaussian": Way(partial(ours, degradation="gaussian"), is_cubic=False),
    "this loader, npy of 16 bits, gaussian": Way(
        partial(ours, form="npy16", depth=16, degradation="gaussian"), is_cubic=False
    ),
}
"""Batches of 8 and of 16 bits; each of 16 follows the one of 8 that it is compared with."""

WAYS = {
    **OUR_WAYS,
    DALI_PNG: Way(dali_of_png),
    TORCH_PNG: Way(torch_of_png),
    TORCH_WRITTEN: Way(partial(torch_of_written_png, preset=WRITTEN_PRESET), is_cubic=False),
    DALI_NUMPY: Way(dali_numpy_reader, pairs=False),
    HOST: Way(our_host_work, pairs=False),
}
"""The ways to compare, in the order of the table."""

OPERATORS = {
    OURS: Way(ours),
    WRITTEN_HERE: Way(variant),
    "HR turned by DALI": Way(partial(variant, turn="rows")),
    "... and cut out by DALI": Way(partial(variant, turn="rows", cut="slice")),
    "flips and a transpose": Way(partial(variant, turn="flips")),
    "rotate": Way(partial(variant, turn="rotate")),
    "rotate, nearest pixel": Way(partial(variant, turn="rotate nearest")),
    "the margin cut off LR, not left out": Way(partial(variant, margin="cut")),
    "LR without the margin": Way(partial(variant, margin="none")),
    "... of CHW, after the transpose": Way(
        partial(variant, margin="none", turn="rows", lr="after")
    ),
    "LR without antialiasing": Way(partial(variant, antialias=False), is_cubic=False),
    "without LR": Way(partial(variant, margin="none", lr="none")),
    "files mapped, the maps kept": Way(partial(variant, read="kept maps")),
    "files mapped again": Way(partial(variant, read="new maps")),
    "np.load of whole files": Way(partial(variant, read="whole files")),
    "prefetch 1": Way(partial(ours, prefetch=1)),
    "one thread": Way(_with_one_thread),
    "its source alone, without DALI": Way(_source_alone, pairs=False),
}
"""The variants to compare with the first one."""
