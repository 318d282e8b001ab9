"""Parts of a recipe: networks, adversarial training, previews. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config import names
from pipeline.spec import Number, Spec


class NetworkSpec(BaseModel):
    """A network: its name in the table of its kind, and its own parameters next to it."""

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
    """Gaussian noise on the discriminator's images, falling to zero (Sønderby et al. 2017)."""

    sigma: Number = Field(
        0.0, ge=0, le=1, description="standard deviation at the first step; images are in [0, 1]"
    )
    steps: int = Field(
        100_000, gt=0, description="step of the run at which it reaches zero; it falls linearly"
    )


class LabelsSpec(Spec):
    """Targets of the discriminator; the generator's target is always 1."""

    smoothing: Number = Field(
        0.0, ge=0, lt=0.5, description="real is 1 - smoothing, fake is 0 (Salimans et al. 2016)"
    )
    noise: Number = Field(
        0.0, ge=0, lt=0.5, description="targets move towards each other by up to this (uniform)"
    )
    flip: Number = Field(
        0.0, ge=0, lt=0.5, description="probability that a sample's label is flipped"
    )

    @model_validator(mode="after")
    def _keep_order(self) -> LabelsSpec:
        # Real targets are above 1 - smoothing - noise, fake targets below noise.
        if self.smoothing + 2 * self.noise >= 1:
            raise ValueError(
                f"smoothing {self.smoothing:g} + 2 x noise {self.noise:g} must be below 1, or a "
                "real sample's target may be below a fake one's; reduce either"
            )
        return self


def _switched(value: Any, on: Any, off: Any) -> Any:
    """Return what `on` or `off`, also as YAML's switches, stand for; any other value as it is."""
    switches = {True: on, "on": on, False: off, "off": off}
    return switches.get(value, value) if isinstance(value, (bool, str)) else value


class AdaptiveSpec(Spec):
    """When the discriminator skips its turns because it is winning.

    Its loss, averaged over `every` steps, is compared with that of a discriminator that guesses.
    """

    skip_below: Number = Field(
        0.25, gt=0, lt=1, description="share of that loss below which it skips its turns"
    )
    resume_above: Number = Field(
        0.4, gt=0, lt=1, description="share from which on it takes them again"
    )
    every: int = Field(
        20, ge=1, description="steps between decisions; each waits for the device once"
    )

    @model_validator(mode="after")
    def _keep_order(self) -> AdaptiveSpec:
        if self.skip_below > self.resume_above:
            raise ValueError(
                f"skip_below {self.skip_below:g} is above resume_above {self.resume_above:g}; "
                "swap or change them"
            )
        return self


class AdversarialSpec(Spec):
    """A discriminator trained against the generator."""

    weight: Number = Field(gt=0, description="weight of this term in the generator's loss")
    loss: str = Field("vanilla", description="a name in pipeline/losses/adversarial.py")
    discriminator: NetworkSpec = NetworkSpec(name="vgg")
    ds_config: str | None = Field(
        None,
        description="DeepSpeed's file for the discriminator: optimizer, schedule, clipping; "
        "default: the generator's",
    )
    start: str | None = Field(
        None,
        description="initial weights of the discriminator: a run folder, or `previous` for the "
        "previous stage; none: random",
    )
    discriminator_every: int = Field(
        1, ge=1, description="steps between updates of the discriminator"
    )
    generator_every: int = Field(1, ge=1, description="steps between updates of the generator")
    adaptive: AdaptiveSpec | None = Field(
        None, description="skip the discriminator's turns while it is winning; on, off or a table"
    )
    labels: LabelsSpec = LabelsSpec()
    instance_noise: InstanceNoiseSpec = InstanceNoiseSpec()

    @field_validator("adaptive", mode="before")
    @classmethod
    def _accept_a_switch(cls, value: Any) -> Any:
        return _switched(value, on={}, off=None)

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
                f"loss {self.loss} has no targets to smooth or move; omit labels.smoothing and "
                "labels.noise"
            )
        if self.discriminator_every > 1 and self.generator_every > 1:
            raise ValueError(
                "one of discriminator_every and generator_every must be 1, so that every step "
                "updates a network"
            )
        if self.adaptive and self.generator_every > 1:
            raise ValueError(
                "adaptive skips the discriminator's turns while it is winning, and generator_every "
                "gives it more turns than the generator; omit one of them"
            )
        return self


class TeacherSpec(Spec):
    """A frozen network of the same scale, which the network in training learns to imitate."""

    file: str = Field(description="the teacher: a weights file, or a run folder (its best step)")
    weight: Number = Field(
        1.0, ge=0, description="weight of the L1 between the outputs of the two networks"
    )
    feature_weight: Number = Field(
        0.0,
        ge=0,
        description="weight of the L1 between the affinities of their features; 0: not compared",
    )

    @model_validator(mode="after")
    def _teaches(self) -> TeacherSpec:
        if not self.weight and not self.feature_weight:
            raise ValueError(
                "weight and feature_weight are both 0; give one of them, or omit the teacher"
            )
        return self


class HealingSpec(Spec):
    """When a run goes back to an earlier step because it has diverged, and what it changes."""

    times: int = Field(
        5,
        ge=0,
        le=100,
        description="how often in a row, without a new healthy checkpoint, a diverged run goes "
        "back before it ends; 0: never",
    )
    window: int = Field(
        200,
        ge=10,
        description="steps without a violation after which a checkpoint counts as healthy",
    )
    rate_factor: Number = Field(
        0.5, gt=0, le=1, description="factor of the learning rate after going back"
    )
    rate_steps: int = Field(2000, ge=0, description="steps for which that factor holds")
    loss_rise: Number = Field(
        5.0, gt=1, description="factor by which the loss may rise over earlier blocks of 10 steps"
    )
    psnr_drop: Number = Field(
        3.0,
        gt=0,
        description="dB by which PSNR-Y may fall below the validations before; twice that for GANs",
    )
    saturation: int = Field(
        500, ge=10, description="steps for which a discriminator may be right about everything"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_a_switch(cls, value: Any) -> Any:
        return _switched(value, on={}, off={"times": 0})

    @property
    def is_on(self) -> bool:
        return self.times > 0


class PosthocEmaSpec(Spec):
    """Two further averages of the weights, from which one of any length can be made afterwards.

    See `pipeline/models/posthoc_ema.py`.
    """

    snapshots: int = Field(
        0,
        ge=0,
        le=1000,
        description="how many steps' averages are kept, each twice the network's size in float32; "
        "48 are good, 6 the fewest; 0: none, also `off`; `on`: 48",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_a_switch(cls, value: Any) -> Any:
        return _switched(value, on={"snapshots": 48}, off={"snapshots": 0})

    @field_validator("snapshots")
    @classmethod
    def _be_enough(cls, number: int) -> int:
        if 0 < number < 6:
            raise ValueError(f"{number} are too few to make an average of another length; use 6")
        return number

    @property
    def is_on(self) -> bool:
        return self.snapshots > 0


class PreviewsSpec(Spec):
    """Pictures that are upscaled repeatedly while the network learns."""

    files: tuple[str, ...] = Field(
        (),
        description="HR images or folders of them, relative to the current folder; none: evenly "
        "spaced images of the validation list",
    )
    count: int | None = Field(
        None,
        ge=0,
        description="maximum number of pictures; 0: none; default: all that are named, or 3 of "
        "the validation list",
    )
    side: int = Field(
        320, ge=64, le=4096, description="HR pixels; larger pictures are cropped to their centre"
    )
    keep: int = Field(
        50,
        ge=1,
        description="sets of pictures kept per run, by epochs and, separately, by validations",
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
