"""The words that start the program again as it was started: launcher, hosts, processes, script or module."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from inrank_megatron.config.defaults import shown_path

LAUNCH_MODULE = "inrank_megatron_launch.pretrain_gpt2"
HOSTFILE = "HOSTFILE"
HOSTFILE_REMARK = f"{HOSTFILE}: the host file of this run"
RENDEZVOUS_PORT = 29500  # torchrun's own choice


def launcher(summary: Mapping) -> tuple[str, str]:
    """The words of a run with this ``summary``, and what to say of them, if anything."""
    size = int(summary.get("world", {}).get("size", 1))
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec is not None and spec.name == LAUNCH_MODULE
    python = ["python", "-m"] if module else ["python"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    several = local < size
    own = "LOCAL_SIZE" not in os.environ  # which DeepSpeed's launcher sets
    words, remark = python, ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["torchrun", *_meeting(), "--nproc-per-node", str(local), *python[1:]]
        remark = "on every host" if _meeting() else ""
    elif own and size == 1:
        pass
    elif own and "OMPI_COMM_WORLD_RANK" in os.environ:
        words = ["mpirun", "-n", str(size), *(_open_mpi_hosts() if several else []), *python]
        remark = HOSTFILE_REMARK if several else ""
    elif own and "SLURM_PROCID" in os.environ:
        nodes = os.environ.get("SLURM_NNODES", "1")
        words = ["srun", *(["--nodes", nodes, "--ntasks", str(size)] if several else []), *python]
    else:
        hosts = ["--hostfile", HOSTFILE] if several else ["--num_gpus", str(size)]
        # On a CPU machine DeepSpeed's launcher cannot count devices.
        words = ["deepspeed", *hosts, *(["--module"] if module else [])]
        remark = f"{HOSTFILE_REMARK}; without ssh on every host, with --no_ssh --node_rank" if several else ""
    return shlex.join([*words, LAUNCH_MODULE if module else _program()]), remark


def _meeting() -> list[str]:
    """Where the agents of several hosts meet; the same words on each."""
    hosts, address = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("MASTER_ADDR")
    if hosts == "1":
        return []
    return ["--nnodes", hosts, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{RENDEZVOUS_PORT}"]


def _open_mpi_hosts() -> list[str]:
    """Host by host, so that tensor parallelism stays inside one; the ranks meet at the first."""
    exported = [f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    options = [word for value in [*exported, "PATH"] for word in ("-x", value)]
    return ["--hostfile", HOSTFILE, "--map-by", "slot", "--bind-to", "none", *options]


def _program() -> str:
    """The script as it was named on the command line; that of the checkout where it is another's."""
    if Path(sys.argv[0]).name == "pretrain_gpt2.py":
        return shown_path(Path(sys.argv[0]))
    return shown_path(Path(__file__).parents[2] / "launch" / "pretrain_gpt2.py")
