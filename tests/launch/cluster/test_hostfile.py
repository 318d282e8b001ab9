"""The hostfile, `.deepspeed_env` and training arguments: nothing in them runs a command on any
host."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import environment
from launch.cluster import messages
from launch.cluster.hostfile import (
    as_filter,
    choose,
    find_hostfile,
    is_host,
    read_hostfile,
    world_size,
)
from launch.cluster.job import ClusterJob, check_launcher, choose_port
from launch.environment import read_env_file, variables_for_ranks
from pipeline.cli import UserError

CANARY = "CANARY"
"""Stands in a payload for the path of a file that exists if any part of it was run."""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that a payload would create, in the folder in which it would run."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "canary"


def refused(read: object, *arguments: object) -> str:
    """Return the one-line message with which `read(*arguments)` fails."""
    with pytest.raises(UserError) as caught:
        read(*arguments)  # type: ignore[operator]
    message = str(caught.value)
    assert message.count("\n") == 0
    return message


# --- The hostfile ---


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("node1 slots=2\nnode2 slots=1\n", {"node1": (0, 1), "node2": (0,)}),
        ("node1 slots=1", {"node1": (0,)}),
        ("\n# the rack\n\n   # more\n  node1\tslots=2  \n\n", {"node1": (0, 1)}),
        (
            "node1 slots=1 # the first\nnode2   slots=1# the second\r\n",
            {"node1": (0,), "node2": (0,)},
        ),
        (
            "10.0.0.7 slots=1\nn-1.rack_2.example.com slots=1\n",
            {"10.0.0.7": (0,), "n-1.rack_2.example.com": (0,)},
        ),
        ("b slots=1\na slots=64\n", {"b": (0,), "a": tuple(range(64))}),
    ],
)
def test_a_hostfile_says_which_hosts_in_which_order(tmp_path: Path, text: str, slots: dict) -> None:
    found = read_hostfile(hostfile(tmp_path, text))
    assert found == slots
    assert list(found) == list(slots)
    assert world_size(found) == sum(map(len, slots.values()))


NO_HOST = (
    "is not a valid host name (letters, digits, dot, dash; put user and port into ~/.ssh/config)"
)
NO_LINE = "is not `HOST slots=N`; write lines like `node1 slots=8`"
NO_NUMBER = "must be 1 to 64: the number of GPUs of node2"
BAD_LINES = [
    ("-oProxyCommand=touch${IFS}CANARY slots=1", NO_HOST),
    ("-w slots=1", NO_HOST),
    ("--include slots=1", NO_HOST),
    ("a;touch${IFS}CANARY slots=1", NO_HOST),
    ("a$(touch${IFS}CANARY) slots=1", NO_HOST),
    ("a`touch${IFS}CANARY` slots=1", NO_HOST),
    ("a|touch${IFS}CANARY slots=1", NO_HOST),
    ("a&touch${IFS}CANARY slots=1", NO_HOST),
    ("a>CANARY slots=1", NO_HOST),
    ("a<CANARY slots=1", NO_HOST),
    ("'node2' slots=1", NO_HOST),
    ('"node2" slots=1', NO_HOST),
    ("node2\\ slots=1", NO_HOST),
    ("~node2 slots=1", NO_HOST),
    ("node* slots=1", NO_HOST),
    ("node[1-3] slots=2", NO_HOST),
    ("a,b slots=2", NO_HOST),
    ("^CANARY slots=1", NO_HOST),
    ("/node/ slots=1", NO_HOST),
    ("node%n slots=1", NO_HOST),
    ("root@node2 slots=1", NO_HOST),
    ("node2:22 slots=1", NO_HOST),
    ("fe80::1 slots=1", NO_HOST),
    ("nöde2 slots=1", NO_HOST),
    ("node2\0 slots=1", NO_HOST),
    (f"{'a' * 254} slots=1", NO_HOST),
    ("node2 slots=2extra", NO_LINE),
    ("node2 slots=1; touch CANARY", NO_LINE),
    ("node2 slots=$(touch CANARY)", NO_LINE),
    ("node2 slots=1 $(touch CANARY)", NO_LINE),
    ("node2 slots = 2", NO_LINE),
    ("node2 max_slots=2", NO_LINE),
    ("node2 slots=2 max_slots=4", NO_LINE),
    ("node2 slots=-1", NO_LINE),
    ("node2 slots=1.5", NO_LINE),
    ("node2 slots=0x2", NO_LINE),
    ("node2 slots=99999", NO_LINE),
    ("node2 slots=", NO_LINE),
    ("node2", NO_LINE),
    ("node2:2", NO_LINE),
    ("slots=2", NO_LINE),
    ("node2 slots=0", NO_NUMBER),
    ("node2 slots=65", NO_NUMBER),
    ("node1 slots=8", "node1 occurs twice; give each host one line with all its slots"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_wrong_line_is_refused_where_it_stands(
    tmp_path: Path, canary: Path, line: str, why: str
) -> None:
    path = hostfile(tmp_path, f"# hosts\n\nnode1 slots=2\n{line.replace(CANARY, str(canary))}\n")
    message = refused(read_hostfile, path)
    assert message.startswith(f"{path}:4: ")
    assert why in message
    assert not canary.exists()


@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_a_comment_hides_no_line_of_its_own(tmp_path: Path, end: str) -> None:
    """A character that some programs take for the end of a line ends it here, too, so that the rest
    is checked as well."""
    path = hostfile(tmp_path, f"node1 slots=1 # spare:{end}-oProxyCommand=x slots=1\n")
    assert refused(read_hostfile, path).startswith(
        f"{path}:2: '-oProxyCommand=x' is not a valid host name"
    )


def test_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "\ufeffnode1 slots=1\n")
    assert refused(read_hostfile, path).startswith(
        f"{path}:1: '\\ufeffnode1' is not a valid host name"
    )


def test_a_host_in_capitals_is_the_same_host(tmp_path: Path) -> None:
    assert "occurs twice" in refused(
        read_hostfile, hostfile(tmp_path, "node1 slots=1\nNode1 slots=1\n")
    )


@pytest.mark.parametrize("text", ["", "\n\n", "# node1 slots=8\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    path = hostfile(tmp_path, text)
    assert (
        refused(read_hostfile, path)
        == f"{path} names no host; write lines like `node1 slots=8`, one per machine"
    )


def test_a_missing_or_unreadable_hostfile_is_refused(tmp_path: Path) -> None:
    """Plain DeepSpeed trains on this machine alone if the file is missing."""
    missing = refused(read_hostfile, tmp_path / "hosts")
    assert missing.startswith(f"no hostfile {tmp_path / 'hosts'}; write lines like `node1 slots=8`")
    assert missing.endswith("or train on this one with ./launch_local_train.sh")
    assert refused(read_hostfile, tmp_path).startswith(f"{tmp_path} cannot be read: ")
    binary = tmp_path / "binary"
    binary.write_bytes(b"node1 slots=1\n\xff\xfe\0")
    assert refused(read_hostfile, binary).startswith(f"{binary} cannot be read: ")


def test_the_file_here_comes_before_the_one_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.cluster.hostfile.ROOT", tmp_path / "checkout")
    assert find_hostfile(Path("hostfile")) == Path("hostfile")
    (tmp_path / "checkout").mkdir()
    own = tmp_path / "checkout" / "hostfile"
    own.touch()
    assert find_hostfile(Path("hostfile")) == own
    assert find_hostfile(Path("other")) == Path("other")
    (tmp_path / "hostfile").touch()
    assert find_hostfile(Path("hostfile")) == Path("hostfile")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.text(st.sampled_from("aZ09._- -;$`'\"\\/@%^:,[]{}()*?!~#&|<>=\n\t\0é"), max_size=6))
def test_a_hosts_name_is_one_plain_word_to_a_shell(name: str) -> None:
    if is_host(name):
        assert shlex.quote(name) == name
        assert not name.startswith("-")


HOSTS = {"node1": (0, 1, 2, 3), "node2": (0, 1), "node3": (0,)}


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ("", "", HOSTS),
        ("node2", "", {"node2": (0, 1)}),
        ("node3@node1:2,0", "", {"node1": (0, 2), "node3": (0,)}),  # in the hostfile's order
        ("node1:1@node1:3", "", {"node1": (1, 3)}),
        ("", "node1", {"node2": (0, 1), "node3": (0,)}),
        ("", "node1:0,1@node3:0", {"node1": (2, 3), "node2": (0, 1)}),
        ("", "node1:0,1,2,3@node2", {"node3": (0,)}),
    ],
)
def test_hosts_and_slots_are_chosen(include: str, exclude: str, chosen: dict) -> None:
    found = choose(HOSTS, include, exclude)
    assert found == chosen
    assert list(found) == list(chosen)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node1", "node2", "--include and --exclude are mutually exclusive; give one of them"),
        ("nod1", "", "--include nod1: no host 'nod1' in the hostfile; did you mean 'node1'?"),
        ("xyz", "", "--include xyz: no host 'xyz' in the hostfile; it has node1, node2, node3"),
        (
            "",
            "node1;reboot",
            "--exclude node1;reboot: no host 'node1;reboot' in the hostfile; did you mean 'node1'?",
        ),
        ("node1:", "", "--include node1:: '' is not a list of slots; write node1:0,1"),
        ("node1:0-3", "", "--include node1:0-3: '0-3' is not a list of slots; write node1:0,1"),
        (
            "node1:$(reboot)",
            "",
            "--include node1:$(reboot): '$(reboot)' is not a list of slots; write node1:0,1",
        ),
        ("node2:0,2,7", "", "--include node2:0,2,7: node2 has slots 0, 1, not 2, 7"),
        ("", "node1@node2@node3", "--exclude node1@node2@node3 leaves no host"),
    ],
)
def test_an_invalid_choice_is_refused(include: str, exclude: str, message: str) -> None:
    assert refused(choose, HOSTS, include, exclude) == message


def test_an_empty_choice_is_refused() -> None:
    assert "@" in refused(choose, HOSTS, "@", "")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numbers=st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=5).filter(any))
def test_a_choice_can_be_written_down_and_read_again(numbers: list[set[int]]) -> None:
    hosts = {f"node{number}": tuple(range(8)) for number in range(len(numbers))}
    chosen = {f"node{number}": tuple(sorted(own)) for number, own in enumerate(numbers) if own}
    assert choose(hosts, as_filter(chosen)) == chosen


# --- .deepspeed_env ---


def env_file(folder: Path, text: str) -> Path:
    path = folder / ".deepspeed_env"
    path.write_bytes(text.encode())
    return path


def test_variables_are_read_as_they_stand(tmp_path: Path) -> None:
    path = env_file(
        tmp_path,
        "\n# for all\nNCCL_DEBUG=WARN\r\n  GLOO_SOCKET_IFNAME = eth0 \n\nEMPTY=\n"
        "_x1=a=b,c:/d e^f\nNCCL_DEBUG=INFO\n",
    )
    assert read_env_file(path) == {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "EMPTY": "",
        "_x1": "a=b,c:/d e^f",
    }
    assert read_env_file(tmp_path / "missing") == {}


NO_VARIABLE = "not a NAME=value line; write lines like NCCL_DEBUG=WARN"
NO_VALUE = "contains characters that a shell would interpret"
NO_PROGRAMS = "decides which programs run, so it is not read from a file"
OURS = (
    "is set by the launcher; use --master-addr and --master-port for the first host's address and "
    "port"
)
BAD_VARIABLES = [
    ("A=$(touch CANARY)", NO_VALUE),
    ("A=`touch CANARY`", NO_VALUE),
    ("A=x;touch CANARY", NO_VALUE),
    ("A=x&touch CANARY", NO_VALUE),
    ("A=x|touch CANARY", NO_VALUE),
    ("A=x>CANARY", NO_VALUE),
    ("A=<(touch CANARY)", NO_VALUE),
    ("A=$HOME", NO_VALUE),
    ("A=${IFS}", NO_VALUE),
    ('A="; touch CANARY; "', NO_VALUE),
    ("A='; touch CANARY; '", NO_VALUE),
    ("A=x\\", NO_VALUE),
    ("A=*", NO_VALUE),
    ("A=~root", NO_VALUE),
    ("A=!!", NO_VALUE),
    ("A=WARN # loud", NO_VALUE),
    ("A={a,b}", NO_VALUE),
    ("A=é", NO_VALUE),
    ("A=x\0y", NO_VALUE),
    ("A=\x1b[2J", NO_VALUE),
    ("export A=1", NO_VARIABLE),
    ("A", NO_VARIABLE),
    ("=x", NO_VARIABLE),
    ("1A=x", NO_VARIABLE),
    ("A-B=x", NO_VARIABLE),
    ("A$(touch CANARY)=x", NO_VARIABLE),
    ("A;touch CANARY;B=x", NO_VARIABLE),
    ("BASH_FUNC_ls%%=() { touch CANARY; }", NO_VARIABLE),
    (f"{'A' * 129}=x", NO_VARIABLE),
    ("\ufeffA=x", NO_VARIABLE),
    ("LD_PRELOAD=/tmp/evil.so", NO_PROGRAMS),
    ("LD_LIBRARY_PATH=/tmp", NO_PROGRAMS),
    ("LD_AUDIT=/tmp/evil.so", NO_PROGRAMS),
    ("PATH=/tmp", NO_PROGRAMS),
    ("PYTHONPATH=/tmp", NO_PROGRAMS),
    ("PYTHONSTARTUP=/tmp/evil.py", NO_PROGRAMS),
    ("PYTHONHOME=/tmp", NO_PROGRAMS),
    ("BASH_ENV=/tmp/evil.sh", NO_PROGRAMS),
    ("ENV=/tmp/evil.sh", NO_PROGRAMS),
    ("IFS=/", NO_PROGRAMS),
    ("HOME=/tmp", NO_PROGRAMS),
    ("GCONV_PATH=/tmp", NO_PROGRAMS),
    ("CXX=/tmp/evil", NO_PROGRAMS),
    ("RANK=0", OURS),
    ("WORLD_SIZE=1", OURS),
    ("LOCAL_RANK=0", OURS),
    ("MASTER_ADDR=10.0.0.1", OURS),
    ("MASTER_PORT=1", OURS),
    ("CUDA_VISIBLE_DEVICES=0", OURS),
]


@pytest.mark.parametrize(("line", "why"), BAD_VARIABLES)
def test_a_wrong_variable_is_refused_where_it_stands(
    tmp_path: Path, canary: Path, line: str, why: str
) -> None:
    path = env_file(tmp_path, f"NCCL_DEBUG=WARN\n\n{line.replace(CANARY, str(canary))}\n")
    message = refused(read_env_file, path)
    assert message.startswith(f"{path}:3: ")
    assert why in message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("TRITON_PTXAS_PATH", NO_PROGRAMS),
        ("CUDA_HOME", NO_PROGRAMS),
        ("OMP_TOOL_LIBRARIES", NO_PROGRAMS),
        ("LOCAL_WORLD_SIZE", "is set by the launcher"),
        ("VASTSCALE_LAUNCHER_PID", "is set by the launcher"),
    ],
)
def test_no_variable_chooses_programs_or_ranks(tmp_path: Path, name: str, why: str) -> None:
    assert why in refused(read_env_file, env_file(tmp_path, f"{name}=1\n"))


@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_a_value_hides_no_line_of_its_own(tmp_path: Path, end: str) -> None:
    path = env_file(tmp_path, f"NCCL_DEBUG=WARN{end}LD_PRELOAD=/tmp/evil.so\n")
    assert refused(read_env_file, path).startswith(
        f"{path}:2: LD_PRELOAD decides which programs run"
    )


def test_an_unreadable_environment_file_is_refused(tmp_path: Path) -> None:
    assert refused(read_env_file, tmp_path).startswith(f"{tmp_path} cannot be read: ")
    path = tmp_path / "binary"
    path.write_bytes(b"A=\xff\n")
    assert refused(read_env_file, path).startswith(f"{path} cannot be read: ")


def test_ranks_get_only_the_shell_variables_that_they_need(tmp_path: Path) -> None:
    """The values are the user's and travel as data, whatever they contain."""
    shell = {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "UCX_TLS": "tcp",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "OMP_NUM_THREADS": "4",
        "HTTPS_PROXY": "http://a$(b)",
        "no_proxy": "localhost",
        "WANDB_MODE": "offline",
    }
    others = {
        "PATH": "/bin",
        "LD_PRELOAD": "x.so",
        "PYTHONPATH": "/x",
        "RANK": "0",
        "MASTER_ADDR": "x",
        "HOME": "/x",
        "CUDA_VISIBLE_DEVICES": "1",
        "SSH_AUTH_SOCK": "/x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "MY_NCCL_DEBUG": "x",
    }
    assert variables_for_ranks([], {**others, **shell}) == shell
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    for folder, text in ((home, "NCCL_DEBUG=WARN\nA=home\n"), (checkout, "A=checkout\n")):
        folder.mkdir()
        env_file(folder, text)
    files = [home / ".deepspeed_env", checkout / ".deepspeed_env", tmp_path / "missing"]
    assert variables_for_ranks(files, {**others, **shell}) == {
        **shell,
        "NCCL_DEBUG": "WARN",
        "A": "checkout",
    }


# --- Arguments that are sent to other hosts ---

ARGUMENTS = [
    "--dataset-dir=/data;touch${IFS}CANARY",
    "--dataset-dir=/da ta$(touch CANARY)",
    "--output-dir=`touch${IFS}CANARY`",
    "steps=1&touch${IFS}CANARY",
    "steps=1|tee${IFS}CANARY",
    "steps=1>CANARY",
    "steps=1\ntouch${IFS}CANARY\n",
    "`touch CANARY`",
    "$(touch CANARY)",
    "${IFS}$(touch${IFS}CANARY)",
    "&& touch CANARY",
    "|| touch CANARY",
    "| tee CANARY",
    "> CANARY",
    "; touch CANARY #",
    "'; touch CANARY; '",
    '"; touch CANARY; "',
    '\\"; touch CANARY; \\"',
    "\\'; touch CANARY; #",
    "\ntouch CANARY\n",
    "\r\ntouch CANARY",
    "<(touch CANARY)",
    "$'\\x60touch CANARY\\x60'",
    "-oProxyCommand=touch CANARY",
    "--launcher_args=-R exec touch CANARY",
    "--hostfile=CANARY",
    "--no_python",
    "--module",
    "%n %h %u",
    "~ * ? [a-z] {a,b} !! #",
    "back\\slash\\",
    "",
    " ",
    "\t\v",
    "\x01\x1b\x7f",
    "写真 é",
    os.fsdecode(b"/data/\xff\xfe"),
    "a" * 20_000,
]

TELL = """#!/bin/sh
printf '%s\\0' "$@" >>"$0.said"
env -0 >>"$0.environment"
"""


class Remote:
    """Another host, reduced to a shell that runs `TELL` in place of Python."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "python"
        self.python.write_text(TELL)
        self.python.chmod(0o755)

    def words(self) -> list[str]:
        """Return the words with which it was started."""
        return Path(f"{self.python}.said").read_bytes().decode().split("\0")[:-1]

    def environment(self) -> dict[str, str]:
        words = (
            Path(f"{self.python}.environment")
            .read_bytes()
            .decode(errors="surrogateescape")
            .split("\0")[:-1]
        )
        return dict(word.split("=", 1) for word in words)


def job(
    tmp_path: Path,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    launcher: str = "pdsh",
) -> ClusterJob:
    slots = (
        {"node1": (0, 1), "node2": (1,)}
        if launcher == "pdsh"
        else {"node1": (0, 1), "node2": (0, 1)}
    )
    return ClusterJob(
        slots,
        "10.0.0.1",
        12345,
        arguments,
        variables or {},
        "/work; touch x",
        tmp_path / "logs",
        launcher,
    )


def meeting(launcher: str) -> dict[str, Any]:
    """Return what a guard's command line says: where the supervisor is, and no key."""
    return {"run": "run", "supervisor": ["10.0.0.1", 1], "key_by_stdin": launcher == "slurm"}


def line_for_a_shell(command: list[str], python: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what DeepSpeed's launcher, run as `command`, lets pdsh pass to the hosts' shells."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import encode_world_info, parse_args

    arguments = parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        resources = {"node1": [0, 1], "node2": [1]}
        words, _, _ = PDSHRunner(arguments, encode_world_info(resources)).get_cmd({}, resources)
    return " ".join(words[words.index("-w") + 2 :])


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_runs_nothing_and_arrives_unchanged(
    tmp_path: Path, canary: Path, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = argument.replace(CANARY, str(canary))
    monkeypatch.chdir(canary.parent)
    remote, sent = (
        Remote(tmp_path),
        job(tmp_path, "--recipe", payload, payload, variables={"NCCL_X": payload}),
    )
    line = line_for_a_shell(sent.command(tmp_path, sent.word("run", 1)), remote.python, monkeypatch)
    for shell in ("sh", "bash"):
        done = subprocess.run(
            [shell, "-c", line], capture_output=True, text=True, timeout=20, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        *words, word = remote.words()
        assert words[-1].endswith("/launch/cluster/guard.py")
        assert messages.unpack(word) == meeting("pdsh")
    # A rank's task never passes through a shell: it is sent over the guard's connection as JSON.
    assert json.loads(json.dumps(sent.task)) == {
        "logs": str(tmp_path / "logs"),
        "arguments": ["--recipe", payload, payload],
        "environment": {"NCCL_X": payload},
        "directory": "/work; touch x",
    }
    assert list(canary.parent.iterdir()) == []


@pytest.mark.parametrize("payload", ARGUMENTS[:7])
def test_plain_deepspeed_would_run_the_argument(
    tmp_path: Path, canary: Path, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above would notice."""
    monkeypatch.chdir(canary.parent)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "train.py",
        payload.replace(CANARY, str(canary)),
    ]
    line = line_for_a_shell(command, Remote(tmp_path).python, monkeypatch)
    subprocess.run(["sh", "-c", line], capture_output=True, timeout=20, check=False)
    assert canary.exists()


PDSH = """
import os, subprocess, sys
words = sys.argv[sys.argv.index("-w") + 2:]
words = [os.environ["TELL"] if word == sys.executable else word for word in words]
sys.exit(subprocess.run(["sh", "-c", " ".join(words)]).returncode)
"""


def test_nothing_in_the_launchers_environment_runs(tmp_path: Path, canary: Path) -> None:
    """The launcher's own process, with all payloads at once, including variables that DeepSpeed
    pastes into a command line."""
    remote, payloads = (
        Remote(tmp_path),
        [argument.replace(CANARY, str(canary)) for argument in ARGUMENTS],
    )
    (tmp_path / "bin").mkdir()
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.write_text(f"#!{sys.executable}{PDSH}")
    pdsh.chmod(0o755)
    hostile = f'x"; touch {canary}; $(touch {canary}) `touch {canary}`'
    base = environment() | {
        "PATH": f"{pdsh.parent}:{os.environ['PATH']}",
        "TELL": str(remote.python),
    }
    base |= dict.fromkeys(
        (
            "NCCL_DEBUG",
            "UCX_TLS",
            "MLFLOW_RUN",
            "MV2_X",
            "PYTHONPATH",
            "WCOLL",
            "PDSH_RCMD_TYPE",
            "OMPI_MCA_plm_rsh_agent",
            "PMIX_X",
        ),
        hostile,
    )
    (canary.parent / ".deepspeed_env").write_text(f"A={hostile}\n")
    sent = job(tmp_path, *payloads, variables={"A": hostile})
    variables = sent.launcher_variables(tmp_path, base)
    assert hostile not in variables.values()
    done = subprocess.run(
        sent.command(tmp_path, sent.word("run", 1)),
        env=variables,
        cwd=canary.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert messages.unpack(remote.words()[-1]) == meeting(sent.launcher)
    assert sent.task["arguments"] == payloads
    assert sent.task["environment"] == {"A": hostile}
    assert not canary.exists()
    there = remote.environment()
    assert (there["MASTER_ADDR"], there["MASTER_PORT"]) == ("10.0.0.1", "12345")
    assert there["PYTHONPATH"] == str(canary.parent)
    assert "A" not in there
    assert "-o BatchMode=yes -o ConnectTimeout=5" in there["PDSH_SSH_ARGS_APPEND"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arguments=st.lists(st.text()))
def test_a_task_is_one_plain_word_to_a_shell(arguments: list[str]) -> None:
    word = messages.pack({"arguments": arguments})
    assert shlex.quote(word) == word
    assert "%" not in word  # pdsh would expand it
    assert messages.unpack(word) == json.loads(json.dumps({"arguments": arguments}))


@pytest.mark.parametrize(
    "slots", [{"node1": (0, 1), "node2": (1,)}, {"node1": (2, 5), "node2": (0,), "node3": (7,)}]
)
def test_deepspeed_reads_the_slots_that_were_chosen(tmp_path: Path, slots: dict) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    command = ClusterJob(slots, "10.0.0.1", 1, (), {}, "/", tmp_path).command(tmp_path, "word")
    chosen = {option: command[command.index(option) + 1] for option in ("--hostfile", "--include")}
    pool = fetch_hostfile(chosen["--hostfile"])
    found = parse_inclusion_exclusion(pool, chosen["--include"], "")
    assert {host: tuple(numbers) for host, numbers in found.items()} == slots
    assert list(found) == list(slots)


def test_what_launchers_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ompi_info").touch(0o755)
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    both = {"node1": (0, 1), "node2": (0, 1)}
    check_launcher("pdsh", {"node1": (1,)}, "")  # one host needs no pdsh
    check_launcher("openmpi", both, "--mca btl tcp")
    check_launcher("slurm", both, "")
    assert refused(check_launcher, "pdsh", both, "") == (
        "--launcher pdsh needs pdsh, which is not installed here; `apt install pdsh`, or choose "
        "another --launcher"
    )
    assert "(here slots 1 of node2)" in refused(
        check_launcher, "openmpi", {"node1": (0, 1), "node2": (1,)}, ""
    )
    uneven = {"node1": (0, 1), "node2": (0,)}
    assert "the same number of slots on every host" in refused(check_launcher, "slurm", uneven, "")
    assert (
        refused(check_launcher, "openmpi", both, "'")
        == '--launcher-args "\'": No closing quotation'
    )
    monkeypatch.setattr("launch.cluster.job.ROOT", Path("/data/my $(reboot)"))
    assert "move the checkout to a path of letters, digits and ./_-" in refused(
        check_launcher, "pdsh", both, ""
    )


@pytest.mark.parametrize(
    "address", ["127.0.0.1;touch x", "$(touch x)", "-x", "127.0.0.1 x", "192.0.2.1"]
)
def test_ranks_meet_only_at_an_address_of_this_machine(address: str) -> None:
    """The address is put into command lines unquoted."""
    from pipeline.distributed.launcher import is_own

    assert not is_own(address)
    assert is_own("127.0.0.1")
    assert "cannot listen on 192.0.2.1: " in refused(choose_port, "192.0.2.1", 0)


def test_a_port_is_a_free_one_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refused(choose_port, "127.0.0.1", port).startswith(
            f"cannot listen on 127.0.0.1 port {port}: "
        )
    assert choose_port("127.0.0.1", port) == port
    assert 1024 <= choose_port("127.0.0.1", 0) <= 65535
    for number in (-1, 65536):
        assert refused(choose_port, "127.0.0.1", number) == (
            f"--master-port {number} must be between 1 and 65535, or 0 for a free one"
        )
