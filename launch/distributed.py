"""Training on the machines of a hostfile: doctor, launcher, supervisor, restarts, and the truth at the end."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import hosts_left
from launch.arguments import without
from launch.doctor import diagnose
from launch.doctor.pace import count_parameters, step_seconds_of
from launch.env_file import ENV_FILE, variables_for_ranks
from launch.hostfile import HOSTFILE, Slots, choose, find_hostfile, read_hostfile, world_size
from launch.job import Job, Launcher, check_launcher, choose_port
from launch.supervisor import Failure, Supervisor
from pipeline import cli, interfaces
from pipeline.cli import RunError, UserError
from pipeline.options import DATASET_DIR, Plan, TrainOptions, dataset_dirs, has_lists, make_plan, overrides_last
from pipeline.recipe import batch_sizes
from pipeline.run_folder import checkpoint_steps, has_ended

RETURN_SECONDS = 300  # for a host that has failed to be there again, where a run may not go on without it
_VALUES = ("--hostfile", "-H", "--include", "--exclude", "--launcher", "--launcher-args", "--master-addr",
           "--master-port", "--interface", "--max-restarts")
_FLAGS = ("--no-doctor", "--elastic", "--reset")


@dataclass
class Options(TrainOptions):
    """Train on every machine of a hostfile, one rank a slot, from the first of them.

    Looks at all hosts first (python -m launch.doctor), then starts the ranks and watches over them: what ends one ends
    all, with the reason last. The options of ./launch_local_train.sh are here, too, with the same meaning.

    Example: ./launch_distributed_train.sh --reset --recipe vapsr_x4 --max-restarts 5 --elastic
    """

    hostfile: Annotated[Path, tyro.conf.arg(aliases=["-H"])] = Path(HOSTFILE)
    """Lines such as `node1 slots=8`, this machine's first. Default: hostfile here, or in the checkout."""
    include: str = ""
    """Only these hosts and slots of it: node1@node2:0,2."""
    exclude: str = ""
    """All but these."""
    launcher: Launcher = "pdsh"
    """How DeepSpeed starts the ranks: pdsh over ssh, Open MPI's mpirun, or Slurm's srun."""
    launcher_args: str = ""
    """Further arguments for pdsh, mpirun or srun, in one word: "--partition=gpu"."""
    master_addr: str = ""
    """This machine's address for the other hosts. Default: the doctor finds the one that all of them reach."""
    master_port: int = 0
    """Port of it on which the ranks meet. Default: a free one."""
    interface: str = ""
    """Name of the network interface on every host. Default: each host's own on the way to the first."""
    no_doctor: bool = False
    """Start at once, without looking at the hosts."""
    max_restarts: int = 0
    """Start again so many times from the newest whole checkpoint when a rank or a host has failed."""
    elastic: bool = False
    """Then go on with the hosts that still answer; the global batch stays, by accumulation."""


def main(options: Options) -> int:
    """Train as `options` say. Exit status as `train.py`'s, and 1 for a failure of any rank on any host."""
    began = time.time()
    slots = choose(read_hostfile(find_hostfile(options.hostfile)), options.include, options.exclude)
    _check(options, slots)
    plan = make_plan(options)  # bad input is refused here, once, before any process starts
    micro_batch, _ = batch_sizes(plan.ds_config, world_size(slots))
    address = _address(options, slots) if options.no_doctor else _ask_doctor(options, slots, plan)
    variables = variables_for_ranks([Path.home() / ENV_FILE, ROOT / ENV_FILE], os.environ)
    if options.interface:
        variables |= {"GLOO_SOCKET_IFNAME": options.interface, "NCCL_SOCKET_IFNAME": f"={options.interface}"}
    arguments = overrides_last(without(sys.argv[1:], _VALUES, _FLAGS), _FLAGS)
    logs = plan.home.with_name(f"{plan.home.name}.logs")
    job = Job(slots, address, 0, tuple(arguments), variables, os.getcwd(), logs, options.launcher,
              options.launcher_args)
    old_run = _folder_number(plan.home)
    must_reset = options.reset
    for attempt in range(options.max_restarts + 1):
        first = ("--reset",) if must_reset else ()
        now = replace(job, port=choose_port(address, options.master_port), arguments=(*first, *job.arguments))
        _say(_introduction(now))
        stopped_by, failure = _run(now)
        # An attempt that failed early may have left the old run where it was: it must not be continued.
        must_reset = must_reset and old_run is not None and _folder_number(plan.home) == old_run
        if stopped_by or failure is None or failure.status == 2 or attempt == options.max_restarts:
            break
        _tell(failure, now)
        _say(f"restart {attempt + 1} of {options.max_restarts}, from "
             f"{'the beginning, afresh' if must_reset else _newest(plan)}")
        job = _for_restart(job, slots, options.elastic, plan, micro_batch)
    if stopped_by:
        if failure is not None:
            _tell(failure, now)
            return 1
        return 128 + stopped_by
    if failure is not None:
        _tell(failure, now)
        return failure.status
    if not has_ended(plan.run_dir, plan.total_steps, plan.recipe.patience):
        raise RunError(f"every rank ended well, but {plan.run_dir} holds no checkpoint of the last step; is the run "
                       "folder on this machine, and is this machine the first of the hostfile?")
    _say(f"all {world_size(job.slots)} ranks ended well, {time.time() - began:.0f} s")
    return 0


def _check(options: Options, slots: Slots) -> None:
    if options.procs:
        raise UserError(f"--procs {options.procs} is for one machine; here slots= in the hostfile says how many ranks "
                        "a host has, and --include which of them")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts} must be 0 or more")
    if options.elastic and not options.max_restarts:
        raise UserError("--elastic says with which hosts a restart goes on; say how many restarts there may be: "
                        "--max-restarts 3")
    if not has_lists(options):
        places = " or ".join(str(path) for path in options.dataset_dir or (DATASET_DIR,))
        raise UserError(f"there are no file lists in {places}; make a dataset with `python tools/images_to_data.py "
                        "PHOTOS ~/dataset/NAME` and `python tools/select_training_files.py`, and bring it to all hosts "
                        "with launch/sync.sh")
    check_launcher(options.launcher, slots, options.launcher_args)


def _ask_doctor(options: Options, slots: Slots, plan: Plan) -> str:
    """This machine's address for the others, if all is well with all of them."""
    folders = [path.absolute() for path in dataset_dirs(options)] + [path.absolute() for path in options.lr_dir]
    if not options.dataset_dir:
        folders[0] = DATASET_DIR  # each host's own
    found = diagnose(slots, dataset_dirs=folders, output_dir=plan.home, interface=options.interface,
                     master_address=options.master_addr, say=_say,
                     ports=[options.master_port] if options.master_port else (),
                     parameters=lambda: count_parameters(options.recipe, options.overrides),
                     step_seconds=step_seconds_of(plan.run_dir, world_size(slots)))
    _say(found.table())
    if not found.ok:
        count = len(found.failures)
        raise UserError(f"{count} check{'s' if count > 1 else ''} failed, the first: {found.failures[0]} "
                        "(--exclude leaves a host out, --no-doctor starts all the same)")
    _insist_on_first(found.master_address, slots)
    return found.master_address


def _address(options: Options, slots: Slots) -> str:
    """Likewise, without asking anybody: the address with which this machine speaks to the second host."""
    first, *others = slots
    if not options.master_addr and interfaces.is_known(first):
        _insist_on_first(first, slots)
    address = options.master_addr or (interfaces.address_towards(others[0]) if others else "127.0.0.1")
    _insist_on_first(address, slots)
    return address


def _insist_on_first(address: str, slots: Slots) -> None:
    first = next(iter(slots))
    if not address or not interfaces.is_own(address):
        raise UserError(f"{first}, the first host of the hostfile ({address or 'no address found'}), is not this "
                        f"machine; start the run there, or move this machine's line to the top")


def _introduction(job: Job) -> str:
    hosts = ", ".join(f"{host} {len(numbers)}" for host, numbers in job.slots.items())
    count = world_size(job.slots)
    return (f"starting {count} rank{'s' if count > 1 else ''} on {len(job.slots)} host"
            f"{'s' if len(job.slots) > 1 else ''} ({hosts}) by {job.launcher}; they meet at {job.address} port "
            f"{job.port}; each rank's output: {job.logs}/ on its host")


def _run(job: Job) -> tuple[int, Failure | None]:
    """Start the ranks and see them to their end: the signal that stopped them, and why they failed."""
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.logs} cannot be made ({error.strerror}), where each rank's output goes; give another "
                        "--output-dir") from error
    with tempfile.TemporaryDirectory(prefix="vastscale-") as folder, \
            open(job.logs / "launcher.log", "a", encoding="utf-8") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {_introduction(job)}\n")
        supervisor = Supervisor(job.hosts, secrets.token_hex(16), log, names_are_ranks=job.launcher != "slurm")
        asyncio.run(_supervise(supervisor, job, Path(folder)))
    return supervisor.stopped_by, supervisor.failure


async def _supervise(supervisor: Supervisor, job: Job, folder: Path) -> None:
    port = await supervisor.listen(job.address)
    command = job.command(folder, job.task(supervisor.run, port))
    await supervisor.watch(command, job.launcher_variables(folder), str(ROOT))


def _for_restart(job: Job, slots: Slots, elastic: bool, plan: Plan, micro_batch: int) -> Job:
    """The job as it is started again: on all hosts once they are back, or on those that answer."""
    if not elastic:
        hosts_left.wait_for_all(slots, RETURN_SECONDS, _say)
        return job
    left = hosts_left.answering(slots)
    used, micro = hosts_left.share_batch(left, plan.ds_config, micro_batch)
    gone = [host for host in slots if host not in used]
    if gone:
        _say(f"going on without {', '.join(gone)}")
    total = plan.ds_config["train_batch_size"]
    accumulation = total // (micro * world_size(used))
    _say(f"global batch {total} = {micro} x {accumulation} accumulation x {world_size(used)} ranks")
    kept = [argument for argument in job.arguments if not argument.startswith(
        ("ds.train_micro_batch_size_per_gpu=", "ds.gradient_accumulation_steps="))]
    return replace(job, slots=used, arguments=(*kept, f"ds.train_micro_batch_size_per_gpu={micro}",
                                               f"ds.gradient_accumulation_steps={accumulation}"))


def _folder_number(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of the same name; None where there is none, or nothing in it."""
    try:
        found = folder.stat()
        return (found.st_dev, found.st_ino) if any(folder.iterdir()) else None
    except OSError:
        return None


def _newest(plan: Plan) -> str:
    steps = checkpoint_steps(plan.run_dir)
    return f"the checkpoint of step {steps[-1]}" if steps else "the beginning: there is no checkpoint yet"


def _tell(failure: Failure, job: Job) -> None:
    """Why a job ended: what the rank in question said last, then the cause in one line."""
    said = failure.tail.strip()
    with suppress(OSError):
        if said and failure.cause:
            print(f"--- the end of what was heard from there ({job.logs}):\n{said}", file=sys.stderr)
        print(f"error: {failure.cause}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(Options, main, overrides_last(sys.argv[1:], _FLAGS))
