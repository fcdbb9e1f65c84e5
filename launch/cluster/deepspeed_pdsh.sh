#!/usr/bin/env bash
# DeepSpeed over ssh with pdsh: run it once, on any host of the hostfile. Further flags replace those below.
#   bash launch/cluster/deepspeed_pdsh.sh --train-iters 20000
# Needs: pdsh here; ssh without a password to every host, this one too; the checkout at the same path everywhere.
# Of this shell's variables the ranks get PYTHON*, NCCL_* and the lines NAME=VALUE of the file .deepspeed_env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
exec deepspeed --hostfile "${HOSTFILE:-launch/cluster/hostfile}" launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "$@"
