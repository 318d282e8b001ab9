"""Degradations as a list of steps in the recipe, drawn separately for each sample.

The list holds steps and groups, which may be nested:

    steps:
    - blur: {sigma: [0.2, 2.0], probability: 0.8}
    - resize: {to: lr}
    - one_of:                           # exactly one, with these probabilities
      - {probability: 0.7, compress: {codec: jpeg, quality: [40, 90]}}
      - {probability: 0.3, compress: {codec: webp, quality: [40, 90]}}
    - sometimes: {probability: 0.2, steps: [sharpen, noise]}
    - shuffle: [noise, blur]            # in random order

The draw for a sample is a plain list of the steps that take place and their parameters. This list
and the pixels determine the result, so any sample can be explained and reproduced.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from pipeline.cli import nearest
from pipeline.data.degradations.base import DegradationSpec, Nodes, OnDevice, PlacedAnywhere
from pipeline.data.degradations.steps import STEPS
from pipeline.data.degradations.steps.base import (
    NUMBERS,
    Canvas,
    Draws,
    Image,
    Parameters,
    StepNodes,
)
from pipeline.spec import Probability, Spec

GROUPS = ("one_of", "sometimes", "shuffle")
MAX_STEPS = 200  # in a chain, groups included


def _item(value: Any) -> Any:
    """Expand `blur` and `blur:` to `{blur: {}}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"{_short(value)} is not a step; write one step or group per item, such as "
            "`- blur: {sigma: 1.5}`"
        )
    name, section = str(next(iter(value))), next(iter(value.values()))
    if name not in (*STEPS, *GROUPS):
        raise ValueError(f"no step named {name!r}{nearest(name, (*STEPS, *GROUPS))}")
    return {name: {} if section is None and name in STEPS else section}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _kind(value: Any) -> str:
    return next(iter(value)) if isinstance(value, Mapping) else next(iter(type(value).model_fields))


class Choice(Spec):
    """One of the choices of `one_of`: one or more steps, and the probability of the choice."""

    probability: Probability | None = None
    steps: tuple[Item, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_a_step(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"steps": value}
        if isinstance(value, Mapping) and "steps" not in value:
            rest = {name: section for name, section in value.items() if name != "probability"}
            chance = {"probability": value["probability"]} if "probability" in value else {}
            # `none` stands for a choice without any step.
            return {**chance, "steps": [rest] if rest else []}
        return {"steps": [] if value == "none" else [value]} if isinstance(value, str) else value


class OneOf(Spec):
    """Exactly one of several choices."""

    one_of: tuple[Choice, ...] = Field(min_length=1)

    @field_validator("one_of")
    @classmethod
    def _sum_to_one(cls, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        given = [choice.probability for choice in choices if choice.probability is not None]
        if given and len(given) < len(choices):
            raise ValueError("give the probability of every choice of one_of, or of none")
        if given and abs(sum(given) - 1) > 1e-6:
            raise ValueError(
                f"the probabilities of one_of are {' + '.join(f'{p:g}' for p in given)} = "
                f"{sum(given):g}; they must sum to 1 (a choice without steps does nothing: "
                f"`{{probability: {max(0.0, 1 - sum(given)):g}, steps: []}}`)"
            )
        return choices


class Some(Spec):
    """Several steps that take place together or not at all."""

    probability: Probability
    steps: tuple[Item, ...] = Field(min_length=1)


class Sometimes(Spec):
    """A group of steps with a probability."""

    sometimes: Some


class Shuffle(Spec):
    """Steps in random order."""

    shuffle: tuple[Item, ...] = Field(min_length=1)


def _step_model(name: str) -> type[Spec]:
    """Return the model of `{name: section}`, an item of a list of steps."""
    model: type[Spec] = create_model(  # type: ignore[call-overload]
        f"{name.title()}Step",
        __base__=Spec,
        __module__=__name__,
        **{name: (STEPS[name].Spec, ...)},
    )
    # Where pickle looks for the class.
    globals()[model.__name__] = model
    return model


_ITEMS: dict[str, Any] = {
    **{name: _step_model(name) for name in STEPS},
    "one_of": OneOf,
    "sometimes": Sometimes,
    "shuffle": Shuffle,
}
Item = Annotated[
    Union[tuple(Annotated[model, Tag(name)] for name, model in _ITEMS.items())],  # noqa: UP007
    Discriminator(_kind),
    BeforeValidator(_item),
]
for _model in (Choice, OneOf, Some, Sometimes, Shuffle):
    _model.model_rebuild(_types_namespace={"Item": Item, "Choice": Choice, "Some": Some})


class ChainSpec(DegradationSpec):
    """LR made by a list of steps."""

    name: Literal["chain"] = "chain"
    preset: str = Field("", description="name of the preset that the steps come from, for messages")
    steps: tuple[Item, ...] = Field(
        (), description="steps and groups (one_of, sometimes, shuffle), in order"
    )
    surroundings: int = Field(
        64,
        ge=0,
        le=1024,
        description="the degraded region is this many HR pixels larger than the crop, so that "
        "codec blocks may start anywhere in the crop",
    )

    @field_validator("steps")
    @classmethod
    def _bounded(cls, steps: tuple[Any, ...]) -> tuple[Any, ...]:
        count = number_of_items(steps)
        if count > MAX_STEPS:
            raise ValueError(f"{count} steps and groups; at most {MAX_STEPS} are allowed")
        return steps


def number_of_items(steps: Sequence[Any]) -> int:
    """Return the number of steps and groups in the list of a chain."""
    return sum(1 for _ in _walk(steps))


def _walk(items: Sequence[Any]) -> Iterator[Any]:
    """Yield all steps and groups in the order in which they are written."""
    for item in items:
        yield item
        if isinstance(item, OneOf):
            for choice in item.one_of:
                yield from _walk(choice.steps)
        elif isinstance(item, Sometimes):
            yield from _walk(item.sometimes.steps)
        elif isinstance(item, Shuffle):
            yield from _walk(item.shuffle)


class Chain(PlacedAnywhere):
    """A list of steps, run by threads of the host; on a GPU, a graph runs the first ones.

    A graph runs the leading steps that have nodes, those of `leading`. It makes all of LR if these
    are all the steps and they end at the size of LR.
    """

    Spec = ChainSpec
    has_host_chain = True
    turns_first = True  # scan lines, fields and echoes have a direction
    spec: ChainSpec

    def __init__(self, spec: ChainSpec, scale: int) -> None:
        super().__init__(spec, scale)
        # Each step and group has its own random numbers, by its position in the recipe. A draw does
        # not depend on how many numbers the others use.
        self._numbers = {id(item): i for i, item in enumerate(_walk(spec.steps))}
        items = [*itertools.takewhile(_has_nodes, spec.steps)]
        # The steps in the order of the recipe. The choices of `one_of` need no branches: a flag per
        # step says whether it takes place.
        self.leading = [_kind(item) for item in _walk(items) if _kind(item) in STEPS]
        self.has_nodes = bool(self.leading)
        self.is_split = len(items) < len(spec.steps) or not _ends_at_lr(items, scale)
        self.columns = tuple(
            f"{place}_{column}"
            for place, name in enumerate(self.leading)
            for column in ("takes_place", *_nodes_of(name).columns)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The numbers are found by the identity of the spec's parts, which a copy does not share.
        return Chain, (self.spec, self.scale)

    def check(self) -> None:
        for item in _walk(self.spec.steps):
            name = _kind(item)
            if name in STEPS:
                STEPS[name].check(getattr(item, name))

    def versions(self) -> dict[str, str]:
        import cv2

        found = {"numpy": np.__version__, "opencv": cv2.__version__}
        for name in {_kind(item) for item in _walk(self.spec.steps)} & STEPS.keys():
            found |= STEPS[name].versions()
        return dict(sorted(found.items()))

    def draw(self, randoms: Iterator[float], height: int, width: int) -> Parameters:
        key = np.array(Draws(randoms).words(), np.uint64)
        words = np.random.Philox(key=key).random_raw(max(1, len(self._numbers)) * NUMBERS // 2)
        rows = (words.view("<u4").astype(np.float64) * 2.0**-32).reshape(-1, NUMBERS)
        canvas = Canvas((height, width), (height, width), self.scale)
        steps: list[Parameters] = []
        self._draw(self.spec.steps, rows, canvas, steps)
        if canvas.size != canvas.lr:
            # Whatever the steps did to the size, LR has the region's size divided by the scale.
            steps.append({"step": "resize", "kind": "cubic_antialiased", "size": list(canvas.lr)})
        return {"region": [height, width], "steps": steps}

    def _draw(
        self,
        items: Sequence[Any],
        rows: NDArray[np.float64],
        canvas: Canvas,
        steps: list[Parameters],
    ) -> None:
        """Append the draws for `items` to `steps`, and track the size in `canvas`."""
        for item in items:
            draws = Draws(iter(rows[self._numbers[id(item)]].tolist()))
            if isinstance(item, OneOf):
                chances = {
                    str(i): 1.0 if choice.probability is None else choice.probability
                    for i, choice in enumerate(item.one_of)
                }
                chosen = item.one_of[int(draws.choose(chances))]
                self._draw(chosen.steps, rows, canvas, steps)
            elif isinstance(item, Sometimes):
                if draws.chance(item.sometimes.probability):
                    self._draw(item.sometimes.steps, rows, canvas, steps)
            elif isinstance(item, Shuffle):
                order = sorted(item.shuffle, key=lambda _: draws.uniform())
                self._draw(order, rows, canvas, steps)
            else:
                name = _kind(item)
                spec = getattr(item, name)
                if draws.chance(spec.probability):
                    drawn = STEPS[name].draw(spec, draws, canvas)
                    canvas.size = tuple(drawn.get("size", canvas.size))
                    steps.append({"step": name, **drawn})

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

        image = fn.cast(region, dtype=types.FLOAT)
        for place, name in enumerate(self.leading):
            own = {column: nodes[f"{place}_{column}"] for column in _nodes_of(name).columns}
            takes_place = nodes[f"{place}_takes_place"]
            if takes_place:
                image = _nodes_of(name).add(image, own, on_device)
        if self.is_split:
            return image
        low = [side // self.scale for side in size]
        lr = fn.slice(image, start=nodes["start"] // self.scale, shape=low, axes=[0, 1])
        return lr if as_float else fn.cast(lr, dtype=types.UINT8)

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        size, arrays = tuple(parameters["region"]), {}
        for place, drawn in enumerate(self._by_place(parameters)):
            name = self.leading[place]
            nodes = _nodes_of(name)
            values = nodes.arrays(drawn, size) if drawn else nodes.arrays(nodes.idle, (1, 1))
            arrays[f"{place}_takes_place"] = np.array(drawn is not None)
            for column, value in zip(nodes.columns, values, strict=True):
                arrays[f"{place}_{column}"] = value
            size = tuple((drawn or {}).get("size", size))
        return arrays

    def _by_place(self, parameters: Parameters) -> list[Parameters | None]:
        """Return the draw for each of `leading`, None for those that do not take place.

        The first steps of a sample's list are assigned to the first places where they fit. This may
        include a step that was drawn for a later item of the recipe, which makes no difference: the
        steps run in the order of the list.
        """
        steps, placed = iter(parameters["steps"]), []
        drawn = next(steps, None)
        for name in self.leading:
            if drawn and drawn["step"] == name and _nodes_of(name).fits(drawn):
                placed.append(drawn)
                drawn = next(steps, None)
            else:
                placed.append(None)
        return placed

    def lr_on_host(
        self,
        parameters: Parameters,
        keys: Sequence[int],
        region: NDArray[Any],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[Any]:
        from pipeline.data.degradations import host

        lr = run(region, parameters["steps"], workspace)
        return host.rounded_as(region, self.part(lr, start, size), workspace)

    def rest_on_host(
        self,
        parameters: Parameters,
        image: NDArray[np.float32],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[Any]:
        done = sum(drawn is not None for drawn in self._by_place(parameters))
        return self.part(run(image, parameters["steps"][done:], workspace), start, size)


def _nodes_of(name: str) -> StepNodes:
    nodes = STEPS[name].nodes
    assert nodes is not None, name
    return nodes


def _has_nodes(item: Any) -> bool:
    """Whether a graph can run a step or group, whatever is drawn for it."""
    for part in _walk([item]):
        name = _kind(part)
        nodes = STEPS[name].nodes if name in STEPS else None
        if name == "shuffle" or (
            name in STEPS and (nodes is None or not nodes.covers(getattr(part, name)))
        ):
            return False
    return True


def _ends_at_lr(items: Sequence[Any], scale: int, is_there: bool | None = None) -> bool:
    """Whether the image has LR's size after `items`, whatever is drawn for them.

    is_there: whether it has LR's size before; None means that it has HR's size.
    """
    is_there = scale == 1 if is_there is None else is_there
    for item in items:
        if isinstance(item, OneOf):
            choices = [_ends_at_lr(choice.steps, scale, is_there) for choice in item.one_of]
            is_there = all(choices)
        elif isinstance(item, Sometimes):
            is_there = is_there and _ends_at_lr(item.sometimes.steps, scale, is_there)
        elif _kind(item) == "resize":
            is_lr = item.resize.to == "lr" or (item.resize.to == "hr" and scale == 1)
            is_there = is_lr and (is_there or item.resize.probability == 1)
    return is_there


def run(image: Image, steps: Sequence[Parameters], workspace: Any) -> Image:
    """Apply drawn steps to an image, one after another: see `steps.base` for images.

    The seconds that each kind of step took are added to `workspace.seconds`.
    """
    for drawn in steps:
        began = time.perf_counter()
        image = STEPS[drawn["step"]].apply(image, drawn, workspace)
        workspace.took(label(drawn), time.perf_counter() - began)
    return image


def label(drawn: Mapping[str, Any]) -> str:
    """Return a step's name with its kind: `compress(webp)`."""
    kind = drawn.get("codec") or drawn.get("kind")
    return f"{drawn['step']}({kind})" if kind else drawn["step"]
