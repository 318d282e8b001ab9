"""tools/tar/members.py: nested tars, false names, damage, bombs, and memory use."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from dataset_corpus import CHECKOUT, encoded, photograph
from pipeline.cli import UserError
from tools.tar.members import Member, Problem, TarReader, check_archive, clean_name
from tools.tar.streams import Limits

JPEG = encoded(photograph(40, 60), "jpeg")
PNG = encoded(photograph(40, 60, 1), "png")
_BAD_GZIP = b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 600
pytestmark = pytest.mark.usefixtures("_no_hanging")


@pytest.fixture
def _no_hanging():
    """Every test must end within a minute, whatever a hostile archive does to the reader."""

    def stop(*_):
        raise TimeoutError("the reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tar(
    files: dict[str, bytes | tarfile.TarInfo] | list[tuple[str, bytes | tarfile.TarInfo]],
    form: int = tarfile.PAX_FORMAT,
) -> bytes:
    """Build a tar archive; a `TarInfo` is added as it is, without data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            info.name = name
            archive.addfile(
                info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content)
            )
    return file.getvalue()


def header(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, form: int = tarfile.GNU_FORMAT
) -> bytes:
    """A single header block with arbitrary claims."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(form)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def read(
    path: Path, content: bytes, **limits: int
) -> tuple[dict[str, bytes], list[Problem], TarReader]:
    """Read an archive with this content; returns (members, problems, reader)."""
    path = path / "a.tar" if path.is_dir() else path
    path.write_bytes(content)
    reader = TarReader(path, Limits(**limits))
    items = list(reader)
    members = [item for item in items if isinstance(item, Member)]
    names = [member.name for member in members]
    assert len(names) == len(set(names)), "a name was given twice"
    return (
        {member.name: member.data for member in members},
        [i for i in items if isinstance(i, Problem)],
        reader,
    )


def test_tar_of_tars(tmp_path):
    inner = {
        f"n0{number}.tar": tar(
            {f"n0{number}_{image}.JPEG": JPEG + bytes([number, image]) for image in range(3)}
        )
        for number in range(4)
    }
    members, problems, _ = read(tmp_path, tar(inner))
    assert members == {
        f"n0{number}.tar/n0{number}_{image}.JPEG": JPEG + bytes([number, image])
        for number in range(4)
        for image in range(3)
    }
    assert problems == []


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"]
)
def test_compressed_archives(tmp_path, pack):
    content = tar({"a.jpg": JPEG, "in.tar.x": pack(tar({"b.png": PNG}))})
    assert read(tmp_path, pack(content))[:2] == ({"a.jpg": JPEG, "in.tar.x/b.png": PNG}, [])
    # Compressed in pieces, as by pigz, pbzip2 and `cat`.
    middle = len(content) // 2
    assert read(tmp_path, pack(content[:middle]) + pack(content[middle:]))[:2] == (
        {"a.jpg": JPEG, "in.tar.x/b.png": PNG},
        [],
    )
    large = {f"{number}.jpg": np.random.default_rng(number).bytes(1 << 20) for number in range(3)}
    cut = pack(tar(large))
    # bzip2 works in blocks of 900 kB
    members, problems, _ = read(tmp_path, cut[: int(0.9 * len(cut))])
    assert members == {"0.jpg": large["0.jpg"], "1.jpg": large["1.jpg"]}
    assert [problem.name for problem in problems] == [""]
    assert "truncated" in problems[0].reason


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_a_wrong_checksum_at_the_end_of_a_compressed_archive_is_noticed(tmp_path, pack):
    content = bytearray(pack(tar({"a.jpg": JPEG})))
    content[-6] ^= 1  # gz: the length; xz: the footer
    members, problems, _ = read(tmp_path, bytes(content))
    assert members == {"a.jpg": JPEG}
    assert len(problems) == 1
    assert "damaged" in problems[0].reason


def test_photographs_are_known_by_content_archives_too(tmp_path):
    files = {
        "a.dat": JPEG,
        "b": PNG,
        "c.txt": b"text",
        "labels.csv.gz": gzip.compress(b"1,2,3\n" * 300),
        "BM.txt": b"BM",
        "bmw.bin": tar({"BMW/x": PNG}),
        "e": gzip.compress(tar({"x": JPEG})),
        "photo.tar": JPEG,
        "none.jpg": b"no",
    }
    members, problems, reader = read(tmp_path, tar(files))
    assert members == {
        "a.dat": JPEG,
        "b": PNG,
        "bmw.bin/BMW/x": PNG,
        "e/x": JPEG,
        "photo.tar": JPEG,
        "none.jpg": b"no",
    }
    assert problems == []
    assert reader.passed == {"other": 3}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names(tmp_path, form):
    name = "/".join(["folder" * 20] * 4) + "/ö.jpg"
    assert read(tmp_path, tar({name: JPEG, "b.jpg": PNG}, form))[:2] == (
        {name: JPEG, "b.jpg": PNG},
        [],
    )


def test_sizes_beyond_8_gb_come_from_the_pax_header(tmp_path):
    """The ustar field cannot hold them; here it is 0, and pax has the true size."""
    record = next(line for n in range(99) if len(line := b"%d size=%d\n" % (n, len(JPEG))) == n)
    content = (
        header("x", len(record), tarfile.XHDTYPE)
        + padded(record)
        + header("a.jpg", 0)
        + padded(JPEG)
        + tar({})
    )
    assert read(tmp_path, content)[:2] == ({"a.jpg": JPEG}, [])


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("../../etc/x.jpg", "etc/x.jpg"),
        ("/abs/x.jpg", "abs/x.jpg"),
        ("C:\\Users\\x.jpg", "Users/x.jpg"),
        ("c:x.jpg", "x.jpg"),
        ("/C:/x.jpg", "x.jpg"),
        ("a/./b//x.jpg", "a/b/x.jpg"),
        ("..\\..\\x.jpg", "x.jpg"),
        ("a\nb\x1b[31m.jpg", "a_b_[31m.jpg"),
        ("caf\udce9.jpg", "caf_.jpg"),
        ("", "unnamed"),
        ("../..", "unnamed"),
        ("...", "unnamed"),
        ("C:../x.jpg", "x.jpg"),
        ("ö/日本.jpg", "ö/日本.jpg"),
        ("a/x1_000_000.npy", "a/x1_000_000.npy_"),
        ("f000012_x2_001_000.webp/b", "f000012_x2_001_000.webp_/b"),
    ],
)
def test_names_lead_nowhere_but_down(name, clean):
    assert clean_name(name) == clean


def test_endless_names_fit_on_a_disk_and_stay_different(tmp_path):
    names = ["ö" * 300 + "a", "ö" * 300 + "b", "x/" * 900 + "a", "x/" * 900 + "b", "x/" * 901 + "b"]
    members, problems, _ = read(tmp_path, tar([(name, JPEG) for name in names]))
    assert len(members) == 5
    assert problems == []
    for name in members:
        assert len(name.encode()) <= 1000
        assert all(len(part.encode()) <= 200 for part in name.split("/"))


def test_equal_names_are_all_kept(tmp_path):
    """Later members replace earlier ones with the same name when tar unpacks.

    For training, each is a photograph.
    """
    files = [
        ("a.jpg", b"\xff\xd8\xff1"),
        ("./a.jpg", b"\xff\xd8\xff2"),
        ("../a.jpg", b"\xff\xd8\xff3"),
        ("a.jpg~2", b"\xff\xd8\xff4"),
        ("b\x01.jpg", b"\xff\xd8\xff5"),
        ("b_.jpg", b"\xff\xd8\xff6"),
    ]
    members, problems, _ = read(tmp_path, tar(files))
    assert list(members.items()) == [
        ("a.jpg", b"\xff\xd8\xff1"),
        ("a.jpg~2", b"\xff\xd8\xff2"),
        ("a.jpg~3", b"\xff\xd8\xff3"),
        ("a.jpg~2~2", b"\xff\xd8\xff4"),
        ("b_.jpg", b"\xff\xd8\xff5"),
        ("b_.jpg~2", b"\xff\xd8\xff6"),
    ]
    assert problems == []


def test_a_folder_and_an_inner_archive_of_one_name_stay_apart(tmp_path):
    inner = tar({"a.jpg": PNG, "b.jpg": PNG})
    members, _, _ = read(
        tmp_path,
        tar(
            [
                ("n.tar/a.jpg", JPEG),
                ("n.tar", inner),
                ("n.tar/b.jpg", JPEG),
                ("n.tar~2/b.jpg", JPEG),
                ("n.tar", inner),
            ]
        ),
    )
    assert sorted(members.values(), key=len) == sorted([JPEG] * 3 + [PNG] * 4, key=len)
    assert members["n.tar/a.jpg"] == JPEG
    assert members["n.tar~2/a.jpg"] == PNG
    assert members["n.tar~2~b.jpg"] == JPEG


def test_thousands_of_equal_names_take_no_day(tmp_path):
    one = header("a.jpg", 3) + padded(b"\xff\xd8\xff")
    members, problems, _ = read(tmp_path, one * 30_000 + tar({}))
    assert len(members) == 30_000
    assert problems == []


def test_links_devices_and_hidden_files_are_counted(tmp_path):
    files = {
        "a.jpg": JPEG,
        "hard.jpg": special(tarfile.LNKTYPE, "/etc/passwd"),
        "soft.jpg": special(tarfile.SYMTYPE, "../../x"),
        "fifo.jpg": special(tarfile.FIFOTYPE),
        "null.jpg": special(tarfile.CHRTYPE),
        "disk.jpg": special(tarfile.BLKTYPE),
        "d": special(tarfile.DIRTYPE),
        "._a.jpg": JPEG,
        ".git/x.jpg": JPEG,
        "__MACOSX/a.jpg": JPEG,
        "quarantine/a.jpg": JPEG,
        "./b.jpg": PNG,
    }
    members, problems, reader = read(tmp_path, tar(files))
    assert members == {"a.jpg": JPEG, "b.jpg": PNG}
    assert problems == []
    assert reader.passed == {"links": 2, "devices": 3, "hidden": 4}


def test_links_with_a_size_have_no_data(tmp_path):
    content = (
        header("l.jpg", 999, tarfile.LNKTYPE) + header("a.jpg", len(JPEG)) + padded(JPEG) + tar({})
    )
    assert read(tmp_path, content)[:2] == ({"a.jpg": JPEG}, [])


def sparse_header(real_size: int, stored: int, extensions: int = 0) -> bytes:
    """An old GNU sparse member: `stored` bytes of data; the rest is holes."""
    block = bytearray(header("s.jpg", stored, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0%011o\0" % (0, stored)
    block[482] = extensions > 0
    block[483:495] = b"%011o\0" % real_size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    more = b"".join(
        bytes(504) + bytes([number < extensions - 1]) + bytes(7) for number in range(extensions)
    )
    return bytes(block) + more


@pytest.mark.parametrize("extensions", [0, 3])
def test_sparse_members_are_reported_not_blown_up(tmp_path, extensions):
    content = sparse_header(2**33 - 1, 700, extensions) + padded(bytes(700)) + tar({"a.jpg": JPEG})
    members, problems, _ = read(tmp_path, content)
    assert members == {"a.jpg": JPEG}
    assert [problem.name for problem in problems] == ["s.jpg"]
    assert "sparse" in problems[0].reason


@pytest.mark.parametrize("form", ["0.0", "0.1", "1.0", "gnu"])
def test_sparse_members_as_gnu_tar_writes_them(tmp_path, form):
    with open(tmp_path / "s.bmp", "wb") as file:
        file.write(PNG)
        file.seek(1 << 20)
        file.write(PNG)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    style = ["--format=gnu"] if form == "gnu" else ["--format=pax", f"--sparse-version={form}"]
    command = ["tar", "-S", *style, "-cf", tmp_path / "gnu.tar", "-C", tmp_path, "s.bmp", "a.jpg"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no GNU tar here")
    items = list(TarReader(tmp_path / "gnu.tar"))
    assert items[1:] == [Member("a.jpg", JPEG)]
    assert isinstance(items[0], Problem)
    assert "sparse" in items[0].reason


def test_a_corrupt_inner_header_loses_the_rest_of_that_archive_only(tmp_path):
    inner = bytearray(tar({f"{number}.jpg": JPEG for number in range(5)}, tarfile.USTAR_FORMAT))
    inner[2 * (512 + len(padded(JPEG))) + 5] ^= 0xFF
    members, problems, _ = read(
        tmp_path,
        tar({"a.tar": tar({"x.jpg": PNG}), "b.tar": bytes(inner), "c.tar": tar({"y.jpg": PNG})}),
    )
    assert set(members) == {"a.tar/x.jpg", "b.tar/0.jpg", "b.tar/1.jpg", "c.tar/y.jpg"}
    assert [problem.name for problem in problems] == ["b.tar"]
    assert "corrupt header" in problems[0].reason
    assert "after 2 members" in problems[0].reason


def test_damaged_inner_archives_are_problems_by_their_names(tmp_path):
    files = {
        "junk.tar": b"junk" * 500,
        "empty.tar": b"",
        "junk.tar.gz": b"junk" * 500,
        "cut.tgz": gzip.compress(tar({"a.jpg": os.urandom(5000)}))[:60],
        "zstd.tar.zst": b"\x28\xb5\x2f\xfd" + bytes(600),
        "none.tar": tar({}),
        "fine.jpg": JPEG,
    }
    members, problems, _ = read(tmp_path, tar(files))
    assert members == {"fine.jpg": JPEG}
    assert [problem.name for problem in problems] == [name for name in files if name != "fine.jpg"]
    reasons = {problem.name: problem.reason for problem in problems}
    assert "without members" in reasons["none.tar"]
    assert "zstd" in reasons["zstd.tar.zst"] or sys.version_info >= (3, 14)


def test_inner_archive_that_claims_more_than_it_is(tmp_path):
    """Its last member extends beyond its own end, into the next member of the outer archive."""
    inner = header("x.jpg", 5000) + padded(JPEG)
    members, problems, _ = read(tmp_path, tar({"a.tar": inner, "b.tar": tar({"y.jpg": PNG})}))
    assert members == {"b.tar/y.jpg": PNG}
    assert [problem.name for problem in problems] == ["a.tar"]
    assert "truncated within x.jpg" in problems[0].reason


def test_cut_anywhere_what_came_before_is_used_and_the_cut_is_said(tmp_path):
    whole = tar({"a.tar": tar({"0.jpg": JPEG, "1.jpg": PNG}), "b.png": PNG}, tarfile.USTAR_FORMAT)
    whole = padded(whole.rstrip(b"\0"))
    expected = read(tmp_path, whole + bytes(1024))[0]
    assert set(expected) == {"a.tar/0.jpg", "a.tar/1.jpg", "b.png"}
    seen = set()
    for end in [*range(600, len(whole), 211), *range(512, len(whole) + 1, 512)]:
        members, problems, _ = read(tmp_path, whole[:end])
        assert members.items() <= expected.items()
        assert problems, end
        assert problems[-1].name == ""
        seen.add(len(members))
    assert seen == {0, 1, 2, 3}


def test_ten_terabytes_in_a_header_cost_nothing(tmp_path):
    """As a photograph, as another file, as an extended header.

    Skipping must end where the file ends.
    """
    claims = [
        header("a.jpg", 10**13),
        header("a.txt", 10**13),
        header("a.jpg", 2**63 - 1),
        header("x", 10**13, tarfile.XHDTYPE),
        header("x", 10**13, tarfile.GNUTYPE_LONGNAME),
        header("x", 10**13, tarfile.XGLTYPE),
    ]
    for claim in claims:
        for pack in (bytes, gzip.compress):
            members, problems, _ = read(
                tmp_path, pack(tar({"0.jpg": JPEG}, tarfile.USTAR_FORMAT)[: 512 * 10] + claim)
            )
            assert set(members) <= {"0.jpg"}
            assert problems[-1].name == ""
    members, problems, _ = read(
        tmp_path, header("0.jpg", len(JPEG)) + padded(JPEG) + claims[0] + JPEG
    )
    assert members == {"0.jpg": JPEG}
    assert "exceed the limit" in problems[0].reason
    assert "truncated within a.jpg" in problems[1].reason


def test_negative_sizes_do_not_go_backwards(tmp_path):
    for kind in (
        tarfile.REGTYPE,
        tarfile.XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
    ):
        content = (
            header("0.jpg", len(JPEG))
            + padded(JPEG)
            + header("a.jpg", -1536, kind)
            + padded(JPEG)
            + tar({})
        )
        members, problems, _ = read(tmp_path, content)
        assert members == {"0.jpg": JPEG}
        assert len(problems) == 1


@pytest.mark.parametrize(
    "record",
    [
        b"11 size=-5\n",
        b"0 size=5\n",
        b"99999 path=a\n",
        b"path=a\n",
        b"9 path=a",
        b"\0" * 9,
        b"99999999999999999999999 path=a\n",
        b"12 size=1e9\n",
        b"x" * 600,
    ],
)
def test_broken_pax_headers(tmp_path, record):
    start = header("0.jpg", len(JPEG)) + padded(JPEG)
    content = (
        start
        + header("x", len(record), tarfile.XHDTYPE)
        + padded(record)
        + header("a.jpg", 3)
        + padded(b"abc")
    )
    members, problems, _ = read(tmp_path, content + tar({}))
    assert members == {"0.jpg": JPEG}
    assert len(problems) == 1
    assert "extended header" in problems[0].reason


def test_a_million_extended_headers_are_no_recursion(tmp_path):
    chain = (header("x", 9, tarfile.XHDTYPE) + padded(b"9 path=a\n")[:512]) * 20_000
    assert read(tmp_path, chain + header("b.jpg", len(JPEG)) + padded(JPEG) + tar({}))[0] == {
        "a": JPEG
    }
    chain = (header("x", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"long\0")) * 20_000
    assert read(tmp_path, chain + header("b.jpg", len(JPEG)) + padded(JPEG) + tar({}))[0] == {
        "long": JPEG
    }


def test_tars_put_one_behind_another_are_all_read(tmp_path):
    """`cat a.tar b.tar`; most readers stop at the first end mark."""
    content = tar({"a.jpg": JPEG}) + tar({"b.jpg": PNG})
    assert read(tmp_path, content)[:2] == ({"a.jpg": JPEG, "b.jpg": PNG}, [])
    members, problems, _ = read(tmp_path, tar({"a.jpg": JPEG}) + b"something else" * 100)
    assert members == {"a.jpg": JPEG}
    assert "followed by data that is not a tar archive" in problems[0].reason


def test_a_hole_in_place_of_members_is_noticed(tmp_path):
    """Downloads that allocate the whole file first leave zeros where parts are missing."""
    members, problems, _ = read(tmp_path, tar({"a.jpg": JPEG}) + bytes(5 << 20))
    assert members == {"a.jpg": JPEG}
    assert "unfinished download" in problems[0].reason
    with open(tmp_path / "zeros.tar", "wb") as file:
        file.truncate(1 << 40)
    assert ["zero bytes" in item.reason for item in TarReader(tmp_path / "zeros.tar")] == [True]


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"]
)
@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a.tar"])
def test_decompression_bombs(tmp_path, pack, name):
    content = tar({"0.jpg": JPEG, name: bytes(8 << 20)})
    members, problems, _ = read(tmp_path, pack(content), free_bytes=1 << 20, expansion=10)
    assert members == {"0.jpg": JPEG}
    assert "10 times its size" in problems[-1].reason
    # In an outer archive, plain or compressed again, the whole archive is abandoned.
    outer = tar({"0.jpg": JPEG, "in.tar": pack(content), "1.jpg": JPEG})
    for outermost in (outer, pack(outer)):
        members, problems, _ = read(tmp_path, outermost, free_bytes=1 << 20, expansion=10)
        assert set(members) == {"0.jpg", "in.tar/0.jpg"}
        assert [problem.name for problem in problems] == [""]


def test_ordinary_compressed_archives_are_no_bombs(tmp_path):
    flat = encoded(np.full((500, 500, 3), 7, np.uint8), "bmp")
    assert (
        read(tmp_path, gzip.compress(tar({f"{number}.bmp": flat for number in range(9)})))[1] == []
    )


def test_xz_cannot_ask_for_any_memory(tmp_path):
    packed = bytearray(lzma.compress(tar({"a.jpg": JPEG})))
    # the LZMA2 filter, whose single byte is the size of its dictionary
    assert packed[14:16] == b"\x21\x01"
    packed[16] = 40  # 4 GiB
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    (tmp_path / "a.tar.xz").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.tar\.xz.*Memory usage limit"):
        check_archive(tmp_path / "a.tar.xz")


def test_large_members_many_members_and_deep_archives_are_limited(tmp_path):
    members, problems, _ = read(
        tmp_path,
        tar({"a.jpg": JPEG, "b.jpg": JPEG + bytes(9999), "c.jpg": JPEG}),
        member_bytes=len(JPEG),
    )
    assert set(members) == {"a.jpg", "c.jpg"}
    assert [problem.name for problem in problems] == ["b.jpg"]
    members, problems, _ = read(
        tmp_path, tar({f"{number}.jpg": JPEG for number in range(9)}), names=5
    )
    assert len(members) == 5
    assert "more than 5 names" in problems[0].reason
    content = tar({"a.jpg": JPEG})
    for _ in range(4):
        content = tar({"a.jpg": JPEG, "in.tar": content})
    members, problems, _ = read(tmp_path, content)
    assert set(members) == {"a.jpg", "in.tar/a.jpg", "in.tar/in.tar/a.jpg"}
    assert problems[0].name == "in.tar/in.tar/in.tar"


def test_unwanted_members_are_not_even_read(tmp_path):
    """A plain archive is skipped without touching the file's pages; names do not change."""
    files = [
        ("a.jpg", JPEG),
        ("in.tar", tar([("b.jpg", JPEG), ("b.jpg", PNG)])),
        ("a.jpg", PNG),
        ("c.txt", b"text"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(files))
    asked = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return name in ("in.tar", "in.tar/b.jpg~2")

    assert list(TarReader(tmp_path / "a.tar", wanted=wanted)) == [Member("in.tar/b.jpg~2", PNG)]
    assert asked == ["a.jpg", "in.tar", "in.tar/b.jpg", "in.tar/b.jpg~2", "a.jpg~2", "c.txt"]


def test_what_is_no_archive_on_a_disk_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    for path, word in (
        (tmp_path / "fifo.tar", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "gone.tar", "no such file"),
    ):
        with pytest.raises(UserError, match=word):
            check_archive(path)
        with pytest.raises(UserError, match=word):
            list(TarReader(path))
    contents = {
        b"": "empty",
        b"PK\3\4" + bytes(600): "a zip archive",
        b"text" * 300: "not a tar archive",
        gzip.compress(b"text" * 300): "not a tar archive",
        gzip.compress(b"")[:12]: "truncated",
        JPEG: "not a tar",
        b"7z\xbc\xaf\x27\x1c" + bytes(600): "7-zip",
        _BAD_GZIP: "damaged",
    }
    if sys.version_info < (3, 14):
        contents[b"\x28\xb5\x2f\xfd" + bytes(600)] = (
            "zstd, which needs Python 3.14; decompress it with `unzstd`"
        )
    for content, words in contents.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=words):
            check_archive(tmp_path / "a.tar")


def test_an_archive_that_changes_meanwhile_is_reported(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"a.jpg": JPEG, "b.jpg": JPEG}))
    items = iter(TarReader(path))
    assert next(items) == Member("a.jpg", JPEG)
    os.utime(path, ns=(0, 0))
    assert list(items)[-1] == Problem("", "it changed while being read; run the same command again")


def test_any_bytes_are_survived(tmp_path):
    """Flipped, dropped and doubled bytes give problems, never an exception or a hang.

    Applies to plain and compressed archives.
    """
    rng = np.random.default_rng(0)
    whole = tar(
        {
            "a.tar": tar({"ö" * 90 + ".jpg": JPEG[:900]}),
            "b.tgz": gzip.compress(tar({"c.png": PNG[:900]})),
            "d": special(tarfile.SYMTYPE, "x" * 200),
            "e.jpg": JPEG[:900],
        }
    )
    whole = whole[: len(whole.rstrip(b"\0")) + 1536]
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(content) - 1024))
            change = rng.integers(3)
            if change == 0:
                content[at] ^= 1 << int(rng.integers(8))
            elif change == 1:
                del content[at : at + int(rng.integers(1, 600))]
            else:
                content[at:at] = content[at : at + 512]
        path = tmp_path / "a.tar"
        path.write_bytes(gzip.compress(bytes(content), 1) if rng.integers(2) else bytes(content))
        try:
            names = [item.name for item in TarReader(path) if isinstance(item, Member)]
        except UserError:
            continue  # damaged from the first block
        assert len(names) == len(set(names))


_MEMORY_TEST = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tools.tar.members import TarReader, Member
from tools.tar.streams import Limits

def peak():  # not ru_maxrss, which remembers the process that started this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

count = size = 0
before = peak()
for item in TarReader(Path(sys.argv[2]), Limits(free_bytes=1 << 40)):
    assert isinstance(item, Member), item
    count, size = count + 1, size + len(item.data)
print(count, size, before >> 10, peak() >> 10)
"""


def stream_through(path: Path) -> tuple[int, int, int]:
    """Read all members in a fresh process; returns (members, their bytes, memory growth in MiB)."""
    command = [sys.executable, "-c", _MEMORY_TEST, str(CHECKOUT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    count, size, before, after = map(int, done.stdout.split())
    return count, size, after - before


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc"
)
def test_memory_stays_bounded(tmp_path):
    """A tar of a tar of 200 x 1 MiB, plain and as a tar.gz of 1 MB."""
    photo = b"\xff\xd8\xff" + bytes((1 << 20) - 3)
    inner = 200 * (512 + len(photo)) + 1024
    with (
        open(tmp_path / "a.tar", "wb") as file,
        gzip.open(tmp_path / "b.tar.gz", "wb", 1) as packed,
    ):
        for target in (file, packed):
            target.write(header("in.tar", inner))
            for number in range(200):
                target.write(header(f"{number}.jpg", len(photo)) + photo)
            target.write(bytes(1024 + -inner % 512 + 1024))
    for name in ("a.tar", "b.tar.gz"):
        count, size, growth = stream_through(tmp_path / name)
        assert (count, size) == (200, 200 << 20)
        assert growth < 24, name
    os.remove(tmp_path / "a.tar")
