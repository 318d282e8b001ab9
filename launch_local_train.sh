#!/usr/bin/env bash
# Train on this machine: every GPU through DeepSpeed, or one CPU process. `--help` lists the options.
set -euo pipefail
cd_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$cd_root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
exec "$PYTHON" "$cd_root/launch/local.py" "$@"
