"""tools/check_training_data.py as a process: verdicts, dry run, quarantine."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from dataset_corpus import (
    UNGATED,
    assert_user_error,
    bad_files,
    bad_npy_files,
    encoded,
    exif,
    good_files,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from PIL import Image, PngImagePlugin

from pipeline.data.image_files import TRAINING_LIST, write_file_list
from tools.common.image_headers import BadImageError, read_header
from tools.common.image_judging import DaliDecoder
from tools.common.parallel import quiet_libraries
from tools.common.photo_decoding import decode_plain

OTHERS = {"notes.txt": b"not an image", "training_file_list.txt": b"good/plain.png\n", "dataset.json": b"{}",
          "skipped.txt": b"", ".hidden.png": b"junk", "quarantine/old.png": b"junk"}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Good files in good/, bad ones in bad/, and what is neither."""
    good = {**good_files(), "crop.npy": npy(photograph(96, 96)), "UPPER.NPY": npy(photograph(97, 99))}
    bad = {**bad_files(), **bad_npy_files(), "tiny.png": encoded(photograph(95, 200), "png"),
           "tiny.npy": npy(photograph(200, 95))}
    write_files(tmp_path, {**{f"good/{name}": content for name, content in good.items()},
                           **{f"bad/deep er/{name}": content for name, content in bad.items()}, **OTHERS})
    return tmp_path


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    """check_training_data.py without the quality gates, which have tests of their own."""
    return run_tool("check_training_data", *arguments, *UNGATED)


def verdicts(stdout: str, kind: str = "bad") -> dict[str, str]:
    """Path -> reason of the lines of one kind."""
    lines = [line.removeprefix(f"{kind}: ") for line in stdout.splitlines() if line.startswith(f"{kind}: ")]
    return dict(line.split(": ", 1) for line in lines)


def test_full_dry_run_finds_all_and_changes_nothing(corpus):
    before = stamped_tree(corpus)
    result = check("--data-dir", corpus, "--min-size", 96)
    assert result.returncode == 1
    assert result.stderr == ""
    bad = verdicts(result.stdout)
    assert {*bad} == {path for path in before if path.startswith("bad/")}
    assert stamped_tree(corpus) == before
    assert "95x200 is too small: both sides must be at least 96" in bad["bad/deep er/tiny.png"]
    assert "pickle" in bad["bad/deep er/object.npy"]
    assert "CRC" in bad["bad/deep er/flipped.png"]
    assert f"{len(bad)} bad, 0 could not be read; 5 other files left alone" in result.stdout
    assert "--clean moves the bad files to" in result.stdout


def test_thread_count_does_not_matter(corpus):
    one, four = (check("--data-dir", corpus, "--min-size", 96, "--threads", threads).stdout
                 for threads in (1, 4))
    assert verdicts(one) == verdicts(four) != {}


def test_fast_finds_all_that_needs_no_decoding(corpus):
    """Truncation and bit rot of every format are seen; no good file is called bad."""
    result = check("--data-dir", corpus, "--min-size", 96, "--fast")
    assert result.returncode == 1
    bad = {path.name for path in (corpus / "bad/deep er").iterdir()}
    assert {Path(path).name for path in verdicts(result.stdout)} == bad
    assert all(path.startswith("bad/") for path in verdicts(result.stdout))


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_all_good_is_zero(tmp_path, fast):
    write_files(tmp_path, {**good_files(), "crop.npy": npy(photograph(96, 96))})
    result = check("--data-dir", tmp_path, "--min-size", 96, "--max-size", 106, *fast)
    assert (result.returncode, result.stderr) == (0, "")
    assert "23 good, 0 bad" in result.stdout
    result = check("--data-dir", tmp_path, "--min-size", 96, "--max-size", 105, *fast)
    assert len(verdicts(result.stdout)) == 22  # all but the crop
    assert "(--max-size)" in result.stdout


def test_clean_moves_to_quarantine_with_a_report(corpus):
    before = tree(corpus)
    bad = {path for path in before if path.startswith("bad/")}
    arguments = ["--data-dir", corpus, "--min-size", 96, "--clean"]
    assert_user_error(check(*arguments), "nothing was changed; --clean --force goes on")
    assert tree(corpus) == before
    result = check(*arguments, "--force")
    assert result.returncode == 1
    assert "to undo, move a file back" in result.stdout
    after = tree(corpus)
    report = [json.loads(line) for line in (corpus / "quarantine/report.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in report} == bad
    assert all(entry["reason"] and entry["time"] for entry in report)
    del after["quarantine/report.jsonl"]
    assert after == {f"quarantine/{path}" if path in bad else path: digest for path, digest in before.items()}
    assert check("--data-dir", corpus, "--min-size", 96).returncode == 0


def test_quarantine_keeps_both_files_of_one_name(tmp_path):
    for content in (b"first", b"second"):
        write_files(tmp_path, {"a.png": content, "good.png": encoded(photograph(96, 96), "png")})
        assert check("--data-dir", tmp_path, "--min-size", 96, "--clean").returncode == 1
    assert (tmp_path / "quarantine/a.png").read_bytes() == b"first"
    assert (tmp_path / "quarantine/a.png.2").read_bytes() == b"second"


def test_delete_needs_clean_and_then_deletes(tmp_path):
    write_files(tmp_path, {"bad.png": b"text", "good.png": encoded(photograph(96, 96), "png")})
    arguments = ["--data-dir", tmp_path, "--min-size", 96, "--delete"]
    assert_user_error(check(*arguments), "--delete: only with --clean")
    assert (tmp_path / "bad.png").exists()
    result = check(*arguments, "--clean")
    assert "deleted 1 files" in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["good.png"]


def test_a_few_bad_files_need_no_force(tmp_path):
    write_files(tmp_path, {f"{number:02}.png": b"text" for number in range(20)})
    assert check("--data-dir", tmp_path, "--clean").returncode == 1
    assert len(os.listdir(tmp_path / "quarantine")) == 21


def test_lists_are_left_alone_and_named(tmp_path):
    write_files(tmp_path, {"bad.png": b"text", "good.png": encoded(photograph(96, 96), "png")})
    write_file_list(tmp_path / TRAINING_LIST, ["bad.png", "good.png"])
    result = check("--data-dir", tmp_path, "--min-size", 96, "--clean")
    assert "python tools/select_training_files.py --data-dir" in result.stdout
    assert (tmp_path / TRAINING_LIST).read_text() == "bad.png\ngood.png\n"


@pytest.mark.parametrize("form", ["npy", "png"])
def test_bit_rot_is_found_by_the_manifest(tmp_path, form):
    write_files(tmp_path / "photos", {"a.png": encoded(photograph(100, 150), "png")})
    out = tmp_path / "data/demo"
    arguments = [tmp_path / "photos", out, "--size", 48, "--format", form]
    assert run_tool("images_to_data", *arguments, *UNGATED).returncode == 0
    arguments = ["--data-dir", tmp_path / "data", "--min-size", 48]
    assert check(*arguments).returncode == 0
    if form == "npy":
        content = bytearray((out / "a.png/x1_000_001.npy").read_bytes())
        content[3000] ^= 1
        (out / "a.png/x1_000_001.npy").write_bytes(content)
    else:  # a whole and valid file, but not the one that was written
        (out / "a.png/x1_000_001.png").write_bytes(encoded(photograph(48, 48, 5), "png"))
    result = check(*arguments)
    assert {*verdicts(result.stdout)} == {f"demo/a.png/x1_000_001.{form}"}
    assert "manifest recorded" in result.stdout
    (out / f"a.png/x1_000_000.{form}").unlink()
    assert "1 crops that a manifest names are not there" in check(*arguments).stdout


def test_a_broken_manifest_is_named(tmp_path):
    write_files(tmp_path, {"a.png": encoded(photograph(96, 96), "png"), "manifest.jsonl": b'{"path": 1}\n\n'})
    assert_user_error(check("--data-dir", tmp_path), "manifest.jsonl, line 1")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux: /proc/self/mem gives a real read error")
@pytest.mark.parametrize("action", [["--clean"], ["--clean", "--delete"]])
def test_read_errors_never_remove_a_file(tmp_path, action):
    write_files(tmp_path, {"good.png": encoded(photograph(96, 96), "png"), "bad.png": b"text"})
    for suffix in ("png", "npy"):
        os.symlink("/proc/self/mem", tmp_path / f"failing_disk.{suffix}")
        os.symlink("nowhere", tmp_path / f"dangling.{suffix}")
    result = check("--data-dir", tmp_path, "--min-size", 96, *action)
    assert result.returncode == 1
    unread = verdicts(result.stdout, "could not be read")
    assert {*unread} == {f"{name}.{suffix}" for name in ("failing_disk", "dangling") for suffix in ("png", "npy")}
    assert "Input/output error" in unread["failing_disk.png"]
    assert all(os.path.islink(tmp_path / name) for name in unread)
    assert not (tmp_path / "bad.png").exists()
    result = check("--data-dir", tmp_path, "--min-size", 96)
    assert result.returncode == 1, "files that could not be read are no success"


def test_decompression_bomb_is_bad_and_not_decoded(tmp_path):
    bomb = bytearray(encoded(photograph(96, 96), "png"))
    bomb[16:24] = (90_000).to_bytes(4, "big") * 2
    write_files(tmp_path, {"bomb.png": bytes(bomb)})
    result = check("--data-dir", tmp_path)
    assert "8100 megapixels, above the limit of 300" in result.stdout


def test_bad_usage(tmp_path):
    assert_user_error(check("--data-dir", tmp_path / "gone"), "no such folder")
    assert_user_error(check("--data-dir", tmp_path), "no images below this folder")
    (tmp_path / "links").mkdir()
    os.symlink("/usr", tmp_path / "links/usr")
    assert_user_error(check("--data-dir", tmp_path), "links to folders are not followed")
    write_files(tmp_path, {"a.png": b""})
    for arguments, word in ((["--min-size", 0], "--min-size 0"), (["--max-size", 9], "--max-size 9"),
                            (["--force"], "--force"), (["--max-megapixels", -1], "--max-megapixels")):
        assert_user_error(check("--data-dir", tmp_path, *arguments), word)


def plain_files() -> dict[str, bytes]:
    """Images that the checker decodes by the fast decoders rather than by DALI."""
    pixels = photograph(70, 91)
    gray, profile = pixels[..., 0], PngImagePlugin.PngInfo()
    profile.add(b"gAMA", (100_000).to_bytes(4, "big"))  # decoders that apply it would change every pixel
    return {"rgb.png": encoded(pixels, "png"), "gray.png": encoded(gray, "png"),
            "palette.png": encoded(Image.fromarray(pixels).convert("P"), "png"),
            "gamma.png": encoded(pixels, "png", pnginfo=profile),
            "color.jpg": encoded(pixels, "jpeg", quality=80, subsampling=2), "gray.jpg": encoded(gray, "jpeg"),
            "progressive.jpg": encoded(pixels, "jpeg", progressive=True, subsampling=1),
            "lossy.webp": encoded(pixels, "webp", quality=70), "exact.webp": encoded(pixels, "webp", lossless=True)}


@pytest.mark.parametrize("name", plain_files())
def test_fast_decoders_give_dalis_pixels(name):
    """The checker's verdict must be that of the decoder that training uses."""
    content = plain_files()[name]
    header = read_header(io.BytesIO(content))
    assert header.is_plain
    assert np.array_equal(decode_plain(content, header), DaliDecoder().decode(content))


def test_dali_decodes_after_it_refused():
    """One bad file must not spoil the verdict on the next, whatever DALI says about its pipeline."""
    decoder, pixels = DaliDecoder(), photograph(64, 80)
    with quiet_libraries():
        for content in bad_files().values():
            if content[:2] != b"\xff\xd8" and content and not content.startswith(b"GIF"):
                with pytest.raises(BadImageError):
                    decoder.decode(content)
            assert np.array_equal(decoder.decode(encoded(pixels, "png")), pixels)
        assert decoder.decode(encoded(pixels, "jpeg", exif=exif(6))).shape == (80, 64, 3)
