"""What a cluster's hosts run: sshd, and Slurm with munge."""

import os
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.hosts import ADDRESS, Cluster, wait_until

SLOTS = 2
"""Ranks of a host, each with a GPU by what Slurm believes."""

_SSHD = """HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
SetEnv {environment}
"""
_SSH = """IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
# A requeued job waits for the end of its old credentials, else two minutes. Namespaces have no cgroups.
_SLURM = """ClusterName=test
SlurmctldHost=node-1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def ssh_files(folder: Path, environment: Mapping[str, str]) -> Path:
    """A folder for ``/etc/ssh`` of all hosts, which then let each other in.

    Args:
        environment: of what sshd starts, as a cluster's administrator would set it.
    """
    folder.mkdir()
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
    subprocess.run(key, check=True, capture_output=True)
    pairs = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (folder / "sshd_config").write_text(_SSHD.format(environment=pairs))
    (folder / "ssh_config").write_text(_SSH)
    return folder


def start_ssh(cluster: Cluster) -> None:
    """Start sshd on all hosts; each is up when this returns."""
    for host in cluster.hosts:
        host.run("mkdir", "-p", "/run/sshd")
        host.run("/usr/sbin/sshd")


def slurm_files(folder: Path, size: int) -> Path:
    """A folder for ``/etc/slurm`` of all hosts, with the key of munge."""
    folder.mkdir()
    sizes = f"CPUs={4 * SLOTS} Gres=gpu:{SLOTS}"
    nodes = "\n".join(f"NodeName=node-{n} NodeAddr={ADDRESS.format(n)} {sizes}" for n in range(1, size + 1))
    (folder / "slurm.conf").write_text(_SLURM.format(nodes=nodes))
    (folder / "gres.conf").write_text(f"Name=gpu File=/etc/slurm/gpu[0-{SLOTS - 1}]\n")
    for number in range(SLOTS):
        (folder / f"gpu{number}").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    return folder


def start_slurm(cluster: Cluster) -> None:
    """Start Slurm on all hosts, its controller on the first; the nodes are idle when this returns."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    for host in cluster.hosts:
        host.run("mkdir", "-p", "-m", "755", "/run/munge", "/run/slurm/state", "/run/slurm/spool")
        files = [f"--{name}=/run/munge/munged.{name.split('-')[0]}" for name in ("pid-file", "seed-file")]
        files += ["--key-file=/etc/slurm/munge.key", "--log-file=/run/munge/munged.log"]
        host.run("/usr/sbin/munged", "--force", *files)
    first = cluster.hosts[0]
    first.run("/usr/sbin/slurmctld", "-c", "-L", "/run/slurm/slurmctld.log", env=env)
    for host in cluster.hosts:
        host.run("/usr/sbin/slurmd", "-L", "/run/slurm/slurmd.log", env=env)

    def idle() -> bool:
        return first.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(len(cluster.hosts))]

    wait_until(idle, lambda: first.run("sh", "-c", "sinfo; tail /run/slurm/*.log"), seconds=60)
