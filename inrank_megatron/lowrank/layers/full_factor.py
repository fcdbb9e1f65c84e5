"""The factor that a rank applies to its own tokens: stored in shards, gathered for use."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.layers.collectives import Pending, begin_all_gather, begin_reduce_scatter


class FullFactor:
    """Gathers a factor [m/n, k] to [m, k], and returns its gradient to the shards.

    Outside of a step every forward pass gathers and every backward pass reduces. Between :meth:`begin` and
    :meth:`end` the factor is gathered once and its gradient, summed in FP32 over the micro-batches, is
    reduced once, with the last of them: 2 (n-1)/n m k elements per step, however many gradients accumulate.
    """

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._step = self._last = False
        self._full: Tensor | None = None
        self._gradient: Tensor | None = None

    def begin(self, *, first: bool, last: bool) -> None:
        """Announce a micro-batch of an optimizer step: the first, the last, both or neither."""
        self._step, self._last = True, last
        if first:
            self._full = self._gradient = None

    def end(self) -> None:
        """The step is over: the factor is about to change."""
        self._step = False
        self._full = self._gradient = None

    def gather(self, shard: Tensor) -> Tensor:
        """``shard`` [m/n, k] -> [m, k]."""
        if self._group.size() == 1:
            return shard
        full = begin_all_gather(shard, self._group).wait() if self._full is None else self._full
        if self._step:
            self._full = full
        return full

    def begin_reduce(self, gradient: Tensor, *, shared: bool = False) -> Pending:
        """Gradient of the full factor [m, k], this rank's part of the sum -> that of the shard [m/n, k].

        ``shared``: ``gradient`` is that of the shard already, complete on this rank. The result is zero while
        the step accumulates it: ZeRO 2 and 3 ask every parameter for a gradient in every micro-batch.
        """
        if self._step and self._group.size() > 1:
            dtype = gradient.dtype
            if self._gradient is not None:
                gradient = self._gradient.add_(gradient)
            if not self._last:
                self._gradient = gradient.to(torch.promote_types(dtype, torch.float32))
                rows = len(gradient) // (1 if shared else self._group.size())
                return Pending(gradient.new_zeros(rows, gradient.shape[1], dtype=dtype), None)
            self._gradient, gradient = None, gradient.to(dtype)
        return Pending(gradient, None) if shared else begin_reduce_scatter(gradient, self._group)
