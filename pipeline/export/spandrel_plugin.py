"""VapSR, SRResNet and MSRResNet for programs that open weights through spandrel, which does not
know them by itself.

Importing this file adds them to spandrel's registry; from then on `spandrel.ModelLoader` opens the
files exported here and those of other projects that have these networks. It works from anywhere (a
folder of custom nodes of ComfyUI, say) as a copy where Vastscale's checkout is on Python's path,
and as a symbolic link into the checkout without that.

A program that uses spandrel sees the tensors and not the description in our files: colour spaces
other than RGB, and a VapSR with 1x1 projections that works on [-1, 1], would be taken for the usual
network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

CHECKOUT = Path(__file__).resolve().parents[2]
if __package__ != "pipeline.export" and (CHECKOUT / "pipeline" / "models").is_dir():
    sys.path.append(str(CHECKOUT))  # last, so that it hides nothing of the program's

from pipeline.libraries import import_torchvision  # noqa: E402
from pipeline.models import GENERATORS  # noqa: E402
from pipeline.models.common import COLOURS  # noqa: E402

import_torchvision()
from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, ModelTiling  # noqa: E402

ADDED = {"VapSR": "vapsr", "SRResNet": "srresnet", "MSRResNet": "msrresnet"}
"""Name in the program -> name in `GENERATORS`."""
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
"""ComfyUI's: a file of custom nodes without it is reported as broken."""

Found = tuple[int, dict[str, Any], dict[str, Tensor]]


class KnownHere(Architecture):
    """A network of `GENERATORS`, known by its own `recognise` and `convert`."""

    def __init__(self, name: str, network: type[nn.Module]) -> None:
        super().__init__(id=name, detect=lambda state: self._find(state) is not None)
        self._network = network

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """The network with these tensors, which were detected as its own."""
        scale, params, tensors = self._find(state_dict)
        return ImageModelDescriptor(
            self._network(scale=scale, **params).eval(),
            tensors,
            architecture=self,
            purpose="SR",
            tags=[f"{params['num_features']}nf", f"{params['num_blocks']}nb"],
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=COLOURS,
            output_channels=COLOURS,
            tiling=ModelTiling.SUPPORTED,
        )

    def _find(self, state: Mapping[str, Any]) -> Found | None:
        """Scale, the other arguments and the tensors under our names; `None` if they are of another
        network."""
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        convert = getattr(self._network, "convert", lambda _: None)
        for layout in (tensors, convert(tensors)):
            found = layout and self._network.recognise(
                {name: tuple(tensor.shape) for name, tensor in layout.items()}
            )
            if found:
                return *found, layout
        return None


def register() -> list[str]:
    """Add the networks to spandrel's registry; the names of those that were not in it yet."""
    supports = [
        ArchSupport.from_architecture(KnownHere(name, GENERATORS[ours]))
        for name, ours in ADDED.items()
    ]
    return [
        str(support.architecture.id)
        for support in MAIN_REGISTRY.add(*supports, ignore_duplicates=True)
    ]


register()
