"""Second moments of what the factorised linears see, for the activation-aware truncation."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.layers.factorised import FactorisedLinear
from inrank_megatron.parallel import Parallel


@torch.no_grad()
def activation_moments(
    model: nn.Module, layers: Mapping[str, FactorisedLinear], losses: Iterable[Tensor], parallel: Parallel
) -> dict[str, Tensor]:
    """Mean of ``a a^T`` over all tokens of the job, FP32, at the replica that owns the layer.

    ``a`` is the input [I] of a column layer, the output [O] before the bias of a row layer: the narrower side
    in an MLP. The result is the same on all tensor-parallel ranks.

    Args:
        losses: losses of this rank's micro-batches, computed lazily on ``model``; they run without dropout
            and without gradients.
    """
    moments: dict[str, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def watch(name: str, layer: FactorisedLinear):
        size = layer.output_size if layer.row_parallel else layer.input_size
        total = moments[name] = torch.zeros(size, size, device=layer.U.device)

        def add(module, inputs, outputs):
            a = outputs[0] if layer.row_parallel else inputs[0]
            a = a.reshape(-1, size).float()
            if layer.row_parallel and layer.bias is not None:
                a = a - layer.bias
            total.addmm_(a.t(), a)
            tokens[name] += len(a)

        return layer.register_forward_hook(add)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    model.eval()
    for _ in losses:
        pass
    model.train()
    for hook in hooks:
        hook.remove()

    for index, (name, layer) in enumerate(layers.items()):
        shares = parallel.tp_size if layer.sequence_parallel else 1
        total = moments[name].div_(tokens[name] * shares * parallel.dp_size)
        owner = index % parallel.dp_size
        dist.reduce(total, group=parallel.dp_group, group_dst=owner)
        if owner != parallel.dp_rank:
            del moments[name]
        elif layer.sequence_parallel:
            dist.all_reduce(total, group=parallel.tp_group)
    return moments
