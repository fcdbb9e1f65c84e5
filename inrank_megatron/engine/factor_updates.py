"""What changes of factors are made of, on live parameters, FP32 master weights and W0: start, place, merge,
spectra.

``layers`` are the factorised linears by name; letters as in ``lowrank/layers/factorised.py``.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.factor_init import drawn_columns
from inrank_megatron.engine.fragments import local_shape, read_value, write_value
from inrank_megatron.engine.gradients import input_gradients_only
from inrank_megatron.engine.linears import local_product
from inrank_megatron.engine.truncation import Shards, truncated
from inrank_megatron.engine.zero_state import read_master_weight, write_master_weight
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.linalg.factors import shard_matrix
from inrank_megatron.model.initialise import named_generator

Layers = Mapping[str, FactorisedLinear]


def weight_gradients(
    model: nn.Module, layers: Layers, losses: Iterable[Tensor], parallel: Parallel, *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to each layer's W0, this rank's shard, averaged over the job.

    ``losses`` yields the scalar losses of this rank's micro-batches, computed lazily on ``model`` one after
    the other. ``scale``: of the loss on its way back, so that a gradient in float16 does not vanish.
    """
    weights = {name: layer.weight for name, layer in layers.items()}
    totals = {name: torch.zeros(local_shape(w), device=w.device) for name, w in weights.items()}
    count = 0
    with input_gradients_only(model):
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            (loss * scale).backward()
            for total, weight in zip(totals.values(), weights.values(), strict=True):
                total += weight.grad.float() / scale
                weight.grad = None
            count += 1
        for weight in weights.values():
            weight.requires_grad_(False)
    for total in totals.values():
        total /= count * parallel.dp_size
        dist.all_reduce(total, group=parallel.dp_group)
    return totals


def gradient_start(
    layers: Layers, gradients: Mapping[str, Tensor], parallel: Parallel, *, column_norm: float, seed: int
) -> Shards:
    """``U0``, ``V0``: leading singular pairs of each gradient, columns of norm ``column_norm``.

    For a gradient ``sum s u v^T`` they are ``-u`` and ``v^T``: a step along ``-u v^T`` descends (InRank
    algorithm 2, line 3, for the untransposed gradient). Where a gradient has fewer, random ones follow.
    """
    columns = {name: layer.active_columns for name, layer in layers.items()}
    pairs = truncated(
        layers,
        gradients.__getitem__,
        columns,
        parallel,
        what="the loss gradient",
        step=0,
        device=_device(layers),
    )
    for name, (left, right) in pairs.items():
        layer = layers[name]
        random = drawn_columns(
            layer, layer.active_columns, "random", norm=1.0, generator=named_generator(seed, name)
        )
        left, right = (
            _unit_columns(part, other, parallel.tp_group)
            for part, other in ((left, random[0]), (right.t(), random[1].t()))
        )
        pairs[name] = -column_norm * left, column_norm * right.t()
    return pairs


def spectral_start(layers: Layers, initial_weight: Callable[[str], Tensor], parallel: Parallel) -> Shards:
    """Truncated SVD of each initial weight; ``initial_weight(name)`` is the full matrix [O, I]."""

    def shard(name: str) -> Tensor:
        layer, full = layers[name], initial_weight(name).to(_device(layers))
        if layer.row_parallel:
            return shard_matrix(full, 1, parallel.tp_group)
        return shard_matrix(full, 0, parallel.tp_group, layer.U.partition_stride)

    columns = {name: layer.active_columns for name, layer in layers.items()}
    what = "the initial weight"
    return truncated(layers, shard, columns, parallel, what=what, step=0, device=_device(layers))


def _unit_columns(shard: Tensor, replacement: Tensor, group: ProcessGroup) -> Tensor:
    """Columns sharded over ``group``, each scaled to norm 1; those that are zero become ``replacement``'s."""
    squares = shard.square().sum(dim=0)
    dist.all_reduce(squares, group=group)
    return torch.where(squares > 0, shard / squares.sqrt(), replacement)


@torch.no_grad()
def place_columns(
    layer: FactorisedLinear, left: Tensor, right: Tensor, *, start: int, absorb: bool
) -> tuple[Tensor, Tensor]:
    """Write shards ``left`` [O/n, c], ``right`` [c, I/n] into columns ``start`` ..., master weights included.

    With ``absorb`` their product, as rounded to the parameters' dtype, is subtracted from W0. Returns the
    rounded shards.
    """
    left, right = left.to(layer.U), right.to(layer.V)
    stop = start + left.shape[1]
    for parameter, index, value in (
        (layer.U, (slice(None), slice(start, stop)), left),
        (layer.V, (slice(start, stop), slice(None)), right),
    ):
        full = read_master_weight(parameter).clone()
        full[index] = value.to(full)
        write_master_weight(parameter, full)
    if absorb:
        product = local_product(layer, left.float(), right.float())
        write_value(layer.weight, read_value(layer.weight).float() - product)
    return left, right


@torch.no_grad()
def merge(layer: FactorisedLinear) -> None:
    """Add ``U V``, of the master weights' columns in use, to W0. Collective over both groups."""
    u, v = (
        read_master_weight(layer.U)[:, : layer.active_columns],
        read_master_weight(layer.V)[: layer.active_columns],
    )
    write_value(layer.weight, read_value(layer.weight).float() + local_product(layer, u, v))


def _device(layers: Layers) -> torch.device:
    return next(iter(layers.values())).U.device
