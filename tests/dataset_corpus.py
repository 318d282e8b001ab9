"""Photographs, broken files and processes for the tests of the dataset tools."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import warm
from pipeline.data.image_files import MANIFEST
from tools.crops.manifest import DatasetHash, iterate_records

# For tests that are not about the quality gates: their images are repetitive and synthetic.
UNGATED = ("--min-gradient", "0", "--min-sharpness", "0", "--keep-duplicates")
CHECKOUT = Path(__file__).resolve().parents[1]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python tools/<name>.py` as a user does, from another folder."""
    command = [warm.python(), str(CHECKOUT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd="/", check=False
    )


def assert_user_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, and only one line on stderr, which contains all the words."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def dataset_hash(root: Path, *folders: str) -> str:
    """Return the hash of all crops recorded by the manifests of `folders` in `root`, or of
    `root`."""
    total = DatasetHash()
    for record in iterate_records(
        root, [f"{folder}/{MANIFEST}" for folder in folders] or [MANIFEST]
    ):
        total.add(record.path, record.sha256)
    return total.hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stamped_tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Like `tree`, with modification times: equal only if nothing was rewritten."""
    return {
        name: (digest, (folder / name).stat().st_mtime_ns) for name, digest in tree(folder).items()
    }


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 RGB (height, width, 3): waves and a little noise; compresses like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        127 + 90 * np.sin(x / rng.uniform(5, 40) + y / rng.uniform(5, 40) + phase)
        for phase in range(3)
    ]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def wheel_photograph(name: str) -> np.ndarray:
    """A photograph that ships with scikit-image, decoded to uint8 RGB; lossy ones are halved."""
    spec = importlib.util.find_spec("skimage")
    with Image.open(Path(spec.submodule_search_locations[0]) / "data" / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    half = pixels.shape[1] // 2, pixels.shape[0] // 2
    return (
        pixels if name.endswith(".png") else cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    )


def encoded(pixels: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    """Encode an image file in the format that Pillow calls `form`."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    """Encode uint16 gray, RGB or RGBA pixels as a 16-bit PNG."""
    order = {
        2: lambda p: p,
        3: lambda p: p[..., ::-1] if p.shape[2] == 3 else p[..., [2, 1, 0, 3]],
    }[pixels.ndim]
    return cv2.imencode(".png", order(pixels))[1].tobytes()


def exif(orientation: int) -> bytes:
    """EXIF data with nothing but the orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def npy(array: np.ndarray) -> bytes:
    """The content of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def good_files(size: int = 96) -> dict[str, bytes]:
    """Files of `size` x `size` + 10 pixels that both tools must accept, in every format, mode and
    spelling."""
    pixels = photograph(size, size + 10)
    image = Image.fromarray(pixels)
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[: size // 2] = 40
    return {
        "plain.png": encoded(image, "png"),
        "UPPER.PNG": encoded(image, "png"),
        "photo.JpEg": encoded(image, "jpeg"),
        "progressive.jpg": encoded(image, "jpeg", progressive=True, quality=90),
        "cmyk.jpg": encoded(image.convert("CMYK"), "jpeg"),
        "gray.jpg": encoded(image.convert("L"), "jpeg"),
        "turned.jpg": encoded(image, "jpeg", exif=exif(6)),
        "lossy.webp": encoded(image, "webp"),
        "lossless.webp": encoded(image, "webp", lossless=True),
        "gray.png": encoded(image.convert("L"), "png"),
        "bits.png": encoded(image.convert("1"), "png"),
        "palette.png": encoded(image.convert("P"), "png"),
        "LA.png": encoded(Image.merge("LA", (image.convert("L"), Image.fromarray(alpha))), "png"),
        "RGBA.png": encoded(np.dstack([pixels, alpha]), "png"),
        "deep.png": deep_png(pixels.astype(np.uint16) * 257),
        "deep_gray.png": deep_png(pixels[..., 0].astype(np.uint16) * 257),
        "photo.bmp": encoded(image, "bmp"),
        "photo.tiff": encoded(image, "tiff"),
        "packed.TIF": encoded(image, "tiff", compression="tiff_lzw"),
        "restarts.jpg": cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[
            1
        ].tobytes(),
        "photo.jp2": encoded(image, "jpeg2000"),
        "really_a_jpeg.png": encoded(image, "jpeg"),
    }


def bad_files(size: int = 96) -> dict[str, bytes]:
    """Encoded files that every tool must refuse, whatever their names promise."""
    image = Image.fromarray(photograph(size, size, seed=1))
    files = {
        f"cut.{suffix}": encoded(image, form)[:-200]
        for suffix, form in {
            "png": "png",
            "jpg": "jpeg",
            "webp": "webp",
            "bmp": "bmp",
            "jp2": "jpeg2000",
        }.items()
    }
    flipped = bytearray(encoded(image, "png"))
    flipped[len(flipped) // 2] ^= 16
    return {
        **files,
        "cut_progressive.jpg": encoded(image, "jpeg", progressive=True)[:-300],
        "flipped.png": bytes(flipped),
        "empty.png": b"",
        "empty.jpg": b"",
        "zeros.png": bytes(5000),
        "text.png": b"This is not a photograph.\n" * 20,
        "text.jpg": b"\xff\xd8\xffnonsense" * 20,
        "head_only.png": encoded(image, "png")[:40],
        "animation.png": encoded(image.convert("P"), "gif"),
    }


def bad_npy_files(size: int = 96) -> dict[str, bytes]:
    """.npy files that every tool must refuse."""
    pixels = photograph(size, size, seed=2)
    return {
        "float.npy": npy(pixels.astype(np.float32)),
        "cut.npy": npy(pixels)[:-1],
        "long.npy": npy(pixels) + b"\0",
        "object.npy": npy(np.array([{}, 1], object)),
        "gray.npy": npy(pixels[..., 0]),
        "empty.npy": b"",
        "rgba.npy": npy(np.dstack([pixels, pixels[..., 0]])),
        "fortran.npy": npy(np.asfortranarray(pixels)),
        "none.npy": npy(pixels[:0]),
        "text.npy": b"not an array",
        "int8.npy": npy(pixels.astype(np.int8)),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, and the folders they need."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
