"""Allowed imports between the 13 folders of pipeline/, tools/ and launch/, without cycles.

tools/ is below launch/, whose demo makes a small dataset with it; the hyperparameter search is
above launch/, because each of its trials is a launch. Within launch/, the doctor may use cluster/,
but not the other way round.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from conftest import ROOT, run_python

# Folder or module -> what it may import. The ground floor (the files directly in pipeline/) is open
# to all.
ALLOWED = {
    "pipeline/distributed": set(),
    "pipeline/config/names": set(),
    "pipeline/data": set(),
    "pipeline/config": {
        "pipeline/config/names",
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/metrics",
    },
    "pipeline/models": {"pipeline/config", "pipeline/config/names"},
    "pipeline/losses": {"pipeline/config/names"},
    "pipeline/metrics": {"pipeline/losses"},
    "pipeline/engine": {"pipeline/config", "pipeline/distributed"},
    "pipeline/checkpoint": {
        "pipeline/distributed",
        "pipeline/engine",
        "pipeline/metrics",
        "pipeline/models",
    },
    "pipeline/monitor": {"pipeline/checkpoint"},
    "pipeline/training": {
        "pipeline/config",
        "pipeline/data",
        "pipeline/models",
        "pipeline/losses",
        "pipeline/metrics",
        "pipeline/engine",
        "pipeline/checkpoint",
        "pipeline/monitor",
        "pipeline/distributed",
    },
    "pipeline/export": {"pipeline/data", "pipeline/metrics", "pipeline/models"},
    "pipeline/inference": {
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/export",
        "pipeline/models",
    },
    "pipeline/evaluation": {
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/inference",
        "pipeline/metrics",
        "pipeline/models",
    },
    "tools": {
        "pipeline/config",
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/metrics",
        "pipeline/models",
        "pipeline/training",
    },
    "launch/environment": {"pipeline/distributed"},
    "launch/requirements_missing": set(),
    "launch/cluster": {
        "launch/environment",
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/training",
    },
    "launch/doctor": {
        "launch/cluster",
        "launch/requirements_missing",
        "pipeline/data",
        "pipeline/training",
    },
    "launch/selfcheck": {
        "launch/cluster",
        "launch/doctor",
        "launch/requirements_missing",
        "pipeline/config",
        "pipeline/data",
        "pipeline/distributed",
        "pipeline/engine",
        "pipeline/inference",
        "pipeline/losses",
        "pipeline/metrics",
        "pipeline/models",
        "tools",
    },
    "launch": {
        "launch/cluster",
        "launch/doctor",
        "launch/environment",
        "pipeline/config",
        "pipeline/distributed",
        "pipeline/training",
        "tools",
    },
    "tools/search": {
        "launch/environment",
        "pipeline/config",
        "pipeline/distributed",
        "pipeline/metrics",
        "pipeline/training",
        "tools",
    },
    "tools/search_hyperparameters": {
        "launch/environment",
        "pipeline/config",
        "pipeline/metrics",
        "pipeline/training",
        "tools/search",
    },
}
GROUND = "pipeline"
FENCED = {  # library -> the only files that import it
    "deepspeed": {"pipeline/engine/deepspeed_engine.py", "pipeline/checkpoint/engine_state.py"},
    "wandb": {"pipeline/monitor/wandb_tracker.py"},
    "accelerate": {"pipeline/engine/accelerate_engine.py"},
    "onnx": {
        "pipeline/export/onnx_file.py",
        "pipeline/export/int8.py",
        "pipeline/export/network_files.py",
    },
    "onnxruntime": {"pipeline/export/int8.py", "pipeline/libraries.py"},
    "openvino": {
        "pipeline/libraries.py",
        "pipeline/export/openvino_file.py",
        "pipeline/export/network_files.py",
    },
    "tensorrt": {"pipeline/export/tensorrt_file.py"},
    "torch.utils.tensorboard": {"pipeline/monitor/journal.py"},
}
TORCH_FREE_SCRIPTS = [
    path for folder in ("tools", "launch") for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Return every module and name that a file imports, dotted.

    With `at_import_time`, imports inside functions are left out.
    """
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        is_for_types = (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        )
        if not (
            at_import_time
            and (is_for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        ):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def unit_of(path: Path) -> str:
    """Return the row of `ALLOWED` for a file: its own, or that of the nearest folder with a row."""
    name = path.relative_to(ROOT).with_suffix("")
    return next(
        str(unit) for unit in (name, *name.parents) if str(unit) in ALLOWED or str(unit) == GROUND
    )


def units_of(module: str) -> set[str]:
    """Return the row for a dotted name; none for third-party modules and for names of a package
    itself."""
    path = ROOT / module.replace(".", "/")
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if module.split(".")[0] not in ("pipeline", "tools", "launch") or not file.exists():
        return set()
    # a docstring
    is_empty = (
        file.name == "__init__.py" and len(ast.parse(file.read_text(encoding="utf-8")).body) <= 1
    )
    return set() if is_empty else {unit_of(file)}


@functools.cache
def edges() -> dict[str, dict[str, str]]:
    """Return row -> rows that it imports, each with a file that does so."""
    found: dict[str, dict[str, str]] = {unit: {} for unit in (*ALLOWED, GROUND)}
    for folder in ("pipeline", "tools", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for module in imports(path):
                for unit in units_of(module) - {unit_of(path)}:
                    found[unit_of(path)].setdefault(unit, str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("unit", sorted(ALLOWED))
def test_a_folder_imports_only_what_lies_below_it(unit: str) -> None:
    forbidden = {
        below: path
        for below, path in edges()[unit].items()
        if below not in ALLOWED[unit] | {GROUND}
    }
    assert not forbidden


def test_the_ground_floor_imports_nothing_of_the_house() -> None:
    assert edges()[GROUND] == {}


def test_every_folder_has_a_row_and_there_is_no_cycle() -> None:
    folders = {
        f"pipeline/{path.name}"
        for path in (ROOT / "pipeline").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders == {
        unit for unit in ALLOWED if unit.startswith("pipeline/") and unit.count("/") == 1
    }
    assert len(folders) == 13
    left = {unit: set(below) for unit, below in edges().items()}
    while left:
        lowest = {unit for unit, below in left.items() if not below & left.keys()}
        assert lowest, f"a cycle among {sorted(left)}"
        left = {unit: below for unit, below in left.items() if unit not in lowest}


@pytest.mark.parametrize("library", sorted(FENCED))
def test_a_library_has_one_door(library: str) -> None:
    for path in [*(ROOT / "pipeline").rglob("*.py"), *TORCH_FREE_SCRIPTS, *ROOT.glob("*.py")]:
        if any(name == library or name.startswith(f"{library}.") for name in imports(path)):
            assert str(path.relative_to(ROOT)) in FENCED[library]


def test_dali_stays_in_the_data_path() -> None:
    for path in [
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "launch").rglob("*.py"),
        *ROOT.glob("*.py"),
    ]:
        if any(module.startswith("nvidia.dali") for module in imports(path)):
            assert unit_of(path) == "pipeline/data"


def test_tools_and_launch_import_no_torch() -> None:
    """Datasets are built and ranks are started on machines without torch; checked by importing all
    modules."""
    named = [
        path
        for path in TORCH_FREE_SCRIPTS
        if any(
            module.split(".")[0] in ("torch", "deepspeed")
            for module in imports(path, at_import_time=True)
        )
    ]
    assert named == []
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in TORCH_FREE_SCRIPTS
        if path.name not in ("__main__.py",)
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_name_in_the_list_of_slow_tests_is_a_test() -> None:
    """If a slow test is renamed, `./run_tests.sh fast` would otherwise run it."""
    listed = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split()
    functions = {
        file: {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        for file in {line.partition("::")[0] for line in listed}
        if (ROOT / file).is_file()
    }
    gone = [
        line
        for line in listed
        if line.partition("::")[2] not in functions.get(line.partition("::")[0], ())
    ]
    assert gone == []
    assert len(listed) == len(set(listed))
