"""Evaluation in several processes: the same bytes as in one process, and a common end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import warm
from conftest import environment, run_python
from fabricate import CHECKOUT, picture, shared, tiny_saved, write_images
from pipeline.cli import UserError
from pipeline.distributed import gpus
from pipeline.distributed.launcher import RankInfo
from pipeline.evaluation.processes import num_processes, worth_starting
from pipeline.inference.devices import Device, device_at
from pipeline.models.weights import write_network

EVALUATE = str(CHECKOUT / "evaluate.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two x2 models and two sets of images, whose sizes are in no order."""
    folder = tmp_path_factory.mktemp("work")
    for seed in (1, 2):
        write_network(folder / f"net{seed}.pth", tiny_saved(seed, scale=2))
    sizes = [(50, 61), (90, 140), (40, 44), (120, 80), (64, 64), (40, 44)]
    write_images(
        folder / "hr",
        {f'{index} é,"x".png': picture(*size, index) for index, size in enumerate(sizes)},
    )
    write_images(
        folder / "sets" / "Set5" / "HR",
        {f"{index}.png": picture(50 + 9 * index, 70, 40 + index) for index in range(5)},
    )
    return folder


def arguments(*more: str) -> list[str]:
    return [
        "--hr",
        "hr",
        "--benchmark",
        "set5",
        "--benchmarks",
        "sets",
        "--model",
        "net1.pth",
        "net2.pth",
        "--self-ensemble",
        "--html",
        "page",
        *more,
    ]


def outputs(folder) -> dict[str, bytes]:
    """Return the content of every file below a folder, without the time in the page."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {
        name: re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC", b"", content)
        for name, content in files.items()
    }


def evaluate(command: list[str], cwd, **more):
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(work):
    """The LPIPS options, and what one process writes and prints."""
    lpips = [
        "--lpips",
        "squeeze",
        "--lpips-weights",
        str(shared("weights/lpips_squeeze_trunk.pth")),
    ]
    done = evaluate([warm.python(), EVALUATE, *arguments("--out", "alone", *lpips)], work)
    assert done.returncode == 0, done.stderr
    (work / "page" / "index.html").rename(work / "alone" / "index.html")
    return lpips, outputs(work / "alone"), done.stdout


def launched(count: int, launcher: str) -> list[str]:
    if launcher == "--procs":
        return [warm.python(), EVALUATE, "--procs", str(count)]
    if launcher == "torchrun":
        return [
            warm.python(),
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(count),
            EVALUATE,
        ]
    # {"localhost": [0, 1]}
    return [
        warm.python(),
        "-m",
        "deepspeed.launcher.launch",
        "--world_info",
        "eyJsb2NhbGhvc3QiOiBbMCwgMV19",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "29417",
        EVALUATE,
    ]


@pytest.mark.parametrize(("count", "launcher"), [(3, "--procs"), (2, "torchrun"), (2, "deepspeed")])
def test_several_processes_write_the_same_bytes_as_one(work, alone, count, launcher):
    lpips, expected, stdout = alone
    out = f"{launcher.strip('-')}{count}"
    done = evaluate(
        [*launched(count, launcher), *arguments("--out", out, *lpips)], work, DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stderr
    (work / "page" / "index.html").rename(work / out / "index.html")
    found = outputs(work / out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert len(found) == 11 + 4  # pictures; JSON, CSV, Markdown, page
    assert f"on cpu, self-ensemble of eight, in {count} processes" in done.stdout
    assert printed(done.stdout) == printed(stdout)


def printed(text: str) -> str:
    """Return the part of an evaluation's output from its images to its numbers."""
    return re.search(r"^images: .*(?=^numbers: )", text, flags=re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("launcher", ["--procs", "torchrun"])
def test_a_broken_image_ends_all_with_one_line(work, tmp_path, launcher):
    hr = write_images(
        tmp_path / "hr", {f"{index}.png": picture(60, 60, index) for index in range(5)}
    )
    (hr / "3.png").write_bytes((hr / "2.png").read_bytes()[:600])
    done = evaluate(
        [
            *launched(2, launcher),
            "--hr",
            str(hr),
            "--model",
            "net1.pth",
            "--out",
            str(tmp_path / "out"),
        ],
        work,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.fullmatch(
        r"error: image '.*3\.png' cannot be read \(.*\); replace or remove it", errors[0]
    )
    assert not (tmp_path / "out" / "evaluation.json").exists()
    if launcher == "--procs":
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert done.returncode != 0


def test_bad_options_are_reported_once(work):
    done = evaluate([*launched(2, "--procs"), "--hr", "nowhere", "--model", "net1.pth"], work)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the folder of HR images 'nowhere' does not exist\n"
    done = evaluate([warm.python(), EVALUATE, *arguments("--procs", "-1")], work)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --procs -1 must be 1 or more; omit it for one per GPU\n",
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images whose evaluation takes long enough to be interrupted: one file under many names."""
    hr = write_images(tmp_path_factory.mktemp("large") / "hr", {"0.png": picture(700, 700)})
    for index in range(1, 60):
        (hr / f"{index}.png").hardlink_to(hr / "0.png")
    return hr


def start_slow(work, large, tmp_path):
    """Start an evaluation of large images in two processes and wait until both are measuring.

    Returns the running command and the ids of the two processes.
    """
    command = [
        sys.executable,
        EVALUATE,
        "--procs",
        "2",
        "--hr",
        str(large),
        "--model",
        "net1.pth",
        "--self-ensemble",
    ]
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        cwd=work,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.png"))) < 2:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    with open(f"/proc/{running.pid}/task/{running.pid}/children", encoding="ascii") as children:
        return running, [int(child) for child in children.read().split()]


def is_gone(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_is_named(work, large, tmp_path, rank):
    running, children = start_slow(work, large, tmp_path)
    assert len(children) == 2
    os.kill(children[rank], signal.SIGKILL)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1
    assert errors == (
        f"error: process {rank + 1} of 2 was killed by SIGKILL; if memory ran out, start fewer "
        "with --procs\n"
    )
    assert all(map(is_gone, children))
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "stopped\n"), (signal.SIGKILL, -signal.SIGKILL, "")],
)
def test_all_processes_end_with_the_command(work, large, tmp_path, number, status, line):
    running, children = start_slow(work, large, tmp_path)
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert (running.returncode, errors) == (status, line)
    deadline = time.monotonic() + 10
    while not all(map(is_gone, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_at_most_one_process_per_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(gpus, "list_gpus", list)  # whatever this machine has
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [
        num_processes(0, "auto"),
        num_processes(2, "cuda"),
        num_processes(0, "cpu"),
        num_processes(3, "cpu"),
        num_processes(0, "cuda:1"),
    ] == [4, 2, 1, 3, 1]
    with pytest.raises(
        UserError,
        match="--procs 5 is more than this machine's 4 GPUs; use at most one process per GPU",
    ):
        num_processes(5, "auto")
    with pytest.raises(UserError, match="--procs 2 on --device cuda:1, which is a single device"):
        num_processes(2, "cuda:1")
    place = RankInfo(rank=5, world_size=8, local_rank=1, launcher="torchrun", local_size=4)
    assert device_at(place, "auto") == Device("cuda", 1)
    with pytest.raises(
        UserError,
        match="--device cuda:1 is one device for 8 processes; omit --device to use one GPU",
    ):
        device_at(place, "cuda:1")


def test_the_numbers_do_not_depend_on_the_number_of_threads():
    from pipeline.metrics import measure
    from pipeline.metrics.lpips import LpipsMetric

    metric = LpipsMetric("squeeze", str(shared("weights/lpips_squeeze_trunk.pth")))
    sr, hr = (torch.from_numpy(picture(300, 400, seed)).permute(2, 0, 1)[None] for seed in (1, 2))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((measure(sr, hr, 4), metric(sr, hr)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_the_page_shows_the_same_images_as_one_process(work, alone):
    page = alone[1]["index.html"].decode()
    assert page.count('class="compare"') == 8  # two best and two worst of each set
    with Image.open(work / "alone" / "hr" / '3 é,"x".png') as sheet:
        assert np.asarray(sheet).std() > 20


def test_few_images_are_not_split(work, tmp_path):
    assert [worth_starting(*numbers) for numbers in ((2, 4), (2, 3), (3, 5), (8, 100), (2, 0))] == [
        2,
        1,
        2,
        8,
        1,
    ]
    hr = write_images(
        tmp_path / "hr", {f"{index}.png": picture(40, 50, index) for index in range(3)}
    )
    done = evaluate(
        [
            warm.python(),
            EVALUATE,
            "--procs",
            "2",
            "--hr",
            str(hr),
            "--model",
            "net1.pth",
            "--out",
            str(tmp_path / "out"),
        ],
        work,
    )
    assert (done.returncode, done.stderr) == (0, "")
    note, model = done.stdout.splitlines()[:2]
    assert note == "note: too few images (3) for 2 processes; using 1"
    assert model.endswith("on cpu; 3 images, LR made by bicubic downscaling")


def test_forks_have_the_imports_and_their_own_environment():
    """Run in a process of its own, because this one has already started threads."""
    code = (
        "import os, sys\nfrom pipeline.cli import UserError\n"
        "from pipeline.evaluation.processes import fork_processes\n"
        "import torch\nparent = os.getpid()\ntorch.set_num_threads(1)\nprint('before')\n"
        "def work():\n"
        "    assert os.getppid() == parent and os.getsid(0) == os.getpid()\n"
        "    rank = os.environ['RANK']\n"
        "    print(f\"rank {rank} of {os.environ['WORLD_SIZE']} on {torch.get_num_threads()}\")\n"
        "    if rank == sys.argv[1]:\n"
        "        raise UserError('bad') if sys.argv[2] == 'bad' else RuntimeError('wrong')\n"
        "    return 0\n"
        "print('status', fork_processes(2, work))\n"
    )

    def output(rank, how):
        done = run_python(code, rank, how)
        return sorted(done.stdout.splitlines()), done.stderr

    expected = ["before", "rank 0 of 2 on 1", "rank 1 of 2 on 1", "status 0"]
    assert output("2", "bad") == (expected, "")
    lines, errors = output("1", "bad")
    assert ("status 2" in lines, errors) == (True, "error: bad\n")
    lines, errors = output("0", "wrong")
    assert "status 1" in lines
    assert errors.endswith("RuntimeError: wrong\n")
