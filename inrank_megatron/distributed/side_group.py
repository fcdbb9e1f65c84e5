"""Messages between threads of the ranks that work while the training goes on."""

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from inrank_megatron.distributed.entered import OF_SIDE_THREADS
from inrank_megatron.distributed.process_groups import Parallel

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # a disk may take any time; lost ranks are the watchdog's


class SideGroup:
    """All ranks of the job, for one thread of each: it has a Gloo group of its own, as collectives of two
    threads must not meet in one. Made, and its methods called, on all ranks in the same order.
    """

    def __init__(self, parallel: Parallel):
        self._is_first = parallel.rank == 0
        self._group = None
        if parallel.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=OF_SIDE_THREADS)

    def to_first(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on rank 0; nothing on the others."""
        if self._group is None:
            return [value]
        values: list | None = [None] * self._group.size() if self._is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
