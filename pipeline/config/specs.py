"""The parts of a recipe that say which networks are trained, how the adversarial ones are, and what
is shown meanwhile.

Needs no torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config import names
from pipeline.spec import Number, Spec


class NetworkSpec(BaseModel):
    """A network: its name in the table of its kind and, beside it, that network's own
    parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _accept_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class InstanceNoiseSpec(Spec):
    """Gaussian noise on all images that the discriminator sees, falling to nothing (Sønderby et
    al., ICLR 2017)."""

    sigma: Number = Field(
        0.0, ge=0, le=1, description="standard deviation at the first step; 1 is the whole range"
    )
    steps: int = Field(
        100_000, gt=0, description="after so many steps of the run there is none; it falls evenly"
    )


class LabelsSpec(Spec):
    """The targets that the discriminator learns; the generator's is always 1."""

    smoothing: Number = Field(
        0.0, ge=0, lt=0.5, description="real is 1 - smoothing, fake 0 (Salimans et al. 2016)"
    )
    noise: Number = Field(
        0.0, ge=0, lt=0.5, description="targets move by up to this, evenly, towards each other"
    )
    flip: Number = Field(
        0.0, ge=0, lt=0.5, description="probability of a sample to be called its opposite"
    )

    @model_validator(mode="after")
    def _keep_order(self) -> LabelsSpec:
        if (
            self.smoothing + 2 * self.noise >= 1
        ):  # real is above 1 - smoothing - noise, fake is below noise
            raise ValueError(
                f"smoothing {self.smoothing:g} + 2 x noise {self.noise:g} must be below 1, or a "
                "real "
                "sample's target may lie below a fake one's; take less of either"
            )
        return self


class AdversarialSpec(Spec):
    """A discriminator against the generator."""

    weight: Number = Field(gt=0, description="of the adversarial term among the generator's losses")
    loss: str = Field("vanilla", description="a name in pipeline/losses/adversarial.py")
    discriminator: NetworkSpec = NetworkSpec(name="vgg")
    ds_config: str | None = Field(
        None,
        description="DeepSpeed's file for the discriminator: optimizer, schedule, "
        "clipping; default: the generator's",
    )
    start: str | None = Field(
        None,
        description="weights of the discriminator to begin with: a run folder, or "
        "`previous`, which is the stage before; none: at random",
    )
    discriminator_every: int = Field(
        1, ge=1, description="steps from one update of the discriminator to the next"
    )
    generator_every: int = Field(
        1, ge=1, description="steps from one update of the generator to the next"
    )
    labels: LabelsSpec = LabelsSpec()
    instance_noise: InstanceNoiseSpec = InstanceNoiseSpec()

    @field_validator("loss")
    @classmethod
    def _know_loss(cls, name: str) -> str:
        names.ADVERSARIAL_LOSSES.check(name)
        return name

    @field_validator("discriminator")
    @classmethod
    def _know_discriminator(cls, spec: NetworkSpec) -> NetworkSpec:
        names.DISCRIMINATORS.check(spec.name, spec.params)
        return spec

    @model_validator(mode="after")
    def _fit(self) -> AdversarialSpec:
        takes_labels = names.ADVERSARIAL_LOSSES.check(self.loss).flags["takes_labels"]
        if not takes_labels and (self.labels.smoothing or self.labels.noise):
            raise ValueError(
                f"loss {self.loss} has no targets to smooth or to move; leave labels.smoothing and "
                "labels.noise out"
            )
        if self.discriminator_every > 1 and self.generator_every > 1:
            raise ValueError(
                "one of discriminator_every and generator_every must be 1: every step updates "
                "something"
            )
        return self


# The recipe's `previews` part: which pictures show how far the network is. Needs no torch.


class PreviewsSpec(Spec):
    """Pictures that are upscaled again and again while the network learns."""

    files: tuple[str, ...] = Field(
        (),
        description="HR images, or folders of them, seen from the current folder; none: "
        "some of the validation list, evenly apart",
    )
    count: int | None = Field(
        None,
        ge=0,
        description="at most so many pictures; 0: none; default: all that are named, "
        "or 3 of the validation list",
    )
    side: int = Field(
        320, ge=64, le=4096, description="HR pixels; of a larger picture the middle is taken"
    )
    keep: int = Field(
        50,
        ge=1,
        description="sets of pictures by epochs, and likewise by validations, in a whole run",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_files_alone(cls, value: Any) -> Any:
        if value is False or value == "off":
            return {"count": 0}
        value = {"files": value} if isinstance(value, (str, list)) else value
        if isinstance(value, dict) and isinstance(value.get("files"), str):
            return {**value, "files": [value["files"]]}
        return value
