#!/usr/bin/env bash
# TensorBoard of all runs: ./run_tensorboard.sh [LOG_DIR] [TensorBoard's own options, such as --port 6007]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
log_dir=runs
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then log_dir=$1; shift; fi
[ -d "$log_dir" ] || vastscale_die "there is no folder $log_dir; train first (./launch_local_train.sh), or name the --log-dir you trained with"
exec "$PYTHON" -m tensorboard.main --logdir "$log_dir" "$@"
