#!/usr/bin/env bash
# Install what the tests need, then run them, two files at a time; tests/cluster.sh runs those of several hosts.
# Arguments go to pytest:
#   bash tests/run.sh -n 0 tests/unit -k ranks    -n: processes that run test files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh test
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/cluster "$@"
