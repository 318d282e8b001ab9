"""Which library drives the ranks, and what of a ds_config and of accelerate's own settings it cannot do. No torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.cli import UserError
from pipeline.config.recipe import zero_stage
from pipeline.distributed.launcher import is_from_accelerate

Runtime = Literal["auto", "deepspeed", "accelerate"]
DEEPSPEEDS_FP16 = ("loss_scale", "hysteresis", "consecutive_hysteresis", "min_loss_scale",
                   "fp16_master_weights_and_grads")
DEEPSPEEDS_OWN = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")
DEEPSPEEDS_SCHEDULES = ("OneCycle", "LRRangeTest")
ACCELERATES_MODES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP",
                     "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism"}


def choose_runtime(asked: Runtime, variables: Mapping[str, str] = os.environ) -> str:
    """deepspeed or accelerate; for "auto" accelerate under `accelerate launch` and where DeepSpeed is missing."""
    chosen = asked
    if asked == "auto":
        chosen = "accelerate" if is_from_accelerate(variables) or not _is_installed("deepspeed") else "deepspeed"
    if not _is_installed(chosen):
        raise UserError(f"--runtime {chosen}: the package {chosen} is not installed; pip install -r requirements.txt")
    return chosen


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_accelerate(ds_config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` for what Accelerate cannot do of a ds_config, and where accelerate's settings contradict it."""
    if zero_stage(ds_config):
        raise UserError(f"zero_optimization.stage {zero_stage(ds_config)} is DeepSpeed's, and the runtime is "
                        "accelerate; say ds.zero_optimization.stage=0 or --runtime deepspeed")
    fp16 = ds_config.get("fp16", {})
    own = [f"fp16.{key}" for key in DEEPSPEEDS_FP16 if fp16.get("enabled") and key in fp16]
    own += [key for key in DEEPSPEEDS_OWN if key in ds_config]
    if own:
        raise UserError(f"ds_config: {own[0]} is DeepSpeed's, and the runtime is accelerate; leave it out or say "
                        "--runtime deepspeed")
    schedule = ds_config.get("scheduler", {}).get("type")
    if schedule in DEEPSPEEDS_SCHEDULES:
        raise UserError(f"ds_config: schedule {schedule} is DeepSpeed's, and the runtime is accelerate; choose "
                        "another, such as CyclicLR, or say --runtime deepspeed")
    _check_settings(ds_config, variables)


def _check_settings(ds_config: Mapping[str, Any], variables: Mapping[str, str]) -> None:
    """What `accelerate config` wrote or `accelerate launch` was told, beside the ds_config."""
    for variable, mode in ACCELERATES_MODES.items():
        if variables.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(f"accelerate is set to use {mode}, which it does not do here; say no to it in `accelerate "
                            "config`, or start with ./launch_local_train.sh, which uses DeepSpeed")
    said = variables.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "no")
    if said not in ("no", wanted):
        ours = "FP32" if wanted == "no" else wanted.upper()
        raise UserError(f"accelerate says mixed_precision {said}, the ds_config {ours}; set accelerate's to "
                        f"{wanted}, or the ds_config's (ds.fp16.enabled, ds.bf16.enabled)")
    if variables.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(f"accelerate says dynamo_backend {variables['ACCELERATE_DYNAMO_BACKEND']}; set it to no: the "
                        "recipe's compile=auto, on or off decides")
    steps = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", "1", str(ds_config.get("gradient_accumulation_steps", 1))):
        raise UserError(f"accelerate says gradient_accumulation_steps {steps}; leave it out: the ds_config's "
                        "gradient_accumulation_steps decides")
