"""The measured overlap of tiles: kept, and enough for results within half a level of untiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fabricate import picture, shared, tiny_network
from pipeline.data.image_pixels import read_rgb
from pipeline.export.network_files import FILE_BACKENDS
from pipeline.export.onnx_file import Form, convert
from pipeline.inference import reach
from pipeline.inference.backends import FileBackend, FileFacts
from pipeline.inference.devices import CPU
from pipeline.inference.measurements import Measurements
from pipeline.inference.reach import Reach, busiest, distance_within, edge_changes, natural
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import TorchBackend
from pipeline.models.weights import read_network


def nothing(_: float) -> None:
    pass


@pytest.fixture(scope="module")
def released():
    """The released VapSR x4 in PyTorch and in every other backend."""
    saved = read_network(shared("weights/VapSR_X4.pth"))
    network = saved.build()
    content = convert(saved, network, Form())
    facts = FileFacts(network.scale, network.receptive_radius)
    return {
        "torch": TorchBackend(network, CPU),
        **{
            name: FileBackend(
                lambda _, kind=kind: kind.load(content, CPU),
                facts,
                CPU,
                lambda _: "fp32",
                "fp32",
                Measurements(),
            )
            for name, kind in FILE_BACKENDS.items()
        },
    }


@pytest.mark.parametrize("backend", ["torch", *FILE_BACKENDS])
def test_tiles_of_the_released_network_are_within_half_a_level(released, backend):
    photo = read_rgb(shared("data/kodak/1.png"))[100:228, 300:460]
    far, network = Reach(released[backend], Measurements()), released[backend]
    deep = np.dtype(np.uint16)  # resolves differences below one 8-bit level

    def upscaled(halo):
        shown = []
        result = Upscaler(network, tile=0 if halo is None else 48, halo=halo)(
            photo[None], deep, is_deep=False, advance=shown.append
        )
        return result.astype(int), len(shown)

    whole, pieces = upscaled(None)
    tiled, tiles = upscaled(far)
    assert pieces == 1
    assert tiles > 4
    assert far(None) == 32  # the receptive radius is 172
    assert np.abs(tiled - whole).max() / 257 <= 0.5
    seams, _ = upscaled(lambda _: 4)
    assert np.abs(seams - whole).max() / 257 > 0.5


def test_exact_tiles_overlap_by_the_receptive_field():
    network = tiny_network(3, num_blocks=1)
    image = picture(90, 123, 1)[None]
    whole = Upscaler(TorchBackend(network, CPU))(
        image, np.dtype(np.uint16), is_deep=False, advance=nothing
    )
    tiled = Upscaler(TorchBackend(network, CPU), tile=16)(
        image, np.dtype(np.uint16), is_deep=False, advance=nothing
    )
    assert np.abs(tiled.astype(int) - whole.astype(int)).max() <= 1  # of 65535

    def no_measurement(image):
        return (
            None if image is None else pytest.fail("measured, though 16-bit pictures need it not")
        )

    deep = Upscaler(TorchBackend(network, CPU), tile=16, halo=no_measurement)
    found = deep(image.astype(np.uint16) * 257, np.dtype(np.uint16), is_deep=True, advance=nothing)
    assert np.abs(found.astype(int) - whole.astype(int)).max() <= 1


def test_it_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = TorchBackend(tiny_network(0, num_blocks=6), CPU)
    first = Reach(backend, Measurements("0" * 32))
    assert first(None) is None
    found = first(picture(40, 40))
    assert found in range(16, backend.halo + 16, 16)
    assert Reach(None, Measurements("0" * 32))(None) == found
    (tmp_path / "vastscale" / "converted" / f"{'0' * 32}.json").write_text("no JSON")
    assert Reach(backend, Measurements("0" * 32))(None) is None


def test_nothing_is_measured_for_an_image_in_one_piece():
    def refuse(image):
        return None if image is None else pytest.fail("measured")

    upscaler = Upscaler(TorchBackend(tiny_network(0, num_blocks=1), CPU), halo=refuse)
    assert upscaler(
        picture(40, 50)[None], np.dtype(np.uint8), is_deep=False, advance=nothing
    ).shape == (1, 80, 100, 3)


def test_changes_by_distance_from_the_edge():
    """A cut changes a box blur of radius 5 up to 5 pixels away, and no further."""
    blur = torch.nn.Conv2d(3, 3, 11, padding=5, groups=3, bias=False)
    torch.nn.init.constant_(blur.weight, 1 / 121)
    image = torch.from_numpy(natural(0, 20, 96)).permute(2, 0, 1)[None].float() / 255
    left, right = (blur(image[..., start : start + 64]).detach().numpy() for start in (0, 32))
    changes = edge_changes(left, right, 32, 1)
    assert (np.diff(changes) <= 0).all()
    assert changes[4] > 1e-3
    assert changes[5] < 1e-6
    assert distance_within(np.array([1.0] * 20 + [0.1] * 60), 0.2) == 32
    assert distance_within(np.ones(80), 0.2) is None


def test_the_synthetic_images_are_natural_and_repeatable():
    image = natural(1, 64, 288)
    np.testing.assert_array_equal(image, natural(1, 64, 288))
    assert np.abs(image.astype(int) - natural(0, 64, 288)).mean() > 10
    assert 25 < image.std() < 100
    busy = np.full((200, 400, 3), 128, np.uint8)
    busy[90:150, 60:200] = natural(0, 60, 140)
    piece = busiest(busy, (60, 140))
    assert piece.shape == (60, 140, 3)
    assert (piece != 128).mean() > 0.95
    assert busiest(picture(10, 12), (64, 288)).shape == (64, 288, 3)
    assert reach.MARGIN < 1
