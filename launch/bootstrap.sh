# To be sourced: sets PYTHON to an interpreter that has all packages of a requirements file.
#
# If an environment is active (VIRTUAL_ENV, CONDA_PREFIX), missing packages are installed into it; packages with
# another version are reported and left unchanged. Otherwise .venv is made in this checkout, once. A stamp with the
# hash of the requirements makes every later start instant.
# shellcheck shell=bash

vastscale_run() {  # usage: vastscale_run SCRIPT [ARGUMENT...]; ends this shell
    # CTRL+C waits until the script can handle it: the interpreter itself would print a traceback.
    local blocked=(env --block-signal=INT)
    "${blocked[@]}" true 2>/dev/null || blocked=(env)
    VASTSCALE_COMMAND=$0 exec "${blocked[@]}" "$PYTHON" "$@"
}

vastscale_die() { printf 'error: %s\n' "$1" >&2; exit 2; }

vastscale_find_python() {  # print the path of a Python that is new enough, or exit with a message
    local candidate
    if [ -n "${VASTSCALE_PYTHON:-}" ]; then
        "$VASTSCALE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
            || vastscale_die "VASTSCALE_PYTHON=$VASTSCALE_PYTHON is not Python 3.10 or newer"
        command -v "$VASTSCALE_PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    vastscale_die "Vastscale needs Python 3.10 or newer, but found $(python3 --version 2>&1 || echo 'no python3'); install one, or give its path: VASTSCALE_PYTHON=/path/to/python3.12 $0"
}

vastscale_pip() {
    local quiet=(--quiet)
    [ -t 1 ] && quiet=()
    "$PYTHON" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input "$@" \
        || vastscale_die "pip could not install the packages (see its message above); fix the cause and run the same command again to continue"
}

vastscale_bootstrap() {  # usage: vastscale_bootstrap REQUIREMENTS_FILE
    local root requirements=$1 environment own stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    # conda activates its base environment in every shell, so nobody has chosen it for this
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

    if command -v flock >/dev/null && [ -w "$root" ]; then  # two first starts at the same time must not build the same environment
        exec 9>"$root/.bootstrap.lock"
        flock 9
    fi
    if [ "$own" = 1 ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # there is no environment yet, or it is broken
        local base
        base=$(vastscale_find_python) || exit 2
        echo "creating .venv with $("$base" --version) and the packages of $requirements (takes a few minutes, once)"
        rm -f "$environment"/.vastscale-*
        "$base" -m venv --clear "$environment" || { rm -rf "$environment"; vastscale_die "$base cannot create a virtual environment (Debian: apt install python3-venv)"; }
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || vastscale_die "Vastscale needs Python 3.10 or newer, but the environment $environment has $("$PYTHON" --version 2>&1); deactivate it, or activate another"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        if [ "$own" = 1 ]; then
            vastscale_pip -r "$root/$requirements"
        else
            local missing
            missing=$("$PYTHON" "$root/launch/requirements_missing.py" "$root/$requirements") || vastscale_die "$missing"
            if [ -n "$missing" ]; then
                echo "installing into the active environment $environment:" $missing
                # shellcheck disable=SC2086 # one word per requirement
                vastscale_pip $missing
            fi
        fi
        # a read-only environment that has all packages gets no stamp and is checked at every start
        { echo "$want" > "$stamp"; } 2>/dev/null || [ "$own" = 0 ] || vastscale_die "cannot write $stamp"
    fi
    if [ -e "$root/.bootstrap.lock" ]; then exec 9>&-; fi
}
