"""Megatron's process groups for one call of a rank that serves many."""

import torch.distributed as dist

from inrank_megatron.distributed.platform import backend
from inrank_megatron.distributed.process_groups import Parallel, initialise
from tests.harness import at_end


def join(tensor_model_parallel_size: int) -> Parallel:
    """The groups for the whole world, until the next ones or the end of the call.

    A rank joins hundreds of times in a session. Megatron forgets most of its groups without ending them, and
    each of the 17 holds threads that poll: unended they slow the machine to a halt.
    """
    _leave()
    groups = dist.distributed_c10d._world.pg_map
    known = set(groups)
    parallel = initialise(backend=backend(), tensor_model_parallel_size=tensor_model_parallel_size)
    _joined[:] = [g for g in groups if g not in known]
    at_end.append(_leave)
    return parallel


def _leave() -> None:
    for group in [g for g in _joined if g in dist.distributed_c10d._world.pg_map]:
        dist.destroy_process_group(group)
    _joined.clear()


_joined: list[dist.ProcessGroup] = []
