"""Where this code is installed, and the names of its commands. Needs only the standard library.

A command is a script. In a checkout, users run the script itself. An installed package holds the
same files in its folder `vastscale/checkout`, and the command `vastscale` runs them; messages then
name that command instead of the script.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or the folder of an installed package that holds the same files."""
INSTALLED = ROOT.name == "checkout" and (ROOT.parent / "__main__.py").is_file()
"""Whether this code belongs to an installed package."""


class Command(NamedTuple):
    """What `vastscale NAME` runs."""

    script: str  # relative to `ROOT`
    summary: str  # one line for --help


DISTRIBUTED = "launch/distributed.py"
"""What `vastscale train` runs if a hostfile is given."""
COMMANDS = {
    "train": Command("launch/local.py", "train a network; with --hostfile FILE on many machines"),
    "evaluate": Command("evaluate.py", "measure networks against bicubic: PSNR, SSIM, LPIPS"),
    "upscale": Command("upscale.py", "upscale images, folders and videos"),
    "export": Command("export_trained_model.py", "write a run's network to .pth and .safetensors"),
    "convert": Command("convert_to_onnx.py", "convert a network to ONNX, OpenVINO or TensorRT"),
    "search": Command("tools/search_hyperparameters.py", "search hyperparameters with Optuna"),
    "plot": Command("tools/plot_run.py", "draw the curves of runs as a picture"),
    "compare": Command("tools/crop_compare.py", "show crops of several images side by side"),
    "interpolate": Command("tools/interpolate_weights.py", "blend the weights of two networks"),
    "tensorboard": Command("launch/show_tensorboard.py", "show the curves and pictures of runs"),
    "doctor": Command("launch/doctor/__main__.py", "check the machines of a hostfile"),
}
"""`vastscale NAME` -> its script."""
DATA_COMMANDS = {
    "images": Command("tools/images_to_data.py", "cut photographs into a training dataset"),
    "videos": Command("tools/video_to_data.py", "cut frames of videos into a training dataset"),
    "imagenet": Command("tools/imagenet_to_data.py", "cut the images in tar archives"),
    "pairs": Command("tools/pairs_to_data.py", "cut matching HR and LR images"),
    "check": Command("tools/check_training_data.py", "check every file of a dataset"),
    "select": Command("tools/select_training_files.py", "write training and validation lists"),
    "report": Command("tools/dataset_report.py", "write an HTML report on a dataset"),
    "degrade": Command("tools/degrade.py", "make LR images from images and videos"),
    "show-batch": Command("tools/show_batch.py", "draw the samples of a training step"),
    "list": Command("tools/list_data_folders.py", "list the folders of a dataset with their sizes"),
    "analyze": Command("tools/analyze_images.py", "measure means, spread, clipping and brightness"),
    "estimate": Command(
        "tools/estimate_degradation.py", "measure what LR images suffer from; write a preset"
    ),
    "convert": Command("tools/convert_dataset.py", "store a dataset in another file format"),
    "benchmark": Command("tools/benchmark_formats.py", "time the file formats on a dataset"),
    "niqe": Command("tools/fit_niqe.py", "fit NIQE's parameters to sharp photographs"),
    "monitor": Command("tools/monitor_folder.py", "watch a folder grow"),
    "demo": Command("tools/make_demo_dataset.py", "make the demo dataset"),
    "test-images": Command("tools/make_test_images.py", "make synthetic images for experiments"),
    "mkv-to-mp4": Command("tools/mkv_to_mp4.py", "remux .mkv videos to .mp4, without re-encoding"),
}
"""`vastscale data NAME` -> its script."""

_NAMES = {
    "launch_local_train.sh": "vastscale train",
    "launch_distributed_train.sh": "vastscale train --hostfile hostfile",
    "run_tensorboard.sh": "vastscale tensorboard",
    "launch.doctor": "vastscale doctor",
    "launch/sync.sh": "rsync",  # `launch/sync.sh` copies a checkout
    "pipeline.models.weights import read_network": "vastscale import read_network",
    **{command.script: f"vastscale {name}" for name, command in COMMANDS.items()},
    **{command.script: f"vastscale data {name}" for name, command in DATA_COMMANDS.items()},
}
_NAMES |= {name.removeprefix("tools/"): typed for name, typed in _NAMES.items()}
_SCRIPT = re.compile(
    r"(?<![\w/.-])(?:python\s+(?:-m\s+)?|\./)?("
    + "|".join(re.escape(name) for name in sorted(_NAMES, key=len, reverse=True))
    + r")(?![\w/])"
)


def as_typed(text: str) -> str:
    """Return `text` with the commands in it as users type them here.

    `python tools/images_to_data.py PHOTOS` becomes `vastscale data images PHOTOS` where the package
    is installed, and stays unchanged in a checkout.
    """
    return _SCRIPT.sub(lambda match: _NAMES[match[1]], text) if INSTALLED else text


def find_file(name: str) -> Path:
    """A file that comes with the code, such as `ds_config.json` or `recipes/demo.yaml`.

    Where the package is installed, a file of that name in the current folder comes first. An
    absolute `name` is used unchanged.
    """
    return Path(name) if INSTALLED and os.path.isfile(name) else ROOT / name


def recipe_names(folder: str = "recipes") -> list[str]:
    """Return the names of the YAML files that `find_file` finds in `folder`, sorted."""
    places = {ROOT / folder, *([Path(folder)] if INSTALLED else [])}
    return sorted({file.stem for place in places for file in place.glob("*.yaml")})


def cache_dir() -> Path:
    """Return the folder for files that can be recreated.

    This is `.cache` in a checkout, otherwise `vastscale` in the user's cache folder.
    `VASTSCALE_CACHE` names another folder.
    """
    if given := os.environ.get("VASTSCALE_CACHE"):
        return Path(given)
    if not INSTALLED:
        return ROOT / ".cache"
    return user_cache_dir()


def user_cache_dir() -> Path:
    """Return `vastscale` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vastscale"
