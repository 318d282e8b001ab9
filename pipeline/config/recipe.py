"""What an experiment is: a recipe (what to train) and a ds_config.json (how to optimise), both checked when read.

A recipe is a small YAML file in `recipes/`; `base: NAME` makes it a difference from another one. Batch sizes,
precision, optimizer and learning rate schedule live in DeepSpeed's own JSON file and nowhere else.
Needs no torch.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from pipeline.adversarial_spec import AdversarialSpec, NetworkSpec, Number
from pipeline.cli import UserError, nearest
from pipeline.config.specs import DataSpec, Spec
from pipeline.files import write_atomically
from pipeline.samples_spec import SamplesSpec

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
FREE_FIELDS = frozenset({"steps", "patience", "validate_every", "validation_images", "save_every", "save_minutes",
                         "log_every", "keep", "samples", "histograms", "data.threads", "data.prefetch",
                         "data.on_error", "data.max_bad_files", "lpips_weights", "losses.vgg_feature.weights",
                         "losses.lpips.weights"})
"""Fields that may change between a run and its continuation: when things happen, what is measured, not what is learnt.

A loss is a table here, as `recipe_differences` sees it.
"""
TAKEN = ("checkpoints", "file_lists", "samples", "tensorboard", "wandb")
"""Folders that a run has beside those of its stages."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, as in YAML 1.2 (for PyYAML it is text without a dot)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z"),
                              list("-+0123456789"))


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _loss_term(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping)):
        raise ValueError(f"{value!r} is neither a weight nor a table with one, such as {{weight: 1.0}}")
    return dict(value) if isinstance(value, Mapping) else float(value)


LossTerm = Annotated[Any, BeforeValidator(_loss_term)]
"""A weight, or a table of the weight and the loss's own parameters."""


class BestSpec(Spec):
    """Which validated step is the best, what `best` means to export and to patience."""

    metric: Literal["psnr", "lpips"] = Field("psnr", description="highest PSNR-Y, or lowest LPIPS")
    psnr_floor: Number | None = Field(None, description="dB; with lpips: steps below it count only while none is above")

    @model_validator(mode="after")
    def _fit(self) -> BestSpec:
        if self.metric == "psnr" and self.psnr_floor is not None:
            raise ValueError("psnr_floor is for metric lpips: the highest PSNR needs none; leave it out, or say null")
        return self


class Recipe(Spec):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="names the run folder and the exported files")
    scale: int = Field(ge=2, le=8, description="how many times larger the output is, each way")
    stage: str = Field("", pattern=r"^[A-Za-z0-9_-]*$", description="which of the recipe's stages this is")
    generator: NetworkSpec
    start: str | None = Field(None, description="weights to begin with: a file, a run folder, or `previous`, which is "
                                                "the stage before; none: at random")
    losses: dict[str, LossTerm] = Field({"l1": 1.0}, description="loss name -> weight, or -> a table of "
                                                                               "weight and the loss's own parameters")
    adversarial: AdversarialSpec | None = None
    data: DataSpec = DataSpec()
    ds_config: str = Field("ds_config.json", description="DeepSpeed's file, seen from the checkout's root")
    steps: int = Field(gt=0, description="optimizer updates in all")
    seed: int = Field(0, ge=0, lt=2**63, description="of initial weights and of sampling")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights; 0 turns averaging off")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile with Inductor; auto: if it can")
    channels_last: Literal["auto", "on", "off"] = Field("auto", description="auto: the faster layout, measured")
    validate_every: int = Field(1000, gt=0, description="steps")
    validation_images: int = Field(200, gt=0, description="at most so many, spread evenly over the validation list")
    validation_lpips: Literal["off", "alex", "squeeze", "vgg"] = Field("off", description="measure LPIPS, too")
    lpips_weights: str | None = Field(None, description="file of that network's trunk; default: torchvision's cache")
    best: BestSpec = BestSpec()
    patience: int = Field(0, ge=0, description="stop after so many validations without a better one; 0: never")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    save_minutes: float = Field(10, gt=0, description="and at least this often")
    keep: int = Field(2, ge=2, description="newest checkpoints kept, besides the best")
    log_every: int = Field(50, gt=0, description="steps between log lines")
    samples: SamplesSpec = SamplesSpec()
    histograms: int = Field(0, ge=0, description="steps between histograms of each layer's weights and gradients; "
                                                 "0: none")

    @field_validator("compile", "channels_last", "validation_lpips", mode="before")
    @classmethod
    def _accept_yaml_switches(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("stage")
    @classmethod
    def _keep_folders(cls, name: str) -> str:
        if name in TAKEN:
            raise ValueError(f"{name!r} is a folder of every run; name the stage otherwise")
        return name

    @model_validator(mode="after")
    def _fit_crop(self) -> Recipe:
        if self.data.crop % self.scale:
            raise ValueError(f"data.crop {self.data.crop} is not a multiple of scale {self.scale}; "
                             f"use {self.data.crop - self.data.crop % self.scale}")
        if not self.losses:
            raise ValueError("at least one loss is needed, such as losses.l1=1")
        if self.best.metric == "lpips" and self.validation_lpips == "off":
            raise ValueError("best.metric lpips needs validation_lpips: alex, squeeze or vgg")
        return self

    def ds_config_path(self) -> Path:
        return ROOT / self.ds_config


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` (of `recipes/`, or the path of a YAML file) with `overrides` (dotted keys) put over it.

    Of a recipe with stages, the last: the one whose network is meant to be used.
    """
    return load_stages(name, overrides)[-1]


def load_stages(name: str, overrides: Mapping[str, Any] | None = None) -> list[Recipe]:
    """The recipes of the stages of recipe `name`, in order; a recipe without stages is its only one.

    `stages` is a table: name of the stage -> what is different in it. Each begins with the weights of the one before,
    unless it says `start`. Overrides are for all stages, or, such as `stages.gan.steps`, for one.
    """
    values = _with_bases(_recipe_path(name), ())
    _check_stages(values.get("stages"), f"recipe {name}")
    overrides = dict(overrides or {})
    for key in ("base", "stages", *(["stage"] if values.get("stages") else [])):
        if key in overrides:
            raise UserError(f"{key}: that is said in a recipe's file, not on the command line")
    for key in [key for key in overrides if key.startswith("stages.")]:
        stage, known = key.split(".")[1], values.get("stages") or {}
        if stage not in known:
            what = f"stage {stage!r}{nearest(stage, known)}" if known else "stages"
            raise UserError(f"{key}: recipe {name} has no {what}")
        _assign(values, key, overrides.pop(key))
    stages = values.pop("stages", None)
    _check_stages(stages, f"recipe {name}")
    recipes: list[Recipe] = []
    for stage, change in (stages or {"": {}}).items():
        start = {"start": "previous"} if recipes else {}
        own = _merged(values, {**start, **change, **({"stage": stage} if stage else {})})
        for key, value in overrides.items():
            _assign(own, key, value)
        recipes.append(recipe_of(own, f"recipe {name}" + (f", stage {stage}" if stage else "")))
    if recipes[0].start == "previous" and (stages or not recipes[0].stage):
        raise UserError(f"recipe {name}: start: previous, but there is no stage before; name a file or a run folder")
    return recipes


def _check_stages(stages: Any, where: str) -> None:
    """Raise `UserError` for `stages` that are no table of tables, a name that is none, and what a stage cannot hold."""
    if stages is None:
        return
    if not isinstance(stages, dict) or not all(isinstance(change, dict) for change in stages.values()):
        raise UserError(f"{where}: stages must be a table of tables, such as `stages: {{psnr: {{steps: 1000}}}}`")
    for stage, change in stages.items():
        if not isinstance(stage, str):
            raise UserError(f"{where}: the name of stage {stage!r} is not text; put it in quotes")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage):
            raise UserError(f"{where}: a stage's name is made of letters, digits, _ and -; {stage!r} is not")
        for key in ("base", "stages"):
            if key in change:
                raise UserError(f"{where}, stage {stage}: {key} belongs at the top of the recipe, not in a stage")


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run folder keeps."""
    return recipe_of(_read_yaml(path), str(path))


def write_recipe(recipe: Recipe, path: Path) -> None:
    write_atomically(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """`["data.crop: 96 in the run, 128 asked for", …]` of the fields that must not change within a run."""
    before, after = (dict(_flat(_with_loss_tables(recipe.model_dump(mode="json")))) for recipe in (old, new))
    unset = "unset"
    return [f"{key}: {before.get(key, unset)} in the run, {after.get(key, unset)} asked for"
            for key in sorted(before.keys() | after.keys())
            if not FREE_FIELDS & {key, key.split(".")[0]} and before.get(key, unset) != after.get(key, unset)]


def _with_loss_tables(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values in which every loss is a table, since `l1: 1` and `l1: {weight: 1}` say the same."""
    tables = {name: term if isinstance(term, dict) else {"weight": term} for name, term in values["losses"].items()}
    return {**values, "losses": tables}


def parse_overrides(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`["data.crop=96", "ds.train_batch_size=32"]` -> (recipe overrides, ds_config overrides); values are YAML."""
    recipe: dict[str, Any] = {}
    ds_config: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise UserError(f"{assignment!r} is not an override; write key=value, such as data.crop=96 or "
                            "ds.train_batch_size=32, and options with two dashes (--help lists them)")
        try:
            value = _yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {key} is not YAML: {text!r}") from error
        target, key = (ds_config, key[3:]) if key.startswith("ds.") else (recipe, key)
        target[key] = value
    return recipe, ds_config


def load_ds_config(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration as written, with `overrides` (dotted keys), checked for what this project relies on."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name DeepSpeed's file with --ds-config") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    for key, value in (overrides or {}).items():
        _assign(config, key, value)
    _check_ds_config(config, path)
    if not config.get("comms_logger", {}).get("enabled", False):  # DeepSpeed counts wherever the section is there
        config.pop("comms_logger", None)
    return config


DS_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "data_types", "steps_per_print",
    "wall_clock_breakdown", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "comms_logger", "flops_profiler", "dump_state",
})
"""The top-level keys of DeepSpeed's file that mean something here. DeepSpeed itself ignores a misspelt key."""
DS_SECTIONS = frozenset({"optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "data_types", "comms_logger",
                         "flops_profiler"})
DS_SECTION_KEYS = {
    "optimizer": ("type", "params"), "scheduler": ("type", "params"),
    "fp16": ("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
             "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
             "bf16_optimizer_states"),
}
"""And the keys of those sections in which a misspelt one would be passed over, too."""


def _check_ds_config(config: dict[str, Any], path: Path) -> None:
    for key in config:
        if key not in DS_KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, DS_KEYS)}")
    for section in DS_SECTIONS & config.keys():
        if not isinstance(config[section], dict):
            raise UserError(f"{path}: {section} must be a table, not {config[section]!r}; write "
                            f"ds.{section}.KEY=VALUE, such as ds.fp16.enabled=false")
        for key in config[section]:
            if key not in DS_SECTION_KEYS.get(section, (key,)):
                raise UserError(f"{path}: unknown key '{section}.{key}'{nearest(key, DS_SECTION_KEYS[section])}")
    for section in {"optimizer", "scheduler"} & config.keys():
        if not isinstance(config[section].get("params", {}), dict) or not isinstance(config[section].get("type"), str):
            raise UserError(f'{path}: {section} needs a type and a table of params, such as {{"type": "AdamW", '
                            '"params": {"lr": 0.001}}')
    clipping = config.get("gradient_clipping", 1.0)
    if not isinstance(clipping, (int, float)) or clipping < 0:
        raise UserError(f"{path}: gradient_clipping must be a number, 0 or above, not {clipping!r}")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = config.get(key, None if key == "train_batch_size" else 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            about = ", the global batch," if key == "train_batch_size" else ""
            raise UserError(f"{path}: {key}{about} must be a whole number above 0, not {value!r}")
    if zero_stage(config) not in (0, 1, 2):
        raise UserError(f"{path}: zero_optimization.stage {zero_stage(config)} is not supported; choose 0, 1 or 2")
    for key in config.get("zero_optimization", {}):
        if key.startswith("offload"):
            raise UserError(f"{path}: zero_optimization.{key} is not supported: a super-resolution network fits a GPU")
    if config.get("comms_logger", {}).get("verbose"):
        raise UserError(f"{path}: comms_logger.verbose prints a line a call, and DeepSpeed is kept quiet here; leave "
                        "it out: the sums are in log.jsonl")
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 and bf16 are both enabled; choose one")
    if "optimizer" not in config:
        raise UserError(f'{path}: optimizer is missing; write {{"type": "AdamW", "params": {{"lr": 0.001}}}}')


def zero_stage(config: Mapping[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def batch_sizes(config: Mapping[str, Any], world_size: int) -> tuple[int, int]:
    """(micro-batch per rank, gradient accumulation steps) that make up the global batch on `world_size` ranks.

    Of the two, the one that the file leaves out follows from the other; when both are given they must multiply up.
    """
    total = config["train_batch_size"]
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps", None if micro else 1)
    micro = micro or total // (accumulation * world_size)
    accumulation = accumulation or total // max(1, micro * world_size)
    if not micro or not accumulation or micro * accumulation * world_size != total:
        unit = world_size * (config.get("train_micro_batch_size_per_gpu") or 1)
        unit = max(unit, world_size * config.get("gradient_accumulation_steps", 1))
        below, above = total - total % unit, total - total % unit + unit
        choices = f"{below} or {above}" if below else str(above)
        raise UserError(f"train_batch_size {total} is not micro-batch x accumulation x {world_size} ranks "
                        f"({micro} x {accumulation} x {world_size} = {micro * accumulation * world_size}); say "
                        f"ds.train_batch_size={choices}, or use another number of ranks")
    return micro, accumulation


def ds_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """As `recipe_differences`, of two ds_configs. How the global batch is split over ranks may change."""
    free = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "wall_clock_breakdown",
            "comms_logger", "flops_profiler", "scheduler.params.total_num_steps")
    before, after = dict(_flat(old)), dict(_flat(new))
    return [f"ds.{key}: {before.get(key, 'unset')} in the run, {after.get(key, 'unset')} asked for"
            for key in sorted(before.keys() | after.keys())
            if not key.startswith(free) and before.get(key) != after.get(key)]


def _recipe_path(name: str) -> Path:
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in RECIPES.glob("*.yaml")]
        raise UserError(f"no recipe {name!r}{nearest(name, known)} (or give the path of a .yaml file)")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, such as `scale: 2`")
    return values


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"recipe {path} is its own base: {' -> '.join(p.stem for p in (*seen, path))}")
    values = _read_yaml(path)
    base = values.pop("base", None)
    values.setdefault("name", path.stem)
    if base is None:
        return values
    return _merged(_with_bases(_recipe_path(str(base)), (*seen, path)), values)


def _merged(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` over `base`, key by key; losses, and a generator or degradation of another name, replace all."""
    merged = copy.deepcopy(base)
    for key, value in change.items():
        old = merged.get(key)
        is_table = isinstance(old, dict) and isinstance(value, Mapping) and key != "losses"
        if is_table and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merged(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if parent == "degradation" and isinstance(values.get(parent), str):
            values[parent] = {"name": values[parent]}
        if parent == "samples" and isinstance(values.get(parent), (str, list)):
            values[parent] = {"files": values[parent]}
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{dotted}: {parent} has no keys of its own")
    values[last] = value


def recipe_of(values: dict[str, Any], where: str) -> Recipe:
    """The recipe of plain values. Raises `UserError` that begins with `where` and names each wrong one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_one_line(fault) for fault in error.errors())) from error


def _one_line(fault: Mapping[str, Any]) -> str:
    parts, fields = _place(fault["loc"])
    key = ".".join(parts) or "recipe"
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(parts[-1], fields)}"
    if fault["type"] == "value_error":
        return f"{'' if key == 'recipe' else key + ': '}{fault['ctx']['error']}"
    message = re.sub(r" or instance of \w+", "", fault["msg"][0].lower() + fault["msg"][1:])
    return f"{key}: {message}" if fault["type"] == "missing" else f"{key}: {message}, not {fault['input']!r}"


def _place(location: Sequence[Any]) -> tuple[list[str], Sequence[str]]:
    """The keys that lead to a fault, as a recipe spells them, and the fields that the innermost table may have."""
    parts: list[str] = []
    spec: Any = Recipe
    fields: Sequence[str] = ()
    for part in location:
        if get_origin(spec) is UnionType or get_origin(spec) is Union:
            tables = [one for one in get_args(spec) if isinstance(one, type) and issubclass(one, BaseModel)]
            if len(tables) > 1:  # pydantic says which of them it took
                spec = next(one for one in tables if one.model_fields["name"].default == part)
                continue
            spec = tables[0] if tables else None
        parts.append(str(part))
        if isinstance(spec, type) and issubclass(spec, BaseModel):
            fields = list(spec.model_fields)
            spec = spec.model_fields[part].annotation if part in spec.model_fields else None
    return parts, fields


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
