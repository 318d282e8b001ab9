"""Make a small dataset from photographs in two Python packages, to train on within seconds."""

from __future__ import annotations

import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import UserError, run
from pipeline.data.image_headers import read_header
from pipeline.data.image_pixels import decode_rgb, prepare_decoders
from pipeline.files import write_atomically
from tools import check_training_data, images_to_data, select_training_files
from tools.crops.grid import halved
from tools.images import encode

CROP_SIZE = 128
HELD_OUT_MULTIPLE = 4  # largest scale at which the demo is evaluated
VALIDATION_PHOTO = "chelsea.png"


@dataclass(frozen=True)
class DemoPhotograph:
    """A photograph inside an installed package, with its licence."""

    package: str  # import name
    distribution: str  # install name
    path: str  # within the package
    licence: str

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.rpartition("/")[2]


def _skimage(name: str, licence: str) -> DemoPhotograph:
    return DemoPhotograph("skimage", "scikit-image", f"data/{name}", licence)


def _sklearn(name: str) -> DemoPhotograph:
    return DemoPhotograph("sklearn", "scikit-learn", f"datasets/images/{name}", "CC BY 2.0")


# Licences according to the docstrings of skimage.data and sklearn/datasets/images/README.txt.
DATASET = (
    _skimage("astronaut.png", "public domain (NASA)"),
    _skimage("rocket.jpg", "public domain (SpaceX)"),
    _skimage("hubble_deep_field.jpg", "public domain (NASA)"),
    _skimage("retina.jpg", "CC0"),
    _sklearn("china.jpg"),
    _skimage(VALIDATION_PHOTO, "CC0"),
)
HELD_OUT = (_skimage("coffee.png", "CC0"), _sklearn("flower.jpg"))


@dataclass(frozen=True)
class Options:
    """Make the demo dataset: six photographs to train and validate on, two for evaluation.

    They come from the installed packages scikit-image and scikit-learn; nothing is downloaded.
    OUT/photographs holds the photographs and their licences, OUT/dataset the crops (128 x 128) and
    the file lists, OUT/held_out two photographs that are in neither list. Runs images_to_data.py,
    check_training_data.py and select_training_files.py, as you would for your own photographs. The
    demo is good for trying things out, not for assessing a network.

    Example: python tools/make_demo_dataset.py ~/demo
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the demo; correct files that already exist are kept."""


@dataclass(frozen=True)
class DemoDataset:
    """Paths of the demo: crops and lists, and PNG images held out for evaluation."""

    dataset_dir: Path
    held_out_dir: Path


def main(options: Options) -> int:
    """Make the demo and print its paths."""
    demo = make_demo_dataset(options.out.expanduser())
    print(f"demo dataset: {demo.dataset_dir}; held out for evaluation: {demo.held_out_dir}")
    return 0


def make_demo_dataset(out: Path) -> DemoDataset:
    """Make the demo below `out`, or complete it.

    A second call changes nothing and takes under two seconds. Raises `UserError` if a package is
    not installed or lacks a photograph.
    """
    contents = {photograph: _read(photograph) for photograph in DATASET + HELD_OUT}
    photographs, dataset, held_out = out / "photographs", out / "dataset", out / "held_out"
    for photograph in DATASET:
        _write(photographs / photograph.name, contents[photograph])
    _write(photographs / "LICENCES.txt", _licences().encode())
    prepare_decoders()
    for photograph in HELD_OUT:
        _write(
            (held_out / photograph.name).with_suffix(".png"), _held_out_png(contents[photograph])
        )
    # six photographs are too few to reject any part of them
    gates = {"min_gradient": 0, "min_sharpness": 0}
    crops = images_to_data.Options(
        photos=photographs, out=dataset / "demo", size=CROP_SIZE, cover=True, **gates
    )
    _succeed("images_to_data", images_to_data.main(crops))
    _succeed(
        "check_training_data",
        check_training_data.main(
            check_training_data.Options(
                data_dir=dataset, min_size=CROP_SIZE, max_size=CROP_SIZE, **gates
            )
        ),
    )
    _succeed(
        "select_training_files",
        select_training_files.main(
            select_training_files.Options(dataset, validation_photo=(f"*/{VALIDATION_PHOTO}",))
        ),
    )
    return DemoDataset(dataset, held_out)


def _read(photograph: DemoPhotograph) -> bytes:
    """Read a photograph from an installed package, without importing the package."""
    spec = importlib.util.find_spec(photograph.package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / photograph.path).is_file():
            return (folder / photograph.path).read_bytes()
    what = f"has no {photograph.path}" if folders else "is not installed"
    raise UserError(
        f"the demo needs the photographs in {photograph.distribution}, which {what}; "
        f"`pip install --upgrade {photograph.distribution}`"
    )


def _write(path: Path, content: bytes) -> None:
    """Write a file unless it already has that content.

    A new modification time would look like a new photograph.
    """
    if path.is_file() and path.read_bytes() == content:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; choose another OUT"
        ) from error


def _held_out_png(content: bytes) -> bytes:
    """Encode a photograph as PNG, cut to multiples of 4.

    Lossy photographs are halved first, as for training.
    """
    header = read_header(io.BytesIO(content))
    pixels = decode_rgb(content, header)
    if header.is_lossy:
        pixels = halved(pixels)
    height, width = (side - side % HELD_OUT_MULTIPLE for side in pixels.shape[:2])
    return encode(pixels[:height, :width].copy(), "png")


def _licences() -> str:
    """Source and licence of each photograph, one per line."""
    return "".join(
        f"{photograph.name}: {photograph.licence}; from the Python package "
        f"{photograph.distribution}, file "
        f"{photograph.package}/{photograph.path}\n"
        for photograph in DATASET + HELD_OUT
    )


def _succeed(tool: str, status: int) -> None:
    """Raise `UserError` if a tool reported a failure."""
    if status:
        raise UserError(
            f"{tool} failed on the demo's photographs (see above); delete the demo's folder and "
            "make it again"
        )


if __name__ == "__main__":
    run(Options, main)
