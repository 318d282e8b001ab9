"""README and docs name only files, links, anchors and options that exist."""

from __future__ import annotations

import argparse
import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from conftest import ROOT
from pipeline.training.options import TrainOptions

OTHERS = {  # of torchrun, Slurm, enroot, Docker and pip
    "nnodes",
    "nproc_per_node",
    "rdzv_backend",
    "rdzv_endpoint",
    "signals-to-handle",
    "ntasks-per-node",
    "gpus-per-node",
    "build-arg",
    "no-deps",
    "rm",
    "stop-timeout",
}
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_scripts_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+?)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    for script in re.findall(r"(?:python |\./)((?:[\w]+/)*\w+\.(?:py|sh))\b", text):
        is_example = f"```python\n# {script}\n" in text  # a file that the page itself gives
        assert is_example or (ROOT / script).is_file(), script
    for test in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / test).is_file(), test


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_exist(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", document.read_text()):
        if not target.startswith("http"):
            page = document.parent / target if target else document
            assert anchor in anchors(page), f"{target}#{anchor}"


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_tree_in_the_readme_exists() -> None:
    """Each line names files or folders, those that are indented relative to the folder above."""
    tree = README.read_text().partition("## The code\n\n```\n")[2].partition("\n```")[0]
    folder, named = ROOT, []
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        parent = folder if line.startswith("  ") else ROOT
        for name in names:
            path = parent / name if "/" not in names[0] or "/" in name else None
            # "data/sampling.py, source.py": the second name is in the same folder as the first
            path = path or (parent / names[0]).parent / name
            assert path.exists(), path
            named.append(path)
        if not line.startswith("  ") and names[0].endswith("/"):
            folder = ROOT / names[0]
    assert len(named) > 40
    for path in (ROOT / "pipeline").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert any(path in (known, *known.parents) for known in named), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_exist(document: Path) -> None:
    sources = "".join(
        path.read_text()
        for folder in ("pipeline", "tools", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ) + "".join(path.read_text() for path in ROOT.glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", document.read_text())) - OTHERS:
        assert re.search(rf"\b{flag.replace('-', '_')}\b", sources), f"--{flag}"


SCRIPTS = {  # of commands that are no Python files
    "./launch_local_train.sh": "launch.local",
    "./launch_distributed_train.sh": "launch.distributed",
    "launch/sync.sh": "launch.cluster.sync",
}
WITHOUT_FLAGS = ("./run_tensorboard.sh", "./run_tests.sh", "launch/cloud/job.sh")


def parser_of(command: str) -> argparse.ArgumentParser:
    module = SCRIPTS.get(command) or command.removeprefix("-m ").removesuffix(".py")
    if command == "-m launch.doctor" or command == "-m launch.selfcheck":
        module += ".__main__"
    module = import_module(module.replace("/", "."))
    options = getattr(module, "Options", TrainOptions)
    return tyro.extras.get_parser(options, config=(tyro.conf.FlagCreatePairsOff,))


def flags_of(command: str) -> set[str]:
    """The flags that `--help` of a command lists."""
    return set(parser_of(command)._option_string_actions)


@pytest.mark.filterwarnings("ignore:get_parser")
def test_the_cheat_sheet_names_real_flags_of_all_commands() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    listed = set()
    for row in re.findall(r"^\| `(.+?)` \|(.*)\|$", page, re.MULTILINE):
        command = re.match(r"(?:python )?((?:-m )?[\w./]+)", row[0])[1]
        listed.add(command)
        if command in WITHOUT_FLAGS:
            continue
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", row[1])) - flags_of(command)
        assert not unknown, f"{command} has no {unknown}"
    cutters = set(re.findall(r"--[a-z-]+", page.partition("All cutters take")[2].partition("|")[0]))
    for name in ("images", "video", "imagenet", "pairs"):
        assert cutters <= flags_of(f"tools/{name}_to_data.py")
    scripts = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
        if any(isinstance(node, ast.If) for node in ast.parse(path.read_text()).body[-1:])
    }
    scripts |= {f"./{path.name}" for path in ROOT.glob("*.sh")}
    assert scripts <= listed


def strings_of(path: Path) -> list[str]:
    """The texts in a source file; in f-strings a zero byte stands for each value."""
    if path.suffix == ".sh":
        return path.read_text().splitlines()

    def flat(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(flat, node.values))
        return node.value if isinstance(getattr(node, "value", None), str) else "\0"

    nodes = ast.walk(ast.parse(path.read_text()))
    return [flat(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]


FOREIGN = {  # in source texts, of mpirun, torchrun, accelerate, Slurm, Docker, pip and the like
    "--allow-run-as-root",
    "--gpu",
    "--help-query-gpu",
    "--helpfull",
    "--ipc",
    "--load_fast",
    "--mca",
    "--mpirun_hostfile",
    "--nodelist",
    "--nodes",
    "--now",
    "--nproc_per_node",
    "--ntasks-per-node",
    "--num_processes",
    "--partition",
    "--port",
    "--shm-size",
    "--sparse",
    "--stats",
    "--upgrade",
}


@pytest.mark.filterwarnings("ignore:get_parser")
def test_messages_name_options_that_exist() -> None:
    """Also in docstrings: `python tool.py --option` of that tool, other options of any command."""
    page = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| `(?:python )?((?:-m )?[\w./]+)", page, re.MULTILINE)
    parsers = {row: parser_of(row) for row in dict.fromkeys(rows) if row not in WITHOUT_FLAGS}
    flags = {row: set(parser._option_string_actions) for row, parser in parsers.items()}
    everything = {"--local_rank"}.union(FOREIGN, *flags.values())
    wrong = []
    for path in sources():
        for text in filter(lambda text: " " in text, strings_of(path)):
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", text))
            wrong += [(path.name, name) for name in named - everything]
            for command, rest in re.findall(r"`python ([\w/]+\.py)([^`]*)`", text):
                named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", rest))
                wrong += [(path.name, command, name) for name in named - flags[command]]
                # A command with arguments is one to copy: it has what it needs.
                given = {word.partition("=")[0] for word in rest.split()}
                wrong += [
                    (path.name, command, action.option_strings)
                    for action in parsers[command]._actions
                    if given and action.required and action.option_strings
                    if not given & {*action.option_strings}
                ]
    assert not wrong, "\n".join(map(str, wrong))


def sources() -> list[Path]:
    folders = ("pipeline", "tools", "launch")
    return [
        *ROOT.glob("*.py"),
        *(path for name in folders for path in sorted((ROOT / name).rglob("*.py"))),
    ]


def test_the_messages_in_troubleshooting_are_real() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)`[^|]*\| .+ \| .+ \|$", page, re.MULTILINE)
    assert len(messages) == len(re.findall(r"^\| `", page, re.MULTILINE)) > 50
    paths = [
        path for name in ("pipeline", "tools", "launch") for path in (ROOT / name).rglob("*.py")
    ]
    texts = "\n".join(
        text.replace("\n", " ")
        for path in [*paths, *ROOT.glob("*.py"), ROOT / "launch" / "bootstrap.sh"]
        for text in strings_of(path)
    ).replace("`", "")
    unknown = [
        message
        for message in messages
        if not re.search(".*".join(map(re.escape, re.split(r"\s*…\s*", message))), texts)
    ]
    assert unknown == []
