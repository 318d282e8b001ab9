"""The first steps of a chain as nodes of a graph: against the host, and where a chain is split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvidia.dali.tensors import TensorListCPU
from test_chain import chain_of, drawn
from test_degradations import photographs, psnr, source

from pipeline.config.recipe import degradation_of
from pipeline.data.degradations.host import Workspace
from pipeline.data.degrading import HostDegraded
from pipeline.data.reader import training_pipeline
from pipeline.data.source import CropSource, Sample

TO_LR = {"resize": {"to": "lr", "kind": ["area", "linear", "cubic"]}}
ALL_BLURS = {
    "kind": [
        *("gaussian", "anisotropic", "generalized", "generalized_anisotropic", "plateau"),
        *("plateau_anisotropic", "sinc", "box", "lens", "motion"),
    ]
}
STEPS: Mapping[str, tuple[list[Any], float]] = {
    "blur": ([{"blur": ALL_BLURS}], 55),
    "resize": ([{"resize": {"factor": [0.3, 1.6]}}], 55),
    "resize to one side's": ([{"resize": {"to": "hr", "probability": 0.5}}], 50),
    "noise": ([{"noise": {"kind": ["gaussian", "poisson"]}}], 55),
    "sharpen": ([{"sharpen": {"kind": "unsharp"}}], 50),
    "sharpen, usm": ([{"sharpen": {"kind": "usm", "threshold": [0, 10]}}], 50),
    "color": (
        [{"color": {"black": [-20, 20], "white": [200, 300], "gamma": [0.5, 2], "hue": [-30, 30]}}],
        55,
    ),
    "color, no gamma": ([{"color": {"gamma": 1, "saturation": [0, 2]}}], 55),
    "compress": ([{"compress": {"quality": [30, 95]}}], 50),
    "groups": (
        [
            {"blur": {"probability": 0.5}},
            {"sometimes": {"probability": 0.5, "steps": ["color", {"blur": {"kind": "sinc"}}]}},
            {"one_of": ["noise", {"steps": [{"resize": {}}, "sharpen"]}, "none", "noise"]},
        ],
        50,
    ),
}
"""Steps that are all in the graph, before LR's size is made, and the least median of PSNR in dB."""
LATER: list[Any] = [
    {"shuffle": ["blur", {"noise": {"probability": 0.5}}]},
    {"chroma": {}},
    {"resize": {"kind": "lanczos", "factor": [0.7, 0.9]}},
]
"""Steps of which the first is not in the graph."""


def both(
    root: Path, steps: list[Any], *, micro_batch: int = 16, **data: Any
) -> tuple[list[CropSource], list[np.ndarray], list[np.ndarray]]:
    """Return the sources, and [HR, LR] of their first micro-batch, by the graph and by the host."""
    names, found, sources = photographs(root, (96, 110), (130, 90)), [], []
    for on_host in (False, True):
        crops = source(
            root,
            names,
            scale=2,
            micro_batch=micro_batch,
            degrades_on_host=on_host,
            degradation={"name": "chain", "steps": steps},
            **{"crop": 48, **data},
        )
        assert crops.degrades_on_host == on_host
        pipeline = training_pipeline(crops, 0, device_id=None, threads=2, prefetch=2)
        assert isinstance(pipeline, HostDegraded) == (on_host or crops.is_split)
        found.append([np.array(side.as_array()) for side in pipeline.run()])
        sources.append(crops)
    return sources, *found


def levels(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float64) / (257 if pixels.dtype == np.uint16 else 1)


@pytest.mark.parametrize("name", STEPS)
def test_the_graph_makes_what_the_host_makes(tmp_path: Path, name: str) -> None:
    """Up to rounding; a photon or a pixel at the threshold of a mask may differ by more."""
    steps, least = STEPS[name]
    (crops, on_host), by_graph, by_host = both(tmp_path, [*steps, TO_LR])
    assert not crops.is_split
    assert crops.samples(0, 16) == on_host.samples(0, 16)
    np.testing.assert_array_equal(by_graph[0], by_host[0])
    difference = np.abs(by_graph[1].astype(int) - by_host[1])
    assert by_graph[1].dtype == np.uint8
    assert difference.max() <= (3 if "sharpen" in str(steps) or "noise" in str(steps) else 1)
    values = [psnr(one, other) for one, other in zip(by_graph[1], by_host[1], strict=True)]
    assert np.median(values) > least, values
    assert min(values) > 45, values


def test_the_graph_makes_all_of_real_esrgans_chain(tmp_path: Path) -> None:
    """As the host does, but for single JPEG coefficients and photons."""
    steps = degradation_of("realesrgan_steps")["steps"]
    (crops, _), by_graph, by_host = both(tmp_path, steps)
    assert not crops.is_split
    values = [psnr(one, other) for one, other in zip(by_graph[1], by_host[1], strict=True)]
    assert min(values) > 35, values
    assert np.median(values) > 45, values


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"lr_noise": {"probability": 0.5}, "brightness": {"probability": 0.5}},
        {"sharpen_hr": True},
        {"depth": 16, "sharpen_hr": True, "lr_noise": {"probability": 1.0}},
    ],
    ids=["plain", "noise and brightness", "sharpened", "16 bits, sharpened, noise"],
)
@pytest.mark.parametrize("is_split", [False, True])
def test_with_all_that_a_recipe_may_add(
    tmp_path: Path, is_split: bool, data: dict[str, Any]
) -> None:
    steps = [*STEPS["groups"][0], *(LATER if is_split else []), TO_LR]
    (crops, on_host), by_graph, by_host = both(tmp_path, steps, **data)
    assert crops.is_split == is_split
    assert crops.samples(0, 16) == on_host.samples(0, 16)
    assert by_graph[1].dtype == by_host[1].dtype == by_graph[0].dtype
    assert np.abs(levels(by_graph[0]) - levels(by_host[0])).max() <= 1
    values = [
        psnr(levels(one), levels(other)) for one, other in zip(by_graph[1], by_host[1], strict=True)
    ]
    assert min(values) > 45, values
    assert np.median(values) > 52, values


@pytest.mark.parametrize("steps", [[TO_LR], ["blur", {"chroma": {}}]], ids=["graph", "split"])
def test_samples_do_not_depend_on_batches(tmp_path: Path, steps: list[Any]) -> None:
    names = photographs(tmp_path, (96, 110), (130, 90))

    def made(micro_batch: int, threads: int) -> np.ndarray:
        crops = source(
            tmp_path,
            names,
            scale=2,
            micro_batch=micro_batch,
            degradation={"name": "chain", "steps": [*STEPS["groups"][0], *steps]},
        )
        pipeline = training_pipeline(crops, 0, device_id=None, threads=threads, prefetch=2)
        return np.concatenate(
            [np.array(pipeline.run()[1].as_array()) for _ in range(12 // micro_batch)]
        )

    np.testing.assert_array_equal(made(12, 1), made(3, 2))


# Where a chain is split.

SPLITS: Mapping[str, tuple[list[Any], int, list[str], bool]] = {
    "all": (["blur", TO_LR], 2, ["blur", "resize"], False),
    "LR of HR's size": (["blur", "noise", "color"], 1, ["blur", "noise", "color"], False),
    "back to it": (["blur", {"resize": {}}, {"resize": {"to": "hr"}}], 1, ["blur"], False),
    "closing resize": (["blur", "noise"], 2, ["blur", "noise"], True),
    "perhaps": ([{"resize": {"to": "lr", "probability": 0.9}}], 2, ["resize"], True),
    "by a factor after it": ([TO_LR, {"resize": {"factor": 0.9}}], 2, ["resize"] * 2, True),
    "either way": ([{"one_of": [TO_LR, ["blur", TO_LR]]}], 2, ["resize", "blur", "resize"], False),
    "one way": ([{"one_of": [TO_LR, "blur"]}], 2, ["resize", "blur"], True),
    "sometimes": ([{"sometimes": {"probability": 0.5, "steps": [TO_LR]}}], 2, ["resize"], True),
    "again": ([TO_LR, {"sometimes": {"probability": 0.5, "steps": [TO_LR]}}], 2, [], False),
    "a step": (["noise", "chroma", "blur", TO_LR], 2, ["noise"], True),
    "a kind": (["noise", {"blur": {"kind": ["gaussian", "median"]}}, TO_LR], 2, ["noise"], True),
    "a kernel": (["blur", {"resize": {"kind": "lanczos", "to": "lr"}}], 2, ["blur"], True),
    "a detour": (["blur", {"resize": {"to": "lr", "detour": {"up": 0.1}}}], 2, ["blur"], True),
    "a space": (["blur", {"noise": {"space": "ycc"}}, TO_LR], 2, ["blur"], True),
    "a codec": (["blur", {"compress": {"codec": ["jpeg", "webp"]}}, TO_LR], 2, ["blur"], True),
    "subsampling": (["blur", {"compress": {"subsampling": "444"}}, TO_LR], 2, ["blur"], True),
    "passes": (["blur", {"compress": {"passes": [1, 2]}}, TO_LR], 2, ["blur"], True),
    "jpeg": ([TO_LR, "compress", "noise"], 2, ["resize", "compress", "noise"], False),
    "a shuffle": (["blur", {"shuffle": ["blur", "noise"]}, TO_LR], 2, ["blur"], True),
    "in a group": (["blur", {"one_of": ["noise", "chroma"]}, TO_LR], 2, ["blur"], True),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_chain_is_split_before_what_a_graph_cannot_do(name: str) -> None:
    steps, scale, leading, is_split = SPLITS[name]
    chain = chain_of(*steps, scale=scale)
    assert chain.is_split == is_split
    assert chain.has_nodes
    assert chain.leading[: len(leading)] == leading
    if is_split:
        assert len(chain.leading) == len(leading)


@pytest.mark.parametrize("first", ["chroma", {"shuffle": ["blur"]}, {"blur": {"kind": "median"}}])
def test_without_a_first_step_for_the_graph_the_host_makes_all(tmp_path: Path, first: Any) -> None:
    assert not chain_of(first, "blur", TO_LR).has_nodes
    names = photographs(tmp_path, (96, 110))
    degradation = {"name": "chain", "steps": [first, "blur"]}
    crops = source(tmp_path, names, scale=2, micro_batch=2, degradation=degradation)
    assert crops.degrades_on_host
    assert not crops.is_split


@pytest.mark.parametrize("later", [[], LATER, [{"resize": {"kind": "lanczos"}}, "noise", "blur"]])
def test_every_step_is_done_once_and_in_order(later: list[Any]) -> None:
    steps = [*STEPS["groups"][0], *STEPS["groups"][0], {"resize": {"probability": 0.5}}]
    chain = chain_of(*steps, *later, *([] if later else [TO_LR]))
    assert chain.is_split == bool(later)
    placed = 0
    for sample in range(200):
        plan = drawn(chain, sample)
        places = chain._by_place(plan)
        done = [step for step in places if step is not None]
        assert done == plan["steps"][: len(done)]
        assert all(
            step is None or step["step"] == name
            for step, name in zip(places, chain.leading, strict=True)
        )
        assert later or len(done) == len(plan["steps"])
        placed += len(done)
        arrays = chain.arrays(plan, [])
        assert tuple(arrays) == chain.columns
        keys = [arrays[name] for name in arrays if name.endswith(("_rows", "_columns"))]
        taken = sum(step is not None and step["step"] == "noise" for step in places)
        assert sum(array.size > 3 for array in keys) == 2 * taken  # small where nothing is added
    assert placed > 200


def test_what_a_gpu_made_is_awaited_before_it_is_copied() -> None:
    """With fakes for the GPU: HR stays there, and LR is finished by the host."""
    chain = chain_of({"blur": {"sigma": 1}}, "chroma", scale=1)
    calls: list[Any] = []
    image = np.full((8, 8, 3), 90.4, np.float32)

    def run(*streams: Any) -> tuple[str, Any]:
        calls.append(("run", *(stream.name for stream in streams)))
        as_cpu = lambda: (calls.append("copy"), TensorListCPU([image.copy()]))[1]  # noqa: E731
        return "hr on the GPU", SimpleNamespace(as_cpu=as_cpu)

    plan = drawn(chain, 0, (8, 8))
    sample = Sample(0, "", None, 0, 0, (0, 0, 8, 8), 0, 0, 0, 1.0, plan, 0.0, ())
    crops: Any = SimpleNamespace(
        is_split=True,
        spec=SimpleNamespace(sharpen_hr=False),
        crop=8,
        scale=1,
        depth=8,
        degradation_of=lambda folder: chain,
        lr_noise=None,
        degraded=lambda index: [(sample, [])],
    )
    stream = SimpleNamespace(name="loader", synchronize=lambda: calls.append("wait"))
    pipeline = HostDegraded(SimpleNamespace(run=run, exec_dynamic=True), crops, 0, 1)
    assert pipeline.exec_dynamic
    for streams, expected in (
        ((stream,), [("run", "loader"), "wait", "copy"]),
        ((), [("run",), "copy"]),
    ):
        calls.clear()
        hr, lr = pipeline.run(*streams)
        assert calls == expected
        assert hr == "hr on the GPU"
        rest = chain.rest_on_host(plan, image.copy(), (0, 0), (8, 8), Workspace())
        np.testing.assert_array_equal(
            np.array(lr.as_array())[0], np.rint(rest).astype(np.uint8).transpose(2, 0, 1)
        )
