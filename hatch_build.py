"""Hatchling hook that takes the wheel's dependencies from requirements.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Requirements(MetadataHookInterface):
    """Fill in the dependencies."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the lines of requirements.txt, without their comments, to `metadata`."""
        lines = (Path(self.root) / "requirements.txt").read_text(encoding="utf-8").splitlines()
        pins = (line.partition("#")[0].strip() for line in lines)
        metadata["dependencies"] = [pin for pin in pins if pin]
