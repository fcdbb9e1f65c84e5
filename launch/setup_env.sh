#!/usr/bin/env bash
# Make the virtual environment .venv in the root of the checkout and install the project into it, once.
# Usage: bash launch/setup_env.sh [test]      test: with what the tests need
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extra=${1:-base}
torch_version=$(sed -n 's/^torch==//p' launch/constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 among python3, python3.12, python3.11: install one and run this again" >&2
    return 1
}

make_environment() {
    # A moved checkout counts as new: the programs of an environment carry its path.
    if [ "$(cat .venv/made-for 2>/dev/null)" = "$root" ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    if ! "$python" -m venv --clear .venv; then
        echo "error: $python -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2
        return 1
    fi
    echo "$root" >.venv/made-for
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

reachable() { # URL: answers within 5 seconds
    .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

install_torch() {
    local install=(.venv/bin/python -m pip install -qq) found
    found=$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0], torch.version.cuda is not None)' \
        2>/dev/null) || found=none
    # A build with CUDA serves every machine; a CPU build, made perhaps on a login node, leaves GPUs idle.
    if [ "$found" = "$torch_version True" ] || [ "$gpu $found" = "no $torch_version False" ]; then
        return
    fi
    if [ "$gpu" = no ]; then
        # The CPU build saves gigabytes. First where pip is configured to look (quick, and the right place behind
        # a mirror), then at PyTorch's own index.
        if "${install[@]}" --no-deps "torch==$torch_version+cpu" 2>/dev/null; then return; fi
        if reachable "$cpu_index/torch/" &&
            "${install[@]}" --no-deps --index-url "$cpu_index" "torch==$torch_version+cpu"; then return; fi
    elif [ "$found" != none ]; then
        .venv/bin/python -m pip uninstall -qq -y torch
    fi
    "${install[@]}" "torch==$torch_version"
}

# One stamp per extra, written last: an interrupted installation leaves none and is taken up again.
gpu=no
if has_nvidia_gpu; then gpu=yes; fi
stamp=$({ echo "$root $gpu"; cat pyproject.toml launch/constraints.txt launch/setup_env.sh; } | sha256sum | cut -d' ' -f1)
installed() { # EXTRA
    [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$stamp" ]
}

# One installation at a time: a second one waits here and then finds the work done.
exec 9>.venv.lock
flock 9
if installed "$extra" || { [ "$extra" = base ] && installed test; }; then
    .venv/bin/python -c '' 2>/dev/null && exit 0
fi

echo "Installing into .venv (once; some minutes) ..."
make_environment
install_torch
target=.
[ "$extra" = base ] || target=".[$extra]"
.venv/bin/python -m pip install -qq --constraint launch/constraints.txt --editable "$target"
echo "$stamp" >".venv/installed-$extra.part"
mv ".venv/installed-$extra.part" ".venv/installed-$extra"
echo "Installed."
