"""Training on the machines of a hostfile: errors before anything starts, and restarts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, SMALL, environment
from launch.cluster import job
from launch.cluster.hostfile import world_size
from launch.cluster.job import answering, share_batch, wait_for_all
from launch.environment import without
from pipeline.cli import RunError
from pipeline.config.ds_config import batch_sizes
from pipeline.training.options import overrides_last

ELSEWHERE = "192.0.2.7"
"""An address that no machine has (RFC 5737)."""


def start(
    folder: Path, hostfile: str | None, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `launch/distributed.py` as `./launch_distributed_train.sh` does, in a folder of its
    own."""
    if hostfile is not None:
        (folder / "hosts").write_text(hostfile)
    if not shutil.which("pdsh"):  # it must exist, but no test here gets as far as running it
        programs = folder.with_name(f"{folder.name}-programs")
        programs.mkdir(exist_ok=True)
        (programs / "pdsh").write_text("#!/bin/sh\nexit 99\n")
        (programs / "pdsh").chmod(0o755)
        variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **variables}
    command = [
        sys.executable,
        str(ROOT / "launch" / "distributed.py"),
        "-H",
        "hosts",
        "--no-doctor",
        "--recipe",
        "demo",
        "--output-dir",
        "run",
        *arguments,
        *SMALL,
    ]
    return subprocess.run(
        command,
        env={**environment(), "HOME": str(folder), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess[str], folder: Path, *parts: str) -> None:
    """Assert that there is one line on stderr, and that nothing was started."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""
    assert [path.name for path in folder.iterdir() if path.name != "hosts"] == []


ONE, TWO = "localhost slots=1\n", f"localhost slots=1\n{ELSEWHERE} slots=1\n"


@pytest.mark.parametrize(
    ("hostfile", "arguments", "parts"),
    [
        (
            None,
            (),
            ("no hostfile hosts; write lines like `node1 slots=8`", "./launch_local_train.sh"),
        ),
        ("# node1 slots=8\n", (), ("hosts names no host; write lines like `node1 slots=8`",)),
        (
            "localhost slots=1\n-oProxyCommand=reboot slots=1\n",
            (),
            ("hosts:2: '-oProxyCommand=reboot' is not a valid host name",),
        ),
        (
            TWO,
            ("--include", "node3"),
            ("--include node3: no host 'node3' in the hostfile; it has localhost, 192.0.2.7",),
        ),
        (
            ONE,
            ("--procs", "2"),
            ("--procs 2 is for one machine; set the ranks of a host with slots= in the hostfile",),
        ),
        (
            ONE,
            ("--elastic",),
            ("--elastic has no effect without restarts", "--max-restarts 3"),
        ),
        (ONE, ("--max-restarts", "-1"), ("--max-restarts -1 must be 0 or more",)),
    ],
)
def test_a_wrong_command_line_starts_nothing(
    tmp_path: Path, hostfile: str | None, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert_refused(start(tmp_path, hostfile, *arguments), tmp_path, *parts)


def test_no_dataset_starts_nothing(tmp_path: Path) -> None:
    assert_refused(
        start(tmp_path, ONE),
        tmp_path,
        "no file lists in ~/dataset; make a dataset with `python tools/images_to_data.py",
        "copy it to all hosts with launch/sync.sh",
    )


def test_a_missing_launcher_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    done = start(tmp_path, TWO, "--dataset-dir", str(dataset), PATH="/nowhere")
    assert_refused(
        done,
        tmp_path,
        "--launcher pdsh needs pdsh, which is not installed here; `apt install pdsh`",
    )


def test_a_batch_that_ranks_cannot_share_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    done = start(tmp_path, "localhost slots=3\n", "--dataset-dir", str(dataset))
    assert_refused(
        done,
        tmp_path,
        "train_batch_size 4 is not micro-batch x accumulation x 3 ranks",
        "ds.train_batch_size=3 or 6, or use another number of ranks",
    )


@pytest.mark.parametrize("hostfile", [ONE, TWO])
def test_a_first_host_that_is_another_machine_starts_nothing(
    dataset: Path, tmp_path: Path, hostfile: str
) -> None:
    done = start(tmp_path, hostfile, "--dataset-dir", str(dataset), "--master-addr", ELSEWHERE)
    assert_refused(
        done,
        tmp_path,
        f"localhost, the first host in the hostfile ({ELSEWHERE}), is not this machine",
        "start the run there, or move this machine's line to the top",
    )


def test_a_first_host_named_only_in_the_hostfile_starts_nothing(
    dataset: Path, tmp_path: Path
) -> None:
    done = start(
        tmp_path, f"{ELSEWHERE} slots=1\n", "--dataset-dir", str(dataset), "--master-port", "70000"
    )
    assert_refused(
        done, tmp_path, f"{ELSEWHERE}, the first host in the hostfile", "is not this machine"
    )


def test_a_port_that_is_taken_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = start(tmp_path, ONE, "--dataset-dir", str(dataset), "--master-port", str(port))
    assert_refused(
        done,
        tmp_path,
        f"cannot listen on 127.0.0.1 port {port}: Address already in use",
        "choose another --master-port",
    )


def test_an_output_folder_that_cannot_be_made_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    done = start(tmp_path, ONE, "--dataset-dir", str(dataset), "--output-dir", "hosts/run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "hosts/run" in done.stderr


# --- Parsing the command line ---


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], []),
        (["--hostfile", "hosts", "--recipe", "demo"], ["--recipe", "demo"]),
        (["--recipe", "demo", "-H", "hosts"], ["--recipe", "demo"]),
        (["--hostfile=hosts", "steps=3"], ["steps=3"]),
        (["--max_restarts", "3", "--max-restarts=4", "steps=3"], ["steps=3"]),
        (["--elastic", "steps=3", "--no_doctor"], ["steps=3"]),
        (["--elastic", "--hostfile", "hosts"], []),
        (["--hostfile", "--elastic", "steps=3"], ["steps=3"]),  # a file of that name
        (["--recipe", "a=b", "--hostfile"], ["--recipe", "a=b"]),
        (
            ["--hostfiles", "x", "hostfile=3", "--elastics"],
            ["--hostfiles", "x", "hostfile=3", "--elastics"],
        ),
    ],
)
def test_the_launchers_own_options_are_kept_from_the_ranks(
    arguments: list[str], kept: list[str]
) -> None:
    assert (
        without(arguments, ("--hostfile", "-H", "--max-restarts"), ("--elastic", "--no-doctor"))
        == kept
    )


@pytest.mark.parametrize(
    ("arguments", "sorted_out"),
    [
        (["steps=3", "--recipe", "demo"], ["--recipe", "demo", "steps=3"]),
        (["--reset", "steps=3", "--recipe", "demo"], ["--reset", "--recipe", "demo", "steps=3"]),
        (
            ["--elastic", "steps=3", "--no-doctor", "data.crop=8"],
            ["--elastic", "--no-doctor", "steps=3", "data.crop=8"],
        ),
        (
            ["--no_doctor", "steps=3", "--recipe", "demo"],
            ["--no_doctor", "--recipe", "demo", "steps=3"],
        ),
        (["--output-dir", "a=b", "steps=3"], ["--output-dir", "a=b", "steps=3"]),
        (
            ["--output-dir=a", "b=c", "--recipe", "demo"],
            ["--output-dir=a", "--recipe", "demo", "b=c"],
        ),
        (["a.b=x y", "--recipe=demo", "a.b=$(z)"], ["--recipe=demo", "a.b=x y", "a.b=$(z)"]),
    ],
)
def test_overrides_come_after_options_and_flags_take_no_value(
    arguments: list[str], sorted_out: list[str]
) -> None:
    assert overrides_last(arguments, ("--reset", "--elastic", "--no-doctor")) == sorted_out


# --- Restarts ---


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    micro=st.integers(1, 12),
    accumulation=st.integers(1, 6),
    before=st.integers(1, 24),
)
def test_the_ranks_that_are_left_share_the_same_batch(
    numbers: list[int], micro: int, accumulation: int, before: int
) -> None:
    total = micro * accumulation * before
    slots = {f"node{number}": tuple(range(count)) for number, count in enumerate(numbers)}
    used, chosen = share_batch(slots, total, micro)
    ranks = world_size(used)
    assert total % (chosen * ranks) == 0
    assert 1 <= chosen <= micro
    config = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": chosen,
        "gradient_accumulation_steps": total // (chosen * ranks),
    }
    assert batch_sizes(config, ranks) == (chosen, total // (chosen * ranks))
    assert not [more for more in range(ranks + 1, world_size(slots) + 1) if total % more == 0]
    assert not [more for more in range(chosen + 1, micro + 1) if total % (more * ranks) == 0]
    assert list(used) == list(slots)[: len(used)]  # the first of the first hosts: rank 0 stays
    assert all(used[host] == slots[host][: len(used[host])] for host in used)
    assert all(used.values())


def test_all_ranks_continue_if_they_can() -> None:
    slots = {"node1": (0, 1), "node2": (2, 3)}
    assert share_batch(slots, 64, 16) == (slots, 16)
    assert share_batch(slots, 6, 6) == ({"node1": (0, 1), "node2": (2,)}, 2)
    assert share_batch({"node1": (0,)}, 64, 8) == ({"node1": (0,)}, 8)


SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
echo "$2: $3" >>"$ASKED"
[ "$2" = "$(cat "$BACK")" ] || exit 255
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an ssh on PATH that reaches the host named in the file BACK; return a file with one line
    per call."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    (tmp_path / "back").write_text("node2")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("BACK", str(tmp_path / "back"))
    return tmp_path / "asked"


THREE = {"node1": (0,), "node2": (0, 1), "node3": (1,)}


def test_the_hosts_that_answer_are_found(ssh: Path) -> None:
    """The first host is this machine, so it is not asked."""
    assert answering(THREE) == {"node1": (0,), "node2": (0, 1)}
    assert sorted(ssh.read_text().splitlines()) == ["node2: true", "node3: true"]
    assert answering({"node1": (0,)}) == {"node1": (0,)}


def test_hosts_that_do_not_come_back_are_named(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "POLL_SECONDS", 0.05)
    said: list[str] = []
    with pytest.raises(
        RunError,
        match="node3 did not come back within 0 s; repair them, or continue without them: "
        "--exclude node3, or --elastic",
    ):
        wait_for_all(THREE, 0.3, said.append)
    assert said == ["waiting up to 0 s for node3 (--elastic continues without)"]
    wait_for_all({"node1": (0,), "node2": (0, 1)}, 0, said.append)
    assert len(said) == 1


def test_a_host_that_comes_back_is_waited_for(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "POLL_SECONDS", 0.05)
    two = {"node1": (0,), "node3": (0,)}
    began = time.monotonic()
    # The host comes back once the wait has begun.
    wait_for_all(two, 30, lambda _: (ssh.parent / "back").write_text("node3"))
    assert time.monotonic() - began < 5


def test_each_host_is_asked_once_per_round(ssh: Path) -> None:
    wait_for_all({"node1": (0,), "node2": (0,)}, 0, print)
    assert ssh.read_text().splitlines() == ["node2: true"]


@pytest.mark.parametrize(
    ("arguments", "variables", "is_on_cpu"),
    [
        (["--device", "cpu"], {}, True),
        ([], {"VASTSCALE_CPU": "1"}, True),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, True),
        ([], {"CUDA_VISIBLE_DEVICES": "GPU-1111"}, False),
    ],
)
def test_all_hosts_are_told_to_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    is_on_cpu: bool,
) -> None:
    """The guards of all ranks get it as data. CUDA_VISIBLE_DEVICES of this shell says nothing about
    other hosts, which is reported."""
    from launch import distributed

    for name in ("VASTSCALE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hosts").write_text(ONE)
    jobs = []
    monkeypatch.setattr(distributed, "_run", lambda job: (jobs.append(job), (0, None))[1])
    monkeypatch.setattr(distributed, "has_ended", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["distributed.py", *arguments])
    options = distributed.Options(
        hostfile=tmp_path / "hosts",
        no_doctor=True,
        recipe="demo",
        dataset_dir=(dataset,),
        output_dir=tmp_path / "run",
        overrides=SMALL,
        device="cpu" if "--device" in arguments else "auto",
    )
    assert distributed.main(options) == 0
    assert (jobs[0].variables.get("VASTSCALE_CPU") == "1") == is_on_cpu
    assert jobs[0].arguments == tuple(arguments)
    assert ("choose GPUs with --include HOST:0,1" in capsys.readouterr().out) != is_on_cpu
