"""Second moments of what the factorisable linears see, forward and backward, to weigh truncations with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.distributed.platform import tensor_cores
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.gradients import input_gradients_only
from inrank_megatron.engine.linears import Linear

_SMALLEST = 1e-6  # of the mean second moment of a layer's output gradients


@torch.no_grad()
def activation_moments(
    model: nn.Module,
    linears: Mapping[str, Linear],
    losses: Callable[[], Iterable[Tensor]],
    parallel: Parallel,
    *,
    at_a_time: int,
) -> dict[str, Tensor]:
    """Mean of ``a a^T`` over all tokens of the job, FP32, at the replica that owns the layer.

    ``a`` is the input [I] of a column layer, the output [O] before the bias of a row layer: the narrower side
    in an MLP. The result is the same on all tensor-parallel ranks. A GPU multiplies half-precision
    activations on its tensor cores; FP32 products would take longer than the forward pass.

    Args:
        losses: gives the losses of this rank's micro-batches, computed lazily on ``model``; they run without
            dropout and without gradients.
        at_a_time: linears that are measured together. Other replicas' moments are gone before the next ones.
    """
    moments: dict[str, Tensor] = {}
    indices = {name: index for index, name in enumerate(linears)}
    model.eval()
    for start in range(0, len(linears), at_a_time):
        names = list(linears)[start : start + at_a_time]
        moments |= _moments_of({name: linears[name] for name in names}, indices, model, losses(), parallel)
    model.train()
    return moments


def _moments_of(
    linears: Mapping[str, Linear],
    indices: Mapping[str, int],
    model: nn.Module,
    losses: Iterable[Tensor],
    parallel: Parallel,
) -> dict[str, Tensor]:
    sums = {name: _Moments(linear) for name, linear in linears.items()}
    half = next(model.parameters()).dtype.itemsize == 2
    with _hooked(linears, sums), tensor_cores() if half else nullcontext():
        for _ in losses:
            pass
    moments = {}
    for name, linear in linears.items():
        token_shards = parallel.tp_size if linear.sequence_parallel else 1
        moment = sums.pop(name)
        total = moment.total.div_(moment.tokens * token_shards * parallel.dp_size)
        owner = indices[name] % parallel.dp_size
        dist.reduce(total, group=parallel.dp_group, group_dst=owner)
        if owner == parallel.dp_rank:
            moments[name] = total
            if linear.sequence_parallel:
                dist.all_reduce(total, group=parallel.tp_group)
    return moments


class _Moments:
    """A forward hook: the sum of ``a a^T`` over the ``tokens`` that a linear has seen."""

    def __init__(self, linear: Linear):
        self._of_output = linear.row_parallel
        size = linear.output_size if self._of_output else linear.input_size
        self.total, self.tokens = torch.zeros(size, size, device=linear.device), 0
        # Read here: under ZeRO 3 it is gone again when the hook runs.
        bias = linear.added_bias if self._of_output else None
        self._bias = None if bias is None else read_value(bias)

    def __call__(self, module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        a = outputs[0] if self._of_output else inputs[0]
        a = a.reshape(-1, len(self.total)).float()
        if self._bias is not None:
            a = a - self._bias
        self.total.addmm_(a.t(), a)
        self.tokens += len(a)


@contextmanager
def _hooked(linears: Mapping[str, Linear], hooks: Mapping[str, Callable]) -> Iterator[None]:
    """Within it ``hooks`` are called after the forward pass of each of ``linears``, by its name."""
    handles = [linear.module.register_forward_hook(hooks[name]) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_gradient_scales(
    model: nn.Module,
    linears: Mapping[str, Linear],
    losses: Iterable[Tensor],
    parallel: Parallel,
    *,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Root mean square over all tokens of the job of the loss gradient at every output feature.

    The gradient is that of the sum of a micro-batch's token losses, of which ``losses`` are the means.
    [O/n] of a column layer, [O] of a row layer, FP32, the same wherever a feature is. A feature's mean square
    is at least 1e-6 of the layer's mean: one without any gradient weighs next to nothing, and the minimiser's
    row for it stays defined.

    Args:
        losses: of this rank's micro-batches, computed lazily on ``model``, dropout included.
        scale: of the loss on its way back, so that a gradient in float16 does not vanish.
    """
    sums = {name: _GradientSquares(linear, parallel.tp_size, scale) for name, linear in linears.items()}
    with _hooked(linears, sums), input_gradients_only(model):
        for loss in losses:
            (loss * scale).backward()
    return {name: _scale(sums[name], linear, parallel) for name, linear in linears.items()}


class _GradientSquares:
    """A forward hook: the sum of the squares of the gradients at a linear's output, over its ``tokens``."""

    def __init__(self, linear: Linear, tp_size: int, scale: float):
        size = linear.output_size if linear.row_parallel else linear.output_size // tp_size
        self.total, self.tokens, self._scale = torch.zeros(size, device=linear.device), 0, scale
        self._token_shards = tp_size if linear.row_parallel and linear.sequence_parallel else 1

    def __call__(self, module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        if outputs[0].requires_grad:  # not in the first pass of recomputation
            outputs[0].register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        g = gradient.reshape(-1, len(self.total)).float() / self._scale
        self.tokens += len(g)
        # The loss is a mean over the tokens of all tensor-parallel ranks.
        self.total.add_((g * (len(g) * self._token_shards)).square().sum(dim=0))


def _scale(sums: _GradientSquares, linear: Linear, parallel: Parallel) -> Tensor:
    total = sums.total.div_(sums.tokens * parallel.dp_size)
    dist.all_reduce(total, group=parallel.dp_group)
    if linear.row_parallel and linear.sequence_parallel:
        dist.all_reduce(total.div_(parallel.tp_size), group=parallel.tp_group)
    mean = total.mean()
    if not linear.row_parallel:
        dist.all_reduce(mean.div_(parallel.tp_size), group=parallel.tp_group)
    return total.clamp(min=max(_SMALLEST * mean.item(), torch.finfo(total.dtype).tiny)).sqrt()
