"""LR folders made as training degrades: every image can be made again from its line of JSON."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dataset_corpus import assert_user_error, encoded, npy, photograph, write_files
from pipeline.cli import run as run_command
from pipeline.data.degradations import build_degradation, host
from pipeline.data.degradations.chain import run
from pipeline.data.degradations.host import Workspace
from pipeline.data.degradations.realesrgan import RealEsrganSpec
from pipeline.images import cubic_resize
from tools import degrade
from tools.degrade import RECORDS, Options, main
from tools.images import decode_file

CHAIN = """# Photographs for a test.
steps:
- shuffle: [{blur: {sigma: [0.3, 2]}}, {noise: {sigma: [1, 9]}}]
- sometimes: {probability: 0.5, steps: [{resize: {factor: [0.4, 0.9]}}]}
- noise: {kind: perlin}
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, two of which differ only in the suffix, and the preset `chain.yaml` beside."""
    root = tmp_path / "photos"
    write_files(
        root,
        {
            "a.png": encoded(photograph(49, 66, 1), "png"),
            "b/c.png": encoded(photograph(40, 40, 2), "png"),
            "b/c.npy": npy(photograph(45, 38, 3)),
            "b/d.png": encoded(photograph(32, 33, 4), "png"),
            "e.png": encoded(photograph(50, 34, 5), "png"),
        },
    )
    (tmp_path / "chain.yaml").write_text(CHAIN)
    return root


NAMES = ["a", "b/c.npy", "b/c.png", "b/d", "e"]


def make(
    photos: Path, *words: object, out: str = "lr", scale: tuple[object, ...] = ("--scale", 2)
) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves seconds; `words` may set another scale."""
    stdout, stderr = io.StringIO(), io.StringIO()
    scale = () if "--scale" in words or "--recipe" in words else scale
    line = [str(word) for word in (photos, photos.parent / out, *scale, "--threads", 2, *words)]
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        run_command(Options, main, line)
    return subprocess.CompletedProcess(line, stop.value.code, stdout.getvalue(), stderr.getvalue())


def chained(photos: Path, *words: object, out: str = "lr") -> subprocess.CompletedProcess[str]:
    return make(photos, "--degradation", photos.parent / "chain.yaml", *words, out=out)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]


def read(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_each_image_can_be_made_again_from_its_line(photos: Path, tmp_path: Path) -> None:
    done = chained(photos, "--seed", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"5 LR images written to {tmp_path / 'lr'}\n"
    lines = records(tmp_path / "lr")
    assert [line["file"] for line in lines] == [f"{name}.png" for name in NAMES]
    assert {line["degradation"] for line in lines} == {"chain"}
    for line in lines:
        height, width = line["region"]
        image = read(photos / line["source"])[:height, :width]
        workspace = Workspace()
        again = host.rounded(run(image, line["steps"], workspace), workspace)
        np.testing.assert_array_equal(read(tmp_path / "lr" / line["file"]), again)
        assert again.shape == (height // 2, width // 2, 3)
    assert len({json.dumps(line["steps"]) for line in lines}) == 5


def test_the_seed_and_the_name_alone_decide(photos: Path, tmp_path: Path) -> None:
    assert chained(photos).returncode == 0
    assert chained(photos, "--threads", 1, out="again").returncode == 0
    first = contents(tmp_path / "lr")
    assert contents(tmp_path / "again") == first
    assert chained(photos, "--seed", 1, out="other").returncode == 0
    assert contents(tmp_path / "other")["a.png"] != first["a.png"]
    # A file beside it changes nothing, nor does its format in LR.
    (photos / "b/c.png").unlink()
    assert chained(photos, "--format", "npy", out="npy").returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "npy/a.npy"), read(tmp_path / "lr" / "a.png"))


def test_images_of_16_bits_keep_them(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    ramp = np.linspace(20000, 21000, 64 * 48, dtype=np.uint16).reshape(64, 48, 1)
    np.save(photos / "a.npy", ramp.repeat(3, axis=2))
    for form, dtype in (("npy", np.uint16), ("png", np.uint16), ("webp", np.uint8)):
        done = make(photos, "--degradation", "gaussian", "--format", form, out=form)
        assert (done.returncode, done.stderr) == (0, "")
        path = tmp_path / form / f"a.{form}"
        lr = np.load(path) if form == "npy" else decode_file(path, depth=None)
        assert (lr.dtype, lr.shape) == (dtype, (32, 24, 3))
    deep = decode_file(tmp_path / "png" / "a.png", depth=None)
    assert len(np.unique(deep)) > 300  # 8 bits would leave five levels
    np.testing.assert_array_equal(deep, np.load(tmp_path / "npy" / "a.npy"))


def test_one_image_and_several_variants(photos: Path, tmp_path: Path) -> None:
    done = make(
        photos / "a.png", "--degradation", tmp_path / "chain.yaml", "--variants", 3, out="../lr"
    )
    assert done.returncode == 0, done.stderr
    files = [f"variant-{number}/a.png" for number in (1, 2, 3)]
    assert [line["file"] for line in records(tmp_path / "lr")] == files
    assert len({contents(tmp_path / "lr")[file] for file in files}) == 3
    # The first variant is what a run without variants makes.
    assert chained(photos, out="whole").returncode == 0
    assert contents(tmp_path / "whole")["a.png"] == contents(tmp_path / "lr")[files[0]]


@pytest.mark.parametrize("name", ["bicubic", "gaussian", "realesrgan"])
def test_degradations_that_are_no_chains(photos: Path, tmp_path: Path, name: str) -> None:
    assert make(photos, "--degradation", name, "--scale", 3).returncode == 0
    for line in records(tmp_path / "lr"):
        height, width = line["region"]
        assert (height % 3, width % 3) == (0, 0)
        lr = read(tmp_path / "lr" / line["file"])
        image = read(photos / line["source"])[:height, :width]
        assert lr.shape == (height // 3, width // 3, 3)
        if name == "bicubic":
            planes = torch.tensor(image).permute(2, 0, 1)[None].float()
            expected = cubic_resize(planes, (height // 3, width // 3))[0].permute(1, 2, 0)
            # torch repeats no pixels beyond the border.
            difference = abs(lr - expected.clamp(0, 255).numpy())[2:-2, 2:-2]
            assert difference.max() <= 0.51
        if name == "realesrgan":
            again = build_degradation(RealEsrganSpec(), 3).lr_on_host(
                line,
                line["keys"],
                image,
                (0, 0),
                image.shape[:2],
                Workspace(),
            )
            np.testing.assert_array_equal(lr, again)


def test_a_recipe_gives_degradation_and_scale(photos: Path, tmp_path: Path) -> None:
    done = make(photos, "--recipe", "realesrgan_x4")
    assert done.returncode == 0, done.stderr
    assert {(line["degradation"], line["scale"]) for line in records(tmp_path / "lr")} == {
        ("realesrgan", 4)
    }


# Videos.


@pytest.fixture
def film(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    still = photograph(64, 96, 9)
    with av.open(str(folder / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        frame = av.VideoFrame.from_ndarray(still, format="rgb24")
        for _ in range(4):
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return folder


def test_frames_of_a_video_share_the_parameters_but_not_the_noise(
    film: Path, tmp_path: Path
) -> None:
    (tmp_path / "chain.yaml").write_text(CHAIN)
    assert chained(film).returncode == 0
    lines = records(tmp_path / "lr")
    assert [line["file"] for line in lines] == [
        f"film.mkv/{number:06d}.png" for number in (1, 2, 3, 4)
    ]

    def without_seeds(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in step.items() if k != "words"} for step in steps]

    assert all(without_seeds(line["steps"]) == without_seeds(lines[0]["steps"]) for line in lines)
    frames = [read(tmp_path / "lr" / line["file"]) for line in lines]
    assert len({frame.tobytes() for frame in frames}) == 4
    for line, frame in zip(lines, frames, strict=True):
        workspace = Workspace()
        again = host.rounded(run(photograph(64, 96, 9), line["steps"], workspace), workspace)
        np.testing.assert_array_equal(frame, again)

    assert chained(film, "--per-frame", out="each").returncode == 0
    drawn = {json.dumps(without_seeds(line["steps"])) for line in records(tmp_path / "each")}
    assert len(drawn) == 4
    assert_user_error(chained(film, "--per-frame"), "with other settings than these")


def test_a_video_that_cannot_be_read_is_named(film: Path) -> None:
    (film / "broken.mp4").write_bytes(b"no film")
    done = make(film, "--degradation", "bicubic")
    assert done.returncode == 1
    assert "not degraded: broken.mp4: " in done.stderr
    assert "4 LR images written" in done.stdout


# Interruptions.


def records_of_whole_lines(out: Path) -> list[bytes]:
    return (out / RECORDS).read_bytes().split(b"\n")[:-1]


def test_a_stopped_run_continues_and_leaves_no_trace(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chained(photos, out="whole").returncode == 0

    room = [1, 1]

    def write(path: Path, content: bytes) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        room.pop()
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(degrade, "write_atomically", write)
        done = chained(photos)
        assert (done.returncode, len(contents(tmp_path / "lr"))) == (1, 3)
        assert "free some space and start the same command again" in done.stderr
    # Killed in the middle of a line; one file has no line yet, one has no file any more.
    with open(tmp_path / "lr" / RECORDS, "ab") as file:
        file.write(b'{"file": "e.pn')
    known = len(records_of_whole_lines(tmp_path / "lr"))
    done = chained(photos)
    assert done.returncode == 0
    assert contents(tmp_path / "lr") == contents(tmp_path / "whole")
    assert done.stdout.startswith(f"{5 - known} LR images written")

    (tmp_path / "lr/e.png").unlink()
    (photos / "a.png").write_bytes(encoded(photograph(64, 64, 8), "png"))
    assert chained(photos).stdout.startswith("2 LR images written")
    assert chained(photos).stdout.startswith("0 LR images written")
    assert [line["file"] for line in records(tmp_path / "lr")] == [f"{n}.png" for n in NAMES]


# Errors.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--degradation", "bicubicc"], "did you mean 'bicubic'"),
        (["--degradation", "web_foto"], "did you mean 'web_photo'"),
        (["--degradation", "none.yaml"], "none.yaml: no such file"),
        (["--degradation", "paired"], "paired reads LR from files and makes none"),
        (["--degradation", "bicubic", "--recipe", "demo"], "either --degradation"),
        (["--recipe", "demmo"], "demmo"),
        ([], "either --degradation PRESET"),
        (["--degradation", "bicubic", "--scale", 9], "--scale 9: must be 1 to 8"),
        (["--degradation", "bicubic", "--variants", 0], "--variants 0: must be 1 to 1000"),
        (["--degradation", "bicubic", "--seed", -1], "--seed -1: must be 0"),
        (["--degradation", "bicubic", "--threads", -1], "--threads -1"),
    ],
)
def test_wrong_input_is_said_in_one_line(
    photos: Path, tmp_path: Path, words: list[object], message: str
) -> None:
    assert_user_error(make(photos, *words), message)
    assert not (tmp_path / "lr").exists()


def test_places_that_are_refused(photos: Path, tmp_path: Path) -> None:
    bicubic = ("--degradation", "bicubic")
    assert_user_error(make(photos, *bicubic, out="photos/lr"), "neither may lie within the other")
    assert_user_error(make(photos, *bicubic, out="photos"), "neither may lie within the other")
    assert_user_error(make(tmp_path / "nothing", *bicubic), "no such folder or file")
    assert_user_error(make(tmp_path / "chain.yaml", *bicubic), "neither an image")
    (tmp_path / "empty").mkdir()
    assert_user_error(make(tmp_path / "empty", *bicubic), "no images or videos below this folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").write_bytes(b"mine")
    assert_user_error(make(photos, *bicubic, out="mine"), "not from this tool")
    assert (tmp_path / "mine/a.png").read_bytes() == b"mine"
    assert make(photos, *bicubic).returncode == 0
    assert_user_error(
        make(photos, *bicubic, "--seed", 2), "was made with seed 0, not 2", "another OUT"
    )
    assert_user_error(chained(photos), "from bicubic at scale 2")
    (tmp_path / "lr" / RECORDS).write_text("[]\n")
    assert_user_error(make(photos, *bicubic), "line 1 is not a record")


def test_the_scale_must_be_given(photos: Path) -> None:
    done = make(photos, "--degradation", "bicubic", scale=())
    assert_user_error(done, "--degradation bicubic needs --scale N")


def test_small_and_bad_images_are_named_and_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "b/d.png").write_bytes(b"no image")
    done = make(photos, "--degradation", "bicubic", "--scale", 5)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "too small for LR of 8x8 pixels: b/c.npy: 45x38",
        "too small for LR of 8x8 pixels: e.png: 50x34",
        "not degraded: b/d.png: not an image (its first bytes are b'no image')",
        "2 files too small, 1 not readable",
    ]
    assert sorted(contents(tmp_path / "lr")) == ["a.png", "b/c.png.png", RECORDS]


def test_the_list_has_a_line_for_each_degradation() -> None:
    lines = degrade.listing()
    assert [line.split()[0] for line in lines][:3] == ["bicubic", "gaussian", "realesrgan"]
    assert any(line.startswith("web_photo") for line in lines)
    assert not any(line.startswith(("paired", "chain ")) for line in lines)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    assert not any(line.endswith((",", " flat")) for line in lines)
