#!/usr/bin/env bash
# Slurm, one task per GPU:
#   sbatch launch/cluster/slurm_task_per_gpu.sh --train-iters 20000
# Two minutes ahead of the time limit the run saves, and the job returns to the queue to go on from there.
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

# The program finds its rank and the host of rank 0 in Slurm's variables.
srun --kill-on-bad-exit python launch/pretrain_gpt2.py \
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
