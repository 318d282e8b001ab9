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


TWO_NETWORKS = """
import faulthandler, os, signal
from pipeline.libraries import openvino_core

faulthandler.enable()  # as in tests: with a stack for signals of its own
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
import numpy, openvino
from openvino import opset13 as ops

def network():
    given = ops.parameter([1, 3, 8, 8], numpy.float32)
    return openvino_core().compile_model(openvino.Model(ops.relu(given), [given]), "CPU")

first, second = network(), network()
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
print(heard)
"""


def test_signals_are_handled_after_two_networks_of_openvino() -> None:
    """With a core for each of them, the signal ends this process with SIGSEGV."""
    done = run_python(TWO_NETWORKS)
    assert (done.returncode, done.stdout) == (0, "[1]\n"), done.stderr
