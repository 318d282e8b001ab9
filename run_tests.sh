#!/usr/bin/env bash
# Set up what the tests need and run them all, on any machine: ./run_tests.sh [pytest's own options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements-dev.txt
cd "$root"
if [ $# = 0 ]; then  # all of them: a few files at once, for most of their time is other processes'
    cores=$(nproc)
    set -- --numprocesses $((cores < 4 ? cores : 4)) --dist loadfile
fi
exec "$PYTHON" -m pytest "$@"
