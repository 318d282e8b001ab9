"""Who may import whom (the architecture section of the README), by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from conftest import ROOT

GROUND = {"cli", "files", "image_reading", "images", "run_folder"}  # what everybody may use
ALLOWED = {  # part of pipeline/ -> the other parts that it may import, besides the ground
    "cli": set(), "files": set(), "image_reading": set(), "images": set(), "run_folder": set(),
    "data_spec": set(), "adversarial_spec": {"data_spec"}, "samples_spec": {"data_spec"},
    "recipe": {"adversarial_spec", "data_spec", "samples_spec"},
    "run_lock": set(), "data": {"data_spec"}, "outcome": set(), "schedules": set(), "torchvision_import": set(),
    "metrics": {"losses", "torchvision_import"}, "losses": {"adversarial_spec", "torchvision_import"},
    "models": {"recipe", "torchvision_import"},
    "ema": set(), "layout": set(), "monitor": set(), "console": set(), "comms": set(), "gradients": set(),
    "wandb_tracker": {"random_states"}, "samples": {"data", "recipe", "validation"}, "skips": {"data"},
    "interfaces": set(), "launched": {"interfaces"}, "ranks": {"launched"}, "runtimes": {"launched", "recipe"},
    "warmup_schedules": {"schedules"}, "zero_shards": set(), "watchdog": set(), "random_states": set(),
    "accelerate_engine": {"ranks", "schedules"}, "deepspeed_engine": {"ranks"},
    "engine": {"accelerate_engine", "deepspeed_engine", "ranks", "recipe", "runtimes", "schedules", "warmup_schedules"},
    "engine_files": {"engine", "schedules", "zero_shards"},
    "options": {"recipe", "runtimes", "data"}, "alike": {"options", "ranks"}, "stopping": {"ranks"},
    "initial_weights": {"engine_files", "models", "options"},
    "evaluation": {"launched", "metrics", "models"},
    "onnxruntime_import": set(), "export": {"metrics", "models", "onnxruntime_import", "torchvision_import"},
    "inference": {"evaluation", "export", "models", "onnxruntime_import"},
    "meter": {"data", "ranks", "monitor", "outcome"}, "validation": {"data", "ranks", "metrics", "recipe"},
    "manifest": set(), "run_disk": {"manifest", "ranks"},
    "checkpoint": {"ema", "engine_files", "manifest", "models", "random_states", "ranks", "run_disk"},
    "trainers": {"adversarial_spec", "data", "ema", "engine", "losses", "models", "outcome"},
}
FENCED = {"deepspeed": {"pipeline/engine/deepspeed_engine.py", "pipeline/checkpoint/engine_state.py",
                       "pipeline/comms.py",
                        "pipeline/gradients.py"},
          "wandb": {"pipeline/monitor/wandb_tracker.py"},
          "accelerate": {"pipeline/engine/accelerate_engine.py"},
          "onnx": {"pipeline/export/onnx_file.py", "pipeline/export/quantization.py",
                   "pipeline/inference/openvino_runtime.py"},
          "onnxruntime": {"pipeline/export/quantization.py", "pipeline/onnxruntime_import.py"},
          "openvino": {"pipeline/export/openvino_file.py", "pipeline/inference/openvino_runtime.py"},
          "tensorrt": {"pipeline/export/tensorrt_file.py"},
          "tensorboard": {"pipeline/monitor/journal.py"}, "torch.utils.tensorboard": {"pipeline/monitor/journal.py"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    paths = files(f"pipeline/{part}") or [ROOT / "pipeline" / f"{part}.py"]
    known = {path.stem for path in (ROOT / "pipeline").iterdir() if not path.name.startswith("_")}
    for path in paths:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")} & known
        assert used <= ALLOWED[part] | GROUND | {part}, f"{path.relative_to(ROOT)} imports {used}"


@pytest.mark.parametrize("library", sorted(FENCED))
def test_a_runtime_has_one_door(library: str) -> None:
    for path in [*files("pipeline"), *files("tools"), *files("launch"), *ROOT.glob("*.py")]:
        if any(name == library or name.startswith(f"{library}.") for name in imports(path)):
            assert str(path.relative_to(ROOT)) in FENCED[library]


def test_dali_stays_in_the_data_path() -> None:
    for path in [*files("pipeline"), *files("launch"), *ROOT.glob("*.py")]:
        name = str(path.relative_to(ROOT))
        if any(module.startswith("nvidia.dali") for module in imports(path)):
            assert name.startswith("pipeline/data/")


TORCH_LATE = ("environment.py", "allreduce.py")  # inside functions: where there is a GPU; on a host that has it


def test_tools_and_launch_need_no_torch() -> None:
    for path in [*files("tools"), *files("launch")]:
        for module in imports(path):
            assert not module.startswith(("torch", "deepspeed")) or path.name in TORCH_LATE, path
