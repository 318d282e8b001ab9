#!/usr/bin/env bash
# Train on every machine of a hostfile; run it on the first one. `--help` lists the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
VASTSCALE_COMMAND=$0 exec "$PYTHON" "$root/launch/distributed.py" "$@"
