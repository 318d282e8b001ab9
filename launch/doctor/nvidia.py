"""What nvidia-smi tells of the GPUs of a machine. Of the standard library alone: the doctor sends it to every host."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

SECONDS = 15  # a GPU that fell off the bus can keep nvidia-smi waiting for ever
FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "pstate", "temperature.gpu", "power.limit",
          "power.default_limit", "ecc.errors.uncorrected.volatile.total", "clocks_event_reasons.active",
          "clocks_throttle_reasons.active", "mig.mode.current")
"""As `nvidia-smi --help-query-gpu` has them; drivers differ in which they know. MiB, degrees Celsius, W."""
_WHOLE = {"index", "memory.total", "memory.used", "temperature.gpu", "ecc.errors.uncorrected.volatile.total"}
_REAL = {"power.limit", "power.default_limit"}
_MASK = {"clocks_event_reasons.active", "clocks_throttle_reasons.active"}
SLOWED_BY = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of nvml.h's nvmlClocksEventReasons that mean trouble; idle clocks and a reached power cap do not."""


def probe() -> dict[str, Any]:
    """{"gpus": [...], "complaint": what keeps nvidia-smi from telling, "" if nothing does}."""
    if not shutil.which("nvidia-smi"):
        present = Path("/dev/nvidia0").exists()
        return {"gpus": [], "complaint": "there is /dev/nvidia0 but no nvidia-smi" if present else ""}
    fields = list(FIELDS)
    while True:
        try:
            done = subprocess.run(["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"],
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"gpus": [], "complaint": f"nvidia-smi did not answer within {SECONDS} s"}
        output = done.stdout.decode(errors="replace")
        unknown = re.search(r'Field "([^"]+)" is not a valid field', output)
        if unknown and unknown.group(1) in fields:
            fields.remove(unknown.group(1))
            continue
        if done.returncode != 0:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            return {"gpus": [], "complaint": lines[0] if lines else f"nvidia-smi: status {done.returncode}"}
        return {"gpus": parse(output, fields), "complaint": ""}


def parse(output: str, fields: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    """A dict for each line of the CSV; `None` for what the GPU does not tell ([N/A], [Not Supported], [Unknown …])."""
    gpus = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(fields):
            gpu: dict[str, Any] = {field: _value(field, cell) for field, cell in zip(fields, cells)}  # noqa: B905 - Python 3.7
            if gpu["index"] is not None:
                gpu["slowed_by"] = _slowed_by(gpu)
                gpus.append(gpu)
    return gpus


def _value(field: str, cell: str) -> str | int | float | None:
    if re.fullmatch(r"\[?(N/A|Not Supported|Unknown Error|Insufficient Permissions|GPU requires reset|ERR!)\]?", cell):
        return None
    try:
        if field in _MASK:
            return int(cell, 16)
        return int(cell) if field in _WHOLE else float(cell) if field in _REAL else cell
    except ValueError:
        return None


def _slowed_by(gpu: dict[str, Any]) -> list[str]:
    active = gpu.get("clocks_event_reasons.active") or gpu.get("clocks_throttle_reasons.active") or 0
    return [reason for bit, reason in SLOWED_BY.items() if active & bit]
