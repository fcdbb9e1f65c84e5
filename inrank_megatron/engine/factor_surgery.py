"""Carries out changes of factors on live parameters, FP32 masters and W0: initialise, grow, truncate.

``layers`` are the factorised linears by name; letters as in ``layers/factorised.py``.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.engine.columns import drawn_columns
from inrank_megatron.engine.work_sharing import (
    own_layers,
    shared_over_replicas,
    shared_spectra,
)
from inrank_megatron.engine.zero_state import read_master, write_master
from inrank_megatron.layers.factorised import FactorisedLinear
from inrank_megatron.linalg import factors as linalg
from inrank_megatron.linalg.spectra import Product, Update, singular_values
from inrank_megatron.linalg.truncation import ShardedMatrix, truncate
from inrank_megatron.model.initialise import named_generator
from inrank_megatron.parallel import Parallel

Layers = Mapping[str, FactorisedLinear]
Shards = dict[str, tuple[Tensor, Tensor]]
"""By layer, this rank's ``(left [O/n, c], right [c, I/n])``, FP32, the same on all data-parallel replicas."""


def weight_gradients(
    model: nn.Module, layers: Layers, losses: Iterable[Tensor], parallel: Parallel
) -> dict[str, Tensor]:
    """Gradient of the mean loss with respect to each layer's W0, this rank's shard, averaged over the job.

    ``losses`` yields the scalar losses of this rank's micro-batches, computed lazily on ``model`` one after
    the other.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = {name: layer.weight for name, layer in layers.items()}
    for parameter in trained:
        parameter.requires_grad_(False)
    totals = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    # Recomputation runs a backward pass of its own, only below a hidden state that asks for a gradient.
    hook = model.embedding.register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
    count = 0
    for loss in losses:
        loss.backward()
        for total, weight in zip(totals.values(), weights.values(), strict=True):
            total += weight.grad
            weight.grad = None
        count += 1
    hook.remove()
    for weight in weights.values():
        weight.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
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
    columns = {name: layer.active for name, layer in layers.items()}
    pairs = _truncated(layers, gradients.__getitem__, columns, parallel, what="the loss gradient", step=0)
    for name, (left, right) in pairs.items():
        layer = layers[name]
        random = drawn_columns(layer, layer.active, "random", norm=1.0, generator=named_generator(seed, name))
        left, right = (
            _unit_columns(part, other, parallel.tp_group)
            for part, other in ((left, random[0]), (right.t(), random[1].t()))
        )
        pairs[name] = -column_norm * left, column_norm * right.t()
    return pairs


def spectral_start(layers: Layers, initial_weight: Callable[[str], Tensor], parallel: Parallel) -> Shards:
    """Truncated SVD of each initial weight; ``initial_weight(name)`` is the whole matrix [O, I]."""

    def shard(name: str) -> Tensor:
        dim = 1 if layers[name].row_parallel else 0
        whole = initial_weight(name).to(_device(layers))
        return whole.chunk(parallel.tp_size, dim)[parallel.tp_rank]

    columns = {name: layer.active for name, layer in layers.items()}
    return _truncated(layers, shard, columns, parallel, what="the initial weight", step=0)


def _unit_columns(shard: Tensor, replacement: Tensor, group: ProcessGroup) -> Tensor:
    """Columns cut over ``group``, each scaled to norm 1; those that are zero become ``replacement``'s."""
    squares = shard.square().sum(dim=0)
    dist.all_reduce(squares, group=group)
    return torch.where(squares > 0, shard / squares.sqrt(), replacement)


@torch.no_grad()
def place_columns(layer: FactorisedLinear, left: Tensor, right: Tensor, *, start: int, absorb: bool) -> None:
    """Write shards ``left`` [O/n, c], ``right`` [c, I/n] into columns ``start`` ..., masters included.

    With ``absorb`` their product, as rounded to the parameters' dtype, is subtracted from W0.
    """
    left, right = left.to(layer.U), right.to(layer.V)
    stop = start + left.shape[1]
    for parameter, index, value in (
        (layer.U, (slice(None), slice(start, stop)), left),
        (layer.V, (slice(start, stop), slice(None)), right),
    ):
        whole = read_master(parameter).clone()
        whole[index] = value.to(whole)
        write_master(parameter, whole)
    if absorb:
        product = _own_product(layer, left.float(), right.float())
        layer.weight.copy_(layer.weight.float() - product)


@torch.no_grad()
def merge(layer: FactorisedLinear) -> None:
    """Add ``U V``, of the masters' columns in use, to W0. Collective over both groups."""
    u, v = read_master(layer.U)[:, : layer.active], read_master(layer.V)[: layer.active]
    layer.weight.copy_(layer.weight.float() + _own_product(layer, u, v))


def _own_product(layer: FactorisedLinear, left: Tensor, right: Tensor) -> Tensor:
    """This rank's share of a product, cut as W0 is, from shards ``left`` [O/n, k] and ``right`` [k, I/n]."""
    if layer.row_parallel:
        return linalg.gather_matrix(left, 0, layer.tp_group) @ right
    return left @ linalg.gather_matrix(right, 1, layer.tp_group)


def spectra(
    layers: Layers, initial: Mapping[str, tuple[Tensor, Tensor]], parallel: Parallel, *, kind: str, step: int
) -> dict[str, Tensor]:
    """Singular values of ``U V`` (``product``) or ``U V - U0 V0`` (``update``) of every layer, from FP32
    masters.
    """
    masters = _own_masters(layers, parallel)
    products: list[Product | Update] = []
    for name, (u, v) in masters.items():
        k = layers[name].active
        if kind == "update":
            u0, v0 = initial[name]
            products.append(Update(name, u[:, :k], v[:k], u0[:, :k], v0[:k]))
        else:
            products.append(Product(name, u[:, :k], v[:k]))
    results = parallel.in_unison(lambda: singular_values(products, parallel.tp_group, step=step))
    values = dict(zip(masters, results, strict=True))
    length = max(min(2 * x.active, x.output_size, x.input_size) for x in layers.values())
    return shared_spectra(list(layers), values.__getitem__, parallel, length=length, device=_device(layers))


def truncated_weights(
    layers: Layers,
    columns: Mapping[str, int],
    moments: Mapping[str, Tensor],
    parallel: Parallel,
    *,
    step: int,
) -> Shards:
    """``U*``, ``V*``: every layer's ``W0 + U V`` (or ``U V``) truncated to so many columns.

    ``moments``: second moments of activations, at least of the layers that this replica owns, see
    ``engine/activations.py``; empty: plain truncation.
    """
    masters = _own_masters(layers, parallel)

    def shard(name: str) -> Tensor:
        layer, (u, v) = layers[name], masters[name]
        product = _own_product(layer, u[:, : layer.active].double(), v[: layer.active].double())
        return product if layer.weight is None else product.add_(layer.weight)

    return _truncated(layers, shard, columns, parallel, what="the weight", step=step, moments=moments)


def _truncated(
    layers: Layers,
    shard: Callable[[str], Tensor],
    columns: Mapping[str, int],
    parallel: Parallel,
    *,
    what: str,
    step: int,
    moments: Mapping[str, Tensor] | None = None,
) -> Shards:
    """Every layer's matrix truncated to so many columns, computed by the replica that owns the layer.

    ``shard(name)``: this rank's share of it, cut as W0 is; called on all ranks of that replica.
    """
    own = own_layers(list(layers), parallel)
    matrices = (
        ShardedMatrix(
            f"{what} of {name}",
            partial(shard, name),
            dim=1 if layers[name].row_parallel else 0,
            moment=(moments or {}).get(name),
        )
        for name in own
    )

    def compute() -> Shards:
        results = truncate(matrices, [columns[name] for name in own], parallel.tp_group, step=step)
        return {name: (t.left.float(), t.right.float()) for name, t in zip(own, results, strict=True)}

    shapes = {name: (len(x.U), columns[name], x.V.shape[1]) for name, x in layers.items()}
    return shared_over_replicas(shapes, parallel.in_unison(compute), parallel, device=_device(layers))


def _own_masters(layers: Layers, parallel: Parallel) -> dict[str, tuple[Tensor, Tensor]]:
    """FP32 masters of U and V, this rank's shards, of the layers that its replica computes."""
    own = set(own_layers(list(layers), parallel))
    masters = {}
    for name, layer in layers.items():  # collective over the data-parallel group: every rank goes through all
        pair = read_master(layer.U), read_master(layer.V)
        if name in own:
            masters[name] = pair
    return masters


def _device(layers: Layers) -> torch.device:
    return next(iter(layers.values())).U.device
