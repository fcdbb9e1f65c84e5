"""Second moments of what the factorisable linears see, forward and backward, to weigh truncations with."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

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
    model: nn.Module, linears: Mapping[str, Linear], losses: Iterable[Tensor], parallel: Parallel
) -> dict[str, Tensor]:
    """Mean of ``a a^T`` over all tokens of the job, FP32, at the replica that owns the layer.

    ``a`` is the input [I] of a column layer, the output [O] before the bias of a row layer: the narrower side
    in an MLP. The result is the same on all tensor-parallel ranks. A GPU multiplies half-precision
    activations on its tensor cores; FP32 products would take longer than the forward pass.

    Args:
        losses: losses of this rank's micro-batches, computed lazily on ``model``; they run without dropout
            and without gradients.
    """
    moments: dict[str, Tensor] = {}
    tokens = dict.fromkeys(linears, 0)

    def watch(name: str, linear: Linear):
        size = linear.output_size if linear.row_parallel else linear.input_size
        total = moments[name] = torch.zeros(size, size, device=linear.device)
        # Read here: under ZeRO 3 it is gone again when the hook below runs.
        bias = None
        if linear.row_parallel and linear.added_bias is not None:
            bias = read_value(linear.added_bias)

        def add(module, inputs, outputs):
            a = outputs[0] if linear.row_parallel else inputs[0]
            a = a.reshape(-1, size).float()
            if bias is not None:
                a = a - bias
            total.addmm_(a.t(), a)
            tokens[name] += len(a)

        return linear.module.register_forward_hook(add)

    hooks = [watch(name, linear) for name, linear in linears.items()]
    model.eval()
    half = next(model.parameters()).dtype.itemsize == 2
    with tensor_cores() if half else nullcontext():
        for _ in losses:
            pass
    model.train()
    for hook in hooks:
        hook.remove()

    for index, (name, linear) in enumerate(linears.items()):
        token_shards = parallel.tp_size if linear.sequence_parallel else 1
        total = moments[name].div_(tokens[name] * token_shards * parallel.dp_size)
        owner = index % parallel.dp_size
        dist.reduce(total, group=parallel.dp_group, group_dst=owner)
        if owner != parallel.dp_rank:
            del moments[name]
        elif linear.sequence_parallel:
            dist.all_reduce(total, group=parallel.tp_group)
    return moments


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
    totals: dict[str, Tensor] = {}
    tokens = dict.fromkeys(linears, 0)

    def watch(name: str, linear: Linear):
        size = linear.output_size if linear.row_parallel else linear.output_size // parallel.tp_size
        total = totals[name] = torch.zeros(size, device=linear.device)
        token_shards = parallel.tp_size if linear.row_parallel and linear.sequence_parallel else 1

        def add(gradient: Tensor) -> None:
            g = gradient.reshape(-1, size).float() / scale
            tokens[name] += len(g)
            # The loss is a mean over the tokens of all tensor-parallel ranks.
            total.add_((g * (len(g) * token_shards)).square().sum(dim=0))

        def on_output(module, inputs, outputs):
            if outputs[0].requires_grad:  # not in the first pass of recomputation
                outputs[0].register_hook(add)

        return linear.module.register_forward_hook(on_output)

    hooks = [watch(name, linear) for name, linear in linears.items()]
    with input_gradients_only(model):
        for loss in losses:
            (loss * scale).backward()
    for hook in hooks:
        hook.remove()
    return {name: _scale(totals[name], tokens[name], linear, parallel) for name, linear in linears.items()}


def _scale(total: Tensor, tokens: int, linear: Linear, parallel: Parallel) -> Tensor:
    total /= tokens * parallel.dp_size
    dist.all_reduce(total, group=parallel.dp_group)
    if linear.row_parallel and linear.sequence_parallel:
        dist.all_reduce(total.div_(parallel.tp_size), group=parallel.tp_group)
    mean = total.mean()
    if not linear.row_parallel:
        dist.all_reduce(mean.div_(parallel.tp_size), group=parallel.tp_group)
    return total.clamp(min=max(_SMALLEST * mean.item(), torch.finfo(total.dtype).tiny)).sqrt()
