"""Training on several hosts with the scripts that a user runs, over ssh and pdsh (`cluster.py`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, why_not
from comparison import logged
from conftest import ROOT, SMALL
from lives import train
from pipeline.checkpoint_index import damage
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

MUST_RUN = "VASTSCALE_TEST_CLUSTER" in os.environ  # skipping would hide that nothing was tested
pytestmark = pytest.mark.skipif(bool(why_not()) and not MUST_RUN, reason=why_not())
SECONDS = 60  # time limit for a job to end on every host, whatever happens
PYTHON = Path(sys.prefix)  # an environment that all hosts share


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert not why_not()
    hosts = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield hosts
    hosts.close()


class Run:
    """A run of `./launch_distributed_train.sh` on node1."""

    def __init__(self, cluster: Cluster, dataset: Path, folder: Path, hosts: int = 2) -> None:
        self.cluster, self.folder, self.dataset = cluster, folder, dataset
        self.run_dir, self.output = folder / "runs" / "rack", folder / "output.txt"
        self.script = ROOT / "launch_distributed_train.sh"
        folder.mkdir(parents=True, exist_ok=True)
        self.hostfile(*(f"node{number} slots=1" for number in range(1, hosts + 1)))

    def hostfile(self, *lines: str) -> None:
        (self.folder / "hostfile").write_text("".join(f"{line}\n" for line in lines))

    def start(
        self, *arguments: str, variables: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        command = [
            str(self.script),
            "-H",
            "hostfile",
            "--recipe",
            "demo",
            "--dataset-dir",
            str(self.dataset),
            "--output-dir",
            str(self.run_dir),
            *SMALL,
            *arguments,
        ]
        return self.cluster.start(
            "node1",
            command,
            cwd=self.folder,
            output=self.output,
            variables={"VIRTUAL_ENV": str(PYTHON), **(variables or {})},
        )

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 120) -> tuple[int, str]:
        """Wait for the end; return (exit status, output). No process may be left on any host."""
        try:
            status = process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.assert_nothing_left()
        return status, self.output.read_text()

    def run(self, *arguments: str) -> tuple[int, str]:
        return self.finish(self.start(*arguments))

    def interrupt(self) -> None:
        """Send CTRL+C to the script itself; nsenter, its parent, would die of it."""
        for pid in self.cluster.processes("node1", f"--output-dir {self.run_dir} "):
            if b"launch/distributed.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGINT)

    def assert_nothing_left(self, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)

    def left(self) -> dict[str, dict[int, str]]:
        """Return the job's processes by host, for hosts that have any."""
        found = {host: self.cluster.processes(host, str(PYTHON)) for host in self.cluster.hosts}
        return {host: processes for host, processes in found.items() if processes}

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def rank_on(self, host: str) -> int:
        """Return the process id of the rank on a host, as seen from outside."""
        (found,) = self.cluster.processes(host, f"{ROOT / 'train.py'} ")
        return found


@pytest.fixture
def run(cluster: Cluster, dataset: Path, tmp_path: Path) -> Iterator[Run]:
    made = Run(cluster, dataset, tmp_path / "work")
    yield made
    for host in cluster.hosts:  # left by a test that failed
        for pid in cluster.processes(host, str(PYTHON)):
            os.kill(pid, signal.SIGKILL)


def test_two_hosts_train_as_one_rank_does(run: Run, dataset: Path, tmp_path: Path) -> None:
    """The whole way, including the doctor. The losses are those of one rank, because samples and
    global batch are the same."""
    status, printed = run.run("--reset", "steps=6")
    assert status == 0, printed
    assert "2 hosts, 2 ranks" in printed
    assert "no failed, no warnings" in printed
    assert "2 x CPU, FP32" in printed
    assert "network interface eth0" in printed
    assert printed.count("finished at step 6") == 1
    assert printed.splitlines()[-1].startswith("all 2 ranks finished")
    assert "Warning" not in printed

    train(dataset, tmp_path / "alone", "steps=6")
    together, alone = (
        [loss for _, loss in logged(folder, "train", "loss")]
        for folder in (run.run_dir, tmp_path / "alone")
    )
    assert len(together) == 6
    assert together == pytest.approx(alone, rel=1e-5)
    # only the first rank writes logs and curves; each rank's output is in a file of its own
    assert len(list((run.run_dir / "tensorboard").iterdir())) == 1
    first, second = (run.run_dir.with_name("rack.logs") / f"rank-0000{rank}.log" for rank in (0, 1))
    assert "rank 0 of 2 on node1" in first.read_text()
    assert "finished at step 6" in first.read_text()
    assert "rank 1 of 2 on node2" in second.read_text()
    assert "finished" not in second.read_text()


def test_a_killed_rank_ends_all_and_fewer_hosts_go_on(run: Run) -> None:
    process = run.start("--no-doctor", "steps=100000", "save_every=5")
    run.wait_for("step 12/")
    began = time.monotonic()
    os.kill(run.rank_on("node2"), signal.SIGKILL)
    status, printed = run.finish(process, SECONDS)
    assert status == 1
    assert time.monotonic() - began < 15
    assert printed.splitlines()[-1] == "error: rank 1 on node2 was killed by SIGKILL"

    run.hostfile("node1 slots=1")
    newest = checkpoint_steps(run.run_dir)[-1]
    status, printed = run.run("--no-doctor", f"steps={newest + 3}", "save_every=5")
    assert status == 0, printed
    assert f"step {newest} was saved by 2 ranks and continues on 1:" in printed
    assert f"continuing from step {newest}" in printed


def test_a_cut_cable_ends_the_job_on_both_sides(run: Run, cluster: Cluster) -> None:
    process = run.start("--no-doctor", "steps=100000", "save_every=5")
    run.wait_for("step 12/")
    began = time.monotonic()
    cluster.cut("node2")
    try:
        status, printed = run.finish(process, SECONDS)
        assert status == 1
        assert time.monotonic() - began < SECONDS
        assert re.search(
            r"error: node2 fell silent .*: the machine or its network is down",
            printed.splitlines()[-1],
        )
    finally:
        cluster.reconnect("node2")
    assert damage(checkpoint_dir(run.run_dir, checkpoint_steps(run.run_dir)[-1])) == ""


def test_the_hosts_that_answer_go_on_by_themselves(run: Run, cluster: Cluster) -> None:
    """One of three hosts is lost; the global batch stays the same."""
    run.hostfile("node1 slots=1", "node2 slots=1", "node3 slots=2")
    process = run.start(
        "--no-doctor",
        "--max-restarts",
        "1",
        "--elastic",
        "steps=100000",
        "save_every=5",
        "ds.train_batch_size=8",
    )
    run.wait_for("step 12/")
    cluster.cut("node3")
    try:
        run.wait_for("restart 1 of 1, from the checkpoint of step ", SECONDS)
        run.wait_for("continuing without node3")
        run.wait_for("global batch 8 = 2 x 2 accumulation x 2 ranks")
        run.wait_for("was saved by 4 ranks")
        run.wait_for("step 60/", SECONDS)
        run.interrupt()
        status, printed = run.finish(process, 30)
    finally:
        cluster.reconnect("node3")
    assert status == 130, printed
    assert "stopped and saved at step" in printed
    steps = [
        json.loads(line)["step"]
        for line in (run.run_dir / "log.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "train"
    ]
    assert steps == list(range(1, len(steps) + 1))


def test_ctrl_c_saves_everywhere_and_the_next_start_continues(run: Run, tmp_path: Path) -> None:
    """Another run on the same hosts continues; DeepSpeed's own way of stopping would kill it."""
    other = Run(run.cluster, run.dataset, tmp_path / "other")
    process, others = (
        run.start("--no-doctor", "steps=100000"),
        other.start("--no-doctor", "steps=100000"),
    )
    run.wait_for("step 12/")
    other.wait_for("step 12/")
    run.interrupt()
    assert process.wait(30) == 130
    printed = run.output.read_text()
    seen = len(other.output.read_text())
    time.sleep(1)
    assert len(other.output.read_text()) > seen
    other.interrupt()
    status, _ = other.finish(others, 30)
    assert status == 130
    stopped = int(re.search(r"stopped and saved at step (\d+)", printed)[1])
    assert checkpoint_steps(run.run_dir)[-1] == stopped
    status, printed = run.run("--no-doctor", f"steps={stopped + 2}")
    assert status == 0, printed
    assert f"continuing from step {stopped}" in printed


def test_a_rank_that_raises_has_the_last_word(run: Run, cluster: Cluster) -> None:
    import torch.optim.adamw as adamw

    broken = run.folder / "adamw.py"
    broken.write_text(Path(adamw.__file__).read_text() + RAISING)
    with replaced(cluster, "node2", broken, Path(adamw.__file__)):
        status, printed = run.finish(run.start("--no-doctor", "steps=100000"), SECONDS)
    assert status == 1
    *_, raised, last = printed.splitlines()
    assert "Traceback (most recent call last)" in printed
    assert raised.removeprefix("[rank1]: ") == "ArithmeticError: the seventh step"
    assert last == "error: rank 1 on node2 ended with status 1"


RAISING = """
_step, calls = AdamW.step, []
def step(self, *given):
    calls.append(0)
    if len(calls) == 7:
        raise ArithmeticError('the seventh step')
    return _step(self, *given)
AdamW.step = step
"""


def test_a_rank_that_never_meets_the_others_is_named(
    run: Run, cluster: Cluster, dataset: Path
) -> None:
    """Plain DeepSpeed waits ten minutes for it. The restart does not continue the old run, which
    --reset had not moved away yet."""
    train(dataset, run.run_dir, "steps=3")
    broken = run.folder / "train.py"
    broken.write_text("import no_such_module\n")
    with replaced(cluster, "node2", broken, ROOT / "train.py"):
        began = time.monotonic()
        status, printed = run.finish(
            run.start("--no-doctor", "--reset", "--max-restarts", "1", "steps=3"), SECONDS
        )
    assert time.monotonic() - began < 50
    assert "restart 1 of 1, from the beginning (--reset)" in printed
    assert "nothing left to do" not in printed
    assert status == 1
    assert printed.splitlines()[-2:] == [
        "ModuleNotFoundError: No module named 'no_such_module'",
        "error: rank 1 on node2 ended with status 1",
    ]


def test_a_rank_that_hangs_is_ended(run: Run) -> None:
    process = run.start("--no-doctor", "steps=100000", "--watchdog-minutes", "0.1")
    run.wait_for("step 12/")
    began = time.monotonic()
    os.kill(run.rank_on("node2"), signal.SIGSTOP)
    status, printed = run.finish(process, SECONDS)
    assert status == 1
    assert time.monotonic() - began < 6 + 20
    assert "made no progress for too long (--watchdog-minutes)" in printed.splitlines()[-1]
    assert "rank 1 on node2 did not answer: stopped or stuck" in printed.splitlines()[-1]


def test_a_launcher_that_is_killed_leaves_no_rank_behind(run: Run, cluster: Cluster) -> None:
    process = run.start("--no-doctor", "steps=100000")
    run.wait_for("step 12/")
    (supervisor,) = cluster.processes("node1", "launch/distributed.py")
    os.kill(supervisor, signal.SIGKILL)
    process.wait(10)
    run.assert_nothing_left(40)
    # The ranks have saved: they lost their supervisor, not each other.
    assert (
        "stopped and saved at step"
        in (run.run_dir.with_name("rack.logs") / "rank-00000.log").read_text()
    )


def test_another_dataset_on_one_host_is_refused_by_the_ranks_too(
    run: Run, cluster: Cluster, dataset: Path
) -> None:
    other = run.folder / "other.txt"
    other.write_text(
        "".join((dataset / "training_file_list.txt").read_text().splitlines(keepends=True)[:9])
    )
    with replaced(cluster, "node2", other, dataset / "training_file_list.txt"):
        status, printed = run.run("--no-doctor")
    assert status == 2
    assert "error: rank 1 on node2 differs from rank 0 on node1: dataset " in printed
    assert "training_files (9 instead of 10)" in printed
    assert not checkpoint_steps(run.run_dir)


def test_hosts_that_share_nothing(run: Run, cluster: Cluster, dataset: Path) -> None:
    """launch/sync.sh copies checkout and dataset; only the first host has the run folder."""
    checkout, data = cluster.disk / "checkout", cluster.disk / "dataset"
    run.run_dir = cluster.disk / "runs" / "rack"
    copied = " ".join(
        str(ROOT / name)
        for name in (
            "launch",
            "pipeline",
            "recipes",
            "train.py",
            "requirements.txt",
            "launch_distributed_train.sh",
        )
    )
    done = cluster.run(
        "node1",
        [
            "sh",
            "-c",
            f"mkdir {checkout} {run.run_dir.parent} && cp -r {copied} {checkout} && "
            f"cp -r {dataset} {data}",
        ],
    )
    assert done.returncode == 0, done.stderr
    stale = checkout / "pipeline" / "ema.py"
    cluster.run(
        "node2",
        [
            "sh",
            "-c",
            f"mkdir -p {stale.parent} && cd {stale.parent} && echo old > ema.py && "
            "echo own > mine.py",
        ],
    )
    run.hostfile("node1 slots=1", "node2 slots=1")

    def sync(*more: str) -> tuple[int, str]:
        done = cluster.run(
            "node1",
            [
                str(checkout / "launch" / "sync.sh"),
                "-H",
                str(run.folder / "hostfile"),
                "--dataset-dir",
                str(data),
                *more,
            ],
            variables={"VIRTUAL_ENV": str(PYTHON)},
        )
        return done.returncode, done.stdout + done.stderr

    status, printed = sync()
    assert status == 0, printed
    assert "node1: checkout: shares this disk, nothing to copy" in printed
    assert printed.splitlines()[-1] == "2 of 2 hosts are up to date"
    digests = [
        cluster.run(
            host,
            [
                "sh",
                "-c",
                f"cd {cluster.disk} && find checkout/pipeline checkout/launch dataset "
                "-type f ! -name '*.pyc' -exec sha256sum {} + | sort",
            ],
        ).stdout
        for host in ("node1", "node2")
    ]
    assert digests[0].count("\n") > 100
    assert digests[0] == digests[1]
    kept = cluster.run(
        "node2", ["sh", "-c", f"cd {checkout}/.synced_away/pipeline && cat ema.py mine.py"]
    ).stdout
    assert kept == "old\nown\n"
    status, printed = sync()
    assert status == 0, printed
    assert "node2: checkout: 0 files" in printed
    assert "node2: dataset: 0 files" in printed

    run.script, run.dataset = checkout / "launch_distributed_train.sh", data
    for steps, said in ((4, "finished at step 4"), (6, "continuing from step 4 of 6")):
        status, printed = run.run("--no-doctor", f"steps={steps}", "ds.zero_optimization.stage=1")
        assert status == 0, printed
        assert said in printed
    listed = {
        host: cluster.run(
            host, ["sh", "-c", f"ls {run.run_dir}/checkpoints {run.run_dir}.logs"]
        ).stdout.split()
        for host in ("node1", "node2")
    }
    assert "step-00000006" in listed["node1"]
    assert listed["node2"] == [f"{run.run_dir}.logs:", "rank-00001.log"]


@pytest.mark.skipif(
    not shutil.which("ompi_info") and not MUST_RUN, reason="needs openmpi-bin (apt install)"
)
def test_open_mpi_starts_guarded_ranks(run: Run) -> None:
    status, printed = run.run("--no-doctor", "--launcher", "openmpi", "steps=3", "save_every=1")
    assert status == 0, printed
    assert "started by mpirun of Open MPI, network interface eth0" in printed
    assert "all 2 ranks finished" in printed


SRUN = """#!/usr/bin/env python3
import os, shlex, subprocess, sys
words = sys.argv[1:]
export = next(place for place, word in enumerate(words) if word.startswith("--export="))
command = words[export + 1:]
hosts = next(word for word in words if word.startswith("--nodelist=")).partition("=")[2].split(",")
variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": len(hosts),
             "SLURM_LOCALID": 0, "SLURM_STEP_NODELIST": ",".join(hosts)}
env = ["env", *(f"{name}={value}" for name, value in variables.items())]
given = sys.stdin.buffer.read()  # srun copies it to all tasks
tasks = [subprocess.Popen(["ssh", host, shlex.join([*env, f"SLURM_PROCID={rank}", *command])],
                          stdin=subprocess.PIPE)
         for rank, host in enumerate(hosts)]
for task in tasks:
    task.stdin.write(given)
    task.stdin.close()
sys.exit(max(task.wait() for task in tasks))
"""


def test_slurm_starts_guarded_ranks(run: Run) -> None:
    """With a stand-in for srun, which starts one task per host with Slurm's variables."""
    programs = run.folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("sinfo", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    status, printed = run.finish(
        run.start(
            "--no-doctor",
            "--launcher",
            "slurm",
            "steps=3",
            "save_every=1",
            variables={"PATH": f"{programs}:{os.environ['PATH']}"},
        )
    )
    assert status == 0, printed
    assert "started by srun of Slurm (job 7), network interface eth0" in printed
    assert "all 2 ranks finished" in printed


# --- The doctor ---


def diagnose(
    cluster: Cluster, folder: Path, hostfile: str, *arguments: str
) -> tuple[int, str, dict]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hostfile").write_text(hostfile)
    done = cluster.run(
        "node1",
        [
            "env",
            "-C",
            str(ROOT),
            f"{sys.executable}",
            "-m",
            "launch.doctor",
            "-H",
            str(folder / "hostfile"),
            "--json",
            str(folder / "found.json"),
            *arguments,
        ],
    )
    found = (
        json.loads((folder / "found.json").read_text()) if (folder / "found.json").is_file() else {}
    )
    return done.returncode, done.stdout + done.stderr, found


def verdicts(found: dict, host: str) -> dict[str, str]:
    return {
        finding["check"]: finding["verdict"]
        for finding in found["findings"]
        if finding["host"] == host
    }


def test_the_doctor_names_what_is_wrong_and_where(
    cluster: Cluster, dataset: Path, tmp_path: Path
) -> None:
    """node2 has a different file in the checkout and a different crop; node3 is unreachable."""
    changed, crop = tmp_path / "ema.py", tmp_path / "crop.npy"
    changed.write_text((ROOT / "pipeline" / "models" / "ema.py").read_text() + "# changed\n")
    crop.write_bytes((dataset / "photos" / "03.npy").read_bytes()[:-1] + b"\x01")
    cluster.cut("node3")
    try:
        with (
            replaced(cluster, "node2", changed, ROOT / "pipeline" / "models" / "ema.py"),
            replaced(cluster, "node2", crop, dataset / "photos" / "03.npy"),
        ):
            began = time.monotonic()
            status, printed, found = diagnose(
                cluster,
                tmp_path,
                "node1 slots=1\nnode2 slots=3\nnode3 slots=1\n",
                "--dataset-dir",
                str(dataset),
                "--no-allreduce",
            )
    finally:
        cluster.reconnect("node3")
    assert status == 2, printed
    assert time.monotonic() - began < 25
    assert "node2: checkout: differs from node1 in pipeline/models/ema.py" in printed
    assert "run launch/sync.sh" in printed
    assert "node2: dataset: 1 of 13 sampled files" in printed
    assert "photos/03.npy" in printed
    assert re.search(r"node3: ssh: (no route|no answer|too slow)", printed), printed
    assert verdicts(found, "node1")["dataset"] == "PASS"
    own = verdicts(found, "node2")
    assert (own["ssh"], own["checkout"], own["dataset"], own["network"]) == (
        "PASS",
        "FAIL",
        "FAIL",
        "PASS",
    )
    if len(os.sched_getaffinity(0)) < 3:
        assert own["cores"] == "WARN"
    assert verdicts(found, "node3") == {"ssh": "FAIL"}


def test_the_doctor_measures_an_all_reduce_and_predicts(
    cluster: Cluster, dataset: Path, tmp_path: Path
) -> None:
    status, printed, found = diagnose(
        cluster,
        tmp_path,
        "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n",
        "--dataset-dir",
        str(dataset),
        "--parameters",
        "1000000",
        "--step-seconds",
        "0.1",
    )
    assert status == 0, printed
    measured = found["all_reduce"]
    assert (measured["backend"], measured["ranks"]) == ("Gloo", 3)
    size = max(int(size) for size in measured["seconds"])
    bandwidth = 2 * 2 / 3 * size / measured["seconds"][str(size)]
    assert measured["bus_bandwidth"] == pytest.approx(bandwidth)
    seconds = 4 / 3 * 4e6 / bandwidth + 4 * measured["latency"] / 4  # ring of three, FP32 gradients
    assert found["prediction"]["fp32"]["all_reduce_seconds"] == pytest.approx(seconds)
    assert found["prediction"]["fp32"]["efficiency"] == pytest.approx(0.1 / (0.1 + seconds))
    assert found["interfaces"] == {"node1": "eth0", "node2": "eth0", "node3": "eth0"}  # not docker0
    assert found["master_address"] == cluster.hosts["node1"].address


def test_the_doctor_counts_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """With an nvidia-smi of the test's own that lists two GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI)
    smi.chmod(0o755)
    for host in ("node1", "node2"):
        assert (
            cluster.run(
                host, ["sh", "-c", f"mount -t tmpfs t /usr/local/bin && cp {smi} /usr/local/bin/"]
            ).returncode
            == 0
        )
    try:
        status, printed, found = diagnose(
            cluster, tmp_path, "node1 slots=2\nnode2 slots=4\n", "--no-allreduce"
        )
    finally:
        for host in ("node1", "node2"):
            cluster.run(host, ["umount", "/usr/local/bin"])
    assert status == 2, printed
    assert verdicts(found, "node1")["GPUs"] == "PASS"
    assert (
        "node2: GPUs: it has 2 GPUs, but the hostfile also uses slots 2, 3 (counted from 0); write "
        "slots=2"
    ) in printed
    assert "node2: GPUs: GPU 1 (NVIDIA Test) is slowed by heat (hardware) at 90 C" in printed


FAKE_SMI = """#!/usr/bin/env python3
import sys
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
known = {"name": "NVIDIA Test", "driver_version": "580.1", "memory.total": "81920",
         "memory.used": "10", "pstate": "P0", "temperature.gpu": "90", "power.limit": "700.0",
         "power.default_limit": "700.0"}
for index in range(2):
    mask = "0x0000000000000040" if index == 1 else "0x0000000000000000"
    print(", ".join(str(index) if field == "index" else mask if field.endswith("reasons.active")
                    else known.get(field, "[N/A]") for field in fields))
"""


class replaced:  # noqa: N801 - reads as the verb that it is
    """Replace the file `target` by `source` on one host, within the context."""

    def __init__(self, cluster: Cluster, host: str, source: Path, target: Path) -> None:
        self._cluster, self._host, self._source, self._target = cluster, host, source, target

    def __enter__(self) -> None:
        done = self._cluster.run(
            self._host, ["mount", "--bind", str(self._source), str(self._target)]
        )
        assert done.returncode == 0, done.stderr

    def __exit__(self, *_: object) -> None:
        self._cluster.run(self._host, ["umount", str(self._target)])
