"""Adds VapSR, SRResNet and MSRResNet to spandrel, for programs that load weights through it.

Importing this file adds the networks to spandrel's registry, after which `spandrel.ModelLoader`
loads the files exported here and those of other projects with these networks. The file works from
anywhere, such as ComfyUI's folder of custom nodes: as a symbolic link into Vastscale's checkout, or
as a copy if the checkout is on Python's path.

A program that uses spandrel sees the tensors but not the metadata of the files. It cannot tell
networks for colour spaces other than RGB, or a VapSR with 1x1 projections that works on [-1, 1],
from the usual ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

CHECKOUT = Path(__file__).resolve().parents[2]
if __package__ != "pipeline.export" and (CHECKOUT / "pipeline" / "models").is_dir():
    sys.path.append(str(CHECKOUT))  # last, so that it hides no module of the program

from pipeline.libraries import import_torchvision  # noqa: E402
from pipeline.models import GENERATORS  # noqa: E402
from pipeline.models.common import COLOURS  # noqa: E402

import_torchvision()
from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, ModelTiling  # noqa: E402

ADDED = {"VapSR": "vapsr", "SRResNet": "srresnet", "MSRResNet": "msrresnet"}
"""Name in spandrel -> name in `GENERATORS`."""
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
"""ComfyUI reports a file of custom nodes without it as broken."""

Found = tuple[int, dict[str, Any], dict[str, Tensor]]


class GeneratorArchitecture(Architecture):
    """A network of `GENERATORS`, detected by its own `recognise` and `convert`."""

    def __init__(self, name: str, network: type[nn.Module]) -> None:
        super().__init__(id=name, detect=lambda state: self._find(state) is not None)
        self._network = network

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """Build the network with these tensors, which were detected as its own."""
        scale, params, tensors = self._find(state_dict)
        return ImageModelDescriptor(
            self._network(scale=scale, **params).eval(),
            tensors,
            architecture=self,
            purpose="Restoration" if scale == 1 else "SR",
            tags=[f"{params['num_features']}nf", f"{params['num_blocks']}nb"],
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=COLOURS,
            output_channels=COLOURS,
            tiling=ModelTiling.SUPPORTED,
        )

    def _find(self, state: Mapping[str, Any]) -> Found | None:
        """Return scale, the other arguments and the renamed tensors; `None` for another network."""
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
    """Add the networks to spandrel's registry; return the names of those that are new there."""
    supports = [
        ArchSupport.from_architecture(GeneratorArchitecture(name, GENERATORS[ours]))
        for name, ours in ADDED.items()
    ]
    return [
        str(support.architecture.id)
        for support in MAIN_REGISTRY.add(*supports, ignore_duplicates=True)
    ]


register()
