"""torch._dynamo is imported when something is compiled, and not before."""

from __future__ import annotations

from pathlib import Path

from conftest import SMALL, run_python

TRAIN_THEN_COMPILE = """
import sys
import torch
from pathlib import Path
from pipeline.training.options import TrainOptions
from pipeline.training.run import main

options = TrainOptions(overrides=OVERRIDES, recipe="demo", dataset_dir=(Path(DATASET),),
                       output_dir=Path(RUN))
assert main(options) == 0
loaded = [name for name in sys.modules if name.startswith("torch._dynamo.")]
assert loaded == [], loaded

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.5)
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
double = torch.compile(lambda x: x * 2 + 1, backend=backend)
assert torch.equal(double(torch.arange(3.0)), torch.tensor([1.0, 3.0, 5.0]))
assert len(graphs) == 1
import torch._dynamo.config
assert sys.modules["torch._dynamo"] is torch._dynamo
assert torch._dynamo.__file__.endswith("__init__.py")
weight.grad = torch.ones(3)
optimizer.step()
optimizer.zero_grad()
assert torch.equal(weight.detach(), torch.full((3,), 0.5))
"""


def test_a_run_that_compiles_nothing_does_not_import_dynamo(dataset: Path, tmp_path: Path) -> None:
    """Until something is compiled in the same process, which then works as ever."""
    code = (
        f"OVERRIDES, DATASET, RUN = {(*SMALL, 'steps=2')!r}, {str(dataset)!r}, {str(tmp_path)!r}\n"
    )
    done = run_python(code + TRAIN_THEN_COMPILE)
    assert done.returncode == 0, done.stderr
