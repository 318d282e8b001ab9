# Sourced: sets PYTHON to an interpreter that has everything in a requirements file.
#
# An active environment (VIRTUAL_ENV, CONDA_PREFIX) is used as it is: what is missing is installed into it, what is
# there in another version is left alone and named. Otherwise .venv is made beside this checkout, once; a stamp with
# the hash of the requirements makes every later start instant.
# shellcheck shell=bash

vastscale_die() { printf 'error: %s\n' "$1" >&2; exit 2; }

vastscale_find_python() {  # a Python that is new enough, or a clear message
    local candidate
    if [ -n "${VASTSCALE_PYTHON:-}" ]; then
        "$VASTSCALE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
            || vastscale_die "VASTSCALE_PYTHON=$VASTSCALE_PYTHON is no Python 3.10 or newer"
        command -v "$VASTSCALE_PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    vastscale_die "Vastscale needs Python 3.10 or newer, and $(python3 --version 2>&1 || echo 'no python3') is what is here; install one, or name it: VASTSCALE_PYTHON=/path/to/python3.12 $0"
}

vastscale_pip() {
    local quiet=(--quiet)
    [ -t 1 ] && quiet=()
    "$PYTHON" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input "$@" \
        || vastscale_die "pip could not install the packages (its message is above); once that is repaired, the same command continues"
}

vastscale_bootstrap() {  # usage: vastscale_bootstrap REQUIREMENTS_FILE
    local root requirements=$1 environment own stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    # conda activates its base by itself in every shell: nobody has chosen it for this
    [ "$environment" = "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ] && environment=
    own=0
    if [ -z "$environment" ]; then
        environment=$root/.venv
        own=1
    fi
    PYTHON=$environment/bin/python
    stamp=$environment/.vastscale-$(basename "$requirements" .txt)
    want=$(cat "$root/requirements.txt" "$root/$requirements" | sha256sum | cut -d' ' -f1)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi

    if command -v flock >/dev/null && [ -w "$root" ]; then  # two first starts at once must not build one environment
        exec 9>"$root/.bootstrap.lock"
        flock 9
    fi
    if [ "$own" = 1 ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # none yet, or one that is broken
        local base
        base=$(vastscale_find_python) || exit 2
        echo "making .venv with $("$base" --version) and the packages of $requirements (a few minutes, once)"
        rm -f "$environment"/.vastscale-*
        "$base" -m venv --clear "$environment" || { rm -rf "$environment"; vastscale_die "$base cannot make a virtual environment (Debian: apt install python3-venv)"; }
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || vastscale_die "Vastscale needs Python 3.10 or newer, and the environment $environment has $("$PYTHON" --version 2>&1); deactivate it, or activate another"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        if [ "$own" = 1 ]; then
            vastscale_pip -r "$root/$requirements"
        else
            local missing
            missing=$("$PYTHON" "$root/launch/requirements_missing.py" "$root/$requirements") || vastscale_die "$missing"
            if [ -n "$missing" ]; then
                echo "installing into the active environment $environment:" $missing
                # shellcheck disable=SC2086 # one word a requirement
                vastscale_pip $missing
            fi
        fi
        # an environment that cannot be written to, but has everything, is checked each time
        { echo "$want" > "$stamp"; } 2>/dev/null || [ "$own" = 0 ] || vastscale_die "cannot write $stamp"
    fi
    if [ -e "$root/.bootstrap.lock" ]; then exec 9>&-; fi
}
