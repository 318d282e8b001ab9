"""Whether all ranks are about to do the same: code, packages, recipe and data."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.training.options import Plan

SOURCES = Path(__file__).resolve().parent
PACKAGES = ("torch", "deepspeed", "accelerate", "numpy", "opencv-python-headless")
MOST_NAMED = 3


def refuse_other_hosts(plans: Sequence[Plan], ranks: Ranks) -> None:
    """Raise `UserError` naming the host, and what differs there from the first rank's; all ranks call it together."""
    if ranks.world_size == 1:
        return
    told = ranks.gather((socket.gethostname(), facts(plans)))
    (first, ours), others = told[0], told[1:]
    for rank, (host, theirs) in enumerate(others, 1):
        named = differences(ours, theirs)
        if named:
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            raise UserError(f"rank {rank} on {host} differs from rank 0 on {first}: {'; '.join(named[:MOST_NAMED])}"
                            f"{more}; make the hosts alike with launch/sync.sh")


def facts(plans: Sequence[Plan]) -> dict[str, str]:
    """What decides what a rank computes, by name."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), **_packages()}
    for plan in plans:
        stage = f"stage {plan.recipe.stage}: " if plan.recipe.stage else ""
        identity = plan.identity
        found |= {f"{stage}dataset {key}": str(value) for key, value in identity.pop("dataset").items()}
        found |= {f"{stage}{key} {name}": value for key, part in identity.items() for name, value in _flat(part)}
    return found | {f"file pipeline/{path.relative_to(SOURCES).as_posix()}": _digest(path)
                    for path in sorted(SOURCES.rglob("*.py"))}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """One text for each fact that is not the same."""
    return [f"{name} ({theirs.get(name, 'none')}, there {ours.get(name, 'none')})"
            for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[f"package {name}"] = version(name)
        except PackageNotFoundError:
            found[f"package {name}"] = "none"
    dali = {distribution.version for distribution in distributions()
            if str(distribution.metadata["Name"]).startswith("nvidia-dali-cuda")}  # of whichever CUDA
    return found | {"package nvidia-dali": ", ".join(sorted(dali))}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return [(prefix, json.dumps(value, sort_keys=True, default=str))]
    return [item for key, inner in value.items() for item in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
