"""tools/check_training_data.py as a process: reports, dry run, quarantine."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

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
from pipeline.data.decoding import HostDecoder
from pipeline.data.image_files import TRAINING_LIST, write_file_list
from pipeline.data.image_headers import BadImageError, read_header
from pipeline.data.image_pixels import decode_plain
from tools.crops.cutting import parse_reject
from tools.dataset.cleaning import Cleaner
from tools.dataset.judging import FileCheck, FileStatus
from tools.parallel import quiet_libraries

OTHERS = {
    "notes.txt": b"not an image",
    "training_file_list.txt": b"good/plain.png\n",
    "dataset.json": b"{}",
    "skipped.txt": b"",
    ".hidden.png": b"junk",
    "quarantine/old.png": b"junk",
}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Good files in good/, bad ones in bad/, and files that are neither."""
    good = {
        **good_files(),
        "crop.npy": npy(photograph(96, 96)),
        "UPPER.NPY": npy(photograph(97, 99)),
    }
    bad = {
        **bad_files(),
        **bad_npy_files(),
        "tiny.png": encoded(photograph(95, 200), "png"),
        "tiny.npy": npy(photograph(200, 95)),
    }
    write_files(
        tmp_path,
        {
            **{f"good/{name}": content for name, content in good.items()},
            **{f"bad/deep er/{name}": content for name, content in bad.items()},
            **OTHERS,
        },
    )
    return tmp_path


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run check_training_data.py without the quality gates, which have their own tests."""
    return run_tool("check_training_data", *arguments, *UNGATED)


def reported(stdout: str, kind: str = "bad") -> dict[str, str]:
    """Path -> reason, for the lines of one kind."""
    lines = [
        line.removeprefix(f"{kind}: ")
        for line in stdout.splitlines()
        if line.startswith(f"{kind}: ")
    ]
    return dict(line.split(": ", 1) for line in lines)


def test_full_dry_run_finds_all_and_changes_nothing(corpus):
    before = stamped_tree(corpus)
    result = check("--data-dir", corpus, "--min-size", 96)
    assert result.returncode == 1
    assert result.stderr == ""
    bad = reported(result.stdout)
    assert {*bad} == {path for path in before if path.startswith("bad/")}
    assert stamped_tree(corpus) == before
    assert "95x200 is too small: both sides must be at least 96" in bad["bad/deep er/tiny.png"]
    assert "pickle" in bad["bad/deep er/object.npy"]
    assert "CRC" in bad["bad/deep er/flipped.png"]
    assert f"{len(bad)} bad, 0 could not be read; 5 other files left alone" in result.stdout
    assert "--clean moves the bad files to" in result.stdout


def test_thread_count_does_not_matter(corpus):
    one, four = (
        check("--data-dir", corpus, "--min-size", 96, "--threads", threads).stdout
        for threads in (1, 4)
    )
    assert reported(one) == reported(four) != {}


def test_fast_finds_all_that_needs_no_decoding(corpus):
    """Truncation and bit rot are detected in every format; no good file is called bad."""
    result = check("--data-dir", corpus, "--min-size", 96, "--fast")
    assert result.returncode == 1
    bad = {path.name for path in (corpus / "bad/deep er").iterdir()}
    assert {Path(path).name for path in reported(result.stdout)} == bad
    assert all(path.startswith("bad/") for path in reported(result.stdout))


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_all_good_is_zero(tmp_path, fast):
    write_files(tmp_path, {**good_files(), "crop.npy": npy(photograph(96, 96))})
    result = check("--data-dir", tmp_path, "--min-size", 96, "--max-size", 106, *fast)
    assert (result.returncode, result.stderr) == (0, "")
    assert "23 good, 0 bad" in result.stdout
    result = check("--data-dir", tmp_path, "--min-size", 96, "--max-size", 105, *fast)
    assert len(reported(result.stdout)) == 22  # all but the crop
    assert "(--max-size)" in result.stdout


def test_clean_moves_to_quarantine_with_a_report(corpus):
    before = tree(corpus)
    bad = {path for path in before if path.startswith("bad/")}
    arguments = ["--data-dir", corpus, "--min-size", 96, "--clean"]
    assert_user_error(check(*arguments), "nothing was changed; --clean --force removes them anyway")
    assert tree(corpus) == before
    result = check(*arguments, "--force")
    assert result.returncode == 1
    assert "to undo, move them back" in result.stdout
    after = tree(corpus)
    report = [
        json.loads(line) for line in (corpus / "quarantine/report.jsonl").read_text().splitlines()
    ]
    assert {entry["path"] for entry in report} == bad
    assert all(entry["reason"] and entry["time"] for entry in report)
    del after["quarantine/report.jsonl"]
    assert after == {
        f"quarantine/{path}" if path in bad else path: digest for path, digest in before.items()
    }
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
    assert_user_error(check(*arguments), "--delete: needs --clean")
    assert (tmp_path / "bad.png").exists()
    result = check(*arguments, "--clean")
    assert "files deleted: 1\n" in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["good.png"]


def test_a_few_bad_files_need_no_force(tmp_path):
    write_files(tmp_path, {f"{number:02}.png": b"text" for number in range(20)})
    assert check("--data-dir", tmp_path, "--clean").returncode == 1
    assert len(os.listdir(tmp_path / "quarantine")) == 21


def test_a_minimum_above_every_file_removes_nothing(tmp_path):
    write_files(
        tmp_path,
        {f"{number}.png": encoded(photograph(96, 96, number), "png") for number in range(9)},
    )
    arguments = ["--data-dir", tmp_path, "--min-size", 128, "--clean"]
    assert_user_error(check(*arguments), "all 9 files are smaller than --min-size 128; nothing was")
    assert len(os.listdir(tmp_path)) == 9
    assert check(*arguments, "--force").returncode == 1
    assert len(os.listdir(tmp_path / "quarantine")) == 10


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
    else:  # an intact, valid file, but not the one that was written
        (out / "a.png/x1_000_001.png").write_bytes(encoded(photograph(48, 48, 5), "png"))
    result = check(*arguments)
    assert {*reported(result.stdout)} == {f"demo/a.png/x1_000_001.{form}"}
    assert "manifest recorded" in result.stdout
    (out / f"a.png/x1_000_000.{form}").unlink()
    assert "listed crops that are missing: 1;" in check(*arguments).stdout


def test_a_broken_manifest_is_named(tmp_path):
    write_files(
        tmp_path,
        {"a.png": encoded(photograph(96, 96), "png"), "manifest.jsonl": b'{"path": 1}\n\n'},
    )
    assert_user_error(check("--data-dir", tmp_path), "manifest.jsonl, line 1")


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(),
    reason="needs Linux: /proc/self/mem gives a real read error",
)
@pytest.mark.parametrize("action", [["--clean"], ["--clean", "--delete"]])
def test_read_errors_never_remove_a_file(tmp_path, action):
    write_files(tmp_path, {"good.png": encoded(photograph(96, 96), "png"), "bad.png": b"text"})
    for suffix in ("png", "npy"):
        os.symlink("/proc/self/mem", tmp_path / f"failing_disk.{suffix}")
        os.symlink("nowhere", tmp_path / f"dangling.{suffix}")
    result = check("--data-dir", tmp_path, "--min-size", 96, *action)
    assert result.returncode == 1
    unread = reported(result.stdout, "could not be read")
    assert {*unread} == {
        f"{name}.{suffix}" for name in ("failing_disk", "dangling") for suffix in ("png", "npy")
    }
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
    for arguments, word in (
        (["--min-size", 0], "--min-size 0"),
        (["--max-size", 9], "--max-size 9"),
        (["--force"], "--force"),
        (["--max-megapixels", -1], "--max-megapixels"),
    ):
        assert_user_error(check("--data-dir", tmp_path, *arguments), word)


def test_a_file_is_not_taken(tmp_path):
    write_files(tmp_path, {"k2.png": encoded(photograph(96, 96), "png")})
    result = check("--data-dir", tmp_path / "k2.png", "--clean")
    assert_user_error(result, "k2.png: not a folder")
    assert "k2.png/NAME" not in result.stderr


GATED = ("--min-size", 96, "--min-gradient", 0, "--min-sharpness", 0)  # but not --keep-duplicates


@pytest.mark.parametrize("delete", [[], ["--delete"]])
def test_a_link_is_the_copy_and_never_its_target(tmp_path, delete):
    """Whichever sorts first by name."""
    pixels = encoded(photograph(96, 96), "png")
    write_files(tmp_path, {"z.png": pixels, "r/other.png": encoded(photograph(96, 96, 5), "png")})
    for link in ("r/a.png", "r/b.png", "zz.png"):
        os.symlink(tmp_path / "z.png", tmp_path / link)
    write_files(tmp_path, {"copy\n.png": pixels})
    result = run_tool("check_training_data", "--data-dir", tmp_path, *GATED, "--clean", *delete)
    bad = {
        line.split(": ")[1]: line for line in result.stdout.splitlines() if line.startswith("bad: ")
    }
    assert {*bad} == {"r/a.png", "r/b.png", "zz.png", "z.png"}, (
        "of two files that are the same, the later one"
    )
    assert "the same file as 'copy\\n.png'" in bad["z.png"], "a name must not break the line"
    kept = {path.name for path in tmp_path.rglob("*.png") if "quarantine" not in path.parts}
    assert "other.png" in kept
    assert len(kept) == 2
    assert all(
        (tmp_path / name).is_file() and not (tmp_path / name).is_symlink()
        for name in kept - {"other.png"}
    )
    assert "2 good, 4 bad" in result.stdout
    assert run_tool("check_training_data", "--data-dir", tmp_path, *GATED).returncode == 0


def test_links_among_themselves(tmp_path):
    """A link that sorts first is replaced by its target; of hard links, the later one is bad."""
    write_files(tmp_path, {"z.png": encoded(photograph(96, 96), "png")})
    (tmp_path / "r").mkdir()
    os.symlink("../z.png", tmp_path / "r/a.png")
    os.link(tmp_path / "z.png", tmp_path / "z2.png")
    result = run_tool("check_training_data", "--data-dir", tmp_path, *GATED)
    reasons = reported(result.stdout)
    assert reasons == {
        "r/a.png": "a link to z.png (--keep-duplicates)",
        "z2.png": "a hard link of z.png (--keep-duplicates)",
    }
    assert "reasons: 2 duplicate" in result.stdout
    assert "1 good, 2 bad" in result.stdout


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A dataset of HR and LR crops of two photographs."""
    for seed, name in enumerate(("one", "two")):
        pixels = photograph(96, 192, seed)
        reduced = cv2.resize(pixels, (48, 24), interpolation=cv2.INTER_AREA)
        write_files(tmp_path / "HR", {f"{name}.png": encoded(pixels, "png")})
        write_files(tmp_path / "LR", {f"{name}x4.png": encoded(reduced, "png")})
    assert cut_pairs(tmp_path).returncode == 0
    return tmp_path


def cut_pairs(folder: Path) -> subprocess.CompletedProcess[str]:
    return run_tool(
        "pairs_to_data",
        folder / "HR",
        folder / "LR",
        "--scale",
        4,
        "--size",
        48,
        "--out",
        folder / "data/pairs",
        *UNGATED,
    )


def test_a_bad_side_takes_the_other_along(pairs):
    data = pairs / "data/pairs"
    (data / "one.png/x1_000_001.npy").write_bytes(b"broken")
    (data / "two.png/x1_000_000_lr4.npy").write_bytes(b"broken")
    (data / "two.png/x1_000_001_lr4.npy").write_bytes(b"broken")
    (data / "two.png/x1_000_001.npy").write_bytes(b"broken")
    before = check("--data-dir", pairs / "data", "--min-size", 48)
    assert {
        path: reason for path, reason in reported(before.stdout).items() if "pair" in reason
    } == {
        "pairs/one.png/x1_000_001_lr4.npy": (
            "the other side of its pair is bad: pairs/one.png/x1_000_001.npy"
        ),
        "pairs/two.png/x1_000_000.npy": (
            "the other side of its pair is bad: pairs/two.png/x1_000_000_lr4.npy"
        ),
    }
    assert "reasons: 4 file, 2 pair" in before.stdout
    assert check("--data-dir", pairs / "data", "--min-size", 48, "--clean").returncode == 1
    after = check("--data-dir", pairs / "data", "--min-size", 48)
    assert after.returncode == 0
    hashes = [
        [line for line in result.stdout.splitlines() if line.startswith("hash of")]
        for result in (before, after)
    ]
    assert hashes[0] == hashes[1] != [], "what was taken along must not be in the hash"
    assert "listed crops that are missing: 6; rerun the tool that made them" in after.stdout
    assert not (data / "rejects.jsonl").exists(), (
        "broken crops are to be made again, with their other sides"
    )


def test_sides_are_told_by_name_without_a_manifest(tmp_path):
    crop, lr = npy(photograph(96, 96)), npy(photograph(96, 96, 3))
    write_files(
        tmp_path,
        {
            "a/x1_000_000.npy": b"",
            "a/x1_000_000_lr4.npy": lr,
            "a/x1_000_001.npy": crop,
            "b/x1_000_000.npy": crop,
            "b/x1_000_000_lr2.npy": b"",
            "c/x1_000_000.npy": crop,
        },
    )
    bad = reported(check("--data-dir", tmp_path, "--min-size", 96).stdout)
    assert {*bad} == {
        "a/x1_000_000.npy",
        "a/x1_000_000_lr4.npy",
        "b/x1_000_000.npy",
        "b/x1_000_000_lr2.npy",
    }


def cut_photos(folder: Path) -> subprocess.CompletedProcess[str]:
    return run_tool(
        "images_to_data",
        folder / "photos",
        folder / "data/crops",
        "--size",
        96,
        "--num-scales",
        1,
        *UNGATED,
    )


@pytest.fixture
def flat_crop(tmp_path) -> Path:
    """A dataset of two crops that its own settings accepted, one of them flat."""
    pixels = photograph(96, 192)
    pixels[:, 96:] = 100
    write_files(tmp_path / "photos", {"a.png": encoded(pixels, "png")})
    assert cut_photos(tmp_path).returncode == 0
    return tmp_path


def clean_flat(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool(
        "check_training_data",
        "--data-dir",
        folder / "data",
        "--min-size",
        96,
        "--min-gradient",
        2,
        "--min-sharpness",
        0,
        "--keep-duplicates",
        *arguments,
    )


@pytest.mark.parametrize("delete", [[], ["--delete"]])
def test_crops_that_were_taken_away_for_good_are_written_down(flat_crop, delete):
    rejects = flat_crop / "data/crops/rejects.jsonl"
    rejects.write_bytes(b'{"torn": ')
    result = clean_flat(flat_crop, "--clean", *delete)
    assert "reasons: 1 flat" in result.stdout
    torn, line = rejects.read_text().splitlines()
    record = json.loads((flat_crop / "data/crops/manifest.jsonl").read_text().splitlines()[1])
    assert (torn, parse_reject(line)["cleaned"]) == ('{"torn": ', True)
    expected = {
        name: record[name]
        for name in ("photo", "path", "scale", "top", "left", "photo_bytes", "photo_mtime_ns")
    }
    values = json.loads(line)
    assert "flat: gradient of" in values.pop("reason")
    assert values == {
        **expected,
        "folder": "a.png",
        "gate": "flat",
        "whole": False,
        "cleaned": True,
    }
    result = clean_flat(flat_crop)
    assert result.returncode == 0
    assert "listed crops that --clean removed, which are not recreated: 1\n" in result.stdout
    assert "rerun the tool that made them" not in result.stdout
    assert cut_photos(flat_crop).returncode == 0
    assert clean_flat(flat_crop).returncode == 0, "the cutter must not make it again"


def test_no_cleaning_beside_a_running_cutter(flat_crop):
    before = tree(flat_crop)
    with open(flat_crop / "data/crops/dataset.json", "r+b") as settings:
        fcntl.flock(settings, fcntl.LOCK_EX)
        assert_user_error(
            clean_flat(flat_crop, "--clean"),
            "crops: a tool is writing there",
            "nothing was changed",
        )
    assert tree(flat_crop) == before
    assert clean_flat(flat_crop, "--clean").returncode == 1


def test_one_cleaning_at_a_time(tmp_path):
    write_files(
        tmp_path,
        {
            "bad.png": b"text",
            "good.png": encoded(photograph(96, 96), "png"),
            "quarantine/report.jsonl": b"",
        },
    )
    with open(tmp_path / "quarantine/report.jsonl", "ab") as report:
        fcntl.flock(report, fcntl.LOCK_EX)
        assert_user_error(
            check("--data-dir", tmp_path, "--min-size", 96, "--clean"),
            "another run",
            "nothing was changed",
        )
    assert (tmp_path / "bad.png").exists()
    assert check("--data-dir", tmp_path, "--min-size", 96, "--clean").returncode == 1
    assert not (tmp_path / "bad.png").exists()


def test_a_quarantine_that_is_a_file(tmp_path):
    write_files(tmp_path, {"bad.png": b"text", "quarantine": b""})
    assert_user_error(check("--data-dir", tmp_path, "--clean"), "quarantine: not a folder")
    assert (tmp_path / "bad.png").exists()


def test_what_cannot_be_moved_is_named_and_not_in_the_report(tmp_path):
    """A file in place of a quarantine folder: even root cannot move files there."""
    write_files(tmp_path, {"a/bad.png": b"text", "b.png": b"text", "quarantine/a": b"in the way"})
    result = check("--data-dir", tmp_path, "--clean")
    assert (result.returncode, result.stderr) == (1, "")
    assert "could not be moved: a/bad.png: " in result.stdout
    assert "each to its old path there: 1; to undo" in result.stdout
    report = [
        json.loads(line) for line in (tmp_path / "quarantine/report.jsonl").read_text().splitlines()
    ]
    assert [entry["path"] for entry in report] == ["b.png"]
    assert (tmp_path / "a/bad.png").exists()


def test_a_rename_that_fails_leaves_no_line(tmp_path, monkeypatch):
    write_files(tmp_path, {"bad.png": b"text", "worse.png": b"text"})
    results = [
        FileCheck(name, FileStatus.BAD, "broken", gate="file")
        for name in ("bad.png", "gone.png", "worse.png")
    ]
    rename = os.rename

    def rename_or_fail(source: Path, target: Path) -> None:
        if source.name == "bad.png":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_or_fail)
    with Cleaner(tmp_path, [], [], results, delete=False) as cleaner:
        for result in results:
            cleaner.take(result)
    assert (cleaner.taken, cleaner.failed) == (1, [("bad.png", "Permission denied")])
    report = [
        json.loads(line) for line in (tmp_path / "quarantine/report.jsonl").read_text().splitlines()
    ]
    assert [entry["path"] for entry in report] == ["worse.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_dataset(tmp_path):
    write_files(tmp_path, {"a/bad.png": b"text"})
    (tmp_path / "a").chmod(0o500)
    result = check("--data-dir", tmp_path, "--clean")
    assert "could not be moved: a/bad.png: Permission denied" in result.stdout
    tmp_path.chmod(0o500)
    (tmp_path / "quarantine").chmod(0o500)
    result = check("--data-dir", tmp_path, "--clean")
    for folder in (tmp_path, tmp_path / "a", tmp_path / "quarantine"):
        folder.chmod(0o700)
    assert_user_error(result, "quarantine: cannot be written")


def plain_files() -> dict[str, bytes]:
    """Images that the checker decodes with the fast decoders and not with DALI."""
    pixels = photograph(70, 91)
    gray, profile = pixels[..., 0], PngImagePlugin.PngInfo()
    # decoders that apply it would change every pixel
    profile.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return {
        "rgb.png": encoded(pixels, "png"),
        "gray.png": encoded(gray, "png"),
        "palette.png": encoded(Image.fromarray(pixels).convert("P"), "png"),
        "gamma.png": encoded(pixels, "png", pnginfo=profile),
        "color.jpg": encoded(pixels, "jpeg", quality=80, subsampling=2),
        "gray.jpg": encoded(gray, "jpeg"),
        "progressive.jpg": encoded(pixels, "jpeg", progressive=True, subsampling=1),
        "lossy.webp": encoded(pixels, "webp", quality=70),
        "exact.webp": encoded(pixels, "webp", lossless=True),
    }


@pytest.mark.parametrize("name", plain_files())
def test_fast_decoders_give_dalis_pixels(name):
    """The checker's pixels must be those of the decoder that training uses."""
    content = plain_files()[name]
    header = read_header(io.BytesIO(content))
    assert header.is_plain
    assert np.array_equal(
        decode_plain(content, header), HostDecoder(threads=1, batch=1).decode_content(content)
    )


def test_dali_decodes_after_it_refused():
    """One bad file must not affect the result of the next, whatever state DALI's pipeline is in."""
    decoder, pixels = HostDecoder(threads=1, batch=1), photograph(64, 80)
    with quiet_libraries():
        for content in bad_files().values():
            if content[:2] != b"\xff\xd8" and content and not content.startswith(b"GIF"):
                with pytest.raises(BadImageError):
                    decoder.decode_content(content)
            assert np.array_equal(decoder.decode_content(encoded(pixels, "png")), pixels)
        assert decoder.decode_content(encoded(pixels, "jpeg", exif=exif(6))).shape == (80, 64, 3)
