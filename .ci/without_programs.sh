#!/usr/bin/env bash
# Run a command as if none of the optional programs were installed: .ci/without_programs.sh COMMAND [ARGUMENTS]
set -euo pipefail
hidden=(pdsh sshd ssh ssh-keygen rsync mpirun mpiexec orterun ompi_info ip chromium chromium-browser google-chrome
        chromedriver ffmpeg ffprobe g++ c++ clang++ gcc cc clang)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
IFS=: read -ra places <<< "$PATH"
for ((i = ${#places[@]} - 1; i >= 0; i--)); do  # backwards, so that the first folder of PATH wins
    [ -d "${places[i]}" ] && find -L "${places[i]}" -maxdepth 1 -type f -executable -exec ln -sf -t "$folder" {} + 2>/dev/null || true
done
for program in "${hidden[@]}"; do
    rm -f "$folder/$program" "$folder/$program"-[0-9]* "$folder"/*-linux-gnu-"$program"*
done
unset VASTSCALE_TEST_CLUSTER VASTSCALE_TEST_BROWSER CXX CC
PATH=$folder "$@"
