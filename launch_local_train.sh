#!/usr/bin/env bash
# Train on this machine: on all GPUs through DeepSpeed, or in one CPU process. `--help` lists the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
VASTSCALE_COMMAND=$0 exec "$PYTHON" "$root/launch/local.py" "$@"
