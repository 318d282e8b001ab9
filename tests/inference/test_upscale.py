"""`upscale.py` on real files: the results, what they keep, and the errors."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path

import av
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from av.video.frame import VideoFrame
from PIL import Image, ImageCms, ImageOps

import upscale
from fabricate import (
    identity_network,
    make_run,
    picture,
    ramp,
    run_command,
    shared,
    tiny_network,
    tiny_saved,
    write_cubic,
)
from pipeline import cli
from pipeline.data.image_pixels import read_rgb
from pipeline.images import cubic_resize
from pipeline.inference import (
    TargetSize,
    TorchBackend,
    Upscaler,
    encode_picture,
    read_picture,
    upscale_picture,
)
from pipeline.inference.backends import precision_of
from pipeline.inference.devices import Device
from pipeline.inference.pictures import Picture
from pipeline.inference.sizes import upscale_images
from pipeline.inference.tiles import lay_tiles, lay_windows
from pipeline.inference.video import _pixels
from pipeline.libraries import import_torchvision
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, read_network, write_network

CPU = torch.device("cpu")


def nothing(_: float) -> None:
    pass


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: small images gain nothing from more, and slow down beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cubic(tmp_path_factory):
    return write_cubic(tmp_path_factory.mktemp("weights") / "cubic.safetensors")


def on_cpu(network, precision="auto", **options):
    return Upscaler(TorchBackend(network, CPU, precision), **options)


def upscaler(path, **options):
    return on_cpu(read_network(path).build(), **options)


def run(capsys, *arguments):
    return run_command(capsys, upscale, *arguments)


def upscaled(capsys, cubic, source, out, *arguments):
    """Run the command successfully and return the result's path."""
    status, _, err = run(capsys, source, "-o", out, "--model", cubic, *arguments)
    assert (status, err) == (0, "")
    return out if out.is_file() else out / f"{source.stem}.png"


def reference(pixels, size=None):
    """Resize (height, width[, channels]) by antialiased cubic, in the type of `pixels`."""
    highest = np.iinfo(pixels.dtype).max
    planes = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).astype(np.float64)).permute(
        2, 0, 1
    )[None]
    size = size or (2 * pixels.shape[0], 2 * pixels.shape[1])
    large = cubic_resize(planes, size)[0].permute(1, 2, 0).round().clamp(0, highest).numpy()
    return large.reshape(*size, *pixels.shape[2:]).astype(pixels.dtype)


def assert_near(found, expected, levels=1, border=0):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    inner = (slice(border, found.shape[0] - border), slice(border, found.shape[1] - border))
    assert int(np.abs(found[inner].astype(int) - expected[inner].astype(int)).max()) <= levels


def assert_cubic(found, pixels, levels=1):
    """Compare away from the borders, which the network and `cubic_resize` extend differently."""
    assert_near(found, reference(pixels), levels, border=4)


# Tiles


@pytest.mark.parametrize(("tile", "kind"), [(16, np.uint8), (64, np.uint16), (33, np.uint8)])
def test_tiled_equals_untiled(tile, kind):
    network = tiny_network(3, num_blocks=1)
    image = picture(90, 123, 1)[None].astype(kind) * (np.iinfo(kind).max // 255)
    whole = on_cpu(network)(image, np.dtype(kind), is_deep=kind == np.uint16, advance=nothing)
    shown = []
    tiled = on_cpu(network, tile=tile)(
        image, np.dtype(kind), is_deep=kind == np.uint16, advance=shown.append
    )
    assert_near(tiled, whole)
    assert sum(shown) == 90 * 123
    blind = TorchBackend(network, CPU)
    blind.halo = 0
    seams = Upscaler(blind, tile=tile)(
        image, np.dtype(kind), is_deep=kind == np.uint16, advance=nothing
    )
    assert np.abs(seams.astype(int) - whole.astype(int)).max() > 2  # so tiles have to overlap


def test_tiles_of_windows_at_an_eighth_of_the_size_keep_their_grid():
    """SCUNet's windows repeat after 64 pixels; tiles that start elsewhere have other windows."""
    torch.manual_seed(0)
    network = build_generator(
        "spandrel", 1, arch="SCUNet", dim=16, config=[0, 0, 1, 1, 1, 0, 0]
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    image = picture(96, 480)[None]
    whole = on_cpu(network)(image, image.dtype, is_deep=False, advance=nothing).astype(int)
    largest = {}
    for grid in (64, 1):
        backend = TorchBackend(network, CPU)
        assert backend.grid == 64
        backend.grid = grid
        tiled = Upscaler(backend, tile=80)(image, image.dtype, is_deep=False, advance=nothing)
        largest[grid] = np.abs(tiled - whole).max()
    assert largest[64] <= 1
    assert largest[1] > 8


def test_a_network_of_scale_1_is_applied_once_to_any_size():
    network = tiny_network(0, scale=1, num_blocks=1)
    image = picture(20, 30)[None]
    restored = on_cpu(network)(image, image.dtype, is_deep=False, advance=nothing)
    assert restored.shape == image.shape
    for scale, size in ((2.5, (50, 75)), (0.5, (10, 15)), (None, (20, 30))):
        target = TargetSize(scale)
        assert (target.passes(20, 30, 1), target.work(20, 30, 1)) == (1, 600)
        result = upscale_images(image, target, on_cpu(network), nothing)
        assert result.shape == (1, *size, 3)
        if scale is None:
            assert np.array_equal(result, restored)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 17, 1000), (2, 300, 40), (1, 257, 255)])
def test_tiles_fill_the_image_once_and_see_their_halo(shape):
    halo, filled = 20, np.zeros(shape, int)
    for tile in lay_tiles(shape, halo, 100 * 100):
        filled[tile.image, tile.rows, tile.columns] += 1
        for piece, seen, length in (
            (tile.rows, tile.seen_rows, shape[1]),
            (tile.columns, tile.seen_columns, shape[2]),
        ):
            assert seen.start <= max(0, piece.start - halo)
            assert seen.stop >= min(length, piece.stop + halo)
            assert not seen.start % 16
    assert (filled == 1).all()


@pytest.mark.parametrize("grid", [1, 16, 64])
@pytest.mark.parametrize("shape", [(1, 40, 256), (2, 257, 300), (1, 900, 447)])
def test_tiles_of_one_size_fill_the_image_once_and_see_their_halo(shape, grid):
    halo, window, filled = 20, (160, 256), np.zeros(shape, int)
    for tile in lay_windows(shape, halo, window, grid):
        filled[tile.image, tile.rows, tile.columns] += 1
        for piece, seen, length, side in (
            (tile.rows, tile.seen_rows, shape[1], window[0]),
            (tile.columns, tile.seen_columns, shape[2], window[1]),
        ):
            assert seen.start <= max(0, piece.start - halo)
            assert seen.stop >= min(length, piece.stop + halo)
            # What is missing at the end of an image is filled by reflection.
            assert seen.stop - seen.start == side or (grid > 1 or side > length)
            assert grid == 1 or not seen.start % grid
            assert seen.stop == min(seen.start + side, length)
    assert (filled == 1).all()


def test_equal_tiles_go_together_and_no_more_than_fit(monkeypatch):
    network, shapes = tiny_network(0, num_blocks=1), []
    network.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    monkeypatch.setattr(TorchBackend, "max_pixels", lambda *_: 64 * 64)
    images = np.stack([picture(25, 20, seed) for seed in range(20)])
    together = on_cpu(network)(images, images.dtype, is_deep=False, advance=nothing)
    assert [shape[0] for shape in shapes] == [8, 8, 4]
    alone = [
        on_cpu(network)(image[None], images.dtype, is_deep=False, advance=nothing)
        for image in images
    ]
    assert_near(together, np.concatenate(alone))


def test_tiles_become_smaller_when_the_memory_does_not_suffice():
    network = tiny_network(1, num_blocks=1)

    def refuse(_, inputs):
        if inputs[0].shape[-1] * inputs[0].shape[-2] > 110 * 110:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    image = picture(180, 140)[None]
    whole = on_cpu(network)(image, image.dtype, is_deep=False, advance=nothing)
    network.register_forward_pre_hook(refuse)
    assert_near(on_cpu(network)(image, image.dtype, is_deep=False, advance=nothing), whole)
    with pytest.raises(
        cli.RunError, match="not enough memory for one tile; choose a smaller --tile"
    ):
        on_cpu(network, tile=200)(image, image.dtype, is_deep=False, advance=nothing)


def test_half_precision_is_near_and_overflow_is_computed_in_fp32():
    network, image = tiny_network(2, num_blocks=1), picture(30, 40)[None]
    full = on_cpu(network)(image, image.dtype, is_deep=False, advance=nothing)
    half = on_cpu(network, "fp16")
    assert half.precision_for(is_deep=False) == "fp16"
    assert_near(half(image, image.dtype, is_deep=False, advance=nothing), full, 2)
    network.register_forward_hook(
        lambda module, inputs, output: output / (output.dtype != torch.float16)
    )
    np.testing.assert_array_equal(
        on_cpu(network, "fp16")(image, image.dtype, is_deep=False, advance=nothing), full
    )
    on_gpu = Device("cuda")
    assert [precision_of("auto", on_gpu, is_deep=is_deep) for is_deep in (False, True)] == [
        "fp16",
        "fp32",
    ]
    assert precision_of("bf16", on_gpu, is_deep=True) == "bf16"


# Modes


def saved_image(path, image, **options):
    image.save(path, **options)
    return path


def test_gray_colours_palette_and_bits_keep_their_kind(tmp_path, capsys, cubic):
    pixels = picture(21, 30)
    gray = pixels[..., 0]
    palette = Image.fromarray(pixels).quantize(16)
    for name, image, expected in (
        ("rgb", Image.fromarray(pixels), pixels),
        ("gray", Image.fromarray(gray), gray),
        ("palette", palette, np.array(palette.convert("RGB"))),
        ("bits", Image.fromarray(gray > 127), (gray > 127).astype(np.uint8) * 255),
    ):
        out = upscaled(
            capsys, cubic, saved_image(tmp_path / f"{name}.png", image), tmp_path / "out"
        )
        assert_cubic(np.array(Image.open(out)), expected)


def test_cmyk_becomes_rgb(tmp_path, capsys, cubic):
    image = Image.fromarray(picture(20, 24)).convert("CMYK")
    broken = bytes(16) + b"CMYK" + bytes(100)
    source = saved_image(tmp_path / "inks.tif", image, icc_profile=broken)
    out = upscaled(capsys, cubic, source, tmp_path / "out")
    assert_cubic(np.array(Image.open(out)), np.array(image.convert("RGB")))
    assert "icc_profile" not in Image.open(out).info  # it describes CMYK


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_stay_16_bits(tmp_path, capsys, cubic, channels, suffix):
    random = np.random.default_rng(channels)
    pixels = random.integers(0, 65536, (20, 26, channels)).astype(np.uint16)
    pixels[:, :13] = 12345  # both values have the same 8-bit level
    pixels[:, 13:16] = 12400
    if channels in (2, 4):
        pixels[..., -1] = np.maximum(pixels[..., -1], 1)
    pixels = pixels[..., 0] if channels == 1 else pixels
    source = tmp_path / "deep.png"
    source.write_bytes(imagecodecs.png_encode(pixels))
    if suffix == ".tif" and channels != 2:  # Pillow cannot open 16-bit gray with alpha
        source = tmp_path / "deep.tif"
        tifffile.imwrite(
            source,
            pixels,
            photometric="rgb" if channels > 2 else "minisblack",
            metadata=None,
            **({"extrasamples": ["unassalpha"]} if channels == 4 else {}),
        )
    out = upscaled(capsys, cubic, source, tmp_path / f"out{suffix}")
    found = imagecodecs.png_decode(out.read_bytes()) if suffix == ".png" else tifffile.imread(out)
    if suffix == ".tif" and channels == 2:
        found = found[..., [0, 3]]
    colours = slice(None, -1) if channels in (2, 4) else slice(None)
    assert_cubic(found.reshape(40, 52, -1)[..., colours], pixels.reshape(20, 26, -1)[..., colours])
    assert_cubic(found[:, 36:], pixels[:, 18:])
    assert (found[:, :20] == 12345).all()


def test_alpha_is_upscaled_with_the_colours(tmp_path, capsys, cubic):
    pixels, alpha = picture(24, 30), np.zeros((24, 30), np.uint8)
    alpha[6:18, 8:22] = 255
    alpha[18:20] = 99
    source = saved_image(tmp_path / "a.png", Image.fromarray(np.dstack([pixels, alpha])))
    found = np.array(Image.open(upscaled(capsys, cubic, source, tmp_path / "out")))
    assert_cubic(found[..., 3], alpha)
    inside = (slice(16, 32), slice(20, 40))
    assert_near(found[inside][..., :3], reference(pixels)[inside])
    gray = saved_image(
        tmp_path / "g.png", Image.fromarray(np.dstack([pixels[..., :1], alpha]), mode=None)
    )
    found = Image.open(upscaled(capsys, cubic, gray, tmp_path / "out"))
    assert found.mode == "LA"
    assert_cubic(np.array(found)[..., 1], alpha)


def test_opaque_stays_opaque_and_hidden_colours_do_not_show():
    made = on_cpu(tiny_network(4))
    pixels = np.dstack([picture(40, 40), np.full((40, 40), 255, np.uint8)])
    assert (
        upscale_picture(Picture(pixels), TargetSize(), made, nothing).pixels[..., 3] == 255
    ).all()
    pixels[:20, :, 3] = 0
    large = upscale_picture(Picture(pixels), TargetSize(), made, nothing).pixels
    assert (large[44:, :, 3] == 255).all()
    assert (large[:36, :, 3] == 0).all()
    pixels[:20, :, :3] = (255, 0, 255)  # garbage where alpha is 0
    np.testing.assert_array_equal(
        upscale_picture(Picture(pixels), TargetSize(), made, nothing).pixels, large
    )


def test_transparency_of_a_palette_and_of_a_colour(tmp_path):
    palette = Image.fromarray(picture(16, 16)).quantize(8)
    saved_image(tmp_path / "p.png", palette, transparency=3)
    found = read_picture(tmp_path / "p.png").pixels
    np.testing.assert_array_equal(found[..., 3] == 0, np.array(palette) == 3)
    pixels = np.full((8, 8, 3), 1000, np.uint16)
    pixels[:4] = 1001  # the same 8-bit level
    data = imagecodecs.png_encode(pixels)
    chunk = b"\0\0\0\6tRNS" + np.array([1001] * 3, ">u2").tobytes()
    data = data[:33] + chunk + zlib.crc32(chunk[4:]).to_bytes(4, "big") + data[33:]
    (tmp_path / "c.png").write_bytes(data)
    found = read_picture(tmp_path / "c.png").pixels
    assert (found[:4, :, 3] == 0).all()
    assert (found[4:, :, 3] == 65535).all()


# Profile, EXIF, orientation


def camera_exif(orientation):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", orientation
    exif[0x8769] = {0x829A: (1, 50), 0x9003: "2026:01:01 00:00:00"}
    return exif.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_profile_and_exif_are_kept_byte_for_byte(tmp_path, capsys, cubic, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = camera_exif(1)
    source = saved_image(
        tmp_path / f"a{suffix}", Image.fromarray(picture(20, 24)), icc_profile=profile, exif=exif
    )
    out = upscaled(capsys, cubic, source, tmp_path / f"out{suffix}")
    for kind in (".png", ".jpg", ".webp", ".tif"):
        (tmp_path / f"out{kind}").write_bytes(encode_picture(read_picture(out), kind))
        with Image.open(tmp_path / f"out{kind}") as found:
            assert found.info["icc_profile"] == profile
            assert found.getexif()[0x010F] == "Maker"
            assert found.getexif().get_ifd(0x8769)[0x9003] == "2026:01:01 00:00:00"
            if kind != ".tif":  # TIFF's own tags are EXIF: equal values, but rewritten
                assert found.info["exif"].removeprefix(b"Exif\0\0") == exif.removeprefix(
                    b"Exif\0\0"
                )
    with Image.open(
        io.BytesIO(encode_picture(read_picture(tmp_path / "out.tif"), ".png"))
    ) as found:
        assert found.info["icc_profile"] == profile
        assert found.getexif().get_ifd(0x8769)[0x9003] == "2026:01:01 00:00:00"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, capsys, cubic, orientation):
    pixels = picture(16, 28, orientation)
    upright = np.array(
        ImageOps.exif_transpose(
            Image.open(
                saved_image(
                    tmp_path / "a.png", Image.fromarray(pixels), exif=camera_exif(orientation)
                )
            )
        )
    )
    with Image.open(upscaled(capsys, cubic, tmp_path / "a.png", tmp_path / "out.jpg")) as found:
        assert found.getexif()[0x0112] == 1
        assert found.getexif()[0x010F] == "Maker"
        assert_cubic(np.array(found), upright, levels=24)  # JPEG
    for name, kind in (("b.tif", np.uint8), ("c.tif", np.uint16)):
        tifffile.imwrite(
            tmp_path / name,
            pixels.astype(kind),
            photometric="rgb",
            extratags=[(274, 3, 1, orientation, True)],
        )
        np.testing.assert_array_equal(read_picture(tmp_path / name).pixels, upright)


# Size


def test_scale_size_and_chains(tmp_path, capsys, cubic):
    pixels = picture(15, 21)
    source = saved_image(tmp_path / "a.png", Image.fromarray(pixels))
    for number, (arguments, size) in enumerate(
        {
            ("--scale", "3"): (45, 63),
            ("--scale", "1.5"): (22, 32),
            ("--scale", "0.5"): (8, 10),
            ("--size", "70x31"): (31, 70),
            ("--scale", "7.3"): (110, 153),
        }.items()
    ):
        found = np.array(
            Image.open(upscaled(capsys, cubic, source, tmp_path / f"{number}.png", *arguments))
        )
        assert found.shape == (*size, 3)
        assert abs(found.mean() - pixels.mean()) < 2
    found = np.array(
        Image.open(upscaled(capsys, cubic, source, tmp_path / "x4.png", "--scale", "4"))
    )
    assert_near(found, reference(reference(pixels)), 2, border=12)
    made = upscaler(cubic)
    once = made(
        made(pixels[None], np.dtype(np.uint16), is_deep=False, advance=nothing),
        np.dtype(np.uint8),
        is_deep=False,
        advance=nothing,
    )
    np.testing.assert_array_equal(found, once[0])


def test_pre_downsample_tries_an_hr_image(tmp_path, capsys, cubic):
    pixels = picture(41, 62)
    source = saved_image(tmp_path / "a.png", Image.fromarray(pixels))
    found = np.array(
        Image.open(upscaled(capsys, cubic, source, tmp_path / "o.png", "--pre-downsample", "2"))
    )
    assert_cubic(found, reference(pixels[:40], (20, 31)))
    alpha = Image.fromarray(np.dstack([pixels, picture(41, 62, 1)[..., 0]]))
    source = saved_image(tmp_path / "b.png", alpha)
    found = np.array(
        Image.open(upscaled(capsys, cubic, source, tmp_path / "p.png", "--pre-downsample", "3"))
    )
    assert found.shape == (26, 40, 4)


# Which files


def test_folders_keep_their_structure(tmp_path, capsys, cubic):
    folder = tmp_path / "in"
    for name in (
        "a.png",
        "deep/er/b.jpg",
        "deep/a.bmp",
        "same.jpg",
        "same.png",
        ".hidden/x.png",
        "._c.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(8, 9)).save(folder / name)
    (folder / "notes.txt").write_text("none of ours")
    (folder / "deep/photo.heic").write_bytes(b"not opened")
    out = folder / "out"  # inside the input: the second run must not upscale the results
    for extra in ((), ("--force",)):
        status, stdout, err = run(
            capsys, folder, "-o", out, "--model", cubic, "--format", "webp", *extra
        )
        assert (status, err) == (0, "")
        assert "5 of 5" in stdout
        assert "not read: 1 HEIC (deep/photo.heic); save them as PNG to use them" in stdout
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
            "a.webp",
            "deep/a.webp",
            "deep/er/b.webp",
            "same.jpg.webp",
            "same.png.webp",
        ]


def test_nothing_is_overwritten(tmp_path, capsys, cubic):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(picture(8, 9)).save(folder / name)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"precious")
    status, _, err = run(capsys, folder, "-o", out, "--model", cubic)
    assert status == 2
    assert err == (
        f"error: '{out}/a.png' exists already; --force overwrites them, --skip-existing keeps "
        "them\n"
    )
    assert not (out / "b.png").exists()
    status, stdout, _ = run(capsys, folder, "-o", out, "--model", cubic, "--skip-existing")
    assert (status, (out / "a.png").read_bytes()) == (0, b"precious")
    assert "skipped: 1 results" in stdout
    assert (out / "b.png").exists()
    assert run(capsys, folder, "-o", out, "--model", cubic, "--force")[0] == 0
    assert Image.open(out / "a.png").size == (18, 16)
    status, _, err = run(capsys, folder / "a.png", "-o", folder, "--model", cubic, "--force")
    assert (status, "would be overwritten by its own result" in err) == (2, True)
    assert Image.open(folder / "a.png").size == (9, 8)


def test_a_bad_file_does_not_stop_the_rest(tmp_path, capsys, cubic):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(picture(40, 40)).save(folder / "c.png")
    data = (folder / "c.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    (folder / "b.jpg").write_bytes(b"no picture")
    (folder / "d.mp4").write_bytes(b"no video")
    (folder / "e.tif").write_bytes(b"")
    status, stdout, err = run(capsys, folder, "-o", tmp_path / "out", "--model", cubic)
    assert status == 1
    assert "upscaled: 1 of 5" in stdout
    lines = err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["failed", f"{folder}/{name}"] for name in ("a.png", "b.jpg", "d.mp4", "e.tif")
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.png"]  # nothing half-written


def test_the_first_of_several_pictures_in_a_file_is_upscaled(tmp_path, capsys, cubic):
    frames = [Image.fromarray(picture(16, 20, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    status, _, err = run(capsys, tmp_path / "a.tif", "-o", tmp_path / "out", "--model", cubic)
    assert (status, err) == (
        0,
        f"note: {tmp_path / 'a.tif'} contains 3 pictures; only the first is upscaled\n",
    )
    assert_cubic(np.array(Image.open(tmp_path / "out" / "a.png")), np.array(frames[0]))


def test_a_result_that_cannot_be_written_is_a_failure(tmp_path, capsys, cubic):
    Image.fromarray(picture(2, 9000)).save(tmp_path / "long.png")
    Image.fromarray(picture(8, 8)).save(tmp_path / "short.png")
    # WebP allows at most 16383 pixels
    status, stdout, err = run(
        capsys,
        tmp_path / "long.png",
        tmp_path / "short.png",
        "-o",
        tmp_path / "out",
        "--format",
        "webp",
        "--model",
        cubic,
    )
    assert (status, "upscaled: 1 of 2" in stdout) == (1, True)
    assert err.startswith(f"failed: {tmp_path / 'long.png'}: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["short.webp"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to upscale"),
        (("nowhere.png",), "'nowhere.png' does not exist"),
        (("text.txt",), "'text.txt': unsupported file type; supported: "),
        (("empty",), "folder 'empty' contains no images or videos"),
        (("a.png", "--scale", "2", "--size", "3x3"), "--scale and --size contradict each other"),
        (("a.png", "--scale", "0"), "--scale 0 must be above 0"),
        (("a.png", "--scale", "nan"), "--scale nan must be above 0"),
        (("a.png", "--size", "big"), "--size 'big' must be WIDTHxHEIGHT"),
        (("a.png", "--size", "0x4"), "--size '0x4' must be WIDTHxHEIGHT"),
        (("a.png", "--pre-downsample", "0"), "--pre-downsample 0 must be from 1"),
        (("a.png", "--tile", "3"), "--tile 3 is below 16"),
        (("a.png", "--device", "abacus"), "no device 'abacus' here"),
        (("a.png", "--model", "text.txt"), "text.txt"),
        (
            ("a.png", "empty", "-o", "x.png"),
            "-o 'x.png' names a file, but there is more than one input",
        ),
        (("a.png", "-o", "x.gif"), "cannot write a picture as '.gif'; choose from .jpeg"),
        (("a.png", "-o", "x.mp4"), "cannot write a picture as '.mp4'"),
        (("a.png", "-o", "text"), "-o 'text' is a file; give a folder"),
        (("one/a.png", "a.png"), "'one/a.png' and 'a.png' would both become"),
        (("a.png", "--sclae", "3"), "unknown option --sclae; did you mean '--scale'?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path, capsys, cubic, monkeypatch, arguments, reason
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "one/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(8, 8)).save(name)
    Path("empty").mkdir()
    Path("text").write_text("")
    Path("text.txt").write_text("")
    defaults = () if "-o" in arguments else ("-o", "out")
    model = () if "--model" in arguments else ("--model", cubic)
    status, _, err = run(capsys, *arguments, *defaults, *model)
    assert status == 2
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**20, 2**20, 8, 2, 0, 0, 0)
    data = Path(saved_image(tmp_path / "a.png", Image.fromarray(picture(8, 8)))).read_bytes()
    (tmp_path / "a.png").write_bytes(
        data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    )
    with pytest.raises(
        cli.UserError, match=r"1048576x1048576 pixels need 16384.0 GiB of memory to decode"
    ):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_one_pixel(channels):
    made, pixels = on_cpu(tiny_network(0)), np.full((1, 1, channels), 77, np.uint8)
    for target, shape in (
        (TargetSize(), (2, 2)),
        (TargetSize(scale=5), (5, 5)),
        (TargetSize(size=(3, 1)), (3, 1)),
    ):
        large = upscale_picture(Picture(pixels), target, made, nothing).pixels
        assert large.shape == (*shape, channels)
        if channels in (2, 4):
            assert (large[..., -1] == 77).all()


def test_a_picture_too_large_for_the_memory_is_refused(cubic, tmp_path, capsys):
    source = saved_image(tmp_path / "a.png", Image.fromarray(picture(8, 8)))
    status, _, err = run(
        capsys, source, "-o", tmp_path / "out", "--model", cubic, "--size", "900000x900000"
    )
    assert status == 1
    assert "GiB of memory, more than is free" in err


# Networks


def test_the_newest_run_is_the_default(tmp_path, capsys, monkeypatch):
    run_dir = make_run(tmp_path / "runs", steps=(100, 200), best=100)
    monkeypatch.chdir(tmp_path)
    pixels = picture(20, 20)
    Image.fromarray(pixels).save("a.png")
    for arguments in ((), ("--model", run_dir)):
        status, stdout, _ = run(capsys, "a.png", "-o", "out", "--force", *arguments)
        assert status == 0
        assert "step-00000100/generator_ema.safetensors" in stdout
        best = on_cpu(tiny_saved(101).build())(
            pixels[None], pixels.dtype, is_deep=False, advance=nothing
        )
        np.testing.assert_array_equal(np.array(Image.open("out/a.png")), best[0])


def test_official_vapsr(tmp_path, capsys):
    source, weights = shared("data/set5/x4"), shared("weights/VapSR_X4.pth")
    lr = next(path for path in sorted(source.iterdir()) if "LR" in path.name)
    status, stdout, _ = run(capsys, lr, "-o", tmp_path, "--model", weights)
    assert (status, "vapsr x4" in stdout) == (0, True)
    found, hr = (
        np.array(Image.open(tmp_path / lr.name)),
        np.array(Image.open(str(lr).replace("LR", "HR"))),
    )
    assert 20 * np.log10(255 / np.sqrt(np.square(found.astype(float) - hr).mean())) > 30


def test_a_network_that_spandrel_knows(tmp_path, capsys):
    torch.manual_seed(0)
    import_torchvision()
    from spandrel.architectures.SPAN import SPAN

    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2, norm=False)
    torch.save({"params": network.state_dict()}, tmp_path / "span.pth")
    source = saved_image(tmp_path / "a.png", Image.fromarray(picture(20, 24)))
    status, stdout, _ = run(
        capsys, source, "-o", tmp_path / "out", "--model", tmp_path / "span.pth"
    )
    assert (status, "spandrel x2" in stdout) == (0, True)
    assert Image.open(tmp_path / "out" / "a.png").size == (48, 40)


# Videos


def ffmpeg(*arguments, data=None):
    from imageio_ffmpeg import get_ffmpeg_exe

    subprocess.run(
        [get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)],
        input=data,
        check=True,
        timeout=60,
    )


def facts(path):
    """Return RGB frames, their times, the rate, the packets of sound, and the pixel format."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        stream = container.streams.video[0]
        rate, pixel_format = stream.average_rate, stream.codec_context.pix_fmt
    sound = []
    with av.open(str(path)) as container:
        if container.streams.audio:
            sound = [
                (bytes(packet), round(float(packet.pts * packet.time_base), 2))
                for packet in container.demux(audio=0)
                if packet.size
            ]
    pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
    return pixels, [round(frame.time, 3) for frame in frames], rate, sound, pixel_format


def clip(path, *arguments, size="64x48", rate="30000/1001", sound=True):
    tone = ["-f", "lavfi", "-i", "sine=frequency=440:duration=0.5"] if sound else []
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        f"mandelbrot=size={size}:rate={rate}",
        *tone,
        "-t",
        "0.5",
        *arguments,
        path,
    )
    return path


@pytest.mark.parametrize(
    ("name", "result", "arguments"),
    [
        ("a.mp4", "a.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3", "-c:a", "aac"]),
        ("b.webm", "b.mkv", ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-c:a", "libopus"]),
        ("c.mov", "c.mov", ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-c:a", "pcm_s16le"]),
        (
            "d.mkv",
            "d.mkv",
            [
                "-c:v",
                "libx265",
                "-x265-params",
                "log-level=none",
                "-pix_fmt",
                "yuv420p10le",
                "-c:a",
                "flac",
            ],
        ),
    ],
)
def test_a_video_keeps_frames_times_rate_and_sound(
    tmp_path, capsys, cubic, name, result, arguments
):
    source = clip(tmp_path / name, *arguments)
    status, _, err = run(capsys, source, "-o", tmp_path / "out", "--model", cubic)
    assert (status, err) == (0, "")
    before, after = facts(source), facts(tmp_path / "out" / result)
    assert len(after[0]) == len(before[0]) == 15
    assert after[0][0].shape == (96, 128, 3)
    assert after[1] == pytest.approx(before[1], abs=0.002)
    assert float(after[2]) == pytest.approx(30000 / 1001, rel=1e-3)
    assert len(before[3]) > 5
    assert [packet for packet, _ in after[3]] == [packet for packet, _ in before[3]]
    assert [time for _, time in after[3]] == pytest.approx(
        [time for _, time in before[3]], abs=0.011
    )
    assert ("10" in after[4]) == ("10" in before[4])
    for small, large in zip(before[0], after[0], strict=True):
        assert np.abs(reference(small).astype(int) - large.astype(int)).mean() < 6
        assert np.abs(small.mean((0, 1)) - large.mean((0, 1))).max() < 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [result]


def test_videos_with_uneven_times_rotation_and_odd_sides(tmp_path, capsys, cubic):
    source = clip(
        tmp_path / "a.mkv",
        "-vf",
        "select='not(eq(mod(n,3),1))'",
        "-fps_mode",
        "vfr",
        "-c:v",
        "ffv1",
        sound=False,
        rate="25",
        size="65x49",
    )
    out = tmp_path / "out.mkv"
    assert run(capsys, source, "-o", out, "--model", cubic, "--scale", "3")[0] == 0
    before, after = facts(source), facts(out)
    assert after[1] == pytest.approx(before[1], abs=0.002)
    assert after[0][0].shape == (146, 194, 3)  # 147x195, made even
    clip(tmp_path / "b.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", sound=False)
    ffmpeg(
        "-display_rotation", "90", "-i", tmp_path / "b.mp4", "-c", "copy", tmp_path / "turned.mp4"
    )
    assert (
        run(capsys, tmp_path / "turned.mp4", "-o", tmp_path / "upright.mp4", "--model", cubic)[0]
        == 0
    )
    expected = np.rot90(facts(tmp_path / "b.mp4")[0][3])
    found = facts(tmp_path / "upright.mp4")[0][3]
    assert (
        np.abs(reference(np.ascontiguousarray(expected)).astype(int) - found.astype(int)).mean() < 6
    )
    with av.open(str(tmp_path / "upright.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0


def test_a_video_keeps_the_colours_of_its_matrix(tmp_path, capsys, cubic):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32], frame[:, 32:] = (200, 60, 30), (20, 60, 230)
    for matrix in ("bt709", "smpte170m", "bt2020nc"):
        source, out = tmp_path / f"{matrix}.mp4", tmp_path / f"{matrix}-out.mp4"
        ffmpeg(
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            "64x48",
            "-r",
            10,
            "-i",
            "-",
            "-vf",
            f"scale=out_color_matrix={matrix}",
            "-colorspace",
            matrix,
            "-pix_fmt",
            "yuv420p",
            "-c:v",
            "libx264",
            "-crf",
            "1",
            source,
            data=frame.tobytes() * 3,
        )
        assert run(capsys, source, "-o", out, "--model", cubic)[0] == 0
        ffmpeg("-i", out, "-frames:v", "1", "-pix_fmt", "rgb24", tmp_path / "shown.png")
        shown = np.array(Image.open(tmp_path / "shown.png")).astype(int)
        assert np.abs(shown[48, 32] - (200, 60, 30)).max() <= 4
        assert np.abs(shown[48, 96] - (20, 60, 230)).max() <= 4


def test_reserved_colour_tags_change_no_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (72, 64), dtype=np.uint8)
    plain, tagged = (VideoFrame.from_ndarray(pixels, format="yuv420p") for _ in range(2))
    tagged.color_primaries, tagged.color_trc = 0, 3
    assert np.array_equal(_pixels(tagged), _pixels(plain))
    assert (tagged.color_primaries, tagged.color_trc) == (0, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_10_bit_ramp_passes_unchanged(tmp_path, capsys, suffix):
    weights = tmp_path / "identity.safetensors"
    params = {"num_features": 4, "num_conv": 1}
    write_network(weights, SavedNetwork("compact", 1, params, identity_network().state_dict()))
    source, out = tmp_path / f"ramp{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".png":
        source.write_bytes(imagecodecs.png_encode(ramp()))
    else:
        tifffile.imwrite(source, ramp(), photometric="rgb")
    found = read_rgb(upscaled(capsys, weights, source, out), 16)
    np.testing.assert_array_equal(found, ramp())
