"""Collectives over the first axis, synchronous or begun early and awaited late.

Letters: n ranks of the group; ``x`` [m/n, ...] is this rank's shard of [m, ...].
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Pending:
    """A collective under way; :meth:`wait` gives its result."""

    def __init__(self, result: Tensor | None, work: dist.Work | None):
        self._result, self._work = result, work

    def wait(self) -> Tensor | None:
        if self._work is not None:
            self._work.wait()
        return self._result


def begin_all_gather(x: Tensor, group: ProcessGroup) -> Pending:
    """[m/n, ...] -> [m, ...] on every rank; (n-1)/n of the result's elements on the wire."""
    if group.size() == 1:
        return Pending(x, None)
    x = x.contiguous()
    result = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return Pending(result, dist.all_gather_into_tensor(result, x, group=group, async_op=True))


def begin_reduce_scatter(x: Tensor, group: ProcessGroup) -> Pending:
    """Sum of [m, ...] over the group -> this rank's [m/n, ...]; (n-1)/n of the operand's elements on the
    wire.
    """
    if group.size() == 1:
        return Pending(x, None)
    x = x.contiguous()
    result = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return Pending(result, dist.reduce_scatter_tensor(result, x, group=group, async_op=True))


def begin_all_reduce(x: Tensor, group: ProcessGroup) -> Pending:
    """Sum over the group, in place, on every rank; twice (n-1)/n of the operand's elements on the wire."""
    if group.size() == 1:
        return Pending(x, None)
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=group, async_op=True))


def local_shard(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's [m/n, ...] of [m, ...] that every rank has."""
    return x if group.size() == 1 else x.chunk(group.size(), dim=0)[group.rank()]
