#!/usr/bin/env bash
# torchrun with a fixed number of hosts: run it on every host, with the host's number, from 0.
#   MASTER_ADDR=node-1 NODES=2 bash launch/cluster/torchrun_static.sh 0 --train-iters 20000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
exec torchrun --nnodes "${NODES:-2}" --node-rank "$1" --nproc-per-node "${GPUS:-8}" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "${@:2}"
