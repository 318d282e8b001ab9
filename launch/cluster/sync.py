"""Copy checkout and dataset to every host with rsync, and make the environment there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.cluster.hostfile import HOSTFILE, choose, find_hostfile, read_hostfile
from launch.cluster.remote import SYNCED, run_on, ssh_options
from pipeline import cli
from pipeline.cli import UserError, say
from pipeline.data.image_files import TRAINING_LIST
from pipeline.training.options import DATASET_DIR

REPLACED = ".synced_away"
"""Folder in a host's checkout with the files that a copy replaced or removed."""
OWN = (
    ".git",
    ".venv",
    ".cache",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    ".bootstrap.lock",
    REPLACED,
    SYNCED,
    "/runs",
    "/results",
    "/export",
)
"""Names in a checkout that belong to each host and are never copied or removed."""
ENVIRONMENT_SECONDS = 3600
_RSYNC_STATUS = {
    23: "some files could not be copied",
    12: "rsync is missing there, or died",
    127: "rsync is missing there",
    255: "ssh failed",
    11: "its disk is full, or not writable",
}


@dataclass(frozen=True)
class Options:
    """Copy this checkout and the dataset to every host of the hostfile, and install the Python
    environment there.

    Files that are already there are not copied again, and an interrupted copy continues where it
    stopped. A host that shares this disk is skipped. Nothing in a host's checkout is lost: files
    that are replaced or removed go to .synced_away.

    Example: launch/sync.sh --dataset-dir ~/dataset
    """

    hostfile: Annotated[Path, tyro.conf.arg(aliases=["-H"])] = Path(HOSTFILE)
    """File with lines such as `node1 slots=8`, this machine first. Default: hostfile in the current
    folder, else in the checkout."""
    include: str = ""
    """Copy only to these hosts: node2@node3."""
    exclude: str = ""
    """Copy to all hosts but these."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Dataset folder, copied to the same path; may be repeated. Default: ~/dataset, if it has file
    lists."""
    no_checkout: bool = False
    """Do not copy the checkout."""
    no_dataset: bool = False
    """Do not copy any dataset."""
    no_environment: bool = False
    """Do not install anything."""
    delete: bool = False
    """Also remove files from a host's copy of the dataset that are not in this one."""


@dataclass(frozen=True)
class SyncedFolder:
    """A folder that every host gets, and what to call it in messages."""

    name: str
    folder: Path


def main(options: Options) -> int:
    """Copy and install on all hosts at once, and print the result. Return 1 if a host failed."""
    if not shutil.which("rsync"):
        raise UserError("rsync is not installed here; `apt install rsync` on every host")
    hosts = list(
        choose(read_hostfile(find_hostfile(options.hostfile)), options.include, options.exclude)
    )
    parts = [] if options.no_checkout else [SyncedFolder("checkout", ROOT)]
    parts += (
        []
        if options.no_dataset
        else [SyncedFolder("dataset", folder) for folder in _datasets(options)]
    )
    with ThreadPoolExecutor(len(hosts)) as pool:
        complaints = list(pool.map(lambda host: _bring(host, parts, options), hosts))
    failed = [complaint for complaint in complaints if complaint]
    for complaint in failed:
        print(f"error: {complaint}", file=sys.stderr)
    print(f"{len(hosts) - len(failed)} of {len(hosts)} hosts are up to date")
    return 1 if failed else 0


def _datasets(options: Options) -> list[Path]:
    default = (
        [DATASET_DIR.expanduser()] if (DATASET_DIR.expanduser() / TRAINING_LIST).is_file() else []
    )
    folders = [path.expanduser().absolute() for path in options.dataset_dir] or default
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--dataset-dir {folder}: no such folder")
    return folders


def _bring(host: str, parts: Sequence[SyncedFolder], options: Options) -> str:
    """Copy and install everything on one host; return an error message, or "" if all went well."""
    for part in parts:
        seen = _sees(host, part.folder)
        if isinstance(seen, str):
            return f"{host}: {seen}"
        if seen:
            say(f"{host}: {part.name}: shares this disk, nothing to copy")
            continue
        complaint = _copy(host, part, options)
        if complaint:
            return f"{host}: {part.name}: {complaint}"
    return "" if options.no_environment else _make_environment(host)


def _sees(host: str, folder: Path) -> bool | str:
    """Whether a host sees this very folder (a shared disk), or why this is unknown."""
    mark = folder / f".vastscale-{uuid.uuid4().hex}"
    try:
        mark.touch()
    except OSError as error:
        return (
            f"cannot write to {folder} here ({error.strerror}), which is how a shared disk is "
            "recognised"
        )
    try:
        done = run_on([host], ["test", "-e", str(mark)], timeout=30)[host]
    finally:
        with suppress(OSError):
            mark.unlink()
    return done.status == 0 if done.status in (0, 1) else done.complaint


def _copy(host: str, part: SyncedFolder, options: Options) -> str:
    made = run_on([host], ["mkdir", "-p", "--", str(part.folder)], timeout=30)[host]
    if made.status:
        return made.complaint
    is_checkout = part.folder == ROOT
    shell = shlex.join(["ssh", *ssh_options()])
    command = [
        "rsync",
        "--archive",
        "--no-owner",
        "--no-group",
        "--protect-args",
        "--partial",
        "--partial-dir=.rsync-partial",
        "--timeout=120",
        "--rsh",
        shell,
        "--stats",
        "--human-readable",
    ]
    if is_checkout:
        command += [
            "--delete",
            "--backup",
            f"--backup-dir={REPLACED}",
            *(f"--exclude={name}" for name in OWN),
        ]
    elif options.delete:
        command += ["--delete-after"]
    say(f"{host}: {part.name}: copying {part.folder}")
    done = subprocess.run(
        [*command, "--", f"{part.folder}/", f"{host}:{part.folder}/"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [""]
        unknown = f"rsync ended with status {done.returncode}"
        return f"{_RSYNC_STATUS.get(done.returncode, unknown)}: {lines[0]}"
    say(f"{host}: {part.name}: {_summary(done.stdout)}")
    return _write_commit(host) if is_checkout else ""


def _summary(stats: str) -> str:
    """Summarise rsync's --stats in a few words."""
    lines = dict(line.split(": ", 1) for line in stats.splitlines() if ": " in line)
    files, size = (
        lines.get(name, "?").strip()
        for name in ("Number of regular files transferred", "Total bytes sent")
    )
    return f"{files} files, {size} bytes sent"


def _write_commit(host: str) -> str:
    """Record this checkout's commit in the host's copy, which has no .git; return an error or
    ""."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    text = json.dumps({"commit": done.stdout.strip()})
    left = run_on(
        [host], ["sh", "-c", 'cat > "$1"', "sh", str(ROOT / SYNCED)], timeout=30, stdin=text
    )[host]
    return left.complaint if left.status else ""


def _make_environment(host: str) -> str:
    """Make or complete, on a host, the environment that this process runs in."""
    own = Path(sys.prefix)
    lead = []
    if own != ROOT / ".venv":
        if run_on([host], ["test", "-x", str(own / "bin" / "python")], timeout=30)[host].status:
            return (
                f"{host}: no environment at {own}, which is active here; make one there, or "
                "deactivate it here, so that .venv in the checkout is used"
            )
        lead = [f"export VIRTUAL_ENV={shlex.quote(str(own))}"]
    elif os.environ.get("VASTSCALE_PYTHON"):
        lead = [f"export VASTSCALE_PYTHON={shlex.quote(os.environ['VASTSCALE_PYTHON'])}"]
    script = "; ".join(
        [
            *lead,
            f"source {shlex.quote(str(ROOT / 'launch' / 'bootstrap.sh'))}",
            "vastscale_bootstrap requirements.txt",
        ]
    )
    say(f"{host}: environment: checking {own}")
    done = run_on([host], ["bash", "-c", script], timeout=ENVIRONMENT_SECONDS)[host]
    if done.status:
        return f"{host}: environment: {done.complaint}"
    say(f"{host}: environment: complete")
    return ""


if __name__ == "__main__":
    cli.run(Options, main)
