#!/usr/bin/env bash
# Set up what the tests need and run them all, on any machine: ./run_tests.sh [pytest's own options]
set -euo pipefail
cd_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$cd_root/launch/bootstrap.sh"
vastscale_bootstrap requirements-dev.txt
cd "$cd_root"
exec "$PYTHON" -m pytest "$@"
