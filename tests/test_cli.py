"""Bad command lines end with one clear line and exit status 2, before anything is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import warm
from conftest import ROOT, assert_one_line, command, environment, run
from pipeline.run_folder import checkpoint_steps

COMMANDS = [
    "train.py",
    "launch/local.py",
    "evaluate.py",
    "export_trained_model.py",
    "tools/images_to_data.py",
    "tools/check_training_data.py",
    "tools/select_training_files.py",
    "tools/make_demo_dataset.py",
]


def script(
    name: str, *arguments: str, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    variables = environment() | ({"HOME": str(home)} if home else {})
    return subprocess.run(
        [warm.python(), str(ROOT / name), *arguments],
        env=variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_and_an_unknown_option_names_the_nearest(name: str, tmp_path: Path) -> None:
    done = script(name, "--help", home=tmp_path)
    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert "default" in done.stdout or name.endswith("make_demo_dataset.py")
    assert_one_line(
        script(name, "--hepl", home=tmp_path), "unknown option --hepl; did you mean '--help'?"
    )
    assert list(tmp_path.iterdir()) == []


def unread(name: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose stdout is a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [warm.python(), str(ROOT / name), *arguments],
            env={**environment(), **variables},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)


def test_help_without_a_reader_is_no_error() -> None:
    done = unread("tools/benchmark_formats.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_when_the_reader_is_gone(tmp_path: Path, unbuffered: str) -> None:
    """`check_training_data.py --clean ... | head -1` cleans everything, and its exit status still
    says that files were bad."""
    for number in range(5):
        (tmp_path / f"{number}.npy").write_bytes(b"")
    done = unread(
        "tools/check_training_data.py",
        "--data-dir",
        str(tmp_path),
        "--clean",
        PYTHONUNBUFFERED=unbuffered,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quarantine"]
    assert sorted(path.name for path in (tmp_path / "quarantine").glob("*.npy")) == [
        f"{n}.npy" for n in range(5)
    ]


COMMAND = """
import subprocess, sys
from dataclasses import dataclass
from pathlib import Path
from pipeline.cli import UserError, run

@dataclass
class Options:
    out: Path
    fault: str = ""

def main(options):
    for number in range(100_000):
        print(number)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    options.out.write_text("done")
    if options.fault == "user":
        raise UserError("a bad thing; do another")
    if options.fault == "pipe":
        raise BrokenPipeError("of another pipe")
    return 3

run(Options, main, ends_with_reader=%s)
"""


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("", 3, ""),
        ("user", 2, "error: a bad thing; do another\n"),
        ("pipe", 1, "BrokenPipeError: of another pipe"),
    ],
)
def test_the_status_does_not_depend_on_the_reader(
    tmp_path: Path, fault: str, status: int, error: str
) -> None:
    (tmp_path / "command.py").write_text(COMMAND % False)
    arguments = ("--out", str(tmp_path / "out"), *(("--fault", fault) if fault else ()))
    done = unread(tmp_path / "command.py", *arguments)
    assert done.returncode == status
    assert error in done.stderr
    assert bool(error) == bool(done.stderr)
    assert (tmp_path / "out").read_text() == "done"
    whole = script(str(tmp_path / "command.py"), *arguments)
    assert whole.returncode == status
    assert whole.stdout == "".join(f"{number}\n" for number in range(100_000)) + "from a child\n"


def test_a_command_that_only_tells_ends_with_its_reader(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND % True)
    done = unread(tmp_path / "command.py", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "status", "error"),
    [
        (
            "/dev/full",
            1,
            "error: cannot write to stdout: No space left on device; free space where it is "
            "redirected\n",
        ),
        ("&-", 0, ""),
    ],
)
@pytest.mark.parametrize("what", ["--help", '--data-dir "$DATASET"'])
def test_stdout_that_cannot_be_written(
    dataset: Path, what: str, target: str, status: int, error: str
) -> None:
    if target == "/dev/full" and not os.path.exists(target):
        pytest.skip("only Linux has /dev/full")
    line = f'"{sys.executable}" tools/list_data_folders.py {what} >{target}'
    done = subprocess.run(
        ["sh", "-c", line],
        env={**environment(), "DATASET": str(dataset)},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, error)


def test_the_status_does_not_depend_on_who_reads_the_errors() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["--hepl"], ["--data-dir", "/nowhere"]):
        command_line = [sys.executable, str(ROOT / "tools/check_training_data.py"), *arguments]
        assert (
            subprocess.run(
                command_line,
                env=environment(),
                stdout=writer,
                stderr=writer,
                timeout=60,
                check=False,
            ).returncode
            == 2
        )
    os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recpie", "demo"), "unknown option --recpie; did you mean '--recipe'?"),
        (("--procs", "two"), "Error parsing --procs: invalid literal for int()"),
        (("--procs", "-1"), "--procs -1 must be 1 or more"),
        (("--recipe", "vapsr_x5"), "no recipe 'vapsr_x5'; did you mean 'vapsr_x"),
        (("data.corp=3",), "data.corp: unknown key; did you mean 'crop'?"),
        (("generator.num_block=3",), "num_block"),
        (("ds.optimizer.type=Adamw",), "no optimizer 'Adamw'; did you mean 'AdamW'?"),
        (
            ("ds.train_batch_size=0",),
            "train_batch_size, the global batch, must be a whole number above 0",
        ),
        (("--procs", "3"), "train_batch_size 4 is not micro-batch x accumulation x 3 ranks"),
        (("data.crop=128",), "smaller than data.crop 128"),
        (("--ds-config", "/nowhere.json"), "cannot read /nowhere.json"),
    ],
)
def test_bad_training_options(
    dataset: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run([*command(dataset, tmp_path / "run"), "steps=2", *arguments])
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert checkpoint_steps(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["training_file_list.txt", "validation_file_list.txt"])
def test_a_missing_list_names_the_command_that_writes_it(
    dataset: Path, tmp_path: Path, name: str
) -> None:
    other = "validation_file_list.txt" if name.startswith("training") else "training_file_list.txt"
    (tmp_path / other).write_bytes((dataset / other).read_bytes())
    assert_one_line(
        run(command(tmp_path, tmp_path / "run")), name, "tools/select_training_files.py"
    )


def test_no_dataset_for_a_recipe_that_was_asked_for(tmp_path: Path) -> None:
    done = script(
        "launch/local.py", "--recipe", "vapsr_x4", "--dataset-dir", str(tmp_path / "none")
    )
    assert_one_line(done, "no file lists in", "omit --recipe and --dataset-dir to run the demo")
    done = script("launch/local.py", "--dataset-dir", str(tmp_path / "tpyo"))
    assert_one_line(done, f"no file lists in {tmp_path / 'tpyo'}")


def test_a_bad_file_in_the_dataset_stops_the_run_by_name(dataset: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "dataset with spaces"
    shutil.copytree(dataset, root)
    bad = root / "photos" / "05.npy"
    bad.write_bytes(bad.read_bytes()[:-7])
    for procs in (1, 2):
        done = run(command(root, tmp_path / f"run {procs}", "steps=50", procs=procs))
        assert done.returncode in (1, 2)
        assert f"{bad}: truncated" in done.stderr, done.stderr


def test_another_run_is_refused_with_the_differing_fields(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run(command(dataset, run_dir, "steps=3")).returncode == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    done = run(
        command(
            dataset,
            run_dir,
            "steps=6",
            "generator.num_blocks=2",
            "seed=5",
            "ds.optimizer.params.lr=0.1",
        )
    )
    assert_one_line(
        done,
        "holds another run (step 3)",
        "generator.num_blocks: 1 in the run, 2 asked for",
        "seed: 0 in the run, 5 asked for",
        "ds.optimizer.params.lr: 0.002 in the run, 0.1 asked for",
        "--reset",
    )
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    (dataset_copy := tmp_path / "dataset").mkdir()
    for path in dataset.rglob("*"):
        target = dataset_copy / path.relative_to(dataset)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    names = (dataset / "training_file_list.txt").read_text().splitlines()
    (dataset_copy / "training_file_list.txt").write_text("\n".join(names[:-1]) + "\n")
    done = run(command(dataset_copy, run_dir, "steps=6"))
    assert_one_line(done, "dataset training_files: 10 in the run, 9 asked for")


def test_reset_moves_the_old_run_aside(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run(command(dataset, run_dir, "steps=3")).returncode == 0
    old = {str(p.relative_to(run_dir)): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    done = run(command(dataset, run_dir, "--reset", "steps=2", "seed=1"))
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("run.bak-*")
    assert str(kept) in done.stdout
    assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == old
    assert checkpoint_steps(run_dir) == [2]


def test_two_runs_do_not_share_a_folder(dataset: Path, tmp_path: Path) -> None:
    import time

    long = command(dataset, tmp_path / "run", "steps=100000", "validate_every=100000")
    with subprocess.Popen(long, env=environment(), stdout=subprocess.DEVNULL) as first:
        log = tmp_path / "run" / "log.jsonl"
        while not log.is_file() or '"event": "train"' not in log.read_text():
            assert first.poll() is None
            time.sleep(0.05)
        (tmp_path / "link").symlink_to(tmp_path)
        again = command(dataset, tmp_path / "link" / "run", "steps=100000")
        assert_one_line(run(again), "link/run is in use by process", "stop it, or use another")
        with subprocess.Popen(
            again,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as second:
            assert second.stdout is not None
            line = second.stdout.readline()
            assert "is in use by process" in line
            assert "waiting" in line
            first.terminate()  # it saves and releases the folder; the second takes over
            first.wait(30)
            rest = ""
            while "continuing from step" not in rest:
                line = second.stdout.readline()
                assert line, rest
                rest += line
            second.terminate()
            second.wait(30)
