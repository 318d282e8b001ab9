"""pipeline.data.image_files: headers of .npy crops, and the two file lists."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dataset_corpus import bad_npy_files, npy, photograph, write_files
from pipeline.cli import UserError
from pipeline.data.image_files import (
    BadNpyError,
    is_encoded,
    is_npy,
    lists_hash,
    npy_layout,
    read_file_list,
    write_file_list,
)
from pipeline.files import write_atomically


def _padded_header(version: int) -> bytes:
    """Write a valid .npy header that NumPy would not write: other key order, version 2 or 3."""
    text = b"{'shape': (5, 7, 3), 'descr': 'u1', 'fortran_order': False}\n"
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(text).to_bytes(4, "little")
        + text
        + bytes(5 * 7 * 3)
    )


@pytest.mark.parametrize("shape", [(1, 1, 3), (33, 70, 3), (512, 300, 3)])
def test_layout_is_where_numpy_reads(tmp_path, shape):
    pixels = photograph(*shape[:2])
    path = tmp_path / "a.npy"
    np.save(path, pixels)
    layout = npy_layout(path)
    mapped = np.memmap(path, np.uint8, "r", layout.offset, (layout.height, layout.width, 3))
    assert np.array_equal(mapped, np.load(path))
    assert np.array_equal(mapped, pixels)


@pytest.mark.parametrize("version", [2, 3])
def test_unusual_headers(tmp_path, version):
    path = tmp_path / "a.npy"
    path.write_bytes(_padded_header(version))
    assert npy_layout(path)[1:3] == np.load(path).shape[:2] == (5, 7)
    assert path.stat().st_size == npy_layout(path).offset + 5 * 7 * 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("float.npy", "must be uint8"),
        ("cut.npy", "truncated"),
        ("long.npy", "too long"),
        ("object.npy", "pickle"),
        ("gray.npy", "(height, width, 3)"),
        ("empty.npy", "empty file"),
        ("rgba.npy", "(height, width, 3)"),
        ("fortran.npy", "C order"),
        ("none.npy", "0x96"),
        ("text.npy", "not an .npy array"),
        ("int8.npy", "must be uint8"),
    ],
)
def test_bad_npy_is_one_clear_line(tmp_path, name, words):
    assert {*bad_npy_files()} >= {name}
    write_files(tmp_path, bad_npy_files())
    with pytest.raises(BadNpyError) as error:
        npy_layout(tmp_path / name)
    assert words in error.value.reason
    assert str(error.value).startswith(f"{tmp_path / name}: {error.value.reason}; ")
    assert "check_training_data.py --clean" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_cut_of_an_npy_is_refused(tmp_path):
    content, path = npy(photograph(4, 4)), tmp_path / "a.npy"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadNpyError):
            npy_layout(path)


def test_missing_npy_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file; write the lists again"):
        npy_layout(tmp_path / "gone.npy")
    with pytest.raises(UserError, match="not a regular file"):
        npy_layout(tmp_path)


def test_suffixes_in_any_case():
    assert is_npy("a.NPY")
    assert is_encoded("b/c.JPEG")
    assert is_encoded("x.tIf")
    assert not is_encoded("png")
    assert not is_encoded("notes.txt")


def test_list_round_trip_is_sorted_utf8(tmp_path):
    names = ["ö/b.npy", "a b/ä.png", "z.npy", "a/1.npy"]
    write_file_list(tmp_path / "list.txt", names)
    assert (tmp_path / "list.txt").read_bytes() == "".join(
        f"{name}\n" for name in sorted(names)
    ).encode()
    assert read_file_list(tmp_path / "list.txt", tmp_path) == sorted(names)
    assert os.listdir(tmp_path) == ["list.txt"]


def test_list_edited_on_windows(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"b.npy\r\n\r\na.npy\r\n")
    assert read_file_list(tmp_path / "list.txt", tmp_path) == ["a.npy", "b.npy"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the list is empty"),
        (b"\n\n", "the list is empty"),
        (b"a.npy\n/etc/passwd\n", "line 2: '/etc/passwd'"),
        (b"a/../../b.npy\n", "inside the dataset folder"),
        (b"..\n", "inside the dataset"),
        (b"a.npy\na.npy\n", "twice"),
        (b"\xff\xfe.npy\n", "not UTF-8"),
        (b"a\0.npy\n", "inside the dataset folder"),
    ],
)
def test_bad_lists(tmp_path, content, words):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_file_list(tmp_path / "list.txt", tmp_path)
    assert words in str(error.value)
    assert "select_training_files.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_list_names_its_command(tmp_path):
    with pytest.raises(
        UserError, match=r"no such file list; write it with `python tools/select_training_files\.py"
    ):
        read_file_list(tmp_path / "list.txt", tmp_path)


@pytest.mark.parametrize("name", ["a\nb.npy", "/a.npy", "../a.npy", "", "\udcff.npy", "a\r.npy"])
def test_a_name_that_no_list_can_hold_leaves_the_old_list(tmp_path, name):
    write_file_list(tmp_path / "list.txt", ["old.npy"])
    with pytest.raises(UserError):
        write_file_list(tmp_path / "list.txt", ["new.npy", name])
    assert read_file_list(tmp_path / "list.txt", tmp_path) == ["old.npy"]
    assert os.listdir(tmp_path) == ["list.txt"]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_hash_of_lists():
    assert lists_hash(["b", "a"], ["c"]) == lists_hash(["a", "b"], ["c"])
    assert (
        len(
            {
                lists_hash(["a", "b"], ["c"]),
                lists_hash(["a"], ["b", "c"]),
                lists_hash(["c"], ["a", "b"]),
                lists_hash(["a", "b", "c"]),
                lists_hash(["ab"], ["c"]),
            }
        )
        == 5
    )
    assert len(lists_hash(["a"])) == 64
