#!/usr/bin/env bash
# From nothing to a trained model: install, prepare the embedded corpus, train on what the machine has.
# Arguments go to the program, e.g. bash launch/quickstart.sh --train-iters 600
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

# Every GPU at hand, or two processes on the CPU, which DeepSpeed would count as one device. GPUs that torch cannot
# use end the script here.
device=$(python -m launch.torch_build device)
processes=()
if [ "$device" = cpu ]; then
    processes=(--num_gpus 2)
    export DS_ACCELERATOR=cpu
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

python tools/prepare_data.py
exec deepspeed --log_level error --master_port "$port" "${processes[@]}" \
    launch/pretrain_gpt2.py --inrank --save runs/quickstart --resume auto "$@"
