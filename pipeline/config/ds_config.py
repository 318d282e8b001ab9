"""DeepSpeed's configuration file: read it, check it, and choose the runtime that uses it.

Imports no torch, so that a launcher can check a configuration on a host without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.cli import UserError, nearest
from pipeline.config.elsewhere import ours
from pipeline.config.recipe import assign, changes, flat
from pipeline.distributed.launcher import is_from_accelerate
from pipeline.files import parse_json, read_regular_file

Runtime = Literal["auto", "deepspeed", "accelerate"]
DEEPSPEED_FP16_KEYS = (
    "loss_scale",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "fp16_master_weights_and_grads",
)
DEEPSPEED_KEYS = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")
ACCELERATE_MODES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism",
}
DS_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "zero_optimization",
        "data_types",
        "steps_per_print",
        "wall_clock_breakdown",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "comms_logger",
        "flops_profiler",
        "dump_state",
    }
)
"""Top-level keys of DeepSpeed's file that are accepted here. DeepSpeed itself ignores misspelt
keys."""
DS_SECTIONS = frozenset(
    {
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "zero_optimization",
        "data_types",
        "comms_logger",
        "flops_profiler",
    }
)
DS_SECTION_KEYS = {
    "optimizer": ("type", "params"),
    "scheduler": ("type", "params"),
    "fp16": (
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    ),
    "bf16": (
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
}
"""Keys of the sections in which DeepSpeed would ignore misspelt ones."""

LARGEST_NUMBER = 1e300
_ADAM = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
)


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer that a ds_config may name: torch's, or the class of that name in `file`."""

    params: tuple[str, ...]
    file: str = ""  # module in pipeline/engine/optimizers; empty for torch's
    needs_whole_weights: bool = False  # if True, not with ZeRO 1 and 2, which cut them into parts
    is_schedule_free: bool = False  # if True, only with `STEADY_SCHEDULES`


_OURS = ("lr", "betas", "eps", "weight_decay")
OPTIMIZERS: dict[str, OptimizerRow] = {
    "Adam": OptimizerRow((*_ADAM, "amsgrad", "decoupled_weight_decay", "fused")),
    "AdamW": OptimizerRow((*_ADAM, "amsgrad", "fused")),
    "SGD": OptimizerRow(
        (
            "lr",
            "momentum",
            "dampening",
            "weight_decay",
            "nesterov",
            "maximize",
            "foreach",
            "differentiable",
            "fused",
        )
    ),
    "RAdam": OptimizerRow((*_OURS, "decoupled_weight_decay"), file="radam"),
    "NAdam": OptimizerRow((*_OURS, "decoupled_weight_decay", "momentum_decay"), file="nadam"),
    "Adan": OptimizerRow(_OURS, file="adan"),
    "Adafactor": OptimizerRow(
        ("lr", "beta2_decay", "eps", "d", "weight_decay"),
        file="adafactor",
        needs_whole_weights=True,
    ),
    "Muon": OptimizerRow(
        (*_OURS, "momentum", "nesterov", "ns_steps", "adjust_lr_fn", "adamw_lr"),
        file="muon",
        needs_whole_weights=True,
    ),
    "SOAP": OptimizerRow(
        (*_OURS, "shampoo_beta", "precondition_frequency", "max_precond_dim"),
        file="soap",
        needs_whole_weights=True,
    ),
    "ScheduleFreeAdamW": OptimizerRow(
        (*_OURS, "r", "weight_lr_power"),
        file="schedule_free",
        needs_whole_weights=True,
        is_schedule_free=True,
    ),
}
"""Name of an optimizer -> its row. A new one takes one row."""
STEADY_SCHEDULES = ("WarmupLR", "ConstantLR")
"""Schedules that end at a constant rate."""
_RAMP = ("warmup_num_steps", "warmup_min_ratio")  # a linear warm-up for any of torch's schedules
_WARMUP_LR = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")
SCHEDULES: dict[str, tuple[str, ...]] = {
    "MultiStepLR": ("milestones", "gamma", *_RAMP),
    "StepLR": ("step_size", "gamma", *_RAMP),
    "ExponentialLR": ("gamma", *_RAMP),
    "PolynomialLR": ("total_iters", "power", *_RAMP),
    "CosineAnnealingLR": ("T_max", "eta_min", *_RAMP),
    "CosineAnnealingWarmRestarts": ("T_0", "T_mult", "eta_min", *_RAMP),
    "CyclicLR": (
        "base_lr",
        "max_lr",
        "step_size_up",
        "step_size_down",
        "mode",
        "gamma",
        "cycle_momentum",
        "base_momentum",
        "max_momentum",
        *_RAMP,
    ),
    "ConstantLR": ("factor", "total_iters", *_RAMP),
    "ReduceLROnPlateau": (
        "mode",
        "factor",
        "patience",
        "threshold",
        "threshold_mode",
        "cooldown",
        "min_lr",
        "eps",
        *_RAMP,
    ),
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": ("total_num_steps", *_WARMUP_LR),
    "WarmupCosineLR": (
        "total_num_steps",
        "warmup_min_ratio",
        "warmup_num_steps",
        "cos_min_ratio",
        "warmup_type",
    ),
    "OneCycle": (
        "cycle_min_lr",
        "cycle_max_lr",
        "decay_lr_rate",
        "cycle_first_step_size",
        "cycle_second_step_size",
        "cycle_first_stair_count",
        "cycle_second_stair_count",
        "decay_step_size",
        "cycle_momentum",
        "cycle_min_mom",
        "cycle_max_mom",
        "decay_mom_rate",
        "last_batch_iteration",
    ),
    "LRRangeTest": (
        "lr_range_test_min_lr",
        "lr_range_test_step_size",
        "lr_range_test_step_rate",
        "lr_range_test_staircase",
        "last_batch_iteration",
    ),
}
"""Learning rate schedules of torch and DeepSpeed that a ds_config may name -> their parameters."""
LEFT_TO_DEEPSPEED = ("OneCycle", "LRRangeTest")
"""Schedules that DeepSpeed builds itself; the others are in `pipeline.engine.schedules`."""


def check_optimizer(section: Mapping[str, Any], where: str = "ds_config") -> None:
    """Raise `UserError` for an unknown optimizer type or parameter, suggesting the nearest name."""
    _check_names(
        "optimizer",
        section,
        {name: (*row.params, "torch_adam") for name, row in OPTIMIZERS.items()},
        where,
    )


def check_optimizer_fits(config: Mapping[str, Any], where: str = "ds_config") -> None:
    """Raise `UserError` if the optimizer does not work with the ZeRO stage or the schedule."""
    name, schedule = config["optimizer"]["type"], config.get("scheduler", {}).get("type")
    row = OPTIMIZERS[name]
    if row.needs_whole_weights and zero_stage(config):
        raise UserError(
            f"{where}: optimizer {name} needs whole weights, but zero_optimization.stage "
            f"{zero_stage(config)} cuts them into parts; set ds.zero_optimization.stage=0, or "
            "choose another optimizer, such as AdamW"
        )
    if row.is_schedule_free and schedule not in (None, *STEADY_SCHEDULES):
        raise UserError(
            f"{where}: optimizer {name} needs a rate that is constant after the warm-up, but the "
            f"schedule is {schedule}; set ds.scheduler.type=WarmupLR"
        )


def check_schedule(section: Mapping[str, Any], where: str = "ds_config") -> None:
    """Raise `UserError` for an unknown schedule or parameter, suggesting the nearest name."""
    _check_names("schedule", section, SCHEDULES, where)


def _check_names(
    kind: str, section: Mapping[str, Any], table: Mapping[str, tuple[str, ...]], where: str
) -> None:
    name = section["type"]
    if name not in table:
        raise UserError(f"{where}: no {kind} {name!r}{nearest(name, table)}")
    for key in section.get("params", {}):
        if key not in table[name]:
            raise UserError(
                f"{where}: {kind} {name} has no parameter {key!r}{nearest(key, table[name])}"
            )


KEPT_PARAMS = {"optimizer": ("lr", "weight_decay"), "scheduler": ()}
"""Section -> parameters that an override of its type leaves as they are in the file."""


def _change_type(config: Mapping[str, Any], key: str, name: Any, kept: tuple[str, ...]) -> None:
    """Forget the parameters in a section that belong to another type than `name`, if given."""
    section = config.get(key)
    if name is None or not isinstance(section, dict) or section.get("type") == name:
        return
    if isinstance(params := section.get("params"), dict):
        section["params"] = {key: value for key, value in params.items() if key in kept}


def load_ds_config(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read DeepSpeed's configuration, apply `overrides` (dotted keys), and check it.

    Raises `UserError`.
    """
    try:
        config = parse_json(read_regular_file(path))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; name DeepSpeed's file with --ds-config"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(
            f'{path} must be a table of keys and values, such as {{"train_batch_size": 16, …}}'
        )
    for key, kept in KEPT_PARAMS.items():
        _change_type(config, key, (overrides or {}).get(f"{key}.type"), kept)
    for key, value in (overrides or {}).items():
        assign(config, key, value)
    _check_ds_config(config, path)
    # DeepSpeed counts communication whenever this section exists, even if it is not enabled.
    if not config.get("comms_logger", {}).get("enabled", False):
        config.pop("comms_logger", None)
    return config


def _check_numbers(value: Any, key: str, path: Path) -> None:
    """Raise `UserError` for a number that is not finite; JSON's 1e400 is infinite in Python."""
    if isinstance(value, (dict, list)):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in named:
            _check_numbers(inner, f"{key}.{name}" if key else str(name), path)
    elif isinstance(value, (int, float)) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise UserError(f"{path}: {key} must be a finite number of at most 1e300")


def _check_ds_config(config: dict[str, Any], path: Path) -> None:
    _check_numbers(config, "", path)
    for key in config:
        if key not in DS_KEYS:
            raise UserError(f"{path}: unknown key {key!r}{ours(key) or nearest(key, DS_KEYS)}")
    for section in DS_SECTIONS & config.keys():
        if not isinstance(config[section], dict):
            raise UserError(
                f"{path}: {section} must be a table, not {config[section]!r}; write "
                f"ds.{section}.KEY=VALUE, such as ds.fp16.enabled=false"
            )
        for key in config[section]:
            if key not in DS_SECTION_KEYS.get(section, (key,)):
                raise UserError(
                    f"{path}: unknown key '{section}.{key}'{nearest(key, DS_SECTION_KEYS[section])}"
                )
    for section in {"optimizer", "scheduler"} & config.keys():
        if not isinstance(config[section].get("params", {}), dict) or not isinstance(
            config[section].get("type"), str
        ):
            raise UserError(
                f'{path}: {section} needs a type and a table of params, such as {{"type": "AdamW", '
                '"params": {"lr": 0.001}}'
            )
    if "optimizer" in config:
        check_optimizer(config["optimizer"], str(path))
    if "scheduler" in config:
        check_schedule(config["scheduler"], str(path))
    clipping = config.get("gradient_clipping", 1.0)
    if not isinstance(clipping, (int, float)) or clipping < 0:
        raise UserError(f"{path}: gradient_clipping must be a number, 0 or above, not {clipping!r}")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        value = config.get(key, None if key == "train_batch_size" else 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            about = ", the global batch," if key == "train_batch_size" else ""
            raise UserError(f"{path}: {key}{about} must be a whole number above 0, not {value!r}")
    if zero_stage(config) not in (0, 1, 2):
        raise UserError(
            f"{path}: zero_optimization.stage {zero_stage(config)} is not supported; choose 0, 1 "
            "or 2"
        )
    for key in config.get("zero_optimization", {}):
        if key.startswith("offload"):
            raise UserError(
                f"{path}: zero_optimization.{key} is not supported (super-resolution networks fit "
                "into GPU memory); omit it"
            )
    if config.get("comms_logger", {}).get("verbose"):
        raise UserError(
            f"{path}: comms_logger.verbose would print a line per call; omit it (log.jsonl has the "
            "totals)"
        )
    if config.get("fp16", {}).get("enabled") and config.get("bf16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 and bf16 are both enabled; choose one")
    if "optimizer" not in config:
        raise UserError(
            f'{path}: optimizer is missing; write {{"type": "AdamW", "params": {{"lr": 0.001}}}}'
        )
    check_optimizer_fits(config, str(path))


def zero_stage(config: Mapping[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def batch_sizes(config: Mapping[str, Any], world_size: int) -> tuple[int, int]:
    """Return (micro-batch per rank, gradient accumulation steps) for the global batch.

    If the file gives one of the two, the other follows; if it gives both, the product with
    `world_size` must be the global batch. Raises `UserError`.
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
        raise UserError(
            f"train_batch_size {total} is not micro-batch x accumulation x {world_size} ranks "
            f"({micro} x {accumulation} x {world_size} = {micro * accumulation * world_size}); set "
            f"ds.train_batch_size={choices}, or use another number of ranks"
        )
    return micro, accumulation


def precision_of(config: Mapping[str, Any], *, on_cpu: bool, runtime: str) -> str:
    """Return the precision of training with `config`: FP32, BF16 or FP16 (FP32 on a CPU).

    Accelerate is named in it, because its rounding and its checkpoints differ from DeepSpeed's.
    """
    names = ("bf16",) if on_cpu else ("bf16", "fp16")
    precision = next(
        (name.upper() for name in names if config.get(name, {}).get("enabled")), "FP32"
    )
    if runtime == "accelerate":
        precision += " (Accelerate)" if precision == "FP32" else " autocast (Accelerate)"
    return precision


def ds_differences(old: Mapping[str, Any], new: Mapping[str, Any], owner: str = "run") -> list[str]:
    """Like `recipe_differences`, for two ds_configs.

    How the global batch is split over ranks may change.
    """
    free = (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
        "wall_clock_breakdown",
        "comms_logger",
        "flops_profiler",
        "scheduler.params.total_num_steps",
    )
    before, after = (
        {key: value for key, value in flat(values) if not key.startswith(free)}
        for values in (old, new)
    )
    return changes(before, after, "ds.", owner=owner)


def choose_runtime(asked: Runtime, variables: Mapping[str, str] = os.environ) -> str:
    """Return deepspeed or accelerate.

    "auto" means Accelerate under `accelerate launch` and if DeepSpeed is not installed. Raises
    `UserError` if the runtime's package is missing.
    """
    chosen = asked
    if asked == "auto":
        chosen = (
            "accelerate"
            if is_from_accelerate(variables) or not _is_installed("deepspeed")
            else "deepspeed"
        )
    if not _is_installed(chosen):
        raise UserError(
            f"--runtime {chosen}: package {chosen} is not installed; pip install -r "
            "requirements.txt"
        )
    return chosen


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_accelerate(
    ds_config: Mapping[str, Any], variables: Mapping[str, str] = os.environ
) -> None:
    """Raise `UserError` for what Accelerate cannot do, or for Accelerate settings that disagree."""
    if zero_stage(ds_config):
        raise UserError(
            f"zero_optimization.stage {zero_stage(ds_config)} needs DeepSpeed, but the runtime is "
            "accelerate; set ds.zero_optimization.stage=0 or use --runtime deepspeed"
        )
    fp16 = ds_config.get("fp16", {})
    own = [f"fp16.{key}" for key in DEEPSPEED_FP16_KEYS if fp16.get("enabled") and key in fp16]
    own += [key for key in DEEPSPEED_KEYS if key in ds_config]
    if own:
        raise UserError(
            f"ds_config: {own[0]} needs DeepSpeed, but the runtime is accelerate; omit it or use "
            "--runtime deepspeed"
        )
    schedule = ds_config.get("scheduler", {}).get("type")
    if schedule in LEFT_TO_DEEPSPEED:
        raise UserError(
            f"ds_config: schedule {schedule} needs DeepSpeed, but the runtime is accelerate; "
            "choose another, such as CyclicLR, or use --runtime deepspeed"
        )
    _check_settings(ds_config, variables)


def _check_settings(ds_config: Mapping[str, Any], variables: Mapping[str, str]) -> None:
    """Check the variables of `accelerate config` and `accelerate launch` against the ds_config."""
    for variable, mode in ACCELERATE_MODES.items():
        if variables.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(
                f"accelerate is set to use {mode}, which is not supported here; answer no to it in "
                "`accelerate config`, or start with ./launch_local_train.sh, which uses DeepSpeed"
            )
    given = variables.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = next(
        (name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "no"
    )
    if given not in ("no", wanted):
        ours = "FP32" if wanted == "no" else wanted.upper()
        raise UserError(
            f"accelerate's mixed_precision is {given}, but the ds_config's is {ours}; set "
            f"accelerate's to {wanted}, or change the ds_config's (ds.fp16.enabled, "
            "ds.bf16.enabled)"
        )
    if variables.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            f"accelerate's dynamo_backend is {variables['ACCELERATE_DYNAMO_BACKEND']}; set it to "
            "no: the recipe's compile key decides"
        )
    steps = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", "1", str(ds_config.get("gradient_accumulation_steps", 1))):
        raise UserError(
            f"accelerate's gradient_accumulation_steps is {steps}; omit it: the ds_config's "
            "gradient_accumulation_steps decides"
        )
