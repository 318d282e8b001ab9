"""Fit the parameters that NIQE compares images with to a folder of sharp photographs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import UserError, run, say
from pipeline.data.image_files import MANIFEST, BadNpyError
from pipeline.data.image_headers import BadImageError
from pipeline.data.image_pixels import MAX_MEGAPIXELS, prepare_decoders
from tools.files import printable, walk
from tools.images import decode_file
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Options:
    """Fit NIQE's parameters to a folder of sharp, undegraded photographs.

    NIQE measures how far an image is from natural photographs, so its numbers can be compared only
    with the same parameters. The authors used 125 photographs. Blocks of 96x96 pixels that are
    nearly as sharp as the sharpest of their image count.

    python tools/fit_niqe.py ~/photographs --out niqe.npz

    python evaluate.py --model runs/x --hr FOLDER --niqe niqe.npz
    """

    folder: tyro.conf.Positional[Path]
    """Folder of photographs, searched recursively."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """File to write, .npz; BasicSR reads it as well."""
    force: bool = False
    """Replace an existing file."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Fit and write; return 0 if all images were read, 1 if some could not be read."""
    root, out = options.folder.expanduser(), options.out.expanduser()
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: must end in .npz")
    if out.exists() and not options.force:
        raise UserError(f"{out} exists; choose another file, or replace it with --force")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    files = walk(root, MANIFEST)
    if not files.images:
        raise UserError(f"{root}: no images below this folder{files.links_note()}")
    # Imported here, so that --help does not wait for torch.
    import torch

    from pipeline.metrics.niqe import fit, sharp_features, write_parameters
    from pipeline.metrics.psnr_ssim import luma

    def features_of(name: str) -> tuple[str, np.ndarray | None, str]:
        try:
            pixels = decode_file(root / name, max_megapixels=MAX_MEGAPIXELS)
        except (BadImageError, BadNpyError, OSError) as error:
            return name, None, str(error)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return name, sharp_features(luma(image, rounded=True)[0, 0].numpy()), ""

    prepare_decoders()
    features = []
    with quiet_libraries(), progress(len(files.images), "file") as bar:
        for name, found, reason in ordered_map(
            features_of, files.images, thread_count(options.threads)
        ):
            if found is None:
                print(f"could not be read: {printable(name)}: {reason}")
            else:
                features.append(found)
            bar.update()
    write_parameters(out, *fit(features))
    blocks = sum(len(found) for found in features)
    say(f"{out}: {blocks} sharp blocks of {len(features)} images")
    return 0 if len(features) == len(files.images) else 1


if __name__ == "__main__":
    run(Options, main)
