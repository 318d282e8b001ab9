"""Videos for the tests, encoded on the fly by the ffmpeg of the package `imageio-ffmpeg`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from dataset_corpus import photograph

TESTSRC = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=25:duration=4"]
# every frame another picture
MOVING = ["-f", "lavfi", "-i", "mandelbrot=size=320x240:rate=25", "-t", "4"]
H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "veryfast", "-g", "40", "-bf", "3"]
H265 = [
    "-c:v",
    "libx265",
    "-preset",
    "ultrafast",
    "-x265-params",
    "log-level=error:keyint=40:open-gop=1:bframes=3",
]
VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "40"]
LOSSLESS = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast"]


def ffmpeg(*arguments: object, data: bytes | None = None) -> bytes:
    """Run ffmpeg with `data` as its standard input; return its standard output."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-nostdin", "-y", "-v", "error", *map(str, arguments)]
    if data is not None:
        command.remove("-nostdin")
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def from_pixels(
    path: Path,
    frames: Iterable[np.ndarray],
    *arguments: object,
    rate: int = 25,
    pixel_format: str = "rgb24",
) -> Path:
    """Encode raw frames of one size: uint8 RGB (height, width, 3), or arrays in the layout of
    `pixel_format`."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    if pixel_format.startswith("yuv420p"):
        height = height * 2 // 3
    ffmpeg(
        "-f",
        "rawvideo",
        "-pix_fmt",
        pixel_format,
        "-s",
        f"{width}x{height}",
        "-r",
        rate,
        "-i",
        "-",
        *arguments,
        path,
        data=b"".join(frame.tobytes() for frame in frames),
    )
    return path


def still(seed: int, height: int = 360, width: int = 640) -> np.ndarray:
    """A picture unlike that of any other seed: uint8 RGB, coarse random patches under fine
    waves."""
    patches = np.random.default_rng(seed).integers(20, 236, (6, 10, 3)).astype(np.uint8)
    coarse = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(
        coarse + (photograph(height, width, seed).astype(np.int16) - 127) // 4, 0, 255
    ).astype(np.uint8)


def pan(
    seed: int, count: int, speed: float, height: int = 360, width: int = 640
) -> list[np.ndarray]:
    """`count` frames of a camera moving over a still at `speed` pixels per frame."""
    wide = still(seed, height, width + int(speed * count) + 1)
    return [wide[:, int(speed * index) : int(speed * index) + width] for index in range(count)]


def fade(before: np.ndarray, after: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` frames in which one picture turns into another."""
    parts = np.linspace(0, 1, count + 2)[1:-1]
    return [cv2.addWeighted(before, 1 - part, after, part, 0) for part in parts]


def quadrants(height: int = 240, width: int = 320) -> np.ndarray:
    """uint8 RGB, another colour in each quarter, so that every rotation and reflection shows."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 200, 30, 30
    picture[: height // 2, width // 2 :] = 30, 200, 30
    picture[height // 2 :, : width // 2] = 30, 30, 200
    picture[height // 2 :, width // 2 :] = 180, 180, 180
    return picture


def yuv420p(
    colours: np.ndarray, matrix: str, is_full: bool, bits: int, side: int = 64, height: int = 0
) -> np.ndarray:
    """Squares of flat colours in a row as raw yuv420p (3/2 height, width), by BT.601 or BT.709.

    `colours`: RGB (count, 3) in 0..255. Returns uint8 for 8 bits, uint16 above.
    """
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]
    r, g, b = colours.T / 255
    luma = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
    most = 2**bits - 1
    unit = 2 ** (bits - 8)
    y_scale, y_offset, c_scale = (most, 0, most) if is_full else (219 * unit, 16 * unit, 224 * unit)
    planes = [luma * y_scale + y_offset, cb * c_scale + 128 * unit, cr * c_scale + 128 * unit]
    kind = np.uint8 if bits == 8 else np.uint16
    y, u, v = (np.clip(np.rint(plane), 0, most).astype(kind) for plane in planes)
    height = height or side
    luma_plane = np.tile(np.repeat(y, side), (height, 1))
    chroma = [np.tile(np.repeat(plane, side // 2), (height // 2, 1)).ravel() for plane in (u, v)]
    return np.concatenate([luma_plane.ravel(), *chroma]).reshape(height * 3 // 2, -1)
