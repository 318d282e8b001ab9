#!/usr/bin/env bash
# Set up what the tests need and run them all, on any machine: ./run_tests.sh [pytest's own options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements-dev.txt
cd "$root"
exec "$PYTHON" -m pytest "$@"
