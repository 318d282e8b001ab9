"""LR that is read from disk."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pipeline.data.degradations.base import Degradation, DegradationSpec, Nodes, OnDevice


class PairedSpec(DegradationSpec):
    """LR from disk: beside HR (`NAME_lr<scale>.npy`), or in a folder of its own (--lr-dir)."""

    reads_lr: ClassVar[bool] = True
    name: Literal["paired"] = "paired"


class Paired(Degradation):
    """LR is read instead of made."""

    Spec = PairedSpec
    is_linear = True
    spec: PairedSpec

    @property
    def surroundings(self) -> int:
        return 0

    def lr(
        self,
        nodes: Nodes,
        region: Any,
        size: tuple[int, int],
        on_device: OnDevice,
        *,
        as_float: bool,
    ) -> Any:
        from nvidia.dali import fn, types

        return fn.cast(nodes["lr"], dtype=types.FLOAT) if as_float else nodes["lr"]
