#!/usr/bin/env bash
# DeepSpeed over ssh where there is no pdsh: starts deepspeed_no_ssh.sh on every host of the hostfile.
#   bash launch/cluster/deepspeed_openssh.sh --train-iters 20000
# Needs: ssh without a password to every host, this one too; the checkout at the same path everywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
hostfile=$(realpath "${HOSTFILE:-launch/cluster/hostfile}")
mapfile -t hosts < <(awk '/slots=/ && !/^#/ {print $1}' "$hostfile")
for number in "${!hosts[@]}"; do
    # -tt: when this script or its connection ends, sshd hangs up, and the host's ranks save and end.
    ssh -tt "${hosts[number]}" "HOSTFILE=$(printf %q "$hostfile") MASTER_PORT=${MASTER_PORT:-29500}" \
        "bash $(printf '%q ' "$PWD/launch/cluster/deepspeed_no_ssh.sh" "$number" "$@")" < /dev/null &
done
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # as when this script is interrupted
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
