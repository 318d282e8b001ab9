#!/usr/bin/env bash
# Show all runs in TensorBoard: ./run_tensorboard.sh [LOG_DIR] [options of TensorBoard, such as --port 6007]
set -euo pipefail
trap 'echo stopped >&2; exit 130' INT
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
vastscale_run "$root/launch/show_tensorboard.py" "$@"
