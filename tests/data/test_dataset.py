"""The identity of a dataset must match that of existing runs on disk, however it is computed."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import random
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from pipeline.cli import UserError
from pipeline.data.dataset import Folder, contents_hash, read_dataset
from pipeline.data.image_files import MANIFEST, lists_hash, read_file_list, write_file_list
from pipeline.training.options import TrainOptions, TrainPlan, make_plan


def line(path: str, number: int, **more: object) -> str:
    return (
        json.dumps(
            {
                "path": path,
                "photo": "ö.png",
                "scale": 1,
                "top": 0,
                "size": 64,
                "sha256": f"{number:064x}",
                "gates": {"sharpness": 0.5},
                **more,
            },
            ensure_ascii=False,
        )
        + "\n"
    )


def make(root: Path) -> Path:
    """Create names of all kinds, and manifests with invalid lines in the root and below it."""
    names = [
        "a.npy",
        "one/b.npy",
        "one/c d.npy",
        "one/two/ü.npy",
        "one/two/three/e.npy",
        "one/two/three/four/f.npy",
        "./one/g.npy",
        "one//h.npy",
        "one/./two/i.npy",
        "one/two/..j/k.npy",
        "one/l..npy",
        "other/m.npy",
        "one/n/",
    ]
    (root / "one" / "two" / "three").mkdir(parents=True)
    (root / "other").mkdir()
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:-3]))
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in names[-4:]))
    (root / MANIFEST).write_text(
        line("a.npy", 1)
        + line("one/b.npy", 2)
        + line("other/m.npy", 3)
        + "\n"
        + line("one/two/ü.npy", 4)[:-20]
        + '\n[1]\n5\nnull\n"path"\n{}\n'
        + '{"path": 7, "sha256": 8}\n'
        + line("./one/g.npy", 9, nan=float("nan"))
    )
    (root / "one" / MANIFEST).write_text(
        line("b.npy", 10)
        + line("c d.npy", 11)
        + line("/h.npy", 12)
        + line("two/ü.npy", 13)
        + line("", 14)
        + line("l..npy", 15)
        + line("b.npy", 16)
        + line("n/", 17)
    )
    (root / "one" / "two" / MANIFEST).write_bytes(
        line("ü.npy", 18).encode()
        + line("three/e.npy", 19).encode("utf-16")
        + line("..j/k.npy", 20).encode()
        + b'{"path": "\xff", "sha256": "x"}\n'
        + line("three/four/f.npy", 21).encode().rstrip()
    )
    (root / "one" / "two" / "three" / MANIFEST).write_text(line("e.npy", 22))  # too deep to be read
    return root


def test_the_hashes_are_those_of_runs_on_disk(tmp_path: Path) -> None:
    """The expected hashes were computed when names were still parsed one by one."""
    identity = read_dataset([make(tmp_path / "data")]).identity()
    assert identity == {
        "lists_sha256": "a350dbaf4da6c214fb63c2bd5db14bd26c4e88449776fce4e432bd97f54183d6",
        "contents_sha256": "477bbc69ca905b88d8a20120d77fe5e5bb6b301caf37f62d99b5b04e7da8dcdc",
        "folders": "",
        "training_files": 10,
        "validation_files": 4,
    }
    two = read_dataset([tmp_path / "data", make(tmp_path / "more")]).identity()
    assert two["lists_sha256"] == "2d962a82171898e76f2587bb211dae3a5812211753a857cdd4e39ab3fb2cddd3"
    assert (
        two["contents_sha256"] == "3ba7214f4263da60a8c4488bf524ad6f4f74a961b416fd00ea8649bb6a39c34a"
    )
    assert two["folders"] == "data, more"


def recorded_one_by_one(root: Path, names: list[str]) -> dict[str, str]:
    """Reference implementation: parse every name and read every line with json."""
    places = {
        "",
        *(
            "/".join(PurePosixPath(name).parts[:depth])
            for name in names
            for depth in (1, 2)
            if len(PurePosixPath(name).parts) > depth
        ),
    }
    known = {}
    for place in sorted(places):
        manifest = root / place / MANIFEST
        for text in manifest.read_bytes().splitlines(keepends=True) if manifest.is_file() else ():
            try:
                values = json.loads(text)
                name = posixpath.join(place, str(values["path"]))
                known |= {name: str(values["sha256"])} if name in names else {}
            except (ValueError, KeyError, TypeError):
                continue
    return known


def test_the_contents_are_what_the_plain_way_finds(tmp_path: Path) -> None:
    draw = random.Random(0)
    parts = ["a", "b", ".", "c.npy", "..d", "ü", " "]
    for case in range(150):
        root = tmp_path / str(case)
        names = list({"/".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(12)})
        for place in {
            str(PurePosixPath(*PurePosixPath(name).parts[:depth]))
            for name in names
            for depth in range(3)
        }:
            (root / place).mkdir(parents=True, exist_ok=True)
            if draw.random() < 0.7:
                some = [
                    os.path.relpath(name, place) if draw.random() < 0.5 else name for name in names
                ]
                lines = [line(name, draw.randrange(99)) for name in some]
                lines = [text if draw.random() < 0.9 else text[:-9] for text in lines]
                (root / place / MANIFEST).write_text("".join(lines))
        training, validation = sorted(names[:8]), sorted(names[5:])  # some are in both manifests
        digest = hashlib.sha256()
        known = recorded_one_by_one(root, names)
        for name in (*training, *validation):
            if name in known:
                digest.update(f"{name}\0{known[name]}\n".encode())
        assert contents_hash([Folder(root, training, validation)]) == digest.hexdigest()


def read_one_by_one(text: str) -> list[str] | None:
    """Return the names of a list, or None for an invalid one."""
    names: set[str] = set()
    for name in (part.rstrip("\r") for part in text.split("\n")):
        if not name:
            continue
        if (
            name.startswith("/")
            or "\0" in name
            or ".." in PurePosixPath(name).parts
            or name in names
        ):
            return None
        names.add(name)
    return sorted(names) or None


def outcome(action: Callable[[], object]) -> object:
    try:
        return action()
    except UserError:
        return None


def test_lists_are_read_and_refused_as_name_by_name(tmp_path: Path) -> None:
    draw, path, counts = random.Random(1), tmp_path / "list.txt", [0, 0]
    parts = ["a", "b", "c", "\n", "\n", "/", ".", "..", "\r", "\0", "\r\n", "ü"]
    for _ in range(1000):
        text = "".join(
            draw.choices(
                parts, weights=[9, 9, 9, 9, 9, 5, 3, 1, 1, 0.3, 2, 2], k=draw.randint(0, 14)
            )
        )
        path.write_bytes(text.encode())
        expected = read_one_by_one(text)
        counts[expected is None] += 1
        found = outcome(lambda: read_file_list(path, tmp_path))
        assert found == expected, repr(text)
        if expected is not None and not any("\r" in name for name in expected):
            content = "".join(f"{name}\n" for name in expected).encode()
            if sum(counts) % 50 == 0:  # the file is flushed to disk
                write_file_list(path, draw.sample(expected, len(expected)))
                assert path.read_bytes() == content
            assert (
                lists_hash(expected) == hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
            )
    assert min(counts) > 100, counts


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b\nc"],
        ["a", ""],
        ["", "a"],
        ["a\r"],
        ["/a"],
        ["a/../b"],
        ["a", "b\0"],
        [".."],
        ["\udcff"],
    ],
)
def test_names_that_no_list_can_hold_have_no_hash(names: list[str]) -> None:
    with pytest.raises(UserError):
        lists_hash(names)


def test_files_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    dataset = read_dataset([make(tmp_path / "data"), make(tmp_path / "more")])
    names = [(folder.root, name) for folder in dataset.folders for name in folder.training]
    assert len(dataset.training) == len(names) == 20
    assert [image.path for image in dataset.training] == [os.path.join(*pair) for pair in names]
    assert list(dataset.training_paths) == [os.path.join(*pair) for pair in names]
    assert [image.name for image in dataset.training[7:13]] == [name for _, name in names[7:13]]
    assert dataset.training[-1] == dataset.training[19]
    assert dataset.training_paths.suffixes() == {name[name.rfind(".") :] for _, name in names}
    for number in (20, -21):
        with pytest.raises(IndexError):
            dataset.training[number]


def test_a_run_is_not_put_where_the_dataset_is(tmp_path: Path) -> None:
    """`--reset` would move the dataset away with the run."""
    root = tmp_path / "photos" / "set"
    root.mkdir(parents=True)
    np.save(root / "a.npy", np.zeros((64, 64, 3), np.uint8))
    for name in ("training_file_list.txt", "validation_file_list.txt"):
        (root / name).write_text("a.npy\n")

    def plan(folder: Path) -> TrainPlan:
        return make_plan(
            TrainOptions(recipe="demo", dataset_dir=(root,), output_dir=folder, reset=True)
        )

    for folder in (root, root.parent, root / ".." / "set"):
        with pytest.raises(UserError, match=r"contains the dataset .*a folder of its own"):
            plan(folder)
    assert plan(root / "run").run_dir == root / "run"
