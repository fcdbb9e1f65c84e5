#!/usr/bin/env bash
# First, for 20 minutes, every reader of untrusted files under damage. Then
# every legal combination of method, layout of ranks, ZeRO stage, optimizer, recomputation and precision, each
# compared with one process in FP32. Hours of work: results go to a file line by line, and a second call goes on
# where the first ended.
#   bash tests/full.sh [RESULTS.jsonl] [SHARE]    SHARE, as 1/4, takes every fourth case from the first on
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh test
export OMP_NUM_THREADS=1
faults=0
.venv/bin/python -m tests.fuzz --minutes 20 || faults=1
.venv/bin/python -m tests.contract.full "$@" || faults=1
exit "$faults"
