"""Our depthwise kernel against float64 autograd, its build and choice, and the BF16 guard."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, environment
from fabricate import tiny_network
from pipeline.models import build_generator, depthwise, native
from pipeline.models.depthwise import (
    DepthwiseConv2d,
    faster_kernel,
    may_use_native,
    same_size,
    use_kernel,
)

needs_native = pytest.mark.usefixtures("native_kernel")
SHAPES = [  # images, channels, height, width, kernel, dilation
    (1, 1, 1, 1, 3, 1),
    (1, 16, 5, 5, 5, 3),
    (2, 64, 48, 48, 5, 1),
    (2, 64, 48, 48, 5, 3),
    (1, 3, 7, 2, 3, 2),
    (3, 17, 11, 13, 5, 2),
    (2, 31, 8, 33, 3, 3),
    (1, 48, 64, 9, 5, 1),
    (4, 5, 6, 7, 3, 1),
    (1, 8, 3, 100, 5, 3),
    (2, 33, 70, 21, 5, 3),
    (1, 40, 40, 300, 3, 2),
    (1, 16, 30, 1500, 5, 3),
    (0, 8, 4, 4, 3, 1),
]


@pytest.fixture
def native_kernel():
    """Built by the first test that uses it, not during collection."""
    if lacking := native.why_not_native():
        pytest.skip(f"no native kernel: {lacking}")


def draw(images, channels, height, width, kernel, *, seed=0):
    """Return images, weight, bias and the output's gradient: float64 with float32 values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (images, channels, height, width),
        (channels, 1, kernel, kernel),
        (channels,),
        (images, channels, height, width),
    )
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def by_autograd(features, weight, bias, gradient, dilation):
    """Return the output and the gradients of images, weight and bias, in float64."""
    inputs = [tensor.clone().requires_grad_() for tensor in (features, weight, bias)]
    out = F.conv2d(
        *inputs, padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=len(weight)
    )
    return out.detach(), *torch.autograd.grad(out, inputs, gradient)


@needs_native
@pytest.mark.parametrize(("images", "channels", "height", "width", "kernel", "dilation"), SHAPES)
def test_forward_and_gradients_are_autograds(images, channels, height, width, kernel, dilation):
    features, weight, bias, gradient = draw(images, channels, height, width, kernel)
    layer = same_size(channels, kernel, dilation)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    use_kernel(layer, "native")
    given = features.float().requires_grad_()
    out = layer(given)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.grad_fn.name() == "_DepthwiseBackward"
    out.backward(gradient.float())
    found = out.detach(), given.grad, layer.weight.grad, layer.bias.grad
    terms = kernel**2, kernel**2, max(1, images * height * width), max(1, images * height * width)
    for one, wanted, number in zip(
        found, by_autograd(features, weight, bias, gradient, dilation), terms, strict=True
    ):
        # The rounding error of sums of normal products grows with the square root of their number.
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=2e-6 * number**0.5)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_and_any_part_of_the_gradients(layout):
    features, weight, bias, gradient = (tensor.float() for tensor in draw(2, 20, 9, 10, 5))
    wanted = by_autograd(*(tensor.double() for tensor in (features, weight, bias, gradient)), 3)
    for wants in (
        (True, True, True),
        (True, False, False),
        (False, True, True),
        (False, False, True),
    ):
        inputs = [
            tensor.clone(memory_format=layout) if tensor.dim() == 4 and is_image else tensor.clone()
            for tensor, is_image in ((features, True), (weight, False), (bias, False))
        ]
        for tensor, wanted_gradient in zip(inputs, wants, strict=True):
            tensor.requires_grad_(wanted_gradient)
        out = depthwise._Depthwise.apply(*inputs, 3)
        out.backward(gradient.contiguous(memory_format=layout))
        for tensor, one, is_wanted in zip(inputs, wanted[1:], wants, strict=True):
            assert (tensor.grad is not None) == is_wanted
            if is_wanted:
                torch.testing.assert_close(tensor.grad.double(), one, rtol=1e-4, atol=1e-4)
    without = depthwise._Depthwise.apply(
        features.requires_grad_(), weight.requires_grad_(), None, 3
    )
    torch.testing.assert_close(
        without.detach().double(), wanted[0] - bias.double().view(1, -1, 1, 1), rtol=1e-4, atol=1e-4
    )
    without.backward(gradient)
    torch.testing.assert_close(weight.grad.double(), wanted[2], rtol=1e-4, atol=1e-4)


@needs_native
def test_slices_and_expanded_gradients_are_taken_as_they_lie():
    features, weight, bias, _ = (tensor.float() for tensor in draw(4, 24, 10, 12, 3))
    part = features[1:3, ::2, 1:, 2:].requires_grad_()  # neither layout
    out = depthwise._Depthwise.apply(part, weight[::2].requires_grad_(), bias[::2], 1)
    (to_part,) = torch.autograd.grad(out.sum(), part)  # a gradient of stride 0
    wanted = by_autograd(
        part.detach().double(),
        weight[::2].double(),
        bias[::2].double(),
        torch.ones_like(out).double(),
        1,
    )
    torch.testing.assert_close(out.detach().double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_part.double(), wanted[1], rtol=1e-5, atol=1e-5)


@needs_native
def test_the_number_of_threads_changes_no_bit():
    features, weight, bias, gradient = (tensor.float() for tensor in draw(3, 40, 37, 29, 5))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                (
                    native.forward(features, weight, bias, 3),
                    *native.backward(features, gradient, weight, 3),
                )
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@needs_native
def test_a_network_learns_the_same_with_either_kernel():
    torch.manual_seed(0)
    ours = build_generator(
        "vapsr", 2, num_features=12, num_attention_features=20, num_blocks=3
    ).train()
    theirs = copy.deepcopy(ours)
    assert may_use_native(ours)
    use_kernel(ours, "native")
    for network in (ours, theirs):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for number in range(3):
            images = torch.rand(2, 3, 19, 23, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    gradients = [
        {name: p.grad for name, p in network.named_parameters()} for network in (ours, theirs)
    ]
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert not all(
        torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items()
    ), "the native kernel did not run"


@needs_native
def test_pytorch_computes_whatever_is_not_eager_fp32(monkeypatch):
    monkeypatch.setattr(native, "forward", None)  # calling it would fail
    network = tiny_network()
    use_kernel(network, "native")
    images = torch.rand(1, 3, 9, 10)
    plain = tiny_network()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(network).double()(images), plain.double()(images))
        assert copy.deepcopy(network).bfloat16()(images).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            network(images)
        assert network.to("meta")(images.to("meta")).device.type == "meta"
    network = tiny_network()
    use_kernel(network, "native")
    traced = torch.jit.trace(network, images, check_trace=False)
    exported = torch.export.export(network, (images,))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for module in (traced, exported.module(), compiled):
        torch.testing.assert_close(module(images), tiny_network()(images))
    with pytest.raises(TypeError):
        network(images)


def test_only_convolutions_that_it_knows_are_given_to_the_native_kernel():
    fitting = same_size(8, 5, 3)
    others = [
        DepthwiseConv2d(8, 8, 7, padding=3, groups=8),
        DepthwiseConv2d(8, 8, 3, padding=1, groups=4),
        DepthwiseConv2d(8, 8, 3, stride=2, padding=1, groups=8),
        DepthwiseConv2d(8, 8, 3, groups=8),
        DepthwiseConv2d(8, 16, 3, padding=1, groups=8),
        DepthwiseConv2d(8, 8, (3, 5), padding=(1, 2), groups=8),
        DepthwiseConv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
    ]
    network = torch.nn.Sequential(fitting, *others)
    use_kernel(network, "native")
    assert [module.kernel for module in network] == ["native"] + ["torch"] * len(others)
    assert not may_use_native(torch.nn.Sequential(*others))
    use_kernel(network, "torch")
    assert fitting.kernel == "torch"


@needs_native
def test_the_faster_kernel_is_chosen_and_reported(monkeypatch):
    network = build_generator("vapsr", 2, num_features=8, num_attention_features=16, num_blocks=2)
    kernel, remark = faster_kernel(network, 2, 16)
    assert kernel in depthwise.KERNELS
    assert remark.startswith("depthwise convolutions: ")
    shown = {"torch": 0.004, "native": 0.001}
    monkeypatch.setattr(depthwise, "_measured", lambda *_: shown)
    assert faster_kernel(network, 2, 16) == (
        "native",
        "depthwise convolutions: our own C++ kernel, 4.0 times as fast here as PyTorch's",
    )
    shown["native"] = 0.0039
    assert faster_kernel(network, 2, 16)[0] == "torch"
    assert all(
        module.kernel == "torch"
        for module in network.modules()
        if isinstance(module, DepthwiseConv2d)
    )


# Building it.


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def ask(folder: Path, **variables: str) -> subprocess.Popen:
    """Start a process that prints why there is no native kernel, with the cache in `folder`."""
    code = "from pipeline.models import native; print(native.why_not_native())"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), "TORCH_EXTENSIONS_DIR": str(folder / "cache"), **variables},
    )


@needs_native
def test_one_process_builds_and_the_others_wait(tmp_path):
    compiler = script(tmp_path / "counting", f'echo "$*" >> {tmp_path}/calls; exec g++ "$@"')
    processes = [ask(tmp_path, CXX=str(compiler)) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["\n"] * 3
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if line != "--version"]
    assert len(calls) == 2, "compiled once, linked once"
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [".building", "depthwise.so"]
    ask(tmp_path, CXX=str(compiler)).communicate(timeout=120)
    assert sum(line != "--version" for line in (tmp_path / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            'test "$1" = --version && echo broken 1.0 && exit 0; echo "source.cpp:1: error: no '
            'such machine" >&2; exit 1',
            "failed to compile the kernel: source.cpp:1: error: no such machine",
        ),
        (
            'test "$1" = --version && echo empty 1.0 && exit 0; for last; do :; done; echo nothing '
            '> "$last"',
            "depthwise.so",
        ),
    ],
    ids=["refuses", "makes-rubbish"],
)
def test_a_compiler_that_fails_is_a_reason(tmp_path, text, reason):
    """One line, no exception, and nothing that the next process would take for a library."""
    compiler = script(tmp_path / "compiler", text)
    answer, _ = ask(tmp_path, CXX=str(compiler)).communicate(timeout=120)
    assert reason in answer
    assert answer.count("\n") == 1


def test_without_a_compiler_the_way_out_is_named(tmp_path):
    answer, _ = ask(tmp_path, CXX="", PATH=str(tmp_path)).communicate(timeout=120)
    assert answer == "there is no C++ compiler (Debian: apt install g++)\n"


@needs_native
def test_a_library_that_computes_something_else_is_refused(monkeypatch):
    right = native.forward
    monkeypatch.setattr(native, "forward", lambda *arguments: 1.001 * right(*arguments))
    assert (
        native.why_not_native.__wrapped__() == "the compiled kernel's results differ from PyTorch's"
    )


@needs_native
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "cache").write_text("a file")
    answer, _ = ask(tmp_path).communicate(timeout=120)
    assert "Not a directory" in answer or "File exists" in answer
    assert answer.count("\n") == 1
    assert os.environ.get("TORCH_EXTENSIONS_DIR") != str(tmp_path / "cache")
