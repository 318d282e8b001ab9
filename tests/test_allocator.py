"""The allocator keeps freed memory in every process that computes on a CPU."""

from __future__ import annotations

import json
import os

import pytest

from conftest import environment, run_python
from launch.environment import prepare
from pipeline.libraries import allocator_variables, keep_freed_memory

BOTH = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
FAULTS = """
import json, resource, statistics, sys
import torch
from pipeline.libraries import keep_freed_memory
from pipeline.models import build_generator

was_set = sys.argv[1] == "mallopt" and keep_freed_memory()
network = build_generator("vapsr", 4, num_blocks=3)
images = torch.rand(4, 3, 48, 48)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(images).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4):
    step()
print(json.dumps([was_set, statistics.median(step() for _ in range(7))]))
"""
needs_glibc = pytest.mark.skipif(not allocator_variables({}), reason="the C library is not glibc")


def faults(way: str, variables: dict[str, str]) -> tuple[bool, float]:
    """Return whether the process set it itself, and the median of its page faults per step.

    A fork does not read the variables.
    """
    done = run_python(FAULTS, way, env={**environment(), **variables})
    assert done.returncode == 0, done.stderr
    was_set, number = json.loads(done.stdout)
    return was_set, number


@needs_glibc
def test_a_step_on_a_cpu_asks_the_system_for_no_memory() -> None:
    _, plain = faults("plain", {})
    by_variables, with_variables = faults("plain", allocator_variables({}))
    by_mallopt, with_mallopt = faults("mallopt", {})
    assert (by_variables, by_mallopt) == (False, True)
    assert with_variables < 200, plain
    assert with_mallopt < 200, plain
    assert plain > 1000  # otherwise there is nothing to gain


@needs_glibc
@pytest.mark.parametrize(
    "own",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"MALLOC_TOP_PAD_": "4096"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    ],
)
def test_what_the_user_tunes_is_left_alone(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(allocator_variables({"MALLOC_ARENA_MAX": "2"})) == BOTH
    assert allocator_variables(own) == {}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert BOTH.isdisjoint(prepare(1, on_gpu=False).keys() - own.keys())


@needs_glibc
def test_ranks_on_cpus_start_with_both_thresholds_and_those_on_gpus_with_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in BOTH & os.environ.keys():
        monkeypatch.delenv(name)
    assert prepare(2, on_gpu=False).keys() >= BOTH
    assert BOTH.isdisjoint(prepare(2, on_gpu=True))
    assert allocator_variables(prepare(1, on_gpu=False)) == {}, "a rank must not set it again"
