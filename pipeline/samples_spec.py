"""The recipe's `samples` part: which pictures show how far the network is. Needs no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.config.specs import Spec


class SamplesSpec(Spec):
    """Pictures that are upscaled again and again while the network learns."""

    files: tuple[str, ...] = Field((), description="HR images, or folders of them, seen from the current folder; none: "
                                                   "some of the validation list, evenly apart")
    count: int | None = Field(None, ge=0, description="at most so many pictures; 0: none; default: all that are named, "
                                                      "or 3 of the validation list")
    side: int = Field(320, ge=64, le=4096, description="HR pixels; of a larger picture the middle is taken")
    keep: int = Field(50, ge=1, description="sets of pictures by epochs, and likewise by validations, in a whole run")

    @model_validator(mode="before")
    @classmethod
    def _accept_files_alone(cls, value: Any) -> Any:
        if value is False or value == "off":
            return {"count": 0}
        value = {"files": value} if isinstance(value, (str, list)) else value
        if isinstance(value, dict) and isinstance(value.get("files"), str):
            return {**value, "files": [value["files"]]}
        return value
