"""The command that launches a run on a chosen topology."""

import shlex
from collections.abc import Sequence
from typing import Any

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.flags import kebab
from inrank_megatron.config.schema import Config
from inrank_megatron.planning.space import settings_of

PROGRAM = "launch/pretrain_gpt2.py"


def launch_command(flags: Sequence[str], config: Config, cluster: Cluster) -> str:
    """``deepspeed ...`` with the run's own flags and those of the topology that they do not give.

    Several hosts without GPUs each start theirs by ``torchrun``, with ``NODE_RANK`` and ``MASTER_ADDR``
    filled in.
    """
    if cluster.device == "cpu":
        launcher = ["torchrun", "--nproc-per-node", str(cluster.devices)]
        if cluster.nodes > 1:
            hosts = ["--nnodes", str(cluster.nodes), "--node-rank", "NODE_RANK"]
            launcher += [*hosts, "--master-addr", "MASTER_ADDR"]
    elif cluster.nodes > 1:
        launcher = ["deepspeed", "--hostfile", "launch/cluster/hostfile"]
    else:
        launcher = ["deepspeed", "--num_gpus", str(cluster.devices)]
    given = {kebab(word).partition("=")[0] for word in flags}
    # The launch is to train, whatever flags were taken over from.
    flags = [word for word in flags if kebab(word) != "--dry-run"]
    words = [*launcher, PROGRAM, *flags]
    for name, value in _settings(config).items():
        flag = f"--{name.replace('_', '-')}"
        if not given & {flag, f"--no-{flag[2:]}"}:
            words += _flag(flag, value)
    return shlex.join(words)


def _settings(config: Config) -> dict[str, Any]:
    settings = settings_of(config) | {"global_batch_size": config.training.global_batch_size}
    if config.parallel.tensor_model_parallel_size == 1:
        del settings["sequence_parallel"]  # which changes nothing then
    return settings


def _flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [] if value is None else [flag, str(value)]
