#!/usr/bin/env bash
# Slurm, one task per node, which starts a rank per GPU with torchrun:
#   sbatch launch/cluster/slurm_task_per_node.sh --train-iters 20000
# Two minutes ahead of the time limit the run saves, and the job returns to the queue to go on from there.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun passes the signals on that it handles.
srun --kill-on-bad-exit torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${MASTER_PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 launch/pretrain_gpt2.py \
    --config configs/gpt2_medium_inrank.yaml --save runs/medium --resume auto "$@" &
step=$!
trap 'warned=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1  # to the tasks: save and end
status=0
wait "$step" || status=$?
if [[ ${warned:-no} == yes ]]; then
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
