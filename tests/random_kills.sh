#!/usr/bin/env bash
# Kill runs at any time and at each moment of a save, of growth and of the switch, and compare each run with the
# undisturbed one. An hour or more of work on two cores.
#   bash tests/random_kills.sh [KILLS] [SEED]    100 kills with seed 0 unless asked otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh test
export OMP_NUM_THREADS=1
exec .venv/bin/python -m tests.distributed.test_run_kills "$@"
