#!/usr/bin/env bash
# Show all runs in TensorBoard: ./run_tensorboard.sh [LOG_DIR] [options of TensorBoard, such as --port 6007]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/launch/bootstrap.sh"
log_dir=runs
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then log_dir=$1; shift; fi
for argument in "$@"; do
    case $argument in
        --logdir|--logdir=*|--logdir_spec*) vastscale_die "give the folder as the first argument instead of $argument: $0 LOG_DIR" ;;
        -h|--help|--helpfull) vastscale_bootstrap requirements.txt; exec "$PYTHON" -m tensorboard.main "$argument" ;;
    esac
done
[ -d "$log_dir" ] || vastscale_die "there is no folder $log_dir; train first (./launch_local_train.sh), or give the --log-dir you trained with"
[ -n "$(find -L "$log_dir" -name 'events.out.tfevents.*' -print -quit)" ] \
    || vastscale_die "there is no TensorBoard log in $log_dir yet; train first (./launch_local_train.sh), or give the --log-dir you trained with"
vastscale_bootstrap requirements.txt
# hide TensorBoard's notes for its developers; the line with the URL stays
exec "$PYTHON" -m tensorboard.main --logdir "$log_dir" --samples_per_plugin images=200 "$@" 2> >(grep --line-buffered -vE \
    '^$|TensorFlow installation not found|fast data loading|--load_fast=false|tensorflow/tensorboard/issues/4784' >&2)
