#!/usr/bin/env bash
# Install, then check and measure this project on this machine's GPUs, and leave one file to send back.
#   bash tests/gpu.sh                 everything at once, an hour or so
#   bash tests/gpu.sh --minutes 9     as many cases as fit; run it again until it says that all are done
#   bash tests/gpu.sh --rehearse 2    the same on two processes of the CPU
# docs/guides/first_gpu_run.md says how to read the table; --list, --only and the exit statuses are in --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for word in "$@"; do
    case $word in
        -h | --help)
            python=.venv/bin/python
            [ -x "$python" ] || python=python3
            exec "$python" -m tests.gpu --help
            ;;
    esac
done
bash launch/setup_env.sh test
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# What DeepSpeed and Triton compile stays here as well.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/gpu_results/compiled/torch}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/gpu_results/compiled/triton}
exec .venv/bin/python -m tests.gpu "$@"
