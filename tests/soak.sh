#!/usr/bin/env bash
# Break a job on two and on four hosts again and again (killed and stopped ranks, lost hosts, cut networks, full
# disks, signals), and compare each run with the undisturbed one. An hour of work on two cores; needs root.
#   bash tests/soak.sh [FAULTS] [SEED] [ROWS]    60 on each with seed 0 unless asked otherwise; a row for each goes to soak.jsonl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh test
export OMP_NUM_THREADS=1
exec .venv/bin/python -m tests.cluster.soak "$@"
