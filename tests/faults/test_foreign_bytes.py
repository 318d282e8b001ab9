"""Whatever the bytes of a foreign file, a command ends with one clear line, and soon.

The files here are the ones that once ended in a traceback, hung or filled the memory;
benchmarks/fuzz.py looks for more.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import warm
from benchmarks.fuzz_readers import READERS
from conftest import ROOT, environment
from dataset_corpus import UNGATED, encoded, photograph, run_tool
from pipeline.cli import LONGEST_MESSAGE, UserError, exit_status
from pipeline.config.ds_config import load_ds_config
from pipeline.config.recipe import load_stages, parse_overrides
from pipeline.data.image_files import BadNpyError, npy_layout_of, read_file_list
from pipeline.data.image_headers import BadImageError, read_header
from pipeline.files import open_regular_file
from pipeline.models import build_generator
from pipeline.models.weights import read_network
from tools.crops.manifest import parse_line

JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
JXL = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
FAR = (1 << 61, (1 << 62) + 1, (1 << 63) + 5, (1 << 64) - 1)


def siz(tile: tuple[int, int] = (8, 8), steps: tuple[int, int] = (1, 1)) -> bytes:
    """Return a JPEG 2000 codestream of 8x8 gray pixels up to its end."""
    size = struct.pack(">HHHIIIIIIIIH", 0xFF51, 41, 0, 8, 8, 0, 0, *tile, 0, 0, 1)
    cod = struct.pack(">HH10B", 0xFF52, 12, 0, 0, 0, 1, 0, 1, 4, 4, 0, 0)
    return b"\xff\x4f" + size + struct.pack(">BBB", 7, *steps) + cod + b"\xff\xd9"


def bad_images() -> dict[str, bytes]:
    """Name -> content, with numbers that no file of this length can have."""
    files = {}
    for number, far in enumerate(FAR):
        box = struct.pack(">I4sQ", 1, b"free", far)
        files[f"{number}.jp2"] = (JP2 + box).ljust(128, b"\0")
        files[f"{number}.tif"] = (b"II+\0" + struct.pack("<HHQ", 8, 0, far)).ljust(216, b"\0")
        files[f"{number}.jxl"] = (JXL + box).ljust(128, b"\0")
    files["endless.jxl"] = (JXL + struct.pack(">I4sQ", 1, b"free", 0)).ljust(128, b"\0")
    files["no_tile.jp2"] = siz(tile=(0, 8))
    files["outside.jp2"] = siz(tile=(8, 0))
    files["no_step.jp2"] = siz(steps=(0, 1))
    files["comment.pbm"] = b"P4 2 2#c\n"
    return files


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bad_images()[name])
    with open(tmp_path / name, "rb") as file, pytest.raises(BadImageError):
        read_header(file)


def test_bad_images_do_not_block_an_import(tmp_path: Path) -> None:
    """Each is rejected with its reason, by the tool that cuts and by the one that checks."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in bad_images().items():
        (photos / name).write_bytes(content)
    for seed in range(2):
        (photos / f"good{seed}.png").write_bytes(encoded(photograph(80, 80, seed), "png"))
    done = run_tool("images_to_data", photos, tmp_path / "out", "--size", 64, *UNGATED)
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    lines = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    rejects = {entry["photo"]: entry["reason"] for entry in lines}
    found = {name for name in bad_images() if name.rsplit(".")[-1] != "pbm"}
    assert found <= rejects.keys()
    assert all(rejects.values())
    crops = {path.parent.name for path in (tmp_path / "out").rglob("*.npy")}
    assert crops == {"good0.png", "good1.png"}
    done = run_tool("check_training_data", "--data-dir", photos, "--min-size", 1, *UNGATED)
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    for name in found:
        assert f"bad: {name}: " in done.stdout


BOMB = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {k%d: 1, <<: [%s]}\n" % (98 + n, 98 + n, n, b", ".join([b"*%c" % (97 + n)] * 9))
    for n in range(8)
)
BAD_YAML = {
    "not UTF-8": b"name: caf\xe9\n",
    "a list": b"[]",
    "null": b"null",
    "a date": b"steps: 2024-99-99\n",
    "a date without a year": b"steps: 0001-01-01T00:00:00+14:00\n",
    "digits": b"steps: " + b"9" * 5000 + b"\n",
    "a large number": b"steps: " + b"9" * 400 + b"\n",
    "brackets": b"steps: " + b"[" * 3000 + b"\n",
    "open tables": b"steps: " + b"{a: " * 3000 + b"\n",
    "merges": BOMB,
    "itself": b"data: &a [*a]\n",
    "no switch": b"compile: !!bool maybe\n",
    "no number": b'steps: !!int ""\n',
    "a long file": b"# comment\n" * 100_000,
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_a_bad_recipe_ends_in_one_line(tmp_path: Path, case: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(BAD_YAML[case])
    for read in (lambda: load_stages(str(tmp_path / "bad.yaml")), *READERS["search"].read):
        with pytest.raises(UserError) as error:
            read(tmp_path / "bad.yaml") if read in READERS["search"].read else read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["2024-99-99", "9" * 5000, "[" * 3000, "&a [*a]", "\ud800"])
def test_a_bad_override_ends_in_one_line(value: str) -> None:
    with pytest.raises(UserError) as error:
        load_stages("demo", parse_overrides([f"steps={value}"])[0])
    assert "\n" not in str(error.value)


def test_aliases_are_counted_as_often_as_they_occur(tmp_path: Path) -> None:
    """Usual anchors and merges still work; a bomb of 400 bytes is refused without expanding it."""
    (tmp_path / "good.yaml").write_text(
        "base: demo\nstages:\n  one: &one {steps: 10, data: {crop: 64}}\n"
        "  two: {<<: *one, steps: 20}\n"
    )
    first, second = load_stages(str(tmp_path / "good.yaml"))
    assert (first.steps, second.steps, second.data.crop) == (10, 20, 64)
    assert len(BOMB) < 500
    (tmp_path / "bomb.yaml").write_bytes(BOMB)
    with pytest.raises(UserError, match="more than 10000 values"):
        load_stages(str(tmp_path / "bomb.yaml"))


BAD_JSON = {
    "not UTF-8": b'{"train_batch_size": "caf\xe9"}',
    "a list": b"[]",
    "null": b"null",
    "digits": b'{"train_batch_size": ' + b"9" * 5000 + b"}",
    "brackets": b"[" * 3000,
    "infinite": b'{"train_batch_size": 16, "gradient_clipping": 1e400, "optimizer": '
    b'{"type": "Adam", "params": {"lr": 0.1}}}',
    "not a number": b'{"train_batch_size": 16, "optimizer": '
    b'{"type": "Adam", "params": {"betas": [0.9, NaN]}}}',
    "empty": b"",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_ds_config_ends_in_one_line(tmp_path: Path, case: str) -> None:
    (tmp_path / "bad.json").write_bytes(BAD_JSON[case])
    with pytest.raises(UserError) as error:
        load_ds_config(tmp_path / "bad.json")
    assert "\n" not in str(error.value)
    assert "bad.json" in str(error.value)


def test_commands_print_that_line(tmp_path: Path, dataset: Path) -> None:
    """The launcher reads recipe and ds_config before anything else."""
    (tmp_path / "bad.yaml").write_bytes(BAD_YAML["a date"])
    (tmp_path / "bad.json").write_bytes(BAD_JSON["brackets"])
    for flags in (
        ["--recipe", str(tmp_path / "bad.yaml")],
        ["--recipe", "demo", "--ds-config", str(tmp_path / "bad.json")],
    ):
        done = subprocess.run(
            [warm.python(), str(ROOT / "launch/local.py"), "--dataset-dir", str(dataset), *flags],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "tmp" in done.stderr
        assert "bad." in done.stderr


def test_a_message_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("start " + "x" * 100_000 + " way out")

    assert exit_status(fail) == 2
    line = capsys.readouterr().err
    assert len(line) < LONGEST_MESSAGE + 50
    assert line.startswith("error: start ")
    assert line.endswith(" way out\n")


def test_named_pipes_are_refused_at_once(tmp_path: Path) -> None:
    """Reading one would wait for a writer, before any watchdog runs."""
    for name in ("training_file_list.txt", "ds_config.json", "a.png"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: read_file_list(tmp_path / "training_file_list.txt", tmp_path),
        lambda: load_ds_config(tmp_path / "ds_config.json"),
    ):
        with pytest.raises(UserError, match="not a regular file"):
            read()
    for name in ("_upscale_image", "_convert_image"):
        read = next(read for read in READERS["images"].read if read.__name__ == name)
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "a.png")
    with pytest.raises(IsADirectoryError):
        open_regular_file(tmp_path)


def described(path: Path, description: str) -> Path:
    """Write a small network whose description is `description`."""
    tensors = build_generator("srresnet", 2, num_features=4, num_blocks=1).state_dict()
    safetensors.torch.save_file(tensors, path, {"vastscale": description})
    return path


@pytest.mark.parametrize(
    "fields",
    [
        '{"name": "srresnet", "scale": 1e400, "params": {}}',
        '{"name": "srresnet", "scale": 2, "params": {"num_features": 1e400}}',
        '{"name": "srresnet", "scale": 2, "params": {"num_features": 65536}}',
        '{"name": "srresnet", "scale": 2, "params": {"num_blocks": 65536}}',
        '{"name": "srresnet", "scale": 2, "params": {"num_features": 500, "num_blocks": 50}}',
        '{"name": "spandrel", "scale": 2, "params": {"arch": "SPAN", "feature_channels": 99999}}',
        "[" * 3000,
        "9" * 5000,
    ],
)
def test_a_description_is_not_believed(tmp_path: Path, fields: str) -> None:
    """No network is built in sizes that the tensors do not have."""
    path = described(tmp_path / "a.safetensors", fields)
    with pytest.raises(UserError) as error:
        read_network(path).build()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pth_bomb_is_refused_unread(tmp_path: Path) -> None:
    """A deflated file of 1.9 MB would take 2 GB; several names for the same values may, too."""
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(96 << 20))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    torch.save({"a": torch.zeros(1).expand(1 << 30)}, tmp_path / "view.pth")
    for name in ("bomb.pth", "view.pth"):
        with pytest.raises(UserError, match="decompression bomb"):
            read_network(tmp_path / name)


def test_a_damaged_name_in_a_pth_is_no_traceback(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    # The flag of UTF-8 names, in the central directory, before a name that is not.
    at = content.rindex(b"PK\1\2")
    changed = bytearray(content)
    changed[at + 9] |= 8
    changed[at + 46] = 0xFF
    (tmp_path / "a.pth").write_bytes(changed)
    with pytest.raises(UserError, match="is it damaged"):
        read_network(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_a_network_file_without_inputs_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "openvino":
        xml = '<?xml version="1.0"?><net name="a" version="11"><layers/><edges/></net>'
        (tmp_path / "a.xml").write_text(xml)
        (tmp_path / "a.bin").write_bytes(b"")
        path = tmp_path / "a.xml"
    else:
        import onnx
        from onnx import helper

        value = helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [1.0])
        node = helper.make_node("Constant", [], ["y"], value=value)
        output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        graph = helper.make_graph([node], "a", [], [output])
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        onnx.save(model, tmp_path / "a.onnx")
        path = tmp_path / "a.onnx"
    with pytest.raises(UserError, match="no input"):
        READERS[kind].read[0](path)


def test_numbers_of_an_npy_header_are_checked() -> None:
    for shape in (f"({'9' * 400}, 4, 3)", f"({'9' * 5000}, 4, 3)", "(-1, 4, 3)", "(1.5, 4, 3)"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        head = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
        with pytest.raises(BadNpyError) as error:
            npy_layout_of("a.npy", head + bytes(60))
        assert error.value.reason


def test_lines_of_a_manifest_that_no_tool_wrote_are_not_taken() -> None:
    sample = READERS["crop_manifest"].samples()[0].content
    assert parse_line(sample) is not None
    values = json.loads(sample)
    for change in (
        {"size": 10**30},
        {"bytes": -(10**30)},
        {"gates": {"gradient": "steep"}},
        {"gates": {"gradient": 10**400}},
        {"gates": {"hash": "0g"}},
        {"gates": {"hash": "00"}},
        {"time": 10**400},
    ):
        assert parse_line(json.dumps({**values, **change})) is None, change
    assert parse_line("[" * 3000) is None


@pytest.mark.parametrize("name", READERS)
def test_the_samples_of_the_fuzzer_are_valid(tmp_path: Path, name: str) -> None:
    """Otherwise mutations of them would test little."""
    reader = READERS[name]
    for number, sample in enumerate(reader.samples()):
        folder = tmp_path / str(number)
        for other, content in {**sample.beside, sample.name: sample.wrap(sample.content)}.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        accepted = 0
        for read in reader.read:
            try:
                read(folder / sample.name)
                accepted += 1
            except reader.clear:  # such as 16 bits for convert_dataset.py
                pass
        assert accepted, sample.name


def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    """Mutated files of every kind; a failing one is kept, and the table names it."""
    done = subprocess.run(
        [
            warm.python(),
            str(ROOT / "benchmarks/fuzz.py"),
            "--minutes",
            "0.15",
            "--seed",
            "7",
            "--state",
            str(tmp_path / "fuzz.jsonl"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:]}
    assert counts.keys() == READERS.keys()
    assert all(int(inputs) > 0 for inputs, *_ in counts.values())


@pytest.mark.parametrize(
    ("scale", "shape", "words"),
    [
        ("4", ("n", 3, "h", "w"), "says that its scale is 4, but turns"),
        ("2", (1 << 30, 3, "h", "w"), "more than 64 Mi pixels"),
        ("2", (1, 3, 1 << 20, 1 << 20), "more than 64 Mi pixels"),
    ],
)
def test_a_network_file_is_not_believed(
    tmp_path: Path, scale: str, shape: tuple[int | str, ...], words: str
) -> None:
    """Neither the scale in its metadata nor the size of its input is used unchecked."""
    import onnx

    model = onnx.load_from_string(READERS["onnx"].samples()[0].content)
    params = json.dumps({"num_features": 4, "num_blocks": 1})
    described = {"architecture": "srresnet", "scale": scale, "params": params}
    onnx.helper.set_model_props(model, described)
    values = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    model.graph.input[0].CopyFrom(values)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=words):
        READERS["onnx"].read[0](tmp_path / "a.onnx")
