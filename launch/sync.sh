#!/usr/bin/env bash
# Copy this checkout and the dataset to every host of a hostfile, and make the environment there. `--help` lists the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
VASTSCALE_COMMAND=$0 exec "$PYTHON" "$root/launch/cluster/sync.py" "$@"
