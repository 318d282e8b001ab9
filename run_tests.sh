#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [fast] [pytest's own options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case ${1:-} in -h|--help)
    cat <<'TEXT'
usage: ./run_tests.sh                    every test, on all cores; no GPU needed
       ./run_tests.sh fast               only tests that take about a second or less, for use while you work
       ./run_tests.sh [OPTIONS] [FILES]  passed on to pytest: ./run_tests.sh tests/data -k loader -x

The first run installs the packages of requirements-dev.txt into .venv, or into the active environment. Tests that need
a program that is not installed (pdsh, sshd, rsync, Open MPI, Chromium, g++) are skipped; pytest -rs says why.
TEXT
    exit ;;
esac
source "$root/launch/bootstrap.sh"
vastscale_bootstrap requirements-dev.txt
cd "$root"
unset PYTHONDONTWRITEBYTECODE  # hundreds of interpreters start here, and each would compile the code again
# More processes than cores, because many tests wait for time limits, sockets or disks. tests/conftest.py orders them.
# A process that crashes ends the tests: with another in its place, pytest-xdist 3.8.0 would wait for it forever.
parallel=(--numprocesses $(($(nproc) + 2)) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --max-worker-restart 0)
if [ $# = 0 ]; then
    set -- "${parallel[@]}"
elif [ "$1" = fast ]; then
    shift
    set -- "${parallel[@]}" -m "not slow" "$@"
fi
exec "$PYTHON" -m pytest "$@"
