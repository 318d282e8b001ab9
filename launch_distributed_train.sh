#!/usr/bin/env bash
# Train on every machine of a hostfile; run it on the first one. `--help` lists the options.
set -euo pipefail
trap 'echo stopped >&2; exit 130' INT
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
vastscale_run "$root/launch/distributed.py" "$@"
