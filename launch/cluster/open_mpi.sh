#!/usr/bin/env bash
# Open MPI: run it once, on any host. mpirun starts the ranks, host by host; torch connects them.
#   bash launch/cluster/open_mpi.sh --train-iters 20000
# Needs: Open MPI, and ssh without a password to every host; the checkout at the same path everywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
hostfile=${HOSTFILE:-launch/cluster/hostfile}
first=$(awk '/slots=/ && !/^#/ {print $1; exit}' "$hostfile")
# --map-by slot fills one host after the other, so that tensor parallelism stays inside a host.
exec mpirun --hostfile "$hostfile" --map-by slot --bind-to none \
    -x MASTER_ADDR="$first" -x MASTER_PORT="${MASTER_PORT:-29500}" -x PATH \
    python launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "$@"
