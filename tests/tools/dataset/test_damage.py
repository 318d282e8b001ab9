"""Damaged data behind intact headers and ends, and sloppy files whose pixels are intact."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from dataset_corpus import CHECKOUT, UNGATED, encoded, npy, photograph, run_tool, write_files
from pipeline.data.decoding import HostDecoder
from pipeline.data.image_headers import (
    BadImageError,
    ImageHeader,
    check_complete,
    check_file_size,
    read_header,
    without_harmless_defect,
)
from pipeline.data.image_pixels import decode_plain, decode_rgb, decoder_name, prepare_decoders
from tools.crops.manifest import ManifestIndex
from tools.dataset.judging import FileChecker, FileRules, FileStatus

PIXELS = photograph(301, 403)
KINDS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "rgb": {"keep_rgb": True},
    "gray": {},
}


@pytest.fixture(autouse=True)
def _decoders(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    threads = cv2.getNumThreads()
    prepare_decoders()
    yield
    cv2.setNumThreads(threads)


def decode(content: bytes) -> np.ndarray:
    return decode_rgb(content, read_header(io.BytesIO(content)))


def reason_against(content: bytes) -> str:
    """Reason why a file is rejected, or an empty string."""
    try:
        header = read_header(io.BytesIO(content))
        if header.height * header.width < 1e6:  # not the giant sizes that flipped bits produce
            assert decode_rgb(content, header).shape[2] == 3
    except BadImageError as error:
        return str(error)
    return ""


def checker(folder, decodes: bool = True, megapixels: float = 300) -> FileChecker:
    return FileChecker(
        folder, FileRules(64, None, megapixels, decodes), ManifestIndex(folder, []), None
    )


def jpeg(kind: str = "420", quality: int = 92) -> bytes:
    return encoded(
        PIXELS[..., 0] if kind == "gray" else PIXELS, "jpeg", quality=quality, **KINDS[kind]
    )


def damaged(content: bytes, how: str, seed: int = 0) -> bytes:
    """`content` with a part of its second half zeroed, overwritten or removed."""
    rng = np.random.default_rng(seed)
    at = int(rng.integers(len(content) // 2, len(content) - 5000))
    if how == "zeroed":
        return content[:at] + bytes(2048) + content[at + 2048 :]
    if how == "random":
        return content[:at] + rng.integers(0, 256, 4096, np.uint8).tobytes() + content[at + 4096 :]
    return content[:at] + content[at + 4000 :]


def insert_before_scan(content: bytes, added: bytes) -> bytes:
    at = content.index(b"\xff\xda")
    return content[:at] + added + content[at:]


@pytest.mark.parametrize("how", ["zeroed", "random", "cut out"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_jpeg_data_is_turned_away(kind, how):
    """Damage is nearly always detected.

    Zeros may be valid code by chance, and often are in the refinement scans of a progressive JPEG.
    """
    content = jpeg(kind)
    decode(content)
    reasons = [reason_against(damaged(content, how, seed)) for seed in range(8)]
    assert sum(map(bool, reasons)) >= (4 if (kind, how) == ("progressive", "zeroed") else 7), (
        reasons
    )
    assert "\n" not in "".join(reasons)


@pytest.mark.parametrize("how", ["zeroed", "random", "cut out"])
def test_damaged_cmyk_jpeg_is_turned_away(how):
    content = encoded(Image.fromarray(PIXELS).convert("CMYK"), "jpeg", quality=92)
    decode(content)
    with pytest.raises(BadImageError):
        decode(damaged(content, how))


def test_the_tools_agree_on_damage(tmp_path):
    """The cutter rejects exactly those files that the full check calls bad."""
    tiff = encoded(photograph(300, 400, seed=9), "tiff", compression="tiff_lzw")
    files = {
        "good.jpg": jpeg(),
        "good.tif": tiff,
        "zeroed.jpg": damaged(jpeg(), "zeroed"),
        "random.jpg": damaged(jpeg(), "random"),
        "cut_out.jpg": damaged(jpeg(), "cut out"),
        "progressive.jpg": damaged(jpeg("progressive"), "zeroed"),
        "random.tif": damaged(tiff, "random"),
        "zeroed.tif": damaged(tiff, "zeroed"),
    }
    write_files(tmp_path / "photos", files)
    bad = sorted(set(files) - {"good.jpg", "good.tif"})
    cut = run_tool(
        "images_to_data", tmp_path / "photos", tmp_path / "crops", "--size", 96, *UNGATED
    )
    assert cut.returncode == 1, cut.stderr
    folders = {path.parent.name for path in (tmp_path / "crops").rglob("*.npy")}
    assert len(folders) == 2
    assert all(name.startswith("good") for name in folders)
    checked = run_tool(
        "check_training_data", "--data-dir", tmp_path / "photos", "--min-size", 64, *UNGATED
    )
    assert checked.returncode == 1, checked.stderr
    output = checked.stdout + checked.stderr
    assert [name for name in sorted(files) if f"{name}: " in output] == bad, output


def test_a_damaged_lzw_tiff_is_bad(tmp_path):
    """DALI's decoder accepts it."""
    broken = damaged(encoded(PIXELS, "tiff", compression="tiff_lzw"), "random")
    with pytest.raises(BadImageError, match="cannot be decoded"):
        HostDecoder(threads=1, batch=1).decode_content(broken)
    write_files(tmp_path, {"broken.tif": broken})
    result = checker(tmp_path)("broken.tif")
    assert (result.status, result.gate) == (FileStatus.BAD, "file")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (61, 83), (1, 1), (17, 300)])
def test_strict_decoder_gives_opencvs_pixels(kind, size):
    pixels = photograph(*size, seed=3)
    content = encoded(
        pixels[..., 0] if kind == "gray" else pixels, "jpeg", quality=75, **KINDS[kind]
    )
    header = read_header(io.BytesIO(content))
    expected = cv2.imdecode(
        np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    assert header.is_plain
    assert decoder_name(header) == f"simplejpeg {simplejpeg.__version__}"
    assert np.array_equal(decode_plain(content, header), expected)


@pytest.mark.parametrize("sampling", ["411", "420", "422", "440", "444"])
@pytest.mark.parametrize("restarts", [0, 3])
def test_samplings_and_restarts(sampling, restarts):
    setting = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    content = cv2.imencode(
        ".jpg",
        PIXELS,
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, setting, cv2.IMWRITE_JPEG_RST_INTERVAL, restarts],
    )[1].tobytes()
    header = read_header(io.BytesIO(content))
    assert header.is_plain
    assert np.array_equal(
        decode_plain(content, header),
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB),
    )


@pytest.mark.parametrize(
    "factors",
    [
        (0x21, 0x21, 0x21),
        (0x12, 0x12, 0x12),
        (0x31, 0x31, 0x31),
        (0x22, 0x12, 0x12),
        (0x22, 0x21, 0x21),
        (0x14, 0x11, 0x11),
        (0x41, 0x11, 0x11),
        (0x22, 0x11, 0x12),
        (0x11, 0x22, 0x22),
        (0x31, 0x11, 0x11),
        (0x22, 0x22, 0x22),
        (0x42, 0x11, 0x11),
    ],
)
def test_plain_are_the_samplings_that_the_strict_decoder_knows(factors):
    content = bytearray(jpeg("444"))
    start = content.index(b"\xff\xc0")
    content[start + 11], content[start + 14], content[start + 17] = factors
    try:
        simplejpeg.decode_jpeg_header(bytes(content), strict=False)
        is_known = True
    except (ValueError, KeyError):
        is_known = False
    assert read_header(io.BytesIO(bytes(content))).is_plain == is_known


def sloppy_files() -> dict[str, bytes]:
    """JPEGs as cameras and old software write them, with the pixels of `jpeg()`."""
    content = jpeg()
    tables, adobe = (
        content[:2] + content[content.index(b"\xff\xdb") :],
        b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0",
    )
    jfif = bytearray(content)
    jfif[11] = 3
    scan = bytearray(content)
    limits = content.index(b"\xff\xda") + 11
    scan[limits : limits + 3] = bytes(3)
    return {
        "bytes after the end": content + b"appended by a camera" * 99,
        "some bytes before the end": content[:-2] + b"\x5a\x17" + content[-2:],
        "zeros before the end": content[:-2] + bytes(3000) + content[-2:],
        "fill bytes": insert_before_scan(content, b"\xff\xff"),
        "no JFIF": tables,
        "Adobe": tables[:2] + adobe + b"\1" + tables[2:],
        "strange Adobe": tables[:2] + adobe + b"\7" + tables[2:],
        "strange JFIF": bytes(jfif),
        "strange scan": bytes(scan),
        "all of it": bytes(jfif)[:limits]
        + bytes(3)
        + content[limits + 3 : -2]
        + bytes(3000)
        + content[-2:],
    }


@pytest.mark.parametrize("name", sloppy_files())
def test_sloppy_jpegs_are_good(name):
    content = sloppy_files()[name]
    assert np.array_equal(decode(content), decode(jpeg()))
    assert np.array_equal(HostDecoder(threads=1, batch=1).decode_content(content), decode(content))


@pytest.mark.parametrize(
    "name", ["strange JFIF", "strange scan", "strange Adobe", "zeros before the end"]
)
def test_a_harmless_warning_does_not_hide_damage(name):
    """libjpeg reports only the first warning."""
    content = sloppy_files()[name]
    with pytest.raises(ValueError, match=r"JFIF|SOS|Adobe|extraneous") as warning:
        simplejpeg.decode_jpeg(content, strict=True)
    assert np.array_equal(
        decode(without_harmless_defect(content, str(warning.value))), decode(content)
    )
    middle = len(content) // 3
    with pytest.raises(BadImageError, match="damaged"):
        decode(content[:middle] + bytes(2048) + content[middle + 2048 :])


def test_pixels_that_came_too_late_are_damage():
    """Bytes before the end that are not padding: decoding lost its place for a few blocks."""
    content = jpeg()
    with pytest.raises(BadImageError, match=r"damaged: \d+ extraneous bytes before marker 0xd9"):
        decode(content[:-2] + b"\x5a" * 300 + content[-2:])


def test_markers_in_the_scan_show_without_decoding():
    content = cv2.imencode(".jpg", PIXELS, [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes()
    header = read_header(io.BytesIO(content))
    check_complete(content, header)
    first, second = content.index(b"\xff\xd0"), content.index(b"\xff\xd1")
    for broken in (
        content[:first] + content[second:],  # an interval is missing
        content[:second] + content[first:second] + content[second:],  # an interval occurs twice
        content[: first + 9] + b"\xff\x4f" + content[first + 9 :],
    ):
        with pytest.raises(BadImageError, match="damaged: the marker"):
            check_complete(broken, header)
    plain = jpeg()
    for seed in range(20):
        with pytest.raises(BadImageError):
            check_complete(damaged(plain, "random", seed), header)


def test_hostile_jpegs_end_in_pixels_or_in_a_reason():
    rng = np.random.default_rng(5)
    contents = [
        encoded(photograph(40, 50), "jpeg", **KINDS[kind]) for kind in ("420", "progressive")
    ]
    for turn in range(1500):
        content = bytearray(contents[turn % 2])
        for at in rng.integers(2, len(content), 3):
            content[at] = rng.integers(0, 256)
        assert "\n" not in reason_against(bytes(content))


def test_file_size_must_fit_the_pixels():
    header = ImageHeader("png", 100, 200)
    check_file_size(header, 16 * 20_000 + (64 << 20))
    with pytest.raises(BadImageError, match=r"67428865 bytes for 100x200 pixels"):
        check_file_size(header, 16 * 20_000 + (64 << 20) + 1)


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp", "photo.tif"])
def test_sparse_giants_are_bad_and_not_read(tmp_path, name, decodes):
    form = {"tif": "tiff", "jpg": "jpeg"}.get(name[6:], name[6:])
    write_files(tmp_path, {name: encoded(PIXELS, form)})
    os.truncate(tmp_path / name, 3 << 40)
    result = checker(tmp_path, decodes)(name)
    assert result.status is FileStatus.BAD
    assert f"{3 << 40} bytes for 301x403 pixels" in result.reason


def test_sparse_npy_giants_are_bad_and_not_read(tmp_path):
    header = npy(np.zeros((0, 1, 3), np.uint8)).replace(
        b"(0, 1, 3), }         ", b"(1000000, 1000, 3), }"
    )
    (tmp_path / "giant.npy").write_bytes(header)
    os.truncate(tmp_path / "giant.npy", len(header) + 3 * 10**9)
    result = checker(tmp_path)("giant.npy")
    assert (result.status, result.bytes) == (FileStatus.BAD, 0)
    assert "--max-megapixels" in result.reason


def test_too_little_memory_says_nothing_about_the_file(tmp_path):
    """The image is within the user's limits but exceeds the machine's memory.

    It is not bad, and the other files are checked.
    """
    header = npy(np.zeros((0, 1, 3), np.uint8)).replace(
        b"(0, 1, 3), }          ", b"(1000000, 4000, 3), } "
    )
    write_files(tmp_path, {"giant.npy": header, "good.npy": npy(PIXELS)})
    os.truncate(tmp_path / "giant.npy", len(header) + 12 * 10**9)
    command = [
        sys.executable,
        str(CHECKOUT / "tools/check_training_data.py"),
        "--data-dir",
        str(tmp_path),
        "--min-size",
        "64",
        "--max-megapixels",
        "5000",
        "--min-gradient",
        "0",
        "--min-sharpness",
        "0",
    ]
    limit = 8 << 30
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert result.returncode == 1, result.stderr
    assert "not enough memory" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
