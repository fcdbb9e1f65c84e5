"""How far this rank has come in the collectives of each process group."""

import torch.distributed as dist
from torch.distributed import distributed_c10d

OF_SIDE_THREADS = "side threads"
"""Description of groups that say nothing of the main thread."""
_COUNTER = "_get_sequence_number_for_group"  # the types of torch do not have it


def entered_collectives() -> dict[str, int]:
    """Collectives that were entered in each group of several ranks, by the name that all ranks give it.

    It asks the groups' own counters and may be called from any thread.
    """
    if not dist.is_initialized():
        return {}
    world = distributed_c10d._world
    names = dict(world.pg_names)  # without a group that another thread is just making
    groups = [g for g in names if g.size() > 1 and g.group_desc != OF_SIDE_THREADS]
    return {names[g]: getattr(g, _COUNTER)() for g in groups}
