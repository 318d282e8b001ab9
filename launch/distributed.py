"""Train on the machines of a hostfile: check the hosts, launch and supervise the ranks, restart."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import asyncio
import math
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from launch.cluster import messages
from launch.cluster.hostfile import (
    HOSTFILE,
    Slots,
    choose,
    find_hostfile,
    read_hostfile,
    world_size,
)
from launch.cluster.job import (
    ClusterJob,
    Launcher,
    answering,
    check_launcher,
    choose_port,
    share_batch,
    wait_for_all,
)
from launch.cluster.supervisor import Failure, Supervisor
from launch.doctor import diagnose
from launch.doctor.prediction import count_parameters, step_seconds_of
from launch.environment import ENV_FILE, variables_for_ranks, without
from pipeline import cli
from pipeline.cli import RunError, UserError, counted, say
from pipeline.config.ds_config import batch_sizes
from pipeline.distributed import launcher
from pipeline.distributed.gpus import CPU, VISIBLE, is_cpu_wanted
from pipeline.installation import find_file
from pipeline.run_folder import (
    checkpoint_steps,
    has_ended,
    holds_run,
    kept_runs,
    refuse_if_in_use,
)
from pipeline.training.options import (
    DATASET_DIR,
    TrainOptions,
    TrainPlan,
    dataset_dirs,
    has_lists,
    make_plans,
    overrides_last,
)

RETURN_SECONDS = 300  # how long to wait for a failed host to return (without --elastic)
_VALUES = (
    "--hostfile",
    "-H",
    "--include",
    "--exclude",
    "--launcher",
    "--launcher-args",
    "--master-addr",
    "--master-port",
    "--interface",
    "--max-restarts",
)
_FLAGS = ("--no-doctor", "--elastic", "--reset")


@dataclass
class Options(TrainOptions):
    """Train on every machine of a hostfile, one rank per slot. Start it on the first machine.

    Checks all hosts first (python -m launch.doctor), then starts the ranks and supervises them: if
    one rank dies, all are stopped, and the cause is printed last. Accepts the options of
    ./launch_local_train.sh as well, with the same meaning.

    Example: ./launch_distributed_train.sh --reset --recipe vapsr_x4 --max-restarts 5 --elastic
    """

    hostfile: Annotated[Path, tyro.conf.arg(aliases=["-H"])] = Path(HOSTFILE)
    """File with lines such as `node1 slots=8`, this machine first. Default: hostfile in the current
    folder, else in the checkout."""
    include: str = ""
    """Use only these hosts and slots: node1@node2:0,2."""
    exclude: str = ""
    """Use all hosts and slots but these."""
    launcher: Launcher = "pdsh"
    """How DeepSpeed starts the ranks: pdsh over ssh, Open MPI's mpirun, or Slurm's srun."""
    launcher_args: str = ""
    """Additional arguments for pdsh, mpirun or srun, quoted as one word: "--partition=gpu"."""
    master_addr: str = ""
    """Address of this machine that the other hosts connect to. Default: the doctor picks one that
    all of them can reach."""
    master_port: int = 0
    """Port on that address at which the ranks meet. Default: a free one."""
    interface: str = ""
    """Name of the network interface to use on every host. Default: on each host, the one that leads
    to the first host."""
    no_doctor: bool = False
    """Start immediately, without checking the hosts."""
    max_restarts: int = 0
    """Restart up to this many times from the newest complete checkpoint when a rank or a host
    fails."""
    elastic: bool = False
    """Restart with the hosts that still answer; gradient accumulation keeps the global batch."""


def main(options: Options) -> int:
    """Train as `options` say. Return `train.py`'s exit status, or 1 if any rank failed."""
    began = time.time()
    slots = choose(read_hostfile(find_hostfile(options.hostfile)), options.include, options.exclude)
    _check(options, slots)
    plans = make_plans(options)  # bad input is rejected here, once, before any process starts
    plan = plans[-1]
    refuse_if_in_use(plan.home, say)
    micro_batch = min(batch_sizes(one.ds_config, world_size(slots))[0] for one in plans)
    is_on_cpu = options.device == "cpu" or is_cpu_wanted()
    address = (
        _address(options, slots)
        if options.no_doctor
        else _ask_doctor(options, slots, plan, is_on_cpu)
    )
    variables = variables_for_ranks([Path.home() / ENV_FILE, find_file(ENV_FILE)], os.environ)
    if is_on_cpu:
        variables |= {CPU: "1"}
    elif os.environ.get(VISIBLE):
        say(
            f"note: {VISIBLE} applies to one machine and is ignored here; choose GPUs with "
            "--include HOST:0,1"
        )
    if options.interface:
        variables |= {
            "GLOO_SOCKET_IFNAME": options.interface,
            "NCCL_SOCKET_IFNAME": f"={options.interface}",
        }
    arguments = overrides_last(without(sys.argv[1:], _VALUES, _FLAGS), _FLAGS)
    logs = plan.home.with_name(f"{plan.home.name}.logs")
    job = ClusterJob(
        slots,
        address,
        0,
        tuple(arguments),
        variables,
        os.getcwd(),
        logs,
        options.launcher,
        options.launcher_args,
    )
    old_runs, has_old_run = kept_runs(plan.home), holds_run(plan.home)
    must_reset = options.reset
    for attempt in range(options.max_restarts + 1):
        first = ("--reset",) if must_reset else ()
        port = choose_port(address, options.master_port, wait=attempt > 0)
        now = replace(job, port=port, arguments=(*first, *job.arguments))
        before = _newest_steps(plans)
        say(_introduction(now))
        stopped_by, failure = _run(now)
        # If this attempt failed before it moved the old run away, the next one must still reset,
        # or it would continue the old run.
        must_reset = must_reset and has_old_run and kept_runs(plan.home) == old_runs
        if stopped_by or failure is None or attempt == options.max_restarts:
            break
        if failure.status == 2 and _newest_steps(plans) == before:  # bad input: a retry fails too
            break
        _report(failure, now)
        say(
            f"restart {attempt + 1} of {options.max_restarts}, from "
            f"{'the beginning (--reset)' if must_reset else _newest(plans)}"
        )
        job = _for_restart(job, slots, options.elastic, plans, micro_batch)
    if failure is not None:
        _report(failure, now)
        return 1 if stopped_by else failure.status
    if stopped_by:
        return 128 + stopped_by
    if not has_ended(plan.run_dir, plan.total_steps, plan.recipe.patience):
        raise RunError(
            f"every rank succeeded, but {plan.run_dir} has no checkpoint of the last step; check "
            "that the run folder is on this machine and that this machine is the first in the "
            "hostfile"
        )
    say(f"all {world_size(job.slots)} ranks finished in {time.time() - began:.0f} s")
    return 0


def _check(options: Options, slots: Slots) -> None:
    if options.procs:
        raise UserError(
            f"--procs {options.procs} is for one machine; set the ranks of a host with slots= in "
            "the hostfile, and choose among them with --include"
        )
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts} must be 0 or more")
    if options.elastic and options.launcher == "slurm":
        raise UserError(
            "--elastic does not work with --launcher slurm, where Slurm chooses the hosts; omit "
            "--elastic or use --launcher pdsh"
        )
    if options.max_restarts and len(slots) > 1 and not shutil.which("ssh"):
        raise UserError(
            "--max-restarts needs ssh to ask whether hosts are back, and ssh is not installed "
            "here; run `apt install openssh-client`"
        )
    if options.elastic and not options.max_restarts:
        raise UserError(
            "--elastic has no effect without restarts; add --max-restarts 3, for example"
        )
    if not has_lists(options):
        places = " or ".join(str(path) for path in options.dataset_dir or (DATASET_DIR,))
        raise UserError(
            f"no file lists in {places}; make a dataset with `python tools/images_to_data.py "
            "PHOTOS ~/dataset/NAME` and `python tools/select_training_files.py`, and copy it to "
            "all hosts with launch/sync.sh"
        )
    check_launcher(options.launcher, slots, options.launcher_args)


def _ask_doctor(options: Options, slots: Slots, plan: TrainPlan, is_on_cpu: bool) -> str:
    """Check all hosts; return this machine's address for the others. `UserError` if one fails."""
    folders = [path.absolute() for path in dataset_dirs(options)] + [
        path.absolute() for path in options.lr_dir
    ]
    if not options.dataset_dir:
        folders[0] = DATASET_DIR  # each host's own
    found = diagnose(
        slots,
        dataset_dirs=folders,
        output_dir=plan.home,
        interface=options.interface,
        master_address=options.master_addr,
        say=say,
        is_on_cpu=is_on_cpu,
        ports=[options.master_port] if options.master_port else (),
        parameters=lambda: count_parameters(options.recipe, options.overrides),
        step_seconds=step_seconds_of(plan.run_dir, world_size(slots)),
    )
    say(found.table())
    if not found.ok:
        raise UserError(
            f"{counted(len(found.failures), 'check')} failed, the first: {found.failures[0]} "
            "(--exclude HOST omits a host, --no-doctor skips the checks)"
        )
    return _own_address(found.master_address, slots)


def _address(options: Options, slots: Slots) -> str:
    """Return this machine's address for the others without asking any host.

    It is --master-addr, or the address from which this machine reaches the second host.
    """
    first, *others = slots
    if options.master_addr:
        return _own_address(options.master_addr, slots)
    if launcher.is_known(first):
        _check_is_first(first, slots)
    return launcher.address_towards(others[0]) if others else "127.0.0.1"


def _check_is_first(address: str, slots: Slots) -> None:
    """Raise `UserError` unless `address`, which is the first host's, belongs to this machine."""
    first = next(iter(slots))
    if not address or not launcher.is_own(address):
        raise UserError(
            f"{first}, the first host in the hostfile ({address or 'no address found'}), is not "
            "this machine; start the run there, or move this machine's line to the top"
        )


def _own_address(address: str, slots: Slots) -> str:
    """Return the IP address of `address`, a name or an address of this machine.

    Raises `UserError` if it belongs to another machine, or is a loopback address and there are
    other hosts.
    """
    _check_is_first(address, slots)
    own = launcher.outer_addresses(address)
    if len(slots) > 1 and not own:
        raise UserError(
            f"--master-addr {address} is a loopback address, which other hosts cannot reach; give "
            "this machine's network address, such as 10.0.0.1"
        )
    return own[0] if own else address


def _introduction(job: ClusterJob) -> str:
    hosts = ", ".join(f"{host} {len(numbers)}" for host, numbers in job.slots.items())
    return (
        f"starting {counted(world_size(job.slots), 'rank')} on {counted(len(job.slots), 'host')} "
        f"({hosts}) with {job.launcher}; they meet at "
        f"{job.address} port {job.port}; each rank's output: {job.logs}/ on its host"
    )


def _run(job: ClusterJob) -> tuple[int, Failure | None]:
    """Run all ranks to their end. Return the signal that stopped them (0: none) and the failure."""
    try:
        job.logs.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {job.logs} for the ranks' output ({error.strerror}); give another "
            "--output-dir"
        ) from error
    with (
        tempfile.TemporaryDirectory(prefix="vastscale-") as folder,
        open(job.logs / "launcher.log", "a", encoding="utf-8", opener=_open_private) as log,
    ):
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {_introduction(job)}\n")
        run, key = secrets.token_hex(8), secrets.token_hex(32)
        supervisor = Supervisor(
            job.hosts, run, key, job.task, log, names_are_ranks=job.launcher != "slurm"
        )
        if not job.key_by_stdin:
            others = tuple(job.slots)[1:]
            # pdsh passes these on, too.
            ssh_arguments = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
            messages.deposit_key(run, key, others, ssh_arguments)
        try:
            asyncio.run(_supervise(supervisor, job, Path(folder)))
        finally:
            messages.remove_key(run)
    return supervisor.stopped_by, supervisor.failure


async def _supervise(supervisor: Supervisor, job: ClusterJob, folder: Path) -> None:
    port = await supervisor.listen(job.address)
    command = job.command(folder, job.word(supervisor.run, port))
    stdin = f"{supervisor.key}\n" if job.key_by_stdin else ""
    await supervisor.watch(command, job.launcher_variables(folder), str(ROOT), stdin)


def _open_private(path: str, flags: int) -> int:
    """An opener for `open` that creates files only their owner can read."""
    return os.open(path, flags, 0o600)


def _for_restart(
    job: ClusterJob, slots: Slots, elastic: bool, plans: Sequence[TrainPlan], micro_batch: int
) -> ClusterJob:
    """Return the job to restart: on all hosts once they are back or, if `elastic`, on those that
    answer.

    With fewer ranks the micro-batch and the accumulation change so that each stage keeps its global
    batch. `RunError` if no single split fits all stages.
    """
    if not elastic:
        wait_for_all(slots, RETURN_SECONDS, say)
        return job
    left = answering(slots)
    total = math.gcd(*(plan.ds_config["train_batch_size"] for plan in plans))  # of all stages
    used, micro = share_batch(left, total, micro_batch)
    gone = [host for host in slots if host not in used]
    if gone:
        say(f"continuing without {', '.join(gone)}")
    totals = {plan.ds_config["train_batch_size"] for plan in plans}
    say(
        "; ".join(
            f"global batch {total} = {micro} x {total // (micro * world_size(used))} accumulation "
            f"x {world_size(used)} ranks"
            for total in sorted(totals)
        )
    )
    split = [f"ds.train_micro_batch_size_per_gpu={micro}"]
    if any("gradient_accumulation_steps" in plan.ds_config for plan in plans):
        if len(totals) > 1:
            raise RunError(
                "the stages' global batches differ and gradient_accumulation_steps is set, so no "
                "split over fewer ranks fits every stage; omit it, or restart by hand"
            )
        split.append(f"ds.gradient_accumulation_steps={total // (micro * world_size(used))}")
    kept = [
        argument
        for argument in job.arguments
        if not argument.startswith(
            ("ds.train_micro_batch_size_per_gpu=", "ds.gradient_accumulation_steps=")
        )
    ]
    return replace(job, slots=used, arguments=(*kept, *split))


def _newest_steps(plans: Sequence[TrainPlan]) -> list[int]:
    """The newest checkpoint's step of each stage; 0 if it has none."""
    return [max(checkpoint_steps(plan.run_dir), default=0) for plan in plans]


def _newest(plans: Sequence[TrainPlan]) -> str:
    """Describe the checkpoint that a run continues from, for the log."""
    for plan in reversed(plans):
        steps = checkpoint_steps(plan.run_dir)
        stage = f" of stage {plan.recipe.stage}" if plan.recipe.stage else ""
        if steps:
            return f"the checkpoint of step {steps[-1]}{stage}"
    return "the beginning (no checkpoint yet)"


def _report(failure: Failure, job: ClusterJob) -> None:
    """Print the last output of the rank or host at fault, then the cause in one line."""
    said = failure.tail.strip()
    with suppress(OSError):
        if said:
            print(f"--- last output from there (all logs: {job.logs}):\n{said}", file=sys.stderr)
        print(f"error: {failure.cause}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(Options, main, overrides_last(sys.argv[1:], _FLAGS))
