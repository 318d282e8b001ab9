#!/usr/bin/env bash
# Show all runs in TensorBoard: ./run_tensorboard.sh [LOG_DIR] [options of TensorBoard, such as --port 6007]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements.txt
VASTSCALE_COMMAND=$0 exec "$PYTHON" "$root/launch/show_tensorboard.py" "$@"
