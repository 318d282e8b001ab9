from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from pipeline.cli import UserError
from pipeline.libraries import import_torchvision
from pipeline.models import build_generator, spandrel
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.spandrel import ARCHITECTURES, SpandrelNetwork
from pipeline.models.weights import SavedNetwork, read_network, write_network

TINY = {
    "SPAN": {"feature_channels": 12},
    "Compact": {"num_feat": 8, "num_conv": 2},
    "ESRGAN": {"num_filters": 8, "num_blocks": 1},
    "SwinIR": {
        "embed_dim": 12,
        "depths": [2],
        "num_heads": [2],
        "img_size": 16,
        "mlp_ratio": 2.0,
        "upsampler": "pixelshuffledirect",
    },
    "PLKSR": {"dim": 16, "n_blocks": 2, "kernel_size": 5},
    "SAFMN": {"dim": 8, "n_blocks": 2},
}
OTHERS = {
    "ATD": {"embed_dim": 12, "depths": [2], "num_heads": [2], "num_tokens": 8, "reducted_dim": 4},
    "CRAFT": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]},
    "DAT": {"embed_dim": 16, "depth": [2], "num_heads": [2], "split_size": [2, 4], "img_size": 16},
    "DCTLSA": {"nf": 10, "num_head": 5},
    "DITN": {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1},
    "DRCT": {"embed_dim": 12, "depths": [2], "num_heads": [2], "gc": 4},
    "FDAT": {"embed_dim": 16, "num_groups": 1, "depth_per_group": 1, "num_heads": 2, "mid_dim": 8},
    "GRL": {"embed_dim": 16, "depths": [2], "num_heads_window": [2], "num_heads_stripe": [2]},
    "HAT": {"embed_dim": 12, "depths": [2], "num_heads": [2], "squeeze_factor": 4},
    "MoESR": {"dim": 16, "n_blocks": 1, "n_block": 1, "upsample_dim": 8},
    "MoSR": {"dim": 16, "n_block": 2},
    "NAFNet": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "OmniSR": {"num_feat": 16},
    "RCAN": {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 16, "reduction": 4},
    "RGT": {"embed_dim": 12, "depth": [2], "num_heads": [2], "img_size": 16},
    "RealCUGAN": {},
    "RealPLKSR": {"dim": 16, "n_blocks": 2, "kernel_size": 5},
    "SCUNet": {"dim": 16, "config": [0, 0, 1, 1, 1, 0, 0]},
    "SeemoRe": {"num_experts": 2, "num_layers": 1, "embedding_dim": 12},
    "SwiftSRGAN": {"num_channels": 8, "num_blocks": 1},
    "Swin2SR": {"embed_dim": 12, "depths": [2], "num_heads": [2], "img_size": 16},
}


# Loaded elsewhere at x1 most often, with the networks that only restore.
AT_X1 = ("Compact", "SPAN", "RealPLKSR", "NAFNet", "SCUNet", "ESRGAN")
ONLY_X1 = ("NAFNet", "SCUNet")


def scale_of(arch):
    return 1 if arch in ONLY_X1 else 2


def tiny(arch, scale=None, **params):
    scale = scale or scale_of(arch)
    torch.manual_seed(0)
    return build_generator("spandrel", scale, arch=arch, **{**TINY, **OTHERS}[arch], **params)


def saved(network, arch, scale=2, **params):
    return SavedNetwork(
        "spandrel",
        scale,
        {"arch": arch, **{**TINY, **OTHERS}[arch], **params},
        network.state_dict(),
    )


def opened_elsewhere(path):
    """Open a file as other programs do."""
    import_torchvision()
    from spandrel import ModelLoader

    return ModelLoader().load_from_file(path)


def images_of(*shape):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_the_table_is_all_tried():
    assert sorted({**TINY, **OTHERS}) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("arch", TINY)
def test_from_training_to_other_programs_and_back(tmp_path, arch):
    network = tiny(arch)
    lr, hr = images_of(2, 3, 18, 21), torch.rand(2, 3, 36, 42)
    sr = network(lr)
    assert sr.shape == hr.shape
    assert sr.dtype == torch.float32
    F.l1_loss(sr, hr).backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained
    )
    torch.optim.Adam(trained, lr=1e-3).step()
    network.eval()
    with torch.inference_mode():
        learnt = network(lr)
        assert (learnt - sr).abs().max() > 1e-4
        torch.testing.assert_close(network(lr / 255), learnt, rtol=0, atol=1e-6)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"net{suffix}"
        write_network(path, saved(network, arch))
        elsewhere = opened_elsewhere(path)
        assert (str(elsewhere.architecture.id), elsewhere.scale) == (arch, 2)
        for number in range(2):  # it takes one image at a time
            one = slice(number, number + 1)
            torch.testing.assert_close(
                elsewhere(lr[one] / 255), learnt[one].clamp(0, 1), rtol=0, atol=1e-5
            )
        found = read_network(path)
        assert (found.name, found.scale, found.params) == (
            "spandrel",
            2,
            {"arch": arch, **TINY[arch]},
        )
        built = found.build()
        state = network.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in built.state_dict().items())
        with torch.inference_mode():
            assert torch.equal(built(lr), learnt)


@pytest.mark.parametrize("arch", ["SPAN", "SwinIR", "PLKSR", "SAFMN", "RCAN", "RealPLKSR"])
@pytest.mark.parametrize("half", [False, True])
def test_a_file_without_description_is_read_through_spandrel(tmp_path, arch, half):
    network = tiny(arch, 4).eval()
    state = {
        f"module.{key}": tensor.half() if half and tensor.is_floating_point() else tensor
        for key, tensor in network.state_dict().items()
    }
    torch.save({"params": state}, tmp_path / "bare.pth")
    found = read_network(tmp_path / "bare.pth")
    assert (found.name, found.scale, found.params["arch"]) == ("spandrel", 4, arch)
    lr = images_of(1, 3, 17, 20)
    with torch.inference_mode():
        expected = network(lr)
        assert (found.build()(lr) - expected).abs().max() < (
            0.02 if half else 1e-6
        ) * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("arch", AT_X1)
def test_files_of_scale_1_load_and_train(tmp_path, arch):
    network = tiny(arch, 1)
    lr = images_of(2, 3, 18, 21)
    F.l1_loss(network(lr), lr / 255).backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    torch.optim.Adam(trained, lr=1e-3).step()
    with torch.inference_mode():
        restored = network.eval()(lr)
    torch.save({"params": network.state_dict()}, tmp_path / "bare.pth")
    elsewhere = opened_elsewhere(tmp_path / "bare.pth")
    assert (elsewhere.scale, elsewhere.purpose) == (1, "Restoration")
    found = read_network(tmp_path / "bare.pth")
    assert found.scale == 1
    with torch.inference_mode():
        torch.testing.assert_close(found.build()(lr), restored, rtol=0, atol=1e-5)
    for number in range(2):
        one = slice(number, number + 1)
        torch.testing.assert_close(
            elsewhere(lr[one] / 255), restored[one].clamp(0, 1), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("arch", spandrel.DEFAULTS_AT_X1)
def test_at_scale_1_an_architecture_that_usually_upscales_can_be_built(arch):
    lr = images_of(2, 3, 18, 21)
    assert tiny(arch, 1)(lr).shape == lr.shape


@pytest.mark.parametrize(("arch", "ours"), [("Compact", "compact"), ("ESRGAN", "rrdbnet")])
def test_spandrel_and_our_own_network_agree(tmp_path, arch, ours):
    network = tiny(arch, 4).eval()
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    found = read_network(tmp_path / "bare.pth")
    assert (found.name, found.scale) == (ours, 4)
    lr = images_of(1, 3, 17, 20)
    with torch.inference_mode():
        torch.testing.assert_close(found.build()(lr), network(lr), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", {**TINY, **OTHERS})
def test_every_architecture_learns(arch, dtype):
    network = tiny(arch)
    # buffers stay in float32, as in trainers that cast only parameters
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    lr = images_of(2, 3, 19, 16)
    before = lr.clone()
    sr = network(lr)
    assert sr.shape == (2, 3, 19 * scale_of(arch), 16 * scale_of(arch))
    assert sr.dtype == dtype
    assert torch.equal(lr, before)
    sr.float().abs().mean().backward()
    trained = {
        name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert trained.keys() <= network.state_dict().keys()


@pytest.mark.parametrize("arch", ["SPAN", "ESRGAN", "PLKSR", "NAFNet"])
def test_compiles_without_a_graph_break(arch):
    network = tiny(arch)
    lr = images_of(2, 3, 16, 16)
    expected = network(lr)
    network.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(network(lr), expected, rtol=0, atol=1e-5)


def test_constants_are_not_trained():
    rcan = tiny("RCAN")
    frozen = [name for name, parameter in rcan.named_parameters() if not parameter.requires_grad]
    assert frozen == ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]
    folded = [
        name for name, parameter in tiny("SPAN").named_parameters() if not parameter.requires_grad
    ]
    assert len(folded) == 40
    assert all(".eval_conv." in name for name in folded)


def test_float_images_are_not_changed():
    network = tiny("RCAN").eval()
    images = torch.rand(1, 3, 16, 16)
    before = images.clone()
    network(images)
    assert torch.equal(images, before)


def test_span_is_the_same_in_training_and_folded():
    network = tiny("SPAN")
    lr = torch.rand(1, 3, 12, 14)
    unfolded = network(lr)
    torch.testing.assert_close(network.eval()(lr), unfolded, rtol=0, atol=1e-5)


def test_span_can_be_averaged_after_a_validation():
    network = tiny("SPAN")
    ema = ExponentialMovingAverage(network, 0.9)
    with torch.inference_mode():
        ema.network(images_of(1, 3, 12, 12))
    ema.update(network)
    with torch.inference_mode():
        state = ema.network.state_dict()
    assert not any(tensor.is_inference() for tensor in state.values())
    assert state.keys() == network.state_dict().keys()


def test_copies_are_whole_and_their_own():
    network = tiny("SwinIR").eval()
    copied = copy.deepcopy(network)
    lr = images_of(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(copied(lr), network(lr))
        next(copied.parameters()).add_(1)
        assert not torch.equal(copied(lr), network(lr))


def test_works_in_another_colour_space():
    torch.manual_seed(0)
    network = build_generator("spandrel", 2, arch="SPAN", **TINY["SPAN"], colour_space="y")
    assert isinstance(network, SpandrelNetwork)
    assert network(images_of(1, 3, 8, 9)).shape == (1, 3, 16, 18)


def test_one_image_is_not_enough_for_batch_statistics():
    network = tiny("DAT")
    with pytest.raises(
        UserError, match="cannot train on one; set train_micro_batch_size_per_gpu to 2 or more"
    ):
        network(images_of(1, 3, 16, 16))
    assert network.eval()(images_of(1, 3, 16, 16)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (16, 17)])
def test_any_image_size_fits(size):
    for arch in ("SAFMN", "SwinIR", "DRCT"):
        assert tiny(arch).eval()(images_of(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize(
    ("arch", "params", "message"),
    [
        ("PLKSR", {"with_idt": True}, "'with_idt': False"),
        ("SeemoRe", {"recursive": 1}, "'recursive': 2"),
        ("HAT", {"conv_scale": 0.03}, "'conv_scale': 0.01"),
        ("HAT", {"img_size": 16}, "'img_size': 64"),
        ("ATD", {"category_size": 32}, "'category_size': 256"),
        ("ATD", {"category_size": 4096}, "'category_size': 256"),
        ("HAT", {"ape": True}, "cannot run on images of"),
        ("CRAFT", {"split_size_1": 32}, "cannot run on images of"),
    ],
)
def test_no_seed_lets_pass_what_other_programs_read_differently(arch, params, message):
    for seed in range(4):
        torch.manual_seed(seed)
        with pytest.raises(UserError, match=message) as caught:
            build_generator("spandrel", 2, arch=arch, **{**TINY, **OTHERS}[arch], **params)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["PLKSR", "SeemoRe", "RCAN"])
def test_what_one_seed_accepts_every_seed_accepts(arch):
    for seed in range(4):
        torch.manual_seed(seed)
        build_generator("spandrel", 2, arch=arch, **{**TINY, **OTHERS}[arch])


@pytest.mark.parametrize("arch", {**TINY, **OTHERS})
def test_a_batch_is_its_images(arch):
    network = tiny(arch).eval()
    lr = images_of(2, 3, 12, 16)
    with torch.inference_mode():
        singles = torch.cat([network(lr[:1]), network(lr[1:])])
        torch.testing.assert_close(network(lr), singles, rtol=0, atol=1e-5)


def test_the_experts_are_those_of_spandrel():
    """The chosen expert differs between images; spandrel itself takes one image at a time."""
    torch.manual_seed(0)
    network = build_generator(
        "spandrel", 2, arch="SeemoRe", num_experts=3, num_layers=1, embedding_dim=12
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    chosen = []
    gate = network.get_submodule("body.0.local_block.block.moe_layer.gate")
    gate.register_forward_hook(lambda module, inputs, output: chosen.append(output.argmax(1)))
    lr = torch.rand(3, 3, 16, 16) * torch.tensor([0.1, 0.5, 1]).view(3, 1, 1, 1)
    found = spandrel.read(network.state_dict()).model.eval()
    with torch.inference_mode():
        expected = torch.cat([found(one[None]) for one in lr])
        close = float(1e-4 * expected.abs().max())
        torch.testing.assert_close(network(lr), expected, rtol=0, atol=close)
        torch.testing.assert_close(network.eval()(lr), expected, rtol=0, atol=close)
    assert len({int(number) for number in torch.cat(chosen)}) > 1


@pytest.mark.parametrize("count", [24, 27])  # 27 pixels are no whole number of groups
def test_pixels_of_a_category_keep_their_order(count):
    from spandrel.architectures.ATD.__arch.atd_arch import AC_MSA

    torch.manual_seed(0)
    original = AC_MSA(12, (6, 6), num_tokens=count, num_heads=2, category_size=8)
    stable = copy.deepcopy(original)
    stable.__class__ = spandrel.grouping(AC_MSA)
    qkv = torch.randn(2, count, 36)
    apart = torch.eye(count)[torch.stack([torch.randperm(count) for _ in range(2)])]
    with torch.inference_mode():
        torch.testing.assert_close(stable(qkv, apart, None), original(qkv, apart, None))
        # Of one category, all stay where they are: each group is a piece of the image.
        together = torch.eye(count)[torch.zeros(2, count, dtype=torch.long)]
        in_order = torch.eye(count)[torch.arange(count).expand(2, -1)]
        assert torch.equal(stable(qkv, together, None), stable(qkv, in_order, None))


@pytest.mark.parametrize("space", ["rgb", "y"])
def test_a_network_that_unshuffles_first_needs_no_channels(space):
    network = build_generator(
        "spandrel", 2, arch="ESRGAN", **TINY["ESRGAN"], shuffle_factor=2, colour_space=space
    )
    assert network(images_of(1, 3, 9, 12)).shape == (1, 3, 18, 24)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"arch": "SPANN"}, "no arch 'SPANN'; did you mean 'SPAN'"),
        ({"arch": "span"}, "no arch 'span'; did you mean 'SPAN'"),
        ({"arch": 7}, "arch 7 is not a name; use one such as SPAN"),
        ({"arch": ["SPAN"]}, r"arch \['SPAN'\] is not a name"),
        ({"arch": {}}, r"arch {} is not a name"),
        ({"arch": "SPAN", "scale": 4}, "network 'spandrel' has no parameter 'scale'"),
        ({"arch": "SPAN", "cls": 4}, "network 'spandrel' has no parameter 'cls'"),
        ({"arch": "SPAN", "self": 4}, "network 'spandrel' has no parameter 'self'"),
        ({"arch": "SPAN", "name": 4}, "arch 'SPAN' has no parameter 'name'"),
        (
            {"arch": "ESRGAN", "num_filters": 8, "shuffle_factor": 1.5},
            "unshuffle 1.5 is not a whole number",
        ),
        ({}, "network 'spandrel' needs the parameter 'arch'"),
        ({"arch": "AuraSR"}, "its licence"),
        ({"arch": "IPT"}, "patches of one size"),
        (
            {"arch": "SPAN", "feature_chanels": 3},
            "arch 'SPAN' has no parameter 'feature_chanels'; did you mean 'feature_channels'",
        ),
        ({"arch": "SPAN", "upscale": 4}, "arch 'SPAN' has no parameter 'upscale'"),
        ({"arch": "Compact", "num_feat": -1}, "arch 'Compact' cannot be built with"),
        (
            {"arch": "Compact", "num_feat": 8, "num_conv": 2, "act_type": "relu"},
            "does not recognise its own 'Compact'",
        ),
        (
            {"arch": "SPAN", "feature_channels": 8, "norm": True, "img_range": 1.0},
            "'img_range': 255.0",
        ),
        (
            {"arch": "SwinIR", **TINY["SwinIR"], "upsampler": ""},
            "does not upscale by 2; choose its upsampler",
        ),
        ({"arch": "SPAN", "num_in_ch": 1}, "1 input and"),
    ],
)
def test_bad_values_are_one_clear_line(params, message):
    with pytest.raises(UserError, match=message) as caught:
        build_generator("spandrel", 2, **params)
    assert "\n" not in str(caught.value)


def test_scales_that_an_architecture_lacks_are_refused():
    with pytest.raises(
        UserError, match="arch 'RealCUGAN' does not support scale 5, only 2, 3 and 4"
    ):
        build_generator("spandrel", 5, arch="RealCUGAN")
    with pytest.raises(
        UserError, match="arch 'RealCUGAN' does not support scale 1, only 2, 3 and 4"
    ):
        build_generator("spandrel", 1, arch="RealCUGAN")
    with pytest.raises(UserError, match="arch 'NAFNet' does not support scale 2, only 1"):
        build_generator("spandrel", 2, arch="NAFNet")
    with pytest.raises(UserError, match="'SwinIR' changes the size; choose its upsampler"):
        build_generator(
            "spandrel", 1, arch="SwinIR", **{**TINY["SwinIR"], "upsampler": "nearest+conv"}
        )
    with pytest.raises(UserError, match="scale 0 is not a whole number from 1 to 8"):
        build_generator("spandrel", 0, arch="SPAN")


def test_files_of_other_purposes_are_refused(tmp_path):
    import_torchvision()
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.DnCNN import DnCNN

    for network, message in (
        (DnCNN(in_nc=3, out_nc=3, nc=8, nb=4), "holds spandrel's DnCNN, which is not supported"),
        (
            Compact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=2, upscale=2),
            "holds spandrel's Compact, scale 2, with 1 input and 1 output channels",
        ),
    ):
        torch.save(network.state_dict(), tmp_path / "other.pth")
        with pytest.raises(UserError, match=message):
            read_network(tmp_path / "other.pth")


def test_initial_values_do_not_depend_on_the_comparison():
    import_torchvision()
    from spandrel.architectures.SAFMN import SAFMN

    torch.manual_seed(0)
    plain = SAFMN(**TINY["SAFMN"], upscaling_factor=2).state_dict()
    expected = torch.rand(3)
    assert all(
        torch.equal(plain[key], tensor) for key, tensor in tiny("SAFMN").state_dict().items()
    )
    assert torch.equal(torch.rand(3), expected)
