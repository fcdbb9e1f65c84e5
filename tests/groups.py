"""Megatron's process groups for one call of a rank that serves many."""

import torch.distributed as dist

from inrank_megatron.parallel import Parallel, initialise


def join(tensor_model_parallel_size: int) -> Parallel:
    """The groups for the whole world; those of the call before are ended.

    A rank joins hundreds of times in a session. Megatron forgets most of its groups without ending them, and
    each of the 17 holds threads: unended they slow the machine to a halt.
    """
    groups = dist.distributed_c10d._world.pg_map
    for group in [g for g in _joined if g in groups]:
        dist.destroy_process_group(group)
    known = set(groups)
    parallel = initialise(backend="gloo", tensor_model_parallel_size=tensor_model_parallel_size)
    _joined[:] = [g for g in groups if g not in known]
    return parallel


_joined: list[dist.ProcessGroup] = []
