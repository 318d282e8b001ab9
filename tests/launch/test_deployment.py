"""The image, the Slurm scripts and the cloud job, tested without Docker, Slurm and a cloud.

The image is not built: its Dockerfile is parsed, and a run is trained from the files that it
copies. The Slurm scripts run with an `srun` that starts two tasks with Slurm's variables. The cloud
job copies to a folder, or with an `rclone` that records its command lines.
"""

from __future__ import annotations

import ast
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
import torch

from conftest import ROOT, SMALL, environment
from pipeline.checkpoint_index import damage
from pipeline.losses.trunks import SOURCE, TRUNK_FILES
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

DOCKER, SLURM, CLOUD = (ROOT / "launch" / name for name in ("docker", "slurm", "cloud"))
SCRIPTS = sorted(
    path
    for folder in (ROOT, ROOT / "launch")
    for pattern in ("*.sh", "*/*.sh", "*/*.sbatch")
    for path in folder.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
SECRET = "hunter2-of-the-test"
SELDOM = ("validate_every=20", "save_every=20")
SECONDS = 100  # time limit for any of these jobs, on a busy machine


@pytest.mark.parametrize("script", sorted(set(SCRIPTS)), ids=lambda path: path.name)
def test_bash_reads_every_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- The image ---


def instructions() -> list[tuple[str, str, str]]:
    """Return (stage, instruction, rest of its line) of the Dockerfile."""
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if not line.startswith("#")
    ]
    found, stage = [], ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.partition(" AS ")[2]
        if name:
            found.append((stage, name, " ".join(rest.split())))
    return found


def of_image(instruction: str) -> list[str]:
    """Return the lines of an instruction in the last stage, which has no name."""
    begin = max(number for number, (_, name, _) in enumerate(instructions()) if name == "FROM")
    return [rest for _, name, rest in instructions()[begin:] if name == instruction]


def is_sent(name: str) -> bool:
    """Whether Docker's client sends a file to the builder: the last matching line decides."""
    sent, path = True, Path(name)
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            pieces = re.split(r"(\*\*/|\*)", pattern)
            as_regex = "".join(
                {"**/": "(.*/)?", "*": "[^/]*"}.get(piece, re.escape(piece)) for piece in pieces
            )
            if any(re.fullmatch(as_regex, str(part)) for part in (path, *path.parents[:-1])):
                sent = line.startswith("!")
    return sent


def copied() -> Iterator[tuple[Path, str]]:
    """Yield (file of the checkout, its path in the image's /vastscale)."""
    for line in of_image("COPY"):
        *sources, target = line.split()
        if sources[0].startswith("--from="):
            continue
        for source in sources:
            before = list(ROOT.glob(source.rstrip("/")))
            assert before, f"COPY {source}: nothing there"
            files = [
                file
                for path in before
                for file in (path.rglob("*") if path.is_dir() else [path])
                if file.is_file() and is_sent(str(file.relative_to(ROOT)))
            ]
            assert files, f"COPY {source}: Dockerfile.dockerignore keeps all of it back"
            base = ROOT / source if source.endswith("/") else None
            yield from (
                (file, str(Path(target, file.relative_to(base) if base else file.name)))
                for file in files
            )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the image's /vastscale."""
    folder = tmp_path_factory.mktemp("image") / "vastscale"
    for file, name in copied():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / name)
    return folder


def test_the_image_has_all_that_its_programs_import_and_run(image: Path) -> None:
    for file in image.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [name.name for name in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                path = image / name.replace(".", "/")
                if name.split(".")[0] in ("pipeline", "launch", "tools"):
                    assert path.is_dir() or path.with_suffix(".py").is_file(), (
                        f"{file} imports {name}"
                    )
    for file in image.rglob("*.sh"):
        for name in re.findall(r"\$root/([\w./-]+\.(?:py|sh|txt))", file.read_text()):
            assert (image / name).is_file(), f"{file} runs {name}"
    for recipe in image.glob("recipes/*.yaml"):
        for name in re.findall(r"^ds_config: (\S+)", recipe.read_text(), re.MULTILINE):
            assert (image / name).is_file(), f"{recipe} names {name}"


def test_what_is_private_never_reaches_the_builder() -> None:
    kept_back = (
        ".git/config",
        ".venv/bin/python",
        ".deepspeed_env",
        "hostfile",
        "runs/a/recipe.yaml",
        "key.pem",
        "launch/.env",
        "pipeline/.netrc",
        "tests/conftest.py",
        "pipeline/__pycache__/cli.cpython-312.pyc",
    )
    assert [name for name in kept_back if is_sent(name)] == []
    assert is_sent("train.py")
    assert is_sent("launch/cloud/job.sh")


def test_the_scripts_write_nothing_in_the_image(image: Path, tmp_path: Path) -> None:
    """Its user may not write there: the stamp was written when the image was built."""
    command = ". launch/bootstrap.sh && vastscale_bootstrap requirements.txt"
    assert any(f"bash -c '{command}'" in line for line in of_image("RUN"))
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    variables = environment() | {
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run(
        ["bash", "-c", command], cwd=image, env=variables, capture_output=True, check=True
    )
    (image / ".bootstrap.lock").unlink()
    before = set(image.rglob("*"))
    done = subprocess.run(
        [str(image / "launch_local_train.sh"), "--help"],
        cwd=image,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(image.rglob("*")) == before


def test_the_image_runs_as_a_user_and_is_pinned() -> None:
    (user,) = of_image("USER")
    arguments = dict(line.partition("=")[::2] for line in of_image("ARG"))
    assert int(arguments[user.removeprefix("$")]) > 0
    assert f'--uid "{user}"' in " ".join(of_image("RUN"))
    stages = {stage for stage, *_ in instructions() if stage}
    bases = {rest.split()[0] for _, name, rest in instructions() if name == "FROM"} - stages
    assert bases == {"weights-${PREFETCH_WEIGHTS}", "nvidia/cuda:13.0.2-base-ubuntu24.04"}
    for file in (ROOT / "requirements.txt", ROOT / "requirements-dev.txt"):
        for line in file.read_text().splitlines():
            line = line.split("#")[0].strip()
            assert re.fullmatch(
                r'-r requirements\.txt|[\w-]+==[\w.]+(; python_version (>=|<) "3\.\d+")?|', line
            ), line
    for _, name, rest in instructions():
        assert "pip install" not in rest
        if name in ("ARG", "ENV"):
            assert not re.search(r"(?i)secret|token|passw|credential|key", rest), rest


def test_prefetched_weights_are_the_ones_that_losses_look_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ("", "ARG", "PREFETCH_WEIGHTS=0") in instructions()
    assert not [
        rest for stage, name, rest in instructions() if stage == "weights-0" and name == "ADD"
    ]
    names = []
    for rest in (
        rest for stage, name, rest in instructions() if stage == "weights-1" and name == "ADD"
    ):
        (checksum,) = re.findall(r"--checksum=sha256:([0-9a-f]{64}) ", rest)
        address = rest.split()[-2]
        names.append(address.removeprefix(f"{SOURCE}/"))
        # torchvision's file names end in the first digits of the checksum
        assert Path(address).stem.endswith(f"-{checksum[:8]}")
    assert sorted(names) == sorted(TRUNK_FILES.values())
    (home,) = re.findall(r"TORCH_HOME=(\S+)", " ".join(of_image("ENV")))
    monkeypatch.setenv("TORCH_HOME", home)
    assert f"--from=weights /weights/ {torch.hub.get_dir()}/checkpoints/" in of_image("COPY")


# --- Slurm ---

SRUN = """#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
first = next(number for number, word in enumerate(words) if not word.startswith("-"))
options, command = words[:first], words[first:]
with open("{folder}/srun.calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "FAKE_STATUS" in os.environ:
    sys.exit(int(os.environ["FAKE_STATUS"]))
if any(option.startswith("--container-image=") for option in options):  # the image is a folder here
    within = {{"/opt/venv/bin/python": sys.executable,
              "/vastscale/train.py": os.environ["FAKE_IMAGE"] + "/train.py"}}
    command = [within.get(word, word) for word in command]
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}}
environments = [{{**os.environ, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}}
                for rank in ("0", "1")]
tasks = [subprocess.Popen(command, env=environment) for environment in environments]
with open("{folder}/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""


class Slurm:
    """Does what `sbatch SCRIPT ARGUMENTS` would do, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.job = folder, folder / "output.txt", str(os.getpid())
        programs = folder / "bin"
        programs.mkdir(parents=True)
        (programs / "srun").write_text(SRUN.format(python=sys.executable, folder=folder))
        (programs / "squeue").write_text("#!/bin/bash\necho $FAKE_STATE\n")
        (programs / "scontrol").write_text(f'#!/bin/bash\necho "$*" >> "{folder}/scontrol.calls"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        activate = folder / "venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(
            f'PATH="{Path(sys.executable).parent}:$PATH"\nunset PYTHONHOME $NO_SUCH_NAME\n'
        )

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        slurms = {
            "SLURM_JOB_ID": self.job,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_CPUS_PER_TASK": "1",
            "FAKE_STATE": "RUNNING",
            "VENV": str(self.folder / "venv"),
        }
        own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        own["PATH"] = f"{self.folder / 'bin'}:{own['PATH']}"
        with open(self.output, "wb") as file:
            return subprocess.Popen(
                ["bash", str(SLURM / f"{script}.sbatch"), *arguments],
                cwd=self.folder,
                env={**own, **slurms, **variables},
                stdout=file,
                stderr=file,
            )

    def finish(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        try:
            status = process.wait(SECONDS)
        finally:
            if process.poll() is None:
                for task in self.tasks():
                    os.kill(task, signal.SIGKILL)
                process.kill()
        return status, self.output.read_text()

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.finish(self.start(script, *arguments, **variables))

    def tasks(self) -> list[int]:
        return [int(word) for word in (self.folder / "tasks").read_text().split()]

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.output.read_text():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def srun(self) -> list[str]:
        """Return the last command line of srun."""
        return json.loads((self.folder / "srun.calls").read_text().splitlines()[-1])

    def scontrol(self) -> list[str]:
        """Return the calls that change something; ranks also query the names of their hosts."""
        calls = self.folder / "scontrol.calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if not line.startswith("show hostnames")]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")


def test_the_time_limit_saves_and_the_same_job_continues_from_the_queue(
    slurm: Slurm, dataset: Path
) -> None:
    line = ("--reset", "--recipe", "demo", "--output-dir", "runs/it", *SMALL, *SELDOM, "steps=40")
    run_dir = slurm.folder / "runs" / "it"
    process = slurm.start("module", *line, DATASET=str(dataset))
    slurm.wait_for("step 4/40")
    for task in slurm.tasks():  # --signal=TERM@120 signals only the tasks
        os.kill(task, signal.SIGTERM)
    status, printed = slurm.finish(process)
    assert status == 143, printed
    assert "2 x CPU" in printed
    assert f"started by srun of Slurm (job {slurm.job})" in printed
    (step,) = re.findall(r"stopped and saved at step (\d+)", printed)
    assert checkpoint_steps(run_dir)[-1] == int(step) < 40
    assert f"requeueing job {slurm.job}" in printed
    assert slurm.scontrol() == [f"requeue {slurm.job}"]

    status, printed = slurm.run("module", *line, DATASET=str(dataset), SLURM_RESTART_COUNT="1")
    assert status == 0, printed
    assert f"continuing from step {step} of 40" in printed
    assert "finished at step 40" in printed
    # no run was moved away
    names = [path.name for path in run_dir.parent.iterdir() if not path.name.startswith(".")]
    assert names == ["it"]
    assert len(slurm.scontrol()) == 1


def test_a_container_trains_from_the_image_alone(slurm: Slurm, dataset: Path, image: Path) -> None:
    status, printed = slurm.run(
        "container",
        "--recipe",
        "demo",
        *SMALL,
        "steps=4",
        DATASET=str(dataset),
        IMAGE="lab#vastscale:1",
        FAKE_IMAGE=str(image),
        MOUNTS="/weights:/weights",
    )
    assert status == 0, printed
    assert "finished at step 4" in printed
    assert checkpoint_steps(slurm.folder / "runs" / "demo")[-1] == 4
    options = dict(
        word.removeprefix("--").partition("=")[::2]
        for word in slurm.srun()
        if word.startswith("--")
    )
    assert options["container-image"] == "lab#vastscale:1"
    assert options["container-workdir"] == str(slurm.folder)
    assert options["container-mounts"].split(",") == [
        f"{dataset}:{dataset}:ro",
        f"{slurm.folder}:{slurm.folder}",
        "/weights:/weights",
    ]


@pytest.mark.parametrize("script", ["module", "container"])
def test_only_a_saved_job_that_nobody_cancelled_goes_back_into_the_queue(
    slurm: Slurm, script: str
) -> None:
    for status, state, requeued in (
        (0, "RUNNING", 0),
        (1, "RUNNING", 0),
        (2, "RUNNING", 0),
        (130, "RUNNING", 0),
        (143, "COMPLETING", 0),
        (143, "", 0),
        (143, "RUNNING", 1),
        (138, "RUNNING", 2),  # --signal=USR1@120
    ):
        assert slurm.run(script, FAKE_STATUS=str(status), FAKE_STATE=state)[0] == status
        assert len(slurm.scontrol()) == requeued


@pytest.mark.parametrize("script", ["module", "container"])
def test_arguments_arrive_as_they_were_given_and_no_secret_with_them(
    slurm: Slurm, script: str
) -> None:
    names = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "REGISTRY_PASSWORD")
    line = ("--reset", "--recipe", "my recipe.yaml", "losses={l1: 1.0}", "$(touch ran)", "*")
    status, printed = slurm.run(
        script, *line, FAKE_STATUS="0", DATASET="/data/a b", **dict.fromkeys(names, SECRET)
    )
    assert status == 0, printed
    words = slurm.srun()
    assert words[-8:] == ["--dataset-dir", "/data/a b", *line]
    assert SECRET not in printed + " ".join(words)
    assert not (slurm.folder / "ran").exists()
    slurm.run(script, *line, FAKE_STATUS="0", DATASET="/data/a b", SLURM_RESTART_COUNT="3")
    assert slurm.srun()[-7:] == ["--dataset-dir", "/data/a b", *line[1:]]


def test_modules_are_loaded_and_an_environment_need_not_be(slurm: Slurm) -> None:
    loads = f'() {{ echo "$@" >> "{slurm.folder}/modules"; }}'
    status, printed = slurm.run(
        "module",
        FAKE_STATUS="0",
        MODULES="cuda/13.0 python/3.12",
        VENV="",
        **{"BASH_FUNC_module%%": loads},
    )
    assert status == 0, printed
    assert (slurm.folder / "modules").read_text() == "load cuda/13.0 python/3.12\n"


@pytest.mark.parametrize("script", ["module", "container"])
def test_a_job_asks_slurm_for_a_task_per_gpu_and_for_time_to_save(script: str) -> None:
    """Slurm reads only the lines before the first command."""
    text = (SLURM / f"{script}.sbatch").read_text().split("\nset -euo pipefail\n")
    assert "#SBATCH" not in text[1]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text[0], re.MULTILINE))
    assert len(asked) == text[0].count("\n#SBATCH")
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "TERM@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


# --- A cloud job ---

RCLONE = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
with open("{folder}/rclone.calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
verb, *words = sys.argv[1:]
places = [word for word in words if not word.startswith("-")]
source, target = [
    place if place.startswith("/") else "{folder}/bucket/" + place.rpartition(":")[2]
    for place in places
]
if not Path(source).is_dir():
    sys.exit(3)
excluded = [word for word in words if word.startswith("--exclude=") and not word.endswith("**")]
updating = ["--update"] if "--update" in words else []
Path(target).mkdir(parents=True, exist_ok=True)
deleting = ["--delete"] if verb == "sync" else []
options = [*excluded, *updating, *deleting]
sys.exit(subprocess.call(["rsync", "--archive", *options, source + "/", target + "/"]))
"""


class CloudJob:
    """Runs `launch/cloud/job.sh` of a checkout whose training is the test's script, on machines
    that come and go."""

    def __init__(self, folder: Path, training: str) -> None:
        self.folder, self.output, self.runs = (
            folder,
            folder / "output.txt",
            folder / "mounted" / "runs",
        )
        self.runs.parent.mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "bin" / "rclone").write_text(RCLONE.format(python=sys.executable, folder=folder))
        (folder / "bin" / "rclone").chmod(0o755)
        shutil.copytree(CLOUD, folder / "checkout" / "launch" / "cloud")
        script = folder / "checkout" / "launch_local_train.sh"
        script.write_text(
            f'#!/bin/bash\ncd "$WORK"\necho >> "{folder}/starts"\n'
            f'start=$(wc -l < "{folder}/starts")\n{training}\n'
        )
        script.chmod(0o755)

    def start(
        self, *arguments: str, machine: str = "machine1", **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start the job; an empty value removes a variable."""
        given = {
            "DATASET": str(self.folder),
            "RUNS": str(self.runs),
            "WORK": str(self.folder / machine),
            "RESTART_SECONDS": "0",
            "VIRTUAL_ENV": sys.prefix,
            **variables,
        }
        own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        own["PATH"] = f"{self.folder / 'bin'}:{own['PATH']}"
        with open(self.output, "wb") as file:
            return subprocess.Popen(
                [str(self.folder / "checkout" / "launch" / "cloud" / "job.sh"), *arguments],
                env={**own, **given},
                stdout=file,
                stderr=file,
            )

    def finish(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        try:
            return process.wait(SECONDS), self.output.read_text()
        finally:
            process.kill()

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.finish(self.start(*arguments, **variables))

    def starts(self) -> int:
        """Return how often training was started."""
        file = self.folder / "starts"
        return file.read_text().count("\n") if file.exists() else 0

    def rclones(self) -> list[list[str]]:
        return [
            json.loads(line) for line in (self.folder / "rclone.calls").read_text().splitlines()
        ]


needs_rsync = pytest.mark.skipif(not shutil.which("rsync"), reason="needs rsync (apt install)")
CHECKPOINT = """save() {
    folder=runs/a/checkpoints/step-0000000$1
    mkdir -p $folder; echo $1 > $folder/weights; touch $folder/MANIFEST.json
}"""


@needs_rsync
def test_a_cloud_job_outlives_a_failure_and_its_machine(tmp_path: Path, dataset: Path) -> None:
    """Training crashes, restarts and is preempted; another machine finishes it with the same
    command line."""
    job = CloudJob(tmp_path, f'[ $start = 1 ] && exit 1\nexec "{ROOT}/launch_local_train.sh" "$@"')
    often = ("steps=200", "validate_every=100", "save_every=100")
    line, run_dir = ("--recipe", "demo", *SMALL, *often), job.runs / "demo"
    process = job.start(*line, DATASET=str(dataset))
    deadline = time.monotonic() + SECONDS
    while "step 4/200" not in job.output.read_text():
        assert time.monotonic() < deadline, job.output.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, printed = job.finish(process)
    assert status == 143, printed
    assert "training ended with status 1; restarting in 0 s" in printed
    (step,) = re.findall(r"stopped and saved at step (\d+)", printed)
    assert checkpoint_steps(run_dir)[-1] == int(step) < 200

    status, printed = job.run(*line, DATASET=str(dataset), machine="machine2")
    assert status == 0, printed
    assert f"continuing from step {step} of 200" in printed
    assert "finished at step 200" in printed
    steps = checkpoint_steps(run_dir)
    # old checkpoints were removed there, too
    assert steps == checkpoint_steps(tmp_path / "machine2" / "runs" / "demo")
    assert steps[-1] == 200
    assert [damage(checkpoint_dir(run_dir, step)) for step in steps] == [""] * len(steps)
    assert (
        len(
            {
                json.loads(line)["step"]
                for line in (run_dir / "log.jsonl").read_text().splitlines()
                if json.loads(line)["event"] == "train"
            }
        )
        == 200
    )


@needs_rsync
@pytest.mark.parametrize(
    ("status", "starts"), [(0, 1), (2, 1), (130, 1), (138, 1), (143, 1), (1, 3), (137, 3)]
)
def test_a_cloud_job_ends_with_the_status_of_its_run(
    tmp_path: Path, status: int, starts: int
) -> None:
    job = CloudJob(tmp_path, f"exit {status}")
    assert job.run(MAX_FAILURES="2")[0] == status
    assert job.starts() == starts


@needs_rsync
def test_failures_count_from_the_last_checkpoint(tmp_path: Path) -> None:
    job = CloudJob(tmp_path, f"{CHECKPOINT}\nsave $start\n[ $start = 5 ]")
    status, printed = job.run(MAX_FAILURES="1")
    assert status == 0, printed
    assert job.starts() == 5


@needs_rsync
def test_checkpoints_are_copied_while_training_goes_on(tmp_path: Path) -> None:
    there = tmp_path / "mounted" / "runs" / "a" / "checkpoints"
    job = CloudJob(
        tmp_path,
        f"{CHECKPOINT}\nsave 1; touch runs/a/.lock; mkdir runs/a/checkpoints/.tmp-step-2\n"
        f'until [ -e "{there}/step-00000001/MANIFEST.json" ]; do sleep 0.05; done\n'
        "save 2; rm -r runs/a/checkpoints/step-00000001",
    )
    status, printed = job.run(COPY_SECONDS="0.1")
    assert status == 0, printed
    assert [path.name for path in there.iterdir()] == ["step-00000002"]
    assert [path.name for path in there.parent.iterdir()] == ["checkpoints"]


@needs_rsync
def test_a_bucket_serves_as_well_and_no_secret_is_on_a_command_line(tmp_path: Path) -> None:
    job = CloudJob(
        tmp_path, f'{CHECKPOINT}\ncat "$2/list.txt"; cat runs/a/checkpoints/*/weights; save $start'
    )
    config = tmp_path / "rclone.conf"
    config.write_text(f"[lab]\ntype = s3\nsecret_access_key = {SECRET}\n")
    (tmp_path / "bucket" / "photos" / "dataset").mkdir(parents=True)
    (tmp_path / "bucket" / "photos" / "dataset" / "list.txt").write_text("the list\n")
    for start in (1, 2):
        status, printed = job.run(
            DATASET="s3://photos/dataset",
            RUNS="lab:runs/first",
            RCLONE_CONFIG=str(config),
            WANDB_API_KEY=SECRET,
            machine=f"machine{start}",
        )
        assert status == 0, printed
        assert "the list" in printed
        assert SECRET not in printed
    assert "\n1\n" in printed  # saved by the first machine
    kept = tmp_path / "bucket" / "runs" / "first" / "a" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000001", "step-00000002"]
    calls = job.rclones()
    assert SECRET not in json.dumps(calls)
    assert calls[0][-2:] == [
        ":s3,provider=AWS,env_auth=true:photos/dataset",
        str(tmp_path / "machine1" / "dataset"),
    ]
    out = [call for call in calls if call[-1] == "lab:runs/first"]
    assert ["--exclude=MANIFEST.json" in call for call in out[:2]] == [True, False]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"RUNS": ""}, "RUNS is not set"),
        ({"DATASET": ""}, "DATASET is not set"),
        ({"RUNS": f":s3,secret_access_key={SECRET}:bucket"}, "RUNS contains a credential"),
        ({"DATASET": f"https://me:{SECRET}@example.org/dataset"}, "DATASET contains a credential"),
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, "AWS_SECRET_ACCESS_KEY is set"),
        ({"RCLONE_CONFIG_LAB_PASS": SECRET}, "RCLONE_CONFIG_LAB_PASS is set"),
        ({"RUNS": "/nowhere/mounted/runs"}, "cannot create RUNS="),
    ],
)
def test_a_cloud_job_refuses_before_it_starts(
    tmp_path: Path, given: dict[str, str], named: str
) -> None:
    job = CloudJob(tmp_path, "exit 0")
    status, printed = job.run(**given)
    assert status == 2, printed
    assert printed.splitlines()[-1].startswith(f"error: {named}")
    assert SECRET not in printed
    assert job.starts() == 0


def test_a_cloud_job_takes_no_reset(tmp_path: Path) -> None:
    """The provider runs the same command line after each preemption."""
    job = CloudJob(tmp_path, "exit 0")
    assert job.run("--reset")[0] == 2
    assert job.starts() == 0


@needs_rsync
def test_a_run_that_cannot_be_copied_out_is_a_failure(tmp_path: Path) -> None:
    job = CloudJob(
        tmp_path, f'{CHECKPOINT}\nsave 1; rm -r "{tmp_path}/mounted"; touch "{tmp_path}/mounted"'
    )
    status, printed = job.run()
    assert status == 1
    assert "could not copy the run to RUNS; it is in" in printed
