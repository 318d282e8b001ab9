"""Turn the measurements of many images into a degradation preset that states its reasons."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pipeline.cli import counted
from tools.estimation.measurement import Measurement

LEAST_SHARE = 0.03  # of the images; presets omit rarer degradations
LEAST_BLUR = 0.35  # pixels; sharp photographs differ by this much
LEAST_NOISE = 0.75  # levels; rounding to 8 bits causes less
LEAST_COMBED = 0.02  # of an image's blocks
ENOUGH_LEVELS = 250


@dataclass(frozen=True)
class Spread:
    """Percentiles of a quantity over the images that have it."""

    count: int
    low: float
    """10th percentile."""
    median: float
    high: float
    """90th percentile."""


def spread(values: Iterable[float]) -> Spread | None:
    """Return the percentiles of `values`; `None` if there are none."""
    numbers = np.array(list(values), np.float64)
    if not len(numbers):
        return None
    return Spread(len(numbers), *(float(q) for q in np.percentile(numbers, (10, 50, 90))))


@dataclass(frozen=True)
class Summary:
    """Summary of the measurements of a folder. Counts are numbers of images."""

    count: int
    jpeg_files: Spread | None
    """Quality of JPEG files."""
    jpeg_traces: Spread | None
    """Quality of JPEG compressions found in the pixels of other formats."""
    jpeg: Spread | None
    """Quality of both."""
    jpeg_subsamplings: dict[str, int]
    cropped_grids: int
    """JPEG traces whose blocks do not start at the image's corner."""
    lossy_formats: dict[str, int]
    """Files of lossy formats other than JPEG."""
    webp: Spread | None
    """Quality of lossy WebP files."""
    subsampled: dict[str, int]
    """Chroma subsampling of images without a lossy compression; "444" and "gray" excluded."""
    luma_noise: Spread | None
    """Luma noise of the images in which it is visible and at least `LEAST_NOISE`."""
    chroma_noise: Spread | None
    """Chroma noise of the same images, where it is known."""
    noise_known: int
    """Images whose noise is visible, or would be at `LEAST_NOISE`."""
    visible_noise: float
    """Median of the weakest noise that JPEG compressions leave visible; 0 without JPEG."""
    blur: Spread | None
    """Blur of the images with at least `LEAST_BLUR`."""
    blur_known: int
    enlargement: Spread | None
    repeated: int
    """Enlargements that repeated pixels."""
    levels: Spread | None
    """Number of levels in use, of images that do not use all."""
    levels_known: int
    combed: int
    bars: int


def summary(images: Sequence[Measurement]) -> Summary:
    """Summarise the measurements of at least one image."""
    jpeg = [(image, image.jpeg) for image in images if image.jpeg is not None]
    noisy = [image for image in images if image.luma_noise >= LEAST_NOISE]
    hidden = [
        image for image in images if image.luma_noise == 0 and image.visible_noise > LEAST_NOISE
    ]
    blurs = [image.blur for image in images if image.blur is not None]
    levels = [image.levels for image in images if image.levels is not None]
    visible = [image.visible_noise for image, _ in jpeg]
    return Summary(
        count=len(images),
        jpeg_files=spread(found.quality for _, found in jpeg if found.is_file),
        jpeg_traces=spread(found.quality for _, found in jpeg if not found.is_file),
        jpeg=spread(found.quality for _, found in jpeg),
        jpeg_subsamplings=_counted(found.subsampling for _, found in jpeg),
        cropped_grids=sum(found.offset != (0, 0) and not found.is_file for _, found in jpeg),
        lossy_formats=_counted(
            image.format for image in images if image.is_lossy and image.format != "jpeg"
        ),
        webp=spread(image.webp_quality for image in images if image.webp_quality is not None),
        subsampled=_counted(
            image.subsampling
            for image in images
            if image.jpeg is None
            and not image.is_lossy
            and image.subsampling not in ("444", "gray")
        ),
        luma_noise=spread(image.luma_noise for image in noisy),
        chroma_noise=spread(
            image.chroma_noise for image in noisy if image.chroma_noise is not None
        ),
        noise_known=len(images) - len(hidden),
        visible_noise=float(np.median(visible)) if visible else 0.0,
        blur=spread(blur for blur in blurs if blur >= LEAST_BLUR),
        blur_known=len(blurs),
        enlargement=spread(image.enlargement for image in images if image.enlargement is not None),
        repeated=sum(image.is_repeated for image in images),
        levels=spread(count for count in levels if count < ENOUGH_LEVELS),
        levels_known=len(levels),
        combed=sum(image.combed >= LEAST_COMBED for image in images),
        bars=sum(any(image.bars) for image in images),
    )


def _counted(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())


@dataclass(frozen=True)
class Step:
    """A step or group of a preset, and the reason for it."""

    section: dict[str, Any]
    reason: str


def steps(found: Summary) -> list[Step]:
    """Return, in order, the steps that make images like the measured ones from sharp HR."""
    made = _size(found)
    for step in (_noise(found), _levels(found), _chroma(found), _interlace(found), _codec(found)):
        if step is not None:
            made.append(step)
    return made


def _size(found: Summary) -> list[Step]:
    """Return the steps that resize to LR and blur."""
    to_lr: dict[str, Any] = {"resize": {"to": "lr"}}
    blur: list[dict[str, Any]] = []
    if found.blur is not None and found.blur.count >= LEAST_SHARE * found.blur_known:
        blur = [
            {
                "blur": {
                    "kind": "gaussian",
                    "sigma": _range(found.blur),
                    "probability": _share(found.blur.count, found.blur_known),
                }
            }
        ]
        blur_reason = (
            f"edges are softer than in sharp photographs in {found.blur.count} of "
            f"{found.blur_known} images: sigma {_numbers(found.blur)} LR pixels"
        )
    else:
        blur_reason = "edges are as sharp as in sharp photographs: no blur"
    shrink = (
        "the kernel that shrank the images cannot be distinguished from blur: three common ones, "
        "equally likely"
    )
    enlarged = found.enlargement
    if enlarged is None or enlarged.count < LEAST_SHARE * found.count:
        plain = Step(to_lr, f"no trace of an earlier enlargement; {shrink}")
        return (
            [plain, *(Step(step, blur_reason) for step in blur)]
            if blur
            else [Step(to_lr, f"{plain.reason}; {blur_reason}")]
        )
    low, high = 1 / enlarged.high, 1 / enlarged.low
    kind = {"linear": 1.0, "cubic": 1.0}
    if found.repeated:
        kind["nearest"] = _rounded(2 * found.repeated / max(1, enlarged.count - found.repeated))
    share = _share(enlarged.count, found.count)
    group = {
        "one_of": [
            {
                "probability": share,
                "steps": [
                    {"resize": {"of": "lr", "factor": [_rounded(low), _rounded(high)]}},
                    *blur,
                    {"resize": {"to": "lr", "kind": kind}},
                ],
            },
            {"probability": _rounded(1 - share), "steps": [to_lr, *blur]},
        ]
    }
    return [
        Step(
            group,
            f"{enlarged.count} of {found.count} images were enlarged before, by "
            f"{_numbers(enlarged)}: HR is shrunk below LR's size and enlarged; {shrink}; "
            f"{blur_reason}",
        )
    ]


def _noise(found: Summary) -> Step | None:
    if found.luma_noise is None or found.luma_noise.count < LEAST_SHARE * found.noise_known:
        return None
    section: dict[str, Any] = {
        "kind": "gaussian",
        "space": "ycc",
        "sigma": _range(found.luma_noise),
        "probability": _share(found.luma_noise.count, found.noise_known),
    }
    reason = (
        f"luma noise in {found.luma_noise.count} of {found.noise_known} images: sigma "
        f"{_numbers(found.luma_noise)} levels"
    )
    if found.chroma_noise is not None:
        section["chroma_sigma"] = _range(found.chroma_noise)
        reason += f"; chroma {_numbers(found.chroma_noise)}"
    else:
        section["chroma_sigma"] = [0.0, _rounded(found.luma_noise.high)]
        reason += "; JPEG hides that of chroma: anything up to that of luma"
    if found.visible_noise:
        reason += (
            f"; JPEG hides noise below about {found.visible_noise:.1f} levels, and such images are "
            "not counted"
        )
    return Step({"noise": section}, reason)


def _levels(found: Summary) -> Step | None:
    if found.levels is None or found.levels.count < LEAST_SHARE * found.levels_known:
        return None
    low, high = (max(2, round(bound)) for bound in (found.levels.low, found.levels.high))
    return Step(
        {
            "banding": {
                "kind": "rgb",
                "levels": [low, high],
                "probability": _share(found.levels.count, found.levels_known),
            }
        },
        f"{found.levels.count} of {found.levels_known} images skip levels at regular distances: "
        f"{_numbers(found.levels, 0)} of 256 are in use",
    )


def _chroma(found: Summary) -> Step | None:
    count = sum(found.subsampled.values())
    if count < max(1, LEAST_SHARE * found.count):
        return None
    return Step(
        {
            "chroma": {
                "kind": {kind: float(number) for kind, number in found.subsampled.items()},
                "probability": _share(count, found.count),
            }
        },
        f"every second chroma sample was interpolated in {count} images that show no JPEG "
        f"({_listed(found.subsampled)}): video, WebP or a camera's colour filter",
    )


def _interlace(found: Summary) -> Step | None:
    if found.combed < max(1, LEAST_SHARE * found.count):
        return None
    return Step(
        {"interlace": {"kind": "combing", "probability": _share(found.combed, found.count)}},
        f"combing (interlaced lines) in {found.combed} of {found.count} images",
    )


def _codec(found: Summary) -> Step | None:
    """Return the step of the last compression: none, JPEG, or the codec of the files."""
    choices: list[dict[str, Any]] = []
    reasons: list[str] = []
    left = 1.0
    if found.jpeg is not None and found.jpeg.count >= LEAST_SHARE * found.count:
        known = {
            name: float(number)
            for name, number in found.jpeg_subsamplings.items()
            if name in ("420", "422", "440", "411", "444")
        }
        section: dict[str, Any] = {
            "codec": "jpeg",
            "quality": [round(found.jpeg.low), round(found.jpeg.high)],
        }
        if known:
            section["subsampling"] = known
        share = _share(found.jpeg.count, found.count)
        left -= share
        choices.append({"probability": share, "steps": [{"compress": section}]})
        files = 0 if found.jpeg_files is None else found.jpeg_files.count
        reasons.append(
            f"JPEG in {found.jpeg.count} of {found.count} images, quality "
            f"{_numbers(found.jpeg, 0)}, chroma {_listed(found.jpeg_subsamplings)} "
            f"({files} from their tables, {found.jpeg.count - files} from traces in other formats)"
        )
    for form, number in found.lossy_formats.items():
        share = min(_share(number, found.count), left)
        if form not in ("webp", "avif", "jxl", "jp2") or share < LEAST_SHARE:
            continue
        left -= share
        section = {"codec": form}
        if form == "webp" and found.webp is not None:
            section["quality"] = [round(found.webp.low), round(found.webp.high)]
            reasons.append(
                f"{number} files are lossy WebP; their quantisers give a quality of "
                f"{_numbers(found.webp, 0)}"
            )
        else:
            reasons.append(
                f"{number} files are lossy {form}, which does not state its quality: the default "
                "range"
            )
        choices.append({"probability": _rounded(share), "steps": [{"compress": section}]})
    if not choices:
        return None
    left = _rounded(1 - sum(choice["probability"] for choice in choices))
    if left <= 0:
        choices[0]["probability"] = _rounded(choices[0]["probability"] + left)
    else:
        choices.append({"probability": left, "steps": []})
        reasons.append("the others show no trace of a codec")
    return Step({"one_of": choices}, "; ".join(reasons))


def _range(values: Spread) -> list[float]:
    return [_rounded(values.low), _rounded(values.high)]


def _rounded(value: float) -> float:
    return round(float(value), 3)


def _share(count: int, total: int) -> float:
    return _rounded(count / max(1, total))


def _numbers(values: Spread, digits: int = 2) -> str:
    low, median, high = (f"{v:.{digits}f}" for v in (values.low, values.median, values.high))
    return f"{median} ({low} to {high})"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items()) or "unknown"


MARK = "# Estimated by tools/estimate_degradation.py"
"""First words of every preset written here."""


def document(found: Summary, source: str) -> str:
    """Return the preset as YAML, each step below a comment with its reason.

    `source` is the name of the measured folder.
    """
    lines = [
        *_comment(
            f"{MARK[2:]} from {counted(found.count, 'image')} in {source}. Numbers in comments are "
            "medians, with the 10th and the 90th percentile in brackets. To train with it, add "
            "data.degradation=FILE.yaml to the command, or give the file's path as `degradation` "
            "in a recipe's data section."
        )
    ]
    lines += ["name: chain", "surroundings: 64", "steps:"]
    for step in steps(found):
        lines += _comment(f"{step.reason[0].upper()}{step.reason[1:]}.")
        lines.append(_yaml([step.section]))
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(value: object) -> str:
    return yaml.dump(
        value, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=96
    ).rstrip()
