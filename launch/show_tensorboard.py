"""Show the runs below a folder in TensorBoard, without its internal warnings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from pipeline import cli
from pipeline.cli import UserError
from pipeline.run_folder import RUNS_DIR

IMAGES = 200
"""Number of pictures that TensorBoard keeps per tag."""
USAGE = """\
usage: {prog} [LOG_DIR] [OPTIONS]

Show the curves and pictures of the runs in LOG_DIR (default: runs), in a browser, at the address
that is printed. OPTIONS are TensorBoard's own, such as --port 6007; --helpfull lists them."""
_NOISE = re.compile(
    r"^$|TensorFlow installation not found|fast data loading|--load_fast=false|"
    r"tensorflow/tensorboard/issues/4784"
)


def main(arguments: list[str]) -> int:
    """Serve until CTRL+C. `UserError` if there is nothing to show."""
    prog = os.environ.get("VASTSCALE_COMMAND", Path(sys.argv[0]).name)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE.format(prog=prog))
        return 0
    if "--helpfull" in arguments:
        return _tensorboard(["--helpfull"])
    folder = RUNS_DIR
    if arguments and not arguments[0].startswith("-"):
        folder, arguments = Path(arguments[0]).expanduser(), arguments[1:]
    for argument in arguments:
        if argument.partition("=")[0] in ("--logdir", "--logdir_spec"):
            raise UserError(
                f"give the folder as the first argument instead of {argument}: {prog} LOG_DIR"
            )
    missing = ""
    if not folder.is_dir():
        missing = f"there is no folder {folder}"
    elif not _has_events(folder):
        missing = f"there is no TensorBoard log in {folder} yet"
    if missing:
        raise UserError(
            f"{missing}; train first (./launch_local_train.sh), or give the --log-dir you trained "
            "with"
        )
    return _tensorboard(
        ["--logdir", str(folder), "--samples_per_plugin", f"images={IMAGES}", *arguments]
    )


def _has_events(folder: Path) -> bool:
    return any(
        name.startswith("events.out.tfevents.")
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def _tensorboard(arguments: list[str]) -> int:
    sys.stderr = _WithoutNoise(sys.stderr)
    sys.argv = ["tensorboard", *arguments]
    from tensorboard import main as tensorboard

    tensorboard.run_main()
    return 0


class _WithoutNoise:
    """A text stream that drops the lines that match `_NOISE`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if not _NOISE.search(line):
                self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


if __name__ == "__main__":
    sys.exit(cli.exit_status(lambda: main(sys.argv[1:])))
