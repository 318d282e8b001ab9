"""The documents name nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT

OTHERS = {  # of torchrun, Slurm, enroot and Docker
    "nnodes",
    "nproc_per_node",
    "rdzv_backend",
    "rdzv_endpoint",
    "ntasks-per-node",
    "gpus-per-node",
    "build-arg",
    "rm",
    "stop-timeout",
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_scripts_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+?)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    for script in re.findall(r"(?:python |\./)((?:[\w]+/)*\w+\.(?:py|sh))\b", text):
        assert (ROOT / script).is_file(), script
    for test in re.findall(r"tests/\w+\.py", text):
        assert (ROOT / test).is_file(), test


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(document: Path) -> None:
    sources = "".join(
        path.read_text()
        for folder in ("pipeline", "tools", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ) + "".join(path.read_text() for path in ROOT.glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", document.read_text())) - OTHERS:
        assert re.search(rf"\b{flag.replace('-', '_')}\b", sources), f"--{flag}"
