from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fabricate import CHECKOUT, make_run, shared
from pipeline.export import spandrel_plugin
from pipeline.export.torch_file import export_run
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, read_network, write_network

MAIN_REGISTRY = spandrel_plugin.MAIN_REGISTRY
SMALL = {"num_features": 8, "num_blocks": 2}
VAPSR = {**SMALL, "num_attention_features": 12}
NETWORKS = [
    ("VapSR", 4, VAPSR),
    ("VapSR", 3, {**VAPSR, "global_residual": "bicubic"}),
    ("VapSR", 2, {**VAPSR, "projection_kernel": 3, "value_range": "signed"}),
    ("VapSR", 2, {**VAPSR, "conv_groups": 2}),
    ("SRResNet", 2, SMALL),
    ("SRResNet", 4, SMALL),
    ("SRResNet", 8, SMALL),
    ("MSRResNet", 2, SMALL),
    ("MSRResNet", 3, SMALL),
    ("MSRResNet", 4, {**SMALL, "global_residual": "bilinear"}),
]


def loader():
    # Not at the top: only the plugin makes spandrel importable where torchvision is broken.
    from spandrel import ModelLoader

    return ModelLoader()


def random_network(name, scale, params):
    """Return a network with only random tensors; zeros and fresh norms would hide mistakes."""
    torch.manual_seed(0)
    network = build_generator(spandrel_plugin.ADDED[name], scale, **params).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return network


def image(height=17, width=20):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_equal_output(descriptor, network, lr=None):
    lr = image() if lr is None else lr
    with torch.inference_mode():
        assert torch.equal(descriptor(lr), network(lr).clamp(0, 1))  # spandrel clamps


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("name", "scale", "params"), NETWORKS)
def test_exported_files_load_and_give_equal_images(tmp_path, name, scale, params, suffix):
    network = random_network(name, scale, params)
    path = tmp_path / f"net{suffix}"
    write_network(
        path, SavedNetwork(spandrel_plugin.ADDED[name], scale, params, network.state_dict())
    )
    found = loader().load_from_file(path)
    assert (str(found.architecture.id), found.scale, found.purpose) == (name, scale, "SR")
    assert (found.input_channels, found.output_channels) == (3, 3)
    assert_equal_output(found, network)


def test_a_runs_export_loads_also_in_half_precision(tmp_path):
    run = make_run(tmp_path, best=200, global_residual="bicubic")
    for half in (False, True):
        for path in export_run(run, "best", half=half).files:
            assert_equal_output(loader().load_from_file(path), read_network(path).build())


def test_half_precision_runs():
    network = random_network("SRResNet", 2, SMALL)
    found = loader().load_from_state_dict(network.state_dict()).half()
    assert found.dtype == torch.float16
    with torch.inference_mode():
        # Values reach 4, so FP16's error is large.
        assert (found(image().half()).float() - network(image()).clamp(0, 1)).abs().max() < 0.03


def test_the_names_of_other_projects_are_known():
    network = random_network("SRResNet", 2, SMALL)
    older = {
        name.replace("conv1.0", "conv_block1.0").replace("conv1.1", "conv_block1.1"): tensor
        for name, tensor in network.state_dict().items()
    }
    assert "conv_block1.0.weight" in older
    assert_equal_output(loader().load_from_state_dict(older), network)


def test_the_released_vapsr_opens():
    path = shared("weights/VapSR_X4.pth")
    found = loader().load_from_file(path)
    assert (str(found.architecture.id), found.scale) == ("VapSR", 4)
    assert_equal_output(found, read_network(path).build(), image(24, 31))


def test_networks_that_spandrel_knows_are_left_to_it():
    for name, arch in (("rrdbnet", "ESRGAN"), ("compact", "Compact")):
        small = (
            {"num_features": 8, "num_blocks": 1}
            if name == "rrdbnet"
            else {"num_features": 8, "num_conv": 2}
        )
        state = build_generator(name, 4, **small).state_dict()
        assert str(loader().load_from_state_dict(state).architecture.id) == arch
        assert not any(MAIN_REGISTRY[added].detect(state) for added in spandrel_plugin.ADDED)
    assert not any(
        MAIN_REGISTRY[added].detect({"a": 1, "b": torch.zeros(2)})
        for added in spandrel_plugin.ADDED
    )


def test_it_may_be_imported_twice():
    before = len(MAIN_REGISTRY)
    assert spandrel_plugin.register() == []
    assert len(MAIN_REGISTRY) == before


# Import the plugin as ComfyUI imports a file of custom nodes: by its path, under another name.
AS_CUSTOM_NODE = """
import importlib.util, sys
path, weights = sys.argv[1:]
spec = importlib.util.spec_from_file_location("custom_nodes.vastscale", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
assert module.NODE_CLASS_MAPPINGS == {}
from spandrel import ModelLoader
found = ModelLoader().load_from_file(weights)
print(found.architecture.id, found.scale)
"""


@pytest.mark.parametrize("way", ["copy", "link"])
def test_it_works_as_a_single_file(tmp_path, way):
    plugin = Path(spandrel_plugin.__file__)
    node = tmp_path / "custom_nodes" / "vastscale.py"
    node.parent.mkdir()
    environment = {}
    if way == "copy":
        node.write_bytes(plugin.read_bytes())
        environment["PYTHONPATH"] = str(CHECKOUT)
    else:
        node.symlink_to(plugin)
    network = random_network("MSRResNet", 2, SMALL)
    weights = tmp_path / "net.safetensors"
    write_network(weights, SavedNetwork("msrresnet", 2, SMALL, network.state_dict()))
    done = subprocess.run(
        [sys.executable, "-c", AS_CUSTOM_NODE, str(node), str(weights)],
        cwd=tmp_path,
        timeout=120,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("MSRResNet 2\n", 0), done.stderr
    assert done.stderr == ""
