#!/usr/bin/env bash
# torchrun that goes on after a loss: run the same command on every host. When a rank fails, all are started
# again from the newest checkpoint, at most 3 times; a host that comes back takes its place again.
#   MASTER_ADDR=node-1 NODES=2 bash launch/cluster/torchrun_elastic.sh --train-iters 20000
# NODES=1:2 also goes on with fewer hosts. The host of MASTER_ADDR must stay: the hosts meet there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
# A store for each start: agents that have counted their restarts differently would not meet in the one they share.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${JOB:-medium}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "$@"
