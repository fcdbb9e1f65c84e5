#!/usr/bin/env bash
# Make the virtual environment .venv in the root of the checkout and install the project into it, once.
# Usage: bash launch/setup_env.sh [test] [--torch-index URL]
#   test: with what the tests need
#   --torch-index URL: take torch from this package index, e.g. https://download.pytorch.org/whl/cu126, also where
#       this machine has no GPU and others of the cluster have
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() {
    echo "error: $*" >&2
    exit 1
}

extra=base index=
while [ $# -gt 0 ]; do
    case $1 in
        --torch-index)
            [ $# -ge 2 ] || fail "--torch-index: needs the address of a package index"
            index=$2
            shift
            ;;
        --torch-index=*) index=${1#*=} ;;
        -*) fail "$1: the arguments are [test] [--torch-index URL]" ;;
        *) extra=$1 ;;
    esac
    shift
done
[ "$(uname -s)" = Linux ] || fail "$(uname -s): this project needs Linux (a container or WSL will do)"

find_python() {
    local candidate
    for candidate in "$@" python3 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 among python3, python3.12, python3.11: install one and run this again"
}

make_environment() {
    # A moved checkout counts as new: the programs of an environment carry its path.
    if [ "$(cat .venv/made-for 2>/dev/null)" = "$root" ] && .venv/bin/python -c 'import pip' 2>/dev/null; then
        return
    fi
    local python
    python=$(find_python)
    "$python" -m venv --clear .venv ||
        fail "$python -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv)"
    echo "$root" >.venv/made-for
}

# Which GPUs there are and which builds of torch serve them; GPUs that none can use end the script here.
python=$(find_python .venv/bin/python)
machine=$("$python" -m launch.machine)

# One stamp per extra, written last: an interrupted installation leaves none and is taken up again.
stamp=$({ echo "$root"; cat pyproject.toml launch/constraints.txt launch/setup_env.sh; } | sha256sum | cut -d' ' -f1)
installed() { # EXTRA
    [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$stamp" ]
}
complete() {
    installed "$extra" || { [ "$extra" = base ] && installed test; }
}

# One installation at a time: a second one waits here and then finds the work done.
exec 9>.venv.lock
flock 9
# torch-for has a line for each machine that the installed torch was seen to work on.
if [ -z "$index" ] && complete && grep -qxF "$machine" .venv/torch-for 2>/dev/null; then
    .venv/bin/python -c '' 2>/dev/null && exit 0
fi

if complete; then
    echo "Checking that torch works on this machine ..."
else
    echo "Installing into .venv (once; some minutes) ..."
fi
make_environment
.venv/bin/python -m launch.torch_build install ${index:+--torch-index "$index"}
if ! complete; then
    target=.
    [ "$extra" = base ] || target=".[$extra]"
    if ! said=$(.venv/bin/python -m pip install -qq --constraint launch/constraints.txt --editable "$target" 2>&1); then
        fail "pip cannot install the project's packages: $(grep 'ERROR: ' <<<"$said" | tail -n 1 | sed 's/.*ERROR: //');" \
            "connect this machine to a package index (\`pip config list\` shows the one in use) and run this again"
    fi
    echo "$stamp" >".venv/installed-$extra.part"
    mv ".venv/installed-$extra.part" ".venv/installed-$extra"
fi
echo "Installed."
