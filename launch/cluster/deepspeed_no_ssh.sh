#!/usr/bin/env bash
# DeepSpeed without ssh: run it on every host, with the host's line number in the hostfile, from 0.
#   bash launch/cluster/deepspeed_no_ssh.sh 0 --train-iters 20000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
hostfile=${HOSTFILE:-launch/cluster/hostfile}
first=$(awk '/slots=/ && !/^#/ {print $1; exit}' "$hostfile")
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$1" \
    --master_addr "$first" --master_port "${MASTER_PORT:-29500}" launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "${@:2}"
