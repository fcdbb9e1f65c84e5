#!/usr/bin/env bash
# Install what the tests need, then run them. Arguments go to pytest: bash tests/run.sh tests/unit -k ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh test
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q "$@"
