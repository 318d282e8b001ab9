"""An experiment: a recipe (what to train) and a ds_config.json (how to optimise), both checked.

A recipe is a small YAML file in `recipes/`; with `base: NAME` it lists only its differences from
another one. Batch sizes, precision, optimizer and learning rate schedule are in DeepSpeed's own
JSON file and nowhere else. Imports no torch.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.cli import UserError, nearest
from pipeline.config import names
from pipeline.config.elsewhere import ours
from pipeline.config.specs import (
    AdversarialSpec,
    HealingSpec,
    NetworkSpec,
    PosthocEmaSpec,
    PreviewsSpec,
    TeacherSpec,
)
from pipeline.data.degradations.base import DegradationSpec
from pipeline.data.spec import PRESETS, DataSpec
from pipeline.files import read_regular_file, write_atomically
from pipeline.installation import find_file, recipe_names
from pipeline.metrics import METRICS, Trunk, metric_of
from pipeline.spec import Number, Spec

FREE_FIELDS = frozenset(
    {
        "steps",
        "patience",
        "validate_every",
        "validation_images",
        "save_every",
        "save_minutes",
        "log_every",
        "keep",
        "previews",
        "histograms",
        "healing",
        "activation_checkpointing",
        "data.threads",
        "data.prefetch",
        "data.on_error",
        "data.max_bad_files",
        "validation_metrics",
        "metric_weights",
        "losses.vgg_feature.weights",
        "losses.vgg_patch.weights",
        "losses.contextual.weights",
        "losses.lpips.weights",
        "losses.dists.weights",
        "native_kernels",
    }
)
"""Fields that may change when a run is continued: they decide when things happen and what is
measured, not what is learnt. Losses count as tables, as in `recipe_differences`.

A continued run keeps its kernels whatever `native_kernels` says, unless that is off.
"""
Model = TypeVar("Model", bound=BaseModel)
PRESET_NAME = re.compile(r"data\.degradation(\.folders\.\d+)?\.preset")
"""Where the steps of a chain come from, which makes no difference to them."""
RESERVED_FOLDERS = ("averages", "checkpoints", "file_lists", "samples", "tensorboard", "wandb")
"""Folders that every run folder contains, so a stage cannot have one of these names."""


MAX_YAML_BYTES = 1 << 18
MAX_YAML_VALUES = 10_000
MAX_YAML_DEPTH = 50
MAX_YAML_NUMBER = 10**300
"""Limits on a YAML file, so that a hostile one exhausts neither memory nor time."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2 (without a dot, PyYAML reads it as text).

    Whatever the text, loading ends quickly, with plain values or a `yaml.YAMLError`. An alias
    counts as often as it occurs: ten lines of aliases of aliases can stand for a billion values.
    """

    def __init__(self, stream: str | bytes) -> None:
        self._depth = 0
        # Of each finished node: the number of values in it and its depth, with aliases expanded.
        self._sizes: dict[int, tuple[int, int]] = {}
        super().__init__(stream)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"its values are nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.YAMLError("a value contains itself")
        if not is_alias:
            parts = (
                [part for pair in node.value for part in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
                if isinstance(node, yaml.SequenceNode)
                else []
            )
            sizes = [self._sizes[id(part)] for part in parts]
            size = (
                1 + sum(count for count, _ in sizes),
                1 + max((deep for _, deep in sizes), default=0),
            )
            self._sizes[id(node)] = size
            if size[0] > MAX_YAML_VALUES:
                raise yaml.YAMLError(f"it holds more than {MAX_YAML_VALUES} values")
            if size[1] > MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"its values are nested more than {MAX_YAML_DEPTH} deep")
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        try:
            return super().construct_document(node)
        # What SafeLoader raises for values such as 2024-99-99, 5,000 digits and `!!bool x`.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise yaml.YAMLError(f"a value of it is not valid: {error}") from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = loader.construct_yaml_int(node)
    if abs(number) > MAX_YAML_NUMBER:  # arithmetic with floats would overflow
        raise yaml.YAMLError(f"a whole number is larger than {MAX_YAML_NUMBER:g}")
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _yaml(text: str | bytes) -> Any:
    return yaml.load(text, _Loader)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = _Loader) -> Any:
    """Return the plain values of a YAML file. Raises `UserError`, whatever the file contains."""
    try:
        content = read_regular_file(path)
        if len(content) > MAX_YAML_BYTES:
            raise yaml.YAMLError(f"{len(content)} bytes are above the limit of {MAX_YAML_BYTES}")
        return yaml.load(content.decode("utf-8-sig"), loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not YAML: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _loss_term(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping)):
        raise ValueError(
            f"{value!r} is neither a weight nor a table with a weight, such as {{weight: 1.0}}"
        )
    return dict(value) if isinstance(value, Mapping) else float(value)


LossTerm = Annotated[Any, BeforeValidator(_loss_term)]
"""A weight, or a table of a weight and the loss's own parameters."""


class BestSpec(Spec):
    """How the best validated step is chosen; export and patience use it."""

    metric: str = Field(
        "psnr",
        description="highest PSNR-Y (psnr), lowest LPIPS (lpips), or another metric of "
        "pipeline/metrics",
    )
    weights: dict[str, Number] = Field(
        {},
        description="in place of metric: metric -> weight; the highest sum of weight times value "
        "is best",
    )
    psnr_floor: Number | None = Field(
        None,
        description="dB; with metrics other than psnr, steps below it count only while no step is "
        "above it",
    )

    @field_validator("metric")
    @classmethod
    def _know_metric(cls, key: str) -> str:
        return metric_of(key).key

    @field_validator("weights")
    @classmethod
    def _know_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        known = {metric_of(key): weight for key, weight in weights.items()}
        for metric, weight in known.items():
            if weight == 0 or (weight < 0) != metric.lower_is_better:
                rule = "lower" if metric.lower_is_better else "higher"
                sign = "below" if metric.lower_is_better else "above"
                raise ValueError(
                    f"{metric.key}: {weight:g}: {rule} {metric.title} is better, so its weight "
                    f"must be {sign} 0"
                )
        return {metric.key: weight for metric, weight in known.items()}

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that it compares."""
        return [metric_of(key).name for key in self.weights or (self.metric,)]

    @model_validator(mode="after")
    def _fit(self) -> BestSpec:
        if self.weights and self.metric != "psnr":
            raise ValueError(f"metric {self.metric} and weights exclude each other; omit metric")
        if not self.weights and self.metric == "psnr" and self.psnr_floor is not None:
            raise ValueError(
                "psnr_floor needs another metric, such as lpips: the highest PSNR has no floor; "
                "omit it or set it to null"
            )
        return self


class Recipe(Spec):
    """One experiment: everything about training except DeepSpeed's configuration."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9._-]+$", description="names the run folder and exported files"
    )
    scale: int = Field(
        ge=1,
        le=8,
        description="upscaling factor of height and width; 1: restore without enlarging",
    )
    stage: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]*$", description="which of the recipe's stages this is"
    )
    generator: NetworkSpec
    start: str | None = Field(
        None,
        description="initial weights: a file, a run folder, or `previous` for the previous stage; "
        "none: random",
    )
    losses: dict[str, LossTerm] = Field(
        {"l1": 1.0},
        description="loss name -> weight, or a table of weight and the loss's own parameters",
    )
    adversarial: AdversarialSpec | None = None
    teacher: TeacherSpec | None = None
    data: DataSpec = DataSpec()
    ds_config: str = Field(
        "ds_config.json", description="DeepSpeed's file, relative to the checkout's root"
    )
    steps: int = Field(gt=0, description="total number of optimizer updates")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial weights and of sampling")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights; 0 disables averaging"
    )
    posthoc_ema: PosthocEmaSpec = PosthocEmaSpec()
    compile: Literal["auto", "on", "off", "reduce-overhead"] = Field(
        "auto",
        description="torch.compile with Inductor; auto: on a GPU, if possible; reduce-overhead: "
        "with CUDA graphs",
    )
    native_kernels: Literal["auto", "on", "off"] = Field(
        "auto", description="our own C++ kernels, on CPUs in FP32; auto: where measured faster"
    )
    deterministic: Literal["off", "on"] = Field(
        "off",
        description="on: bit-identical runs on the same GPU, slower; runs on CPUs always are",
    )
    activation_checkpointing: Literal["off", "on"] = Field(
        "off",
        description="on: recompute the blocks' activations instead of storing them, to save memory",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto", description="memory format of activations; auto: the faster one, measured"
    )
    validate_every: int = Field(1000, gt=0, description="steps")
    validation_images: int = Field(
        200, gt=0, description="maximum number of validation images, evenly spaced over the list"
    )
    validation_metrics: tuple[str, ...] = Field(
        ("psnr",), description="what to measure, such as [psnr, ssim, lpips, dists, niqe]"
    )
    validation_lpips: Literal["off", "alex", "squeeze", "vgg"] = Field(
        "off",
        description="also measure LPIPS, with this network; if validation_metrics names it, the "
        "default is alex",
    )
    metric_weights: dict[str, str | None] = Field(
        {},
        description="metric -> file of its network's weights, or of NIQE's parameters; default: "
        "torchvision's cache",
    )
    best: BestSpec = BestSpec()
    patience: int = Field(
        0, ge=0, description="stop after this many validations without an improvement; 0 disables"
    )
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    save_minutes: float = Field(10, gt=0, description="maximum minutes between checkpoints")
    keep: int = Field(2, ge=2, description="number of newest checkpoints kept, besides the best")
    log_every: int = Field(50, gt=0, description="steps between log lines")
    previews: PreviewsSpec = PreviewsSpec()
    healing: HealingSpec = HealingSpec()
    histograms: int = Field(
        0,
        ge=0,
        description="steps between histograms of each layer's weights and gradients; 0: none",
    )

    @field_validator(
        "compile",
        "native_kernels",
        "channels_last",
        "deterministic",
        "activation_checkpointing",
        "validation_lpips",
        mode="before",
    )
    @classmethod
    def _accept_yaml_switches(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("generator")
    @classmethod
    def _know_generator(cls, spec: NetworkSpec) -> NetworkSpec:
        names.NETWORKS.check(spec.name, spec.params)
        return spec

    @field_validator("validation_metrics")
    @classmethod
    def _know_metrics(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(metric_of(key).key for key in keys))

    @field_validator("metric_weights")
    @classmethod
    def _know_metrics_with_weights(cls, files: dict[str, str | None]) -> dict[str, str | None]:
        metrics = {metric_of(key): file for key, file in files.items()}
        for metric in metrics:
            if not metric.trunks:
                raise ValueError(f"{metric.title} has no weights; omit {metric.key}")
        return {metric.key: file for metric, file in metrics.items() if file is not None}

    @field_validator("losses")
    @classmethod
    def _know_losses(cls, terms: dict[str, Any]) -> dict[str, Any]:
        for name, term in terms.items():
            names.LOSSES.check(name, term if isinstance(term, dict) else ())
        return terms

    @field_validator("stage")
    @classmethod
    def _keep_folders(cls, name: str) -> str:
        if name in RESERVED_FOLDERS:
            raise ValueError(f"{name!r} is a folder of every run; choose another stage name")
        return name

    @model_validator(mode="after")
    def _fit_crop(self) -> Recipe:
        if self.data.crop % self.scale:
            raise ValueError(
                f"data.crop {self.data.crop} is not a multiple of scale {self.scale}; "
                f"use {self.data.crop - self.data.crop % self.scale}"
            )
        if not self.losses:
            raise ValueError("at least one loss is needed, such as losses.l1=1")
        listed = {metric_of(key).name for key in self.validation_metrics}
        for name in self.best.metrics:
            metric, is_named = METRICS[name], name == "lpips" and self.validation_lpips != "off"
            if not metric.trunks or name in listed or is_named:
                continue
            way_out = f"validation_metrics: [psnr, {metric.key}]"
            if name == "lpips":
                *others, last = metric.trunks
                way_out = f"validation_lpips: {', '.join(others)} or {last}"
            key = f"best.weights.{metric.key}" if self.best.weights else f"best.metric {metric.key}"
            raise ValueError(f"{key} needs {way_out}")
        return self

    def measured(self) -> dict[str, Trunk | None]:
        """Return what validation measures, by name: PSNR-Y, all that is listed, and best's metrics.

        The value is what the metric compares with, None for metrics that need nothing.
        """
        wanted = {"psnr_y", *self.best.metrics}
        wanted |= {metric_of(key).name for key in self.validation_metrics}
        networks = {} if self.validation_lpips == "off" else {"lpips": self.validation_lpips}
        return {
            name: Trunk(networks.get(name, metric.trunks[0]), self.metric_weights.get(metric.key))
            if metric.trunks
            else None
            for name, metric in METRICS.items()
            if name in wanted or name in networks
        }

    def ds_config_path(self) -> Path:
        return find_file(self.ds_config)


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load the recipe `name` (in `recipes/`, or the path of a YAML file) with `overrides` applied.

    Keys of `overrides` are dotted. For a recipe with stages, returns the last stage, whose
    network is the final one. Raises `UserError`.
    """
    return load_stages(name, overrides)[-1]


def load_stages(name: str, overrides: Mapping[str, Any] | None = None) -> list[Recipe]:
    """Load the stages of recipe `name`, in order; a recipe without stages is its own only stage.

    `stages` is a table: stage name -> its differences. Each stage starts from the weights of the
    previous one, unless it sets `start`. Overrides apply to all stages, or, such as
    `stages.gan.steps`, to one. Raises `UserError`.
    """
    values = _with_bases(_recipe_path(name), ())
    _check_stages(values.get("stages"), f"recipe {name}")
    overrides = _with_current_keys(overrides or {}, is_dotted=True)
    for key in ("base", "stages", *(["stage"] if values.get("stages") else [])):
        if key in overrides:
            raise UserError(f"{key} can only be set in a recipe's file, not on the command line")
    for key in [key for key in overrides if key.startswith("stages.")]:
        stage, known = key.split(".")[1], values.get("stages") or {}
        if stage not in known:
            what = f"stage {stage!r}{nearest(stage, known)}" if known else "stages"
            raise UserError(f"{key}: recipe {name} has no {what}")
        assign(values, key, overrides.pop(key))
    stages = values.pop("stages", None)
    _check_stages(stages, f"recipe {name}")
    recipes: list[Recipe] = []
    for stage, change in (stages or {"": {}}).items():
        start = {"start": "previous"} if recipes else {}
        own = _merged(
            values, {**start, **_with_current_keys(change), **({"stage": stage} if stage else {})}
        )
        for key, value in overrides.items():
            assign(own, key, value)
        recipes.append(recipe_of(own, f"recipe {name}" + (f", stage {stage}" if stage else "")))
    if recipes[0].start == "previous" and (stages or not recipes[0].stage):
        raise UserError(
            f"recipe {name}: start: previous, but there is no previous stage; name a file or a run "
            "folder"
        )
    return recipes


def _check_stages(stages: Any, where: str) -> None:
    """Raise `UserError` unless `stages` is a table of tables with valid names and keys."""
    if stages is None:
        return
    if not isinstance(stages, dict) or not all(
        isinstance(change, dict) for change in stages.values()
    ):
        raise UserError(
            f"{where}: stages must be a table of tables, such as `stages: {{psnr: {{steps: "
            "1000}}`"
        )
    for stage, change in stages.items():
        if not isinstance(stage, str):
            raise UserError(f"{where}: the name of stage {stage!r} is not text; put it in quotes")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage):
            raise UserError(
                f"{where}: stage name {stage!r} may contain only letters, digits, _ and -"
            )
        for key in ("base", "stages"):
            if key in change:
                raise UserError(
                    f"{where}, stage {stage}: {key} belongs at the top of the recipe, not in a "
                    "stage"
                )


def write_recipe(recipe: Recipe, path: Path) -> None:
    write_atomically(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())


def recipe_differences(old: Recipe, new: Recipe, owner: str = "run") -> list[str]:
    """Describe differing fields that must not change within a run.

    Example: `["data.crop: 96 in the run, 128 asked for", …]`.
    """
    before, after = (
        {
            # A depth of "auto" is that of a run of an earlier version, which worked in 8 bits.
            key: 8 if (key, value) == ("data.depth", "auto") else value
            for key, value in flat(_with_loss_tables(recipe.model_dump(mode="json")))
            if not FREE_FIELDS & {key, key.split(".")[0]} and not PRESET_NAME.fullmatch(key)
        }
        for recipe in (old, new)
    )
    return changes(before, after, owner=owner)


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "", *, owner: str = "run"
) -> list[str]:
    """Describe the keys whose values differ between the `owner` on disk and the command line.

    Each line starts with `prefix`. Of an item of a list that is another one, `steps.0`, no keys are
    listed.
    """
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [
        f"{prefix}{key}: {old.get(key, 'unset')} in the {owner}, {new.get(key, 'unset')} asked for"
        for key in differing
        if not any(key.startswith(f"{other}.") for other in differing)
    ]


def _with_loss_tables(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with every loss as a table: `l1: 1` equals `l1: {weight: 1}`."""
    tables = {
        name: term if isinstance(term, dict) else {"weight": term}
        for name, term in values["losses"].items()
    }
    return {**values, "losses": tables}


def parse_overrides(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `["data.crop=96", "ds.train_batch_size=32"]` into recipe and ds_config overrides.

    Values are YAML. Raises `UserError`.
    """
    recipe: dict[str, Any] = {}
    ds_config: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise UserError(
                f"{assignment!r} is not an override; write key=value, such as data.crop=96 or "
                "ds.train_batch_size=32, and options with two dashes (see --help)"
            )
        try:
            value = _yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {key} is not YAML: {text!r}") from error
        target, key = (ds_config, key[3:]) if key.startswith("ds.") else (recipe, key)
        target[key] = value
    return recipe, ds_config


def _recipe_path(name: str) -> Path:
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if is_path else find_file(f"recipes/{name}.yaml")
    if not os.path.isfile(path):  # also False for a name that is too long
        known = recipe_names()
        raise UserError(
            f"no recipe {name!r}{nearest(name, known)} (or give the path of a .yaml file)"
        )
    return path


def _read_yaml(path: Path, example: str = "scale: 2") -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must contain keys and values, such as `{example}`")
    return values


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(
            f"recipe {path} is its own base: {' -> '.join(p.stem for p in (*seen, path))}"
        )
    values = _with_current_keys(_read_yaml(path))
    base = values.pop("base", None)
    values.setdefault("name", path.stem)
    if base is None:
        return values
    return _merged(_with_bases(_recipe_path(str(base)), (*seen, path)), values)


def _merged(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `change` over `base`, key by key.

    Losses are replaced as a whole, and so is a table (generator, degradation) of another name.
    """
    merged = copy.deepcopy(base)
    for key, value in change.items():
        old = merged.get(key)
        if key == "degradation" and isinstance(old, str):
            old = {"name": old}
        is_table = isinstance(old, dict) and isinstance(value, Mapping) and key != "losses"
        if is_table and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merged(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


OLD_KEYS = {"samples": "previews", "lpips_weights": "metric_weights.lpips"}
"""Earlier keys of recipes -> present keys. Old recipes and command lines still work."""


def _with_current_keys(values: Mapping[str, Any], *, is_dotted: bool = False) -> dict[str, Any]:
    """Return a recipe's or stage's table with present keys.

    With `is_dotted` it is a table of dotted keys, which may start with old ones.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        first, dot, rest = str(key).partition(".")
        renamed[OLD_KEYS[first] + dot + rest if first in OLD_KEYS else key] = value
    for key in () if is_dotted else OLD_KEYS.values():
        table, dot, last = key.partition(".")
        if dot and key in renamed:
            renamed[table] = {**(renamed.get(table) or {}), last: renamed.pop(key)}
    return renamed


def assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if parent == "degradation" and isinstance(values.get(parent), str):
            values[parent] = {"name": values[parent]}
        if parent == "previews" and isinstance(values.get(parent), (str, list)):
            values[parent] = {"files": values[parent]}
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{dotted}: {parent} has no keys of its own")
    if parents[-1:] == ["degradation"] and last == "name" and values.get("name", value) != value:
        # As in `_merged`: nothing of another degradation is left, such as the steps of a chain.
        values.clear()
    values[last] = value


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the name of a preset in `data.degradation` by its contents.

    A preset is a YAML file in `recipes/degradations/`, or any other by its path; keys beside its
    name take precedence over those in the file. A run keeps the contents, not the name.
    """
    data = values.get("data")
    if not isinstance(data, Mapping) or "degradation" not in data:
        return values
    given = data["degradation"]
    if isinstance(given, list):
        expanded: Any = [degradation_of(one) for one in given]
    else:
        expanded = degradation_of(given)
    return {**values, "data": {**data, "degradation": expanded}}


def degradation_of(given: Any, seen: tuple[Path, ...] = ()) -> Any:
    """Return the contents of a preset that is given by its name; return other values unchanged.

    A preset may change a few keys of another one, which its `name` names. `seen` holds the files
    that were followed to `given`.
    """
    name = given.get("name") if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        return given
    is_path = name.endswith((".yaml", ".yml"))
    if not is_path and name not in recipe_names(PRESETS):
        return given
    path = Path(name).expanduser() if is_path else find_file(f"{PRESETS}/{name}.yaml")
    if not os.path.isfile(path):
        raise UserError(
            f"data.degradation: {name}: no such file; a run that used it keeps a copy, and "
            "continues with --recipe RUN/recipe.yaml"
        )
    if path in seen:
        chain = " -> ".join(one.stem for one in (*seen, path))
        raise UserError(f"data.degradation: {path} is its own preset: {chain}")
    preset = degradation_of({"name": "chain", **_read_yaml(path, "steps: [blur]")}, (*seen, path))
    if preset["name"] == "chain":
        preset["preset"] = path.stem
    rest = dict(given) if isinstance(given, Mapping) else {}
    return {**preset, **{key: value for key, value in rest.items() if key != "name"}}


def recipe_of(values: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain values.

    Raises `UserError` that starts with `where` and lists all faults.
    """
    return _validated(Recipe, _with_preset(_with_current_keys(values)), where)


class _DataAlone(Spec):
    data: DataSpec


def degradation_spec(given: Any, where: str) -> DegradationSpec:
    """Build a degradation from what `data.degradation` may contain, without a recipe around it.

    Raises `UserError` that starts with `where` and lists all faults.
    """
    values = _with_preset({"data": {"degradation": given}})
    return _validated(_DataAlone, values, where).data.degradation


def _validated(model: type[Model], values: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        # A list whose items are faulty is also reported as too short.
        faults = [
            fault
            for fault in faults
            if fault["type"] != "too_short"
            or not any(
                len(other["loc"]) > len(fault["loc"])
                and other["loc"][: len(fault["loc"])] == fault["loc"]
                for other in faults
            )
        ]
        raise UserError(f"{where}: " + "; ".join(_one_line(fault) for fault in faults)) from error


_TABLE = "keys and values are needed, such as {key: value}"
_MESSAGES = {
    "tuple_type": "a list is needed, such as [one, two]",
    "too_short": "at least 1 item is needed",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _TABLE),
}
"""Kinds of faults that pydantic describes in terms of Python -> what is wrong."""


def _one_line(fault: Mapping[str, Any]) -> str:
    parts, fields = _location(fault["loc"])
    key = ".".join(parts) or "recipe"
    if fault["type"] == "extra_forbidden":
        # A word of another program stands at the top or, for what concerns data, in `data`.
        known = ours(parts[-1]) if len(parts) == 1 or parts[:-1] == ["data"] else ""
        return f"{key}: unknown key{known or nearest(parts[-1], fields)}"
    if fault["type"] == "value_error":
        return f"{'' if key == 'recipe' else key + ': '}{fault['ctx']['error']}"
    message = _MESSAGES.get(fault["type"], fault["msg"][0].lower() + fault["msg"][1:])
    message = re.sub(r" or instance of \w+", "", message)
    return (
        f"{key}: {message}"
        if fault["type"] == "missing"
        else f"{key}: {message}, not {fault['input']!r}"
    )


def _location(location: Sequence[Any]) -> tuple[list[str], Sequence[str]]:
    """Return the keys that lead to a fault, and the valid fields at that place."""
    parts: list[str] = []
    spec: Any = Recipe
    fields: Sequence[str] = ()
    for part in location:
        choices = list(_choices(spec))
        tables = [one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)]
        if isinstance(part, int):
            parts.append(str(part))
            spec = next((get_args(one)[0] for one in choices if get_origin(one) is tuple), None)
            continue
        if len(tables) > 1:
            # The location says which table pydantic chose: by its name, or, for steps of a
            # degradation, by its only key.
            chosen = [
                one
                for one in tables
                if (one.model_fields["name"].default if "name" in one.model_fields else None)
                == part
                or list(one.model_fields) == [part]
            ]
            if chosen:
                spec = chosen[0]
                continue
        parts.append(part)
        spec = None
        if tables:
            fields = list(tables[0].model_fields)
            spec = tables[0].model_fields[part].annotation if part in fields else None
    return parts, fields


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows, without `Annotated` and unions."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin is Union or origin is UnionType:
        for one in get_args(annotation):
            yield from _choices(one)
    else:
        yield annotation


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of tables, and of tables in lists.

    An item of such a list is `steps.0`, with its name or first key as the value.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for number, item in enumerate(value):
                yield f"{prefix}{key}.{number}", item.get("name", next(iter(item), None))
                yield from flat(item, f"{prefix}{key}.{number}.")
        else:
            yield f"{prefix}{key}", value
