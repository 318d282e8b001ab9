from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch

from fabricate import CHECKOUT, make_run, picture, seal, write_images
from lives import train
from pipeline.cli import UserError
from pipeline.export.torch_file import export_run, verify
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import checkpoint_dir, run_network_file

# As sitecustomize.py, every Python with it on its path imports it: it hides the three packages.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "nvidia", "torchvision"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""


def equal_states(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


@pytest.fixture
def alone(tmp_path):
    """The environment of a machine without DeepSpeed, DALI, torchvision and a GPU."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "blocked"), "CUDA_VISIBLE_DEVICES": ""}


def python(*arguments, cwd, env):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        timeout=120,
        capture_output=True,
        text=True,
    )


def test_the_command_exports_the_best_of_the_newest_run_without_deepspeed(tmp_path, alone):
    # The blocker works.
    assert python("-c", "import deepspeed", cwd=tmp_path, env=alone).returncode == 1
    run = make_run(tmp_path / "runs", best=100, global_residual="bicubic")
    done = python(CHECKOUT / "export_trained_model.py", cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (run / "export").iterdir()} == {
        "demo_x2.pth",
        "demo_x2.safetensors",
    }
    trained = read_network(run_network_file(run, 100, ema=True))
    for suffix in ("pth", "safetensors"):
        found = read_network(run / "export" / f"demo_x2.{suffix}")
        assert equal_states(found.state_dict, trained.state_dict)
        assert (found.name, found.scale, found.params) == (
            trained.name,
            trained.scale,
            trained.params,
        )
        count = sum(parameter.numel() for parameter in trained.build().parameters())
        assert found.metadata == {
            "recipe": "demo",
            "step": "100",
            "weights": "averaged (EMA)",
            "dtype": "float32",
            "parameters": str(count),
            "validation": '{"psnr_y": 30.0}',
        }
        assert f"runs/demo/export/demo_x2.{suffix}" in done.stdout
    assert f"step 100, averaged (EMA) weights in float32, {count:,} parameters" in done.stdout
    # The printed Python code works as printed.
    code = "\n".join(line.split("Python:", 1)[-1].strip() for line in done.stdout.splitlines()[-2:])
    assert (
        python(
            "-c",
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{code}\nassert not "
            "network.training",
            cwd=tmp_path,
            env=alone,
        ).returncode
        == 0
    )


def test_files_have_the_format_that_other_programs_expect(tmp_path):
    run = make_run(tmp_path)
    pickled, flat = export_run(run, "newest").files
    content = torch.load(pickled, weights_only=True)
    trained = read_network(run_network_file(run, 200, ema=True)).state_dict
    assert set(content) == {"params_ema", "vastscale"}
    assert equal_states(content["params_ema"], trained)
    with safetensors.safe_open(str(flat), framework="pt") as file:
        assert set(file.keys()) == set(trained)
        shown = file.metadata()
    assert (shown["architecture"], shown["scale"], shown["recipe"], shown["step"]) == (
        "vapsr",
        "2",
        "demo",
        "200",
    )


def test_metadata_has_dataset_validation_and_licence(dataset, tmp_path):
    """A real run: everything that its index and its log contain, and nothing else."""
    train(
        dataset, tmp_path / "runs" / "real", "steps=8", "validate_every=2", "save_every=4", "keep=9"
    )
    run = tmp_path / "runs" / "real"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    psnr = {line["step"]: line["psnr_y"] for line in lines if line["event"] == "validation"}
    identity = json.loads((run / "checkpoints" / "step-00000004" / "MANIFEST.json").read_text())[
        "identity"
    ]["dataset"]
    exported = export_run(run, 4, license_name="CC-BY-4.0", output_dir=tmp_path / "out")
    assert verify(exported) == []
    for file in exported.files:
        found = read_network(file).metadata
        assert found["license"] == "CC-BY-4.0"
        assert (found["dataset_lists_sha256"], len(found["dataset_lists_sha256"])) == (
            identity["lists_sha256"],
            64,
        )
        assert (found["dataset_training_files"], found["dataset_validation_files"]) == ("10", "3")
        assert json.loads(found["validation"]) == {"psnr_y": psnr[4]}
    raw = export_run(run, 4, raw=True).saved.metadata
    assert not raw.keys() & {"validation", "license"}


def test_the_report_of_the_same_weights_goes_into_the_files(tmp_path):
    run = make_run(tmp_path / "runs", best=100)
    hr = write_images(tmp_path / "hr", {f"{i}.png": picture(48, 64, i) for i in range(3)})
    report, weights = tmp_path / "evaluation.json", run_network_file(run, 100, ema=True)
    done = python(
        CHECKOUT / "evaluate.py",
        "--model",
        weights,
        "--hr",
        hr,
        "--json",
        report,
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    done = python(
        CHECKOUT / "export_trained_model.py",
        run,
        "--evaluation",
        report,
        cwd=tmp_path,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(read_network(run / "export" / "demo_x2.safetensors").metadata["evaluation"])
    expected = json.loads(report.read_text())["mean"]["model"]
    assert found["benchmarks"]["hr"]["images"] == 3
    assert found["benchmarks"]["hr"]["psnr_y"] == pytest.approx(expected["psnr_y"], abs=1e-5)
    with pytest.raises(UserError, match=r"is about weights other than .*; evaluate these first"):
        export_run(run, 200, evaluation=report)
    with pytest.raises(UserError, match=r"is not a report of evaluate.py"):
        export_run(run, 200, evaluation=run / "checkpoints" / "step-00000200" / "state.json")


def test_a_checkpoints_folder_is_its_step(tmp_path):
    run = make_run(tmp_path)
    folder = run / "checkpoints" / "step-00000100"
    exported = export_run(folder)
    assert exported.files[0].parent == run / "export"
    assert exported.saved.metadata["step"] == "100"
    with pytest.raises(UserError, match=r"is step 100, not --step 200"):
        export_run(folder, 200)


def test_raw_and_half_go_into_files_of_their_own(tmp_path):
    run = make_run(tmp_path, global_residual="bicubic")
    export_run(run, 200)
    exported = export_run(run, 100, raw=True, half=True, output_dir=tmp_path / "out")
    assert [path.name for path in exported.files] == [
        "demo_x2_raw_fp16.pth",
        "demo_x2_raw_fp16.safetensors",
    ]
    assert verify(exported) == []
    trained = read_network(run_network_file(run, 100, ema=False)).state_dict
    for file in exported.files:
        found = read_network(file)
        assert found.metadata["dtype"] == "float16"
        # A buffer: rounding it would tint the image.
        assert found.state_dict["residual_kernel"].dtype == torch.float32
        assert equal_states(
            found.state_dict,
            {
                key: tensor if key == "residual_kernel" else tensor.half()
                for key, tensor in trained.items()
            },
        )


def test_the_dtype_is_that_of_the_weights_not_of_integer_tables(tmp_path):
    params = {"arch": "HAT", "embed_dim": 12, "depths": [2], "num_heads": [2], "squeeze_factor": 4}
    state = build_generator("spandrel", 2, **params).state_dict()
    assert not next(iter(state.values())).is_floating_point()
    run = make_run(tmp_path, steps=(100,))
    write_network(run_network_file(run, 100, ema=True), SavedNetwork("spandrel", 2, params, state))
    seal(checkpoint_dir(run, 100), 100)
    assert export_run(run, "newest").saved.metadata["dtype"] == "float32"


@pytest.mark.parametrize("params", [{}, {"activation": "relu", "rdb_residual_scale": 0.3}])
def test_what_other_programs_do_not_see_is_said(tmp_path, capsys, params):
    from pipeline.export.torch_file import run_export

    params = {"num_features": 8, "num_blocks": 1, **params}
    state = build_generator("rrdbnet", 4, **params).state_dict()
    run = make_run(tmp_path, steps=(100,))
    write_network(run_network_file(run, 100, ema=True), SavedNetwork("rrdbnet", 4, params, state))
    seal(checkpoint_dir(run, 100), 100)
    assert run_export(run, "newest", False, False, "", None, None) == 0
    note = (
        "note: other programs do not see activation relu, rdb_residual_scale 0.3 in the tensors; "
        "they would compute other images, with activation leakyrelu, rdb_residual_scale 0.2\n"
    )
    assert (note in capsys.readouterr().out) == (len(params) > 2)


def test_verify_detects_a_flipped_bit_and_changed_metadata(tmp_path):
    exported = export_run(make_run(tmp_path), "newest")
    assert verify(exported) == []
    file = exported.files[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [
        str(file) in fault and "not contain the tensors that were written" in fault
        for fault in verify(exported)
    ] == [True]
    content[-1] ^= 1
    step = content.rindex(b'\\"step\\"')  # in the metadata: JSON inside the header's JSON
    content[step:] = content[step:].replace(b"200", b"201", 1)
    file.write_bytes(content)
    assert ["not contain the metadata that was written" in fault for fault in verify(exported)] == [
        True
    ]


def test_a_file_that_reads_back_wrong_is_exit_1(tmp_path, monkeypatch, capsys):
    from pipeline.export import torch_file

    run = make_run(tmp_path, best=200)
    monkeypatch.setattr(torch_file, "write_network", _writing_zeros(torch_file.write_network))
    assert (
        torch_file.run_export(
            run, "best", raw=False, half=False, license="", evaluation=None, output_dir=None
        )
        == 1
    )
    captured = capsys.readouterr()
    assert captured.err.count("does not contain the tensors that were written") == 2
    assert captured.out == ""


def _writing_zeros(write):
    def write_zeros(path, saved):
        zeros = {key: torch.zeros_like(tensor) for key, tensor in saved.state_dict.items()}
        write(path, type(saved)(saved.name, saved.scale, saved.params, zeros, saved.metadata))

    return write_zeros


def test_export_errors_are_one_line(tmp_path, alone):
    cases = {"no run with a checkpoint in 'runs'": (), "no run folder 'runs/none'": ("runs/none",)}
    for message, arguments in cases.items():
        done = python(CHECKOUT / "export_trained_model.py", *arguments, cwd=tmp_path, env=alone)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert message in done.stderr
    run = make_run(tmp_path / "runs", best=100)
    done = python(
        CHECKOUT / "export_trained_model.py", run, "--step", "150", cwd=tmp_path, env=alone
    )
    assert done.returncode == 2
    assert "no complete checkpoint of step 150; choose from best, newest, 100, 200" in done.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*choose another --output-dir"):
        export_run(run, "best", output_dir=tmp_path / "file")


def test_importing_does_nothing_and_needs_no_training_packages(tmp_path, alone):
    code = (
        "import sys, torch; before = torch.random.get_rng_state().clone()\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "import pipeline.export.torch_file, pipeline.evaluation.command, evaluate, "
        "export_trained_model\n"
        "assert torch.equal(before, torch.random.get_rng_state())"
    )
    done = python("-c", code, cwd=tmp_path, env=alone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
