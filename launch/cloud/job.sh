#!/usr/bin/env bash
# Entry script of a cloud job: one machine or container with GPUs, which may be preempted at any time.
#
#   DATASET=s3://bucket/dataset RUNS=s3://bucket/first launch/cloud/job.sh --recipe vapsr_x4
#   DATASET=/mnt/dataset RUNS=/mnt/results/first launch/cloud/job.sh --recipe vapsr_x4 ds.train_batch_size=128
#
# In the image of launch/docker/Dockerfile it is the command: `vastscale launch/cloud/job.sh ...`. Arguments are passed
# to ./launch_local_train.sh. The same command line continues the run, on this machine or another. On SIGTERM it saves
# the run, copies it to RUNS and exits with 143: allow two minutes for that if the provider lets you choose.
#
#   DATASET, RUNS    a mounted folder, s3://..., gs://..., or any remote:path of rclone's configuration. RUNS gets the
#                    contents of runs/ and must belong to this job alone
#   WORK             folder on this machine's own disk to train in (/tmp/vastscale)
#   COPY_SECONDS     interval at which the run is copied to RUNS (300)
#   MAX_FAILURES     restarts in a row that may bring no new checkpoint (3)
#   RESTART_SECONDS  pause before a restart (10)
#
# Give credentials through the machine's role or through files named by RCLONE_CONFIG, AWS_SHARED_CREDENTIALS_FILE or
# GOOGLE_APPLICATION_CREDENTIALS. Too many programs can see command lines and environments.
set -euo pipefail
shopt -s extglob

STOPPED='@(129|130|131|138|140|143|152|158)'  # statuses of a run that a signal has stopped: 128 + signal

say() { printf 'job: %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DATASET=${DATASET:-} RUNS=${RUNS:-} WORK=${WORK:-/tmp/vastscale}
COPY_SECONDS=${COPY_SECONDS:-300} MAX_FAILURES=${MAX_FAILURES:-3} RESTART_SECONDS=${RESTART_SECONDS:-10}

is_remote() { case $1 in /*) return 1 ;; *:*) ;; *) return 1 ;; esac; }

rclones() {  # translate a location into rclone's syntax
    case $1 in
        s3://*) printf ':s3,provider=AWS,env_auth=true:%s' "${1#s3://}" ;;
        gs://*) printf ':gcs,env_auth=true:%s' "${1#gs://}" ;;
        *) printf '%s' "$1" ;;
    esac
}

copy() {  # FROM TO [OPTION...]; skips hidden files, which are incomplete or locks
    local from=$1 to=$2
    if is_remote "$from" || is_remote "$to"; then
        rclone copy --exclude='.*' --exclude='.*/**' "${@:3}" "$(rclones "$from")" "$(rclones "$to")"
    else
        rsync --archive --exclude='.*' "${@:3}" "$from/" "$to/" || [ $? = 24 ]  # 24: a file vanished meanwhile
    fi
}

mirror() {  # FROM TO: also remove from TO what is not in FROM
    if is_remote "$2"; then
        rclone sync --exclude='.*' --exclude='.*/**' "$1" "$(rclones "$2")"
    else
        rsync --archive --delete --exclude='.*' "$1/" "$2/" || [ $? = 24 ]
    fi
}

checkpoints() { find "$WORK/runs" -path '*/checkpoints/step-*/MANIFEST.json' | sort; }

copy_out() {  # copies manifests last, since they make a checkpoint valid; then removes what was removed here
    local folder
    copy "$WORK/runs" "$RUNS" --exclude=MANIFEST.json && copy "$WORK/runs" "$RUNS" || return
    while read -r folder; do
        mirror "$folder" "$RUNS/${folder#"$WORK/runs/"}" || return
    done < <(find "$WORK/runs" -type d -name checkpoints)
}

copy_out_regularly() {
    local nap=
    trap '[ -z "$nap" ] || kill "$nap"; exit 0' TERM  # bash handles it once a running copy is done
    while :; do
        sleep "$COPY_SECONDS" & nap=$!
        wait "$nap"
        nap=
        copy_out || say "warning: could not copy the run to RUNS; retrying in $COPY_SECONDS s"
    done
}

train() {  # sets status
    "$root/launch_local_train.sh" --dataset-dir "$dataset" "$@" &
    child=$!
    [ -z "$stopping" ] || kill -TERM "$child"
    status=0
    wait "$child" || status=$?
    while [ -n "$stopping" ] && kill -0 "$child" 2>/dev/null; do  # a signal interrupts `wait`, but the child still runs
        status=0
        wait "$child" || status=$?
    done
    child=
}

refuse_secrets() {
    local name
    for name in DATASET RUNS; do
        case ${!name,,} in
            *://*@* | *key*=* | *secret*=* | *token*=* | *pass*=*)
                die "$name contains a credential, which would appear on command lines; put it into the file that RCLONE_CONFIG names" ;;
        esac
    done
    while read -r name; do
        case $name in
            RCLONE_PASSWORD_COMMAND) ;;
            AWS_SECRET_ACCESS_KEY | AWS_SESSION_TOKEN | AZURE_CLIENT_SECRET | AZURE_STORAGE_KEY \
                | RCLONE_*SECRET* | RCLONE_*PASS* | RCLONE_*TOKEN | RCLONE_*KEY)
                die "$name is set, and every process would inherit it; put it into the file that RCLONE_CONFIG or" \
                    "AWS_SHARED_CREDENTIALS_FILE names, or give the machine a role" ;;
        esac
    done < <(compgen -e)
}

[ -n "$DATASET" ] || die "DATASET is not set; set it to the folder or bucket with the dataset"
[ -n "$RUNS" ] || die "RUNS is not set; set it to a folder or bucket for this job's checkpoints"
for argument; do
    [ "$argument" != --reset ] || die "--reset would start over after every preemption; use an empty RUNS instead"
done
refuse_secrets
if is_remote "$DATASET" || is_remote "$RUNS"; then
    command -v rclone >/dev/null || die "DATASET or RUNS is not a mounted folder, which needs rclone, and rclone is not installed"
fi

mkdir -p "$WORK/runs"
WORK=$(cd "$WORK" && pwd)
case $RUNS in *:* | /*) ;; *) RUNS=$PWD/$RUNS ;; esac
case $DATASET in *:* | /*) ;; *) DATASET=$PWD/$DATASET ;; esac
dataset=$DATASET
if is_remote "$DATASET"; then
    dataset=$WORK/dataset
    say "copying the dataset to $dataset"
    rclone copy --transfers=32 "$(rclones "$DATASET")" "$dataset"
fi
if is_remote "$RUNS"; then
    status=0
    printed=$(copy "$RUNS" "$WORK/runs" --update 2>&1) || status=$?
    if [ "$status" != 0 ] && [ "$status" != 3 ]; then  # 3: RUNS does not exist yet
        printf '%s\n' "$printed" >&2
        say "error: could not copy the contents of RUNS here" >&2
        exit 1
    fi
else
    # Its parents are not created: if the disk is not mounted, the run would be lost with the machine.
    [ -d "$RUNS" ] || mkdir "$RUNS" || die "cannot create RUNS=$RUNS; check that the disk is mounted"
    copy "$RUNS" "$WORK/runs" --update
fi
cd "$WORK"  # training writes to runs/ in the current folder

stopping='' child='' failures=0
# shellcheck disable=SC2329 # called by trap
stop() { stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap stop TERM INT HUP QUIT USR1 USR2 XCPU PWR
copy_out_regularly & copier=$!

while :; do
    before=$(checkpoints)
    train "$@"
    case $status in 0 | 2 | $STOPPED) break ;; esac  # finished, bad input, stopped
    [ -z "$stopping" ] || break
    [ "$(checkpoints)" = "$before" ] || failures=0
    failures=$((failures + 1))
    if [ "$failures" -gt "$MAX_FAILURES" ]; then
        say "training ended with status $status, and $MAX_FAILURES restarts brought no new checkpoint"
        break
    fi
    say "training ended with status $status; restarting in $RESTART_SECONDS s"
    sleep "$RESTART_SECONDS" & wait $! || true
    if [ -n "$stopping" ]; then status=143; break; fi
done

kill "$copier" 2>/dev/null || true
wait "$copier" || true
copied=
for pause in 0 "$RESTART_SECONDS" "$RESTART_SECONDS"; do
    sleep "$pause"
    if copy_out; then copied=1; break; fi
done
if [ -z "$copied" ]; then
    say "error: could not copy the run to RUNS; it is in $WORK/runs" >&2
    case $status in 0 | $STOPPED) status=1 ;; esac
fi
exit "$status"
