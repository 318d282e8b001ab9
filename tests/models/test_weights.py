from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from test_generators import esrdgan_names, first_esrgan_names, second_esrgan_names
from test_vapsr import plain_vapsr

from fabricate import CHECKOUT, TINY, make_run, shared, tiny_network, tiny_saved
from pipeline import run_folder
from pipeline.cli import UserError
from pipeline.images import to_bytes
from pipeline.models import GENERATORS, build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.models.weights import SavedNetwork, read_network, write_network

ALL_PARAMS = {
    "num_features",
    "num_attention_features",
    "num_blocks",
    "conv_groups",
    "projection_kernel",
    "upsampler_features",
    "global_residual",
    "value_range",
}
TINY_STATE = tiny_network().state_dict()


def equal_states(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


def save_pickled(path, content):
    torch.save(content, path)
    return path


def test_the_same_network_gives_the_same_bytes(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        write_network(
            file,
            SavedNetwork(
                "vapsr",
                4,
                {},
                {"b": torch.ones(3), "a": torch.zeros(5, dtype=torch.half)},
                {"licence": "CC-BY-4.0", "ü": '"', "run": "r", "step": "7"},
            ),
        )
    assert len({file.read_bytes() for file in files}) == 1
    with safetensors.safe_open(files[0], "pt") as opened:
        assert opened.metadata()["ü"] == '"'
        assert opened.get_tensor("a").tolist() == [0.0] * 5


def test_tensors_lie_in_a_file_as_the_library_lays_them(tmp_path):
    """All dtypes in the library's order; only the metadata is sorted."""
    torch.manual_seed(0)
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float32,
        torch.float64,
        torch.int64,
    ]
    tensors = {
        name: (torch.rand(shape) * 100).to(kind)
        for kind in kinds
        for name, shape in (
            (f"b.{kind}", (2, 3)),
            (f"a.{kind}", ()),
            (f'ü."{kind}', (5, 1, 7)),
            (f"empty.{kind}", (0, 4)),
        )
    }
    tensors["wide"] = torch.rand(1, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    tensors["part"] = tensors["wide"][:, :, 1:3]
    write_network(tmp_path / "a.safetensors", SavedNetwork("vapsr", 4, {}, tensors, {"step": "7"}))
    ours = (tmp_path / "a.safetensors").read_bytes()
    theirs = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"step": "7", "architecture": "vapsr"},
    )
    ends = [8 + int.from_bytes(content[:8], "little") for content in (ours, theirs)]
    headers = [
        json.loads(content[8:end]) for content, end in zip((ours, theirs), ends, strict=True)
    ]
    assert list(headers[0].pop("__metadata__")) == ["architecture", "scale", "step", "vastscale"]
    headers[1].pop("__metadata__")
    assert list(headers[0].items()) == list(headers[1].items())
    assert ours[ends[0] :] == theirs[ends[1] :]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip_keeps_every_bit_and_word(tmp_path, suffix):
    saved = tiny_saved(scale=3, global_residual="bicubic")
    saved.metadata = {"step": "400", "recipe": "demo"}
    saved.state_dict["conv_first.weight"] = (
        saved.state_dict["conv_first.weight"].half().contiguous(memory_format=torch.channels_last)
    )
    write_network(tmp_path / f"a{suffix}", saved)
    found = read_network(tmp_path / f"a{suffix}")
    assert (found.name, found.scale, found.params, found.metadata) == (
        saved.name,
        saved.scale,
        saved.params,
        saved.metadata,
    )
    assert equal_states(found.state_dict, saved.state_dict)
    assert os.listdir(tmp_path) == [f"a{suffix}"]  # no temporary file remains


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "params",
    [
        {"scale": 2},
        {"scale": 3},
        {"scale": 4},
        {"scale": 2, "projection_kernel": 3, "value_range": "signed"},
        {"scale": 2, "projection_kernel": 3, "global_residual": "bicubic"},
        {"scale": 4, "conv_groups": 2, "num_blocks": 11},
        {"scale": 2, "upsampler_features": 24},
        {"scale": 3, "global_residual": "bicubic"},
        {"scale": 1},
        {"scale": 1, "projection_kernel": 3, "global_residual": "bicubic"},
    ],
)
def test_the_network_is_recognised_from_its_tensors_alone(tmp_path, suffix, params):
    network = tiny_network(**params)
    path = tmp_path / f"bare{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    found = read_network(path)
    expected = {
        **TINY,
        "conv_groups": 1,
        "projection_kernel": 1,
        "global_residual": "none",
        "value_range": "unit",
        "upsampler_features": {1: None, 4: 64}.get(params["scale"], 56),
        **params,
    }
    assert found.scale == expected.pop("scale")
    assert (found.name, found.params) == ("vapsr", expected)
    assert set(found.params) == ALL_PARAMS
    images = torch.rand(1, 3, 8, 9)
    with torch.inference_mode():
        assert torch.equal(found.build()(images), network(images))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "netG.",
        "net_g.module.",
        "module.generator._orig_mod.module.",
        "_forward_module.",
    ],
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    state = tiny_network().state_dict()
    path = save_pickled(tmp_path / "a.pth", {prefix + key: tensor for key, tensor in state.items()})
    assert equal_states(read_network(path).state_dict, state)


def test_blocks_compiled_one_by_one_are_stripped_too(tmp_path):
    network = tiny_network()
    state = network.state_dict()
    network.body[1] = torch.compile(network.body[1])
    assert "body.1._orig_mod.proj_1.weight" in network.state_dict()
    path = save_pickled(tmp_path / "a.pth", network.state_dict())
    assert equal_states(read_network(path).state_dict, state)


def test_averaged_weights_are_preferred_and_others_can_be_named(tmp_path):
    raw, averaged = tiny_network(1).state_dict(), tiny_network(2).state_dict()
    path = save_pickled(tmp_path / "a.pth", {"iter": 7, "params": raw, "params_ema": averaged})
    assert equal_states(read_network(path).state_dict, averaged)
    assert equal_states(read_network(path, weights="params").state_dict, raw)
    with pytest.raises(UserError, match="holds no weights 'param'; did you mean 'params'"):
        read_network(path, weights="param")


def test_of_a_whole_gan_the_generator_is_taken(tmp_path):
    state = tiny_network().state_dict()
    gan = {f"generator.{key}": tensor for key, tensor in state.items()}
    gan |= {f"discriminator.{key}": torch.zeros(3) for key in state}
    path = save_pickled(tmp_path / "a.pt", {"state_dict": gan, "global_step": 3})
    assert equal_states(read_network(path).state_dict, state)


@pytest.mark.parametrize(
    "key",
    [
        "params",
        "state_dict",
        "model",
        "model_state_dict",
        "generator",
        "ema_state_dict",
        "netG",
        "net_g",
    ],
)
def test_state_dicts_are_found_under_the_usual_names(tmp_path, key):
    state = tiny_network().state_dict()
    path = save_pickled(tmp_path / "a.pt", {key: state, "epoch": 3, "optimizer": {"state": {}}})
    assert equal_states(read_network(path).state_dict, state)


def test_half_files_keep_their_dtype_and_build_in_float32(tmp_path):
    state = {key: tensor.half() for key, tensor in tiny_network().state_dict().items()}
    found = read_network(save_pickled(tmp_path / "half.pth", {"params": state}))
    assert equal_states(found.state_dict, state)
    built = found.build().state_dict()
    assert all(torch.equal(built[key], tensor.float()) for key, tensor in state.items())


def test_building_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_built = SavedNetwork("vapsr", 2, TINY, TINY_STATE).build()
    assert not tiny_built.training
    assert torch.equal(torch.rand(3), expected)


class _Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_refused_and_never_runs(tmp_path):
    victim = tmp_path / "executed"
    path = save_pickled(
        tmp_path / "a.pth", {"params": TINY_STATE, "extra": _Payload(f"touch {victim}")}
    )
    with pytest.raises(
        UserError, match=r"pickled code besides tensors \(posix.system\), which is never executed"
    ):
        read_network(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the payload is real: unsafe loading executes it
    assert victim.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    write_network(path, tiny_saved())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="is not a readable") as caught:
        read_network(path)
    assert re.search(re.escape(str(path)), str(caught.value))
    assert "\n" not in str(caught.value)


def test_files_of_no_use_are_one_clear_line_each(tmp_path):
    rrdb = {
        "conv_first.weight": torch.zeros(8, 3, 3, 3),
        "body.0.rdb1.conv1.weight": torch.zeros(4, 8, 3, 3),
        "conv_body.weight": torch.zeros(8, 8, 3, 3),
        "conv_up1.weight": torch.zeros(8, 8, 3, 3),
    }
    cases = {
        (
            r"matches no known network \(vapsr, .*, spandrel\); "
            r"its first tensors are conv_first.weight"
        ): rrdb,
        "contains no state dict; found epoch": {"epoch": 3},
        "holds a list, not a state dict": [torch.zeros(1)],
        "contains no state dict; found nothing": {},
    }
    for number, (message, content) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            read_network(save_pickled(tmp_path / f"{number}.pth", content))
    (tmp_path / "text.onnx").write_text("x")
    for path, message in (
        (tmp_path / "none.pth", "no weights file"),
        (tmp_path, "it is a folder"),
        (tmp_path / "text.onnx", "has none of the suffixes .safetensors, .pth, .pt, .ckpt, .bin"),
    ):
        with pytest.raises(UserError, match=message):
            read_network(path)
    with pytest.raises(UserError, match=r"must end in .safetensors or .pth"):
        write_network(tmp_path / "a.onnx", tiny_saved())


def test_metadata_that_cannot_be_understood_is_named(tmp_path):
    for description in (
        "{",
        "[]",
        json.dumps({"name": "vapsr"}),
        json.dumps({"name": "vapsr", "scale": "x", "params": {}}),
    ):
        path = save_pickled(tmp_path / "a.pth", {"params": TINY_STATE, "vastscale": description})
        with pytest.raises(UserError, match="metadata is invalid"):
            read_network(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("conv_body.bias"), "needs the tensor 'conv_body.bias'"),
        (lambda state: state.update(surplus=torch.zeros(1)), "has no tensor 'surplus'"),
        (
            lambda state: state.update({"conv_body.bias": torch.zeros(9)}),
            r"is \(9,\) in the weights but must be \(8,\)",
        ),
        (
            lambda state: state["conv_body.bias"].fill_(float("nan")),
            "'conv_body.bias' contains NaN or infinity",
        ),
    ],
)
def test_build_refuses_what_does_not_fit(spoil, message):
    saved = SavedNetwork(
        "vapsr", 2, TINY, {key: tensor.clone() for key, tensor in TINY_STATE.items()}
    )
    spoil(saved.state_dict)
    with pytest.raises(UserError, match=message):
        saved.build()


def test_a_file_is_replaced_not_overwritten(tmp_path):
    path, reader = tmp_path / "a.pth", tmp_path / "link.pth"
    write_network(path, tiny_saved(1))
    os.link(path, reader)  # readers of the old file still see all of it
    before = path.read_bytes()
    write_network(path, tiny_saved(2))
    assert reader.read_bytes() == before != path.read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write_network(path, tiny_saved(1))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_network(path, tiny_saved(2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


def convolution(name, out, inputs, size=3, bias=True):
    return {f"{name}.weight": (out, inputs, size, size)} | (
        {f"{name}.bias": (out,)} if bias else {}
    )


def norm(name, features):
    return {
        f"{name}.{part}": (features,) for part in ("weight", "bias", "running_mean", "running_var")
    } | {f"{name}.num_batches_tracked": ()}


def ancestor_vapsr(features=12, attention=8, blocks=2):
    """catid/upsampling's x2 network with 3x3 projections, upsampling_net.py."""
    shapes = convolution("conv_first", features, 3)
    for block in range(blocks):
        name = f"body.{block}"
        shapes |= convolution(f"{name}.proj_1", attention, features)
        shapes |= convolution(f"{name}.atten_branch.pointwise", attention, attention, 1)
        shapes |= convolution(f"{name}.atten_branch.depthwise", attention, 1, 5)
        shapes |= convolution(f"{name}.atten_branch.depthwise_dilated", attention, 1, 5)
        shapes |= convolution(f"{name}.proj_2", features, attention, 1)
        shapes |= {f"{name}.pixel_norm.weight": (features,), f"{name}.pixel_norm.bias": (features,)}
    shapes |= convolution("conv_body", features, features)
    return shapes | convolution("upsampler.0", 56, features) | convolution("upsampler.2", 12, 56)


def basicsr_rrdbnet(folded=1, features=16, blocks=2, growth=32):
    """BasicSR's rrdbnet_arch.py; x2 unshuffles the image first."""
    shapes = convolution("conv_first", features, 3 * folded)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for number in range(1, 6):
                shapes |= convolution(
                    f"body.{block}.rdb{dense}.conv{number}",
                    growth if number < 5 else features,
                    features + (number - 1) * growth,
                )
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        shapes |= convolution(name, features, features)
    return shapes | convolution("conv_last", 3, features)


def second_esrgan():
    """ESRGAN's own RRDBNet_arch.py (BSRGAN and RealSR have it, too)."""
    renames = {
        "body": "RRDB_trunk",
        "rdb": "RDB",
        "conv_body": "trunk_conv",
        "conv_up": "upconv",
        "conv_hr": "HRconv",
    }
    return {
        re.sub(r"conv_body|body|rdb|conv_up|conv_hr", lambda match: renames[match[0]], name): shape
        for name, shape in basicsr_rrdbnet().items()
    }


def first_esrgan(blocks=2):
    """ESRGAN's first code, whose layers are numbered in one sequence."""
    places = {
        "conv_first": "model.0",
        "conv_body": f"model.1.sub.{blocks}",
        "conv_up1": "model.3",
        "conv_up2": "model.6",
        "conv_hr": "model.8",
        "conv_last": "model.10",
    }
    shapes = {}
    for name, shape in basicsr_rrdbnet(blocks=blocks).items():
        layer, part = name.rsplit(".", 1)
        layer = re.sub(
            r"body\.(\d+)\.rdb(\d)\.(conv\d)",
            r"model.1.sub.\1.RDB\2.\3.0",
            places.get(layer, layer),
        )
        shapes[f"{layer}.{part}"] = shape
    return shapes


def esrdgan(blocks=2, fusion=3, last=3):
    """esrdgan's ESRDnet (generator.py and blocks.py), x4: RRDBNet in modules of its own."""
    places = {
        "conv_first": "model.0",
        "conv_body": f"model.1.module.{blocks}",
        "conv_up1": "model.2.upconv.1",
        "conv_up2": "model.3.upconv.1",
        "conv_hr": "model.4",
        "conv_last": "model.6",
    }
    kernels = {"conv5": fusion, "conv_hr": last, "conv_last": last}
    shapes = {}
    for name, shape in basicsr_rrdbnet(blocks=blocks).items():
        layer, part = name.rsplit(".", 1)
        if part == "weight":
            shape = (*shape[:2], *[kernels.get(layer.split(".")[-1], 3)] * 2)
        dense = re.fullmatch(r"body\.(\d+)\.rdb(\d)\.conv(\d)", layer)
        if dense:
            inner = "LFF" if dense[3] == "5" else f"conv{dense[3]}.conv.0"
            layer = f"model.1.module.{dense[1]}.rdbs.{int(dense[2]) - 1}.{inner}"
        shapes[f"{places.get(layer, layer)}.{part}"] = shape
    return shapes


def basicsr_msrresnet(scale, features=16, blocks=2):
    """BasicSR's srresnet_arch.py."""
    shapes = convolution("conv_first", features, 3)
    for block in range(blocks):
        shapes |= convolution(f"body.{block}.conv1", features, features)
        shapes |= convolution(f"body.{block}.conv2", features, features)
    shapes |= convolution("upconv1", features * (9 if scale == 3 else 4), features)
    if scale == 4:
        shapes |= convolution("upconv2", features * 4, features)
    return (
        shapes | convolution("conv_hr", features, features) | convolution("conv_last", 3, features)
    )


def basicsr_compact(scale, features=8, convolutions=3):
    """BasicSR's srvgg_arch.py with PReLU."""
    shapes = convolution("body.0", features, 3) | {"body.1.weight": (features,)}
    for number in range(2, 2 * convolutions + 2, 2):
        shapes |= convolution(f"body.{number}", features, features) | {
            f"body.{number + 1}.weight": (features,)
        }
    return shapes | convolution(f"body.{2 * convolutions + 2}", 3 * scale * scale, features)


def srgan_generator(features=8, blocks=3):
    """SRGAN-PyTorch's model.py, x4."""
    shapes = convolution("conv1.0", features, 3, 9) | {"conv1.1.weight": (1,)}
    for block in range(blocks):
        name = f"trunk.{block}.rcb"
        shapes |= convolution(f"{name}.0", features, features, bias=False) | norm(
            f"{name}.1", features
        )
        shapes |= {f"{name}.2.weight": (1,)}
        shapes |= convolution(f"{name}.3", features, features, bias=False) | norm(
            f"{name}.4", features
        )
    shapes |= convolution("conv2.0", features, features, bias=False) | norm("conv2.1", features)
    for stage in range(2):
        name = f"upsampling.{stage}.upsample_block"
        shapes |= convolution(f"{name}.0", 4 * features, features) | {f"{name}.2.weight": (1,)}
    return shapes | convolution("conv3", 3, features, 9)


FOREIGN = {
    "ancestor's VapSR-3x3": (ancestor_vapsr, "vapsr", 2),
    "RRDBNet": (basicsr_rrdbnet, "rrdbnet", 4),
    "RRDBNet x2": (lambda: basicsr_rrdbnet(folded=4), "rrdbnet", 2),
    "RRDBNet x1": (lambda: basicsr_rrdbnet(folded=16), "rrdbnet", 1),
    "ESRGAN 2": (second_esrgan, "rrdbnet", 4),
    "ESRGAN 1": (first_esrgan, "rrdbnet", 4),
    "esrdgan": (lambda: esrdgan(blocks=12), "rrdbnet", 4),
    "esrdgan, other kernels": (lambda: esrdgan(fusion=1, last=5), "rrdbnet", 4),
    "MSRResNet x2": (lambda: basicsr_msrresnet(2), "msrresnet", 2),
    "MSRResNet x3": (lambda: basicsr_msrresnet(3), "msrresnet", 3),
    "MSRResNet x4": (lambda: basicsr_msrresnet(4), "msrresnet", 4),
    "SRVGGNetCompact x1": (lambda: basicsr_compact(1), "compact", 1),
    "SRVGGNetCompact x2": (lambda: basicsr_compact(2), "compact", 2),
    "SRVGGNetCompact x4": (lambda: basicsr_compact(4), "compact", 4),
    "SRGAN": (srgan_generator, "srresnet", 4),
}


def foreign_state(shapes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        is_count = name.endswith("num_batches_tracked")
        state[name] = torch.tensor(7) if is_count else (0.1 * torch.randn(shape)).abs().to(dtype)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_load_strictly(tmp_path, kind, dtype):
    make, name, scale = FOREIGN[kind]
    state = foreign_state(make(), dtype)
    averaged = {f"module.{key}": tensor for key, tensor in state.items()}
    path = save_pickled(
        tmp_path / "a.pth", {"params": foreign_state(make(), dtype, seed=1), "params_ema": averaged}
    )
    found = read_network(path)
    assert (found.name, found.scale) == (name, scale)
    built = found.build().state_dict()
    assert len(built) == len(state)
    # the order stays, only names change
    for ours, theirs in zip(found.state_dict, state, strict=True):
        assert torch.equal(built[ours], state[theirs].to(built[ours].dtype))


@pytest.mark.parametrize(
    ("network", "params", "renamed"),
    [
        ("rrdbnet", {"num_grow_ch": 4}, lambda name: name),
        ("rrdbnet", {"num_grow_ch": 4}, second_esrgan_names),
        ("rrdbnet", {"num_grow_ch": 4}, first_esrgan_names),
        ("rrdbnet", {"num_grow_ch": 4, "hr_kernel": 5, "fusion_kernel": 1}, esrdgan_names),
        ("compact", {"num_features": 8, "num_conv": 2}, lambda name: name),
        ("spandrel", {"arch": "SPAN", "feature_channels": 8}, lambda name: name),
        # As released: it works on [0, 255].
        ("spandrel", {"arch": "SPAN", "feature_channels": 16, "norm": True}, lambda name: name),
        (
            "spandrel",
            {"arch": "RealPLKSR", "dim": 16, "n_blocks": 2, "kernel_size": 5, "dysample": True},
            lambda name: name,
        ),
    ],
    ids=["ESRGAN", "ESRGAN 2", "ESRGAN 1", "esrdgan", "Compact", "SPAN", "SPAN 255", "RealPLKSR"],
)
def test_files_of_other_projects_give_the_images_of_their_networks(
    tmp_path, network, params, renamed
):
    torch.manual_seed(0)
    small = {"num_features": 8, "num_blocks": 2} if network == "rrdbnet" else {}
    made = build_generator(network, 4, **small, **params).eval()
    state = {renamed(name): tensor for name, tensor in made.state_dict().items()}
    found = read_network(save_pickled(tmp_path / "a.pth", {"params_ema": state}))
    images = torch.rand(1, 3, 12, 13)
    with torch.inference_mode():
        assert torch.equal(found.build()(images), made(images))
    assert (found.name, found.scale) == (network, 4)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_wrong_tensor_in_a_foreign_file_is_named(tmp_path, kind):
    make, _, _ = FOREIGN[kind]
    for spoil, message in (
        (lambda state, key: state.pop(key), "needs the tensor '{}'"),
        (lambda state, key: state.update({key: torch.zeros(5)}), "tensor '{}' is \\(5,\\) in"),
        (lambda state, key: state[key].fill_(float("inf")), "tensor '{}' contains NaN"),
    ):
        state = foreign_state(make())
        place = max(number for number, key in enumerate(state) if key.endswith("bias"))
        key = list(state)[place]
        ours = list(read_network(save_pickled(tmp_path / "whole.pth", state)).state_dict)[place]
        spoil(state, key)
        with pytest.raises(UserError, match=message.format(re.escape(ours))):
            read_network(save_pickled(tmp_path / "spoilt.pth", state)).build()


def test_the_ancestors_file_makes_the_ancestors_bytes(tmp_path):
    """Its network takes bytes, works on [-1, 1] and returns bytes."""
    torch.manual_seed(0)
    state = OrderedDict(
        (name, (0.1 * torch.randn(shape)).half()) for name, shape in ancestor_vapsr().items()
    )
    network = read_network(save_pickled(tmp_path / "upsampling.pth", state)).build()
    images = torch.randint(0, 256, (1, 3, 9, 11), dtype=torch.uint8)
    signed = plain_vapsr(
        {key: tensor.double() for key, tensor in state.items()}, images.double() / 127.5 - 1, 2
    )
    theirs = (signed * 127.5 + 128).clamp(0, 255).byte()
    assert theirs.unique().numel() > 10
    with torch.inference_mode():
        assert torch.equal(to_bytes(network.double()(images)), theirs)


def test_tied_blocks_become_blocks_of_their_own(tmp_path):
    state = foreign_state(srgan_generator())
    for key in list(state):
        if key.startswith(("trunk.1.", "trunk.2.")):
            state[key] = state[f"trunk.0.{key.split('.', 2)[2]}"]
    network = read_network(save_pickled(tmp_path / "a.pth", {"state_dict": state})).build()
    with torch.no_grad():
        network.trunk[1].rcb[0].weight.add_(1)
    assert torch.equal(network.trunk[0].rcb[0].weight, state["trunk.0.rcb.0.weight"])


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_two_networks_claim_the_same_file(kind):
    state = foreign_state(FOREIGN[kind][0]())
    claims = []
    for name, network in GENERATORS.items():
        for layout in (state, getattr(network, "convert", lambda _: None)(state)):
            recognise = getattr(network, "recognise", lambda _: None)
            if layout is not None and recognise(
                {key: tuple(tensor.shape) for key, tensor in layout.items()}
            ):
                claims.append(name)
    assert claims == [FOREIGN[kind][1]]


# Small arguments to save time; other networks are built with their defaults.
SMALL = {
    "vapsr": {**TINY, "projection_kernel": 3},
    "srresnet": {"num_features": 8, "num_blocks": 1},
    "msrresnet": {"num_features": 8, "num_blocks": 1},
    "rrdbnet": {"num_features": 8, "num_blocks": 1},
    "compact": {"num_features": 8, "num_conv": 1, "activation": "relu"},
    "spandrel": {"arch": "SPAN", "feature_channels": 8},
}


def small_generator(name, **params):
    """Build a small network with its first scale; return it and the scale."""
    torch.manual_seed(0)
    for scale in (2, 4, 3, 8, 1):
        with contextlib.suppress(UserError):
            return build_generator(name, scale, **SMALL.get(name, {}), **params).eval(), scale
    raise AssertionError(f"{name} can be built for no scale")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_description_is_believed_and_rebuilds_the_network(tmp_path, name):
    network, scale = small_generator(name, colour_space="y")
    params = {**SMALL.get(name, {}), "colour_space": "y"}
    write_network(
        tmp_path / "a.safetensors", SavedNetwork(name, scale, params, network.state_dict())
    )
    found = read_network(tmp_path / "a.safetensors")
    assert (found.name, found.scale, found.params) == (name, scale, params)
    images = torch.randint(0, 256, (1, 3, 10, 9), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(found.build()(images), network(images))


@pytest.mark.parametrize("name", GENERATORS)
def test_every_network_keeps_the_contract(name):
    network, scale = small_generator(name)
    assert network.scale == scale
    assert isinstance(network.receptive_radius, int)
    assert network.receptive_radius > 0
    images = torch.randint(0, 256, (2, 3, 11, 18), dtype=torch.uint8)
    floats = images / 255
    kept = floats.clone()
    with torch.inference_mode():
        sr = network(images)
        assert (sr.shape, sr.dtype) == ((2, 3, 11 * scale, 18 * scale), torch.float32)
        torch.testing.assert_close(network(floats), sr, rtol=0, atol=1e-6)
        assert torch.equal(floats, kept)
        assert network.bfloat16()(images).dtype == torch.bfloat16
    refused = "no parameter 'scale'"
    with pytest.raises(UserError, match=refused):
        build_generator(name, scale, **{**SMALL.get(name, {}), "scale": scale})


@pytest.mark.parametrize("name", ["a.PTH", "a.ckpt", "a.CKPT", "a.bin", "a.Pt"])
def test_other_suffixes_are_read_as_safely(tmp_path, name):
    path = save_pickled(
        tmp_path / name, {"state_dict": TINY_STATE, "hyper_parameters": {"lr": 1e-3}}
    )
    assert equal_states(read_network(path).state_dict, TINY_STATE)
    victim = tmp_path / "executed"
    save_pickled(path, {"state_dict": TINY_STATE, "hyper_parameters": _Payload(f"touch {victim}")})
    with pytest.raises(UserError, match="contains pickled code"):
        read_network(path)
    assert not victim.exists()


def test_suffixes_in_capitals_are_written_too(tmp_path):
    for name in ("a.PTH", "a.SafeTensors"):
        write_network(tmp_path / name, tiny_saved())
        assert equal_states(read_network(tmp_path / name).state_dict, TINY_STATE)


@pytest.mark.parametrize("attribute", ["model", "net", "network", "model.module", "net.model"])
def test_an_attribute_of_lightnings_module_is_stripped(tmp_path, attribute):
    state = {f"{attribute}.{key}": tensor for key, tensor in TINY_STATE.items()}
    assert equal_states(
        read_network(save_pickled(tmp_path / "a.ckpt", {"state_dict": state})).state_dict,
        TINY_STATE,
    )


def test_a_lone_state_dict_is_found_under_any_key(tmp_path):
    path = save_pickled(
        tmp_path / "a.pth", {"student": TINY_STATE, "epoch": 3, "optimizer": {"state": {}}}
    )
    assert equal_states(read_network(path).state_dict, TINY_STATE)
    path = save_pickled(tmp_path / "a.pth", {"student": TINY_STATE, "teacher": TINY_STATE})
    with pytest.raises(UserError, match="contains no state dict; found student, teacher"):
        read_network(path)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_one_flipped_byte_is_damage(tmp_path, place):
    path = tmp_path / "a.pth"
    write_network(path, SavedNetwork("vapsr", 2, TINY, TINY_STATE))
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        start = largest.header_offset + 30 + len(largest.filename)
    content = bytearray(path.read_bytes())
    padding = int.from_bytes(
        content[largest.header_offset + 28 : largest.header_offset + 30], "little"
    )
    content[start + padding + int(largest.file_size * place)] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=re.escape(f"{str(path)!r} is damaged: the checksum of its ")
    ):
        read_network(path)


def test_a_program_is_named_as_such(tmp_path, recwarn):
    torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)).save(tmp_path / "a.pt")
    recwarn.clear()
    with pytest.raises(
        UserError,
        match="is a TorchScript program, which is never executed here; save its state_dict",
    ):
        read_network(tmp_path / "a.pt")
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["vgg", "unet", "attention_unet", "patch"])
def test_a_discriminator_is_called_one(tmp_path, kind):
    state = build_discriminator(kind, 64, num_features=4).state_dict()
    with pytest.raises(UserError, match="holds a discriminator, not a generator"):
        read_network(save_pickled(tmp_path / "d.pth", {"params": state}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "'conv_body.bias' is torch.float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.complex64), "'conv_body.bias' is torch.complex64"),
        (
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "'conv_body.bias' is quantised",
        ),
        (lambda tensor: tensor.to_sparse(), "'conv_body.bias' is sparse"),
        (lambda tensor: tensor.to("meta"), "'conv_body.bias' is without values"),
        (
            lambda tensor: tensor.to(torch.int8),
            "'conv_body.bias' is torch.int8 in the weights but must be one of float16",
        ),
        (
            lambda tensor: tensor > 0,
            "'conv_body.bias' is torch.bool in the weights but must be one of float16",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own warning about quantised tensors
def test_other_kinds_of_numbers_are_refused(tmp_path, kind, words):
    state = {**TINY_STATE, "conv_body.bias": kind(TINY_STATE["conv_body.bias"])}
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        read_network(save_pickled(tmp_path / "a.pth", state)).build()
    assert str(tmp_path / "a.pth") in str(caught.value)


def test_integers_as_weights_of_spandrels_are_refused(tmp_path):
    network = build_generator("spandrel", 2, arch="PLKSR", dim=16, n_blocks=1, kernel_size=5)
    state = {key: tensor.to(torch.int8) for key, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"spandrel's PLKSR, but its tensor 'feats.* is torch.int8"):
        read_network(save_pickled(tmp_path / "a.pth", state))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"scale": 4}, "network 'vapsr' has no parameter 'scale'"),
        ({"self": 1}, "has no parameter 'self'"),
        ({"name": "x"}, "has no parameter 'name'"),
        ({"cls": 1}, "has no parameter 'cls'"),
        ({"num_features": 10**8}, "says num_features 100000000, which is larger than all sizes"),
    ],
)
def test_a_description_that_does_not_fit_names_the_file(tmp_path, params, words):
    write_network(tmp_path / "a.pth", SavedNetwork("vapsr", 2, {**TINY, **params}, TINY_STATE))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a.pth'}: ")) as caught:
        read_network(tmp_path / "a.pth").build()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_released_file_loads_strictly():
    path = shared("weights/VapSR_X4.pth")
    found = read_network(path)
    assert (found.name, found.scale) == ("vapsr", 4)
    assert found.params == {
        "num_features": 48,
        "num_attention_features": 64,
        "num_blocks": 21,
        "conv_groups": 1,
        "projection_kernel": 1,
        "upsampler_features": 64,
        "global_residual": "none",
        "value_range": "unit",
    }
    assert sum(parameter.numel() for parameter in found.build().parameters()) == 342_220
    official = torch.load(path, weights_only=True)
    assert equal_states(found.state_dict, official["params_ema"])
    assert equal_states(read_network(path, "params").state_dict, official["params"])


def test_a_checkpoint_exists_with_its_manifest(tmp_path):
    run = make_run(tmp_path / "runs", steps=(100, 300, 200))
    (run_folder.checkpoint_dir(run, 300) / run_folder.MANIFEST_FILE).unlink()
    (run / "checkpoints" / "step-00000400.tmp").mkdir()
    (run / "checkpoints" / "step-00000400.tmp" / run_folder.MANIFEST_FILE).write_text("{}")
    assert run_folder.checkpoint_steps(run) == [100, 200]
    assert run_folder.run_network_file(run, "newest", ema=False) == (
        run / "checkpoints" / "step-00000200" / "generator.safetensors"
    )
    with pytest.raises(
        UserError, match="no complete checkpoint of step 300; choose from best, newest, 100, 200"
    ):
        run_folder.choose_step(run, 300)


def test_best_is_what_the_newest_checkpoint_says(tmp_path, capsys):
    run = make_run(tmp_path, "a", best=100)
    assert run_folder.choose_step(run, "best") == 100
    assert capsys.readouterr().err == ""
    assert run_folder.choose_step(make_run(tmp_path, "b", best=150), "best") == 200
    assert (
        "note: run 'b': the checkpoint of the best step 150 is gone; using the newest, step 200"
        in (capsys.readouterr().err)
    )
    assert run_folder.choose_step(make_run(tmp_path, "c", best=None), "best") == 200
    assert "no best step yet" in capsys.readouterr().err


def test_the_newest_run_is_the_one_saved_last(tmp_path):
    with pytest.raises(UserError, match=r"no run with a checkpoint in .*; train one first with"):
        run_folder.find_run(tmp_path)
    first, second = make_run(tmp_path, "first"), make_run(tmp_path, "second")
    for run, time in ((first, 2_000_000_000), (second, 1_000_000_000)):
        for step in (100, 200):
            os.utime(run_folder.checkpoint_dir(run, step) / run_folder.MANIFEST_FILE, (time, time))
    assert run_folder.find_run(tmp_path) == first
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        run_folder.run_network_file(tmp_path / "empty", "best", ema=True)
    with pytest.raises(UserError, match="no run folder"):
        run_folder.run_network_file(tmp_path / "nowhere", "best", ema=True)


def test_run_folder_needs_no_torch():
    code = "import sys, pipeline.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, timeout=60).returncode == 0
