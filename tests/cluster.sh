#!/usr/bin/env bash
# Train over several hosts, which are network namespaces of this machine, with the real launchers: the recipes
# of launch/cluster, lost hosts, what crosses the network. Needs root on Debian or Ubuntu, whose packages it installs.
#   bash tests/cluster.sh [ARGUMENTS OF PYTEST]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends iproute2 iptables openssh-client openssh-server \
    pdsh munge slurmctld slurmd slurm-client openmpi-bin
bash launch/setup_env.sh test
.venv/bin/pip install -q -c launch/constraints.txt kubernetes-validate==1.37.0
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n 0 tests/cluster "$@"
