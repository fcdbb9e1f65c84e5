"""Carries out changes of factors on live parameters, FP32 masters and W0: initialise, grow, truncate.

``layers`` are the factorised linears by name; letters as in ``layers/factorised.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.engine.work_sharing import (
    own_layers,
    shared_factor_pairs,
    shared_over_replicas,
    shared_spectra,
)
from inrank_megatron.engine.zero_state import read_master, write_master
from inrank_megatron.layers.factorised import FactorisedLinear
from inrank_megatron.linalg import factors as linalg
from inrank_megatron.linalg.spectra import Product, Update, singular_values
from inrank_megatron.linalg.truncation import ShardedMatrix, truncate
from inrank_megatron.parallel import Parallel

Layers = Mapping[str, FactorisedLinear]


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
    layers: Layers, gradients: Mapping[str, Tensor], parallel: Parallel, *, column_norm: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(name, U0 [O, k], V0 [k, I])``: leading singular pairs of each gradient, columns of norm
    ``column_norm``.
    """

    def compute(name):
        layer = layers[name]
        whole = linalg.gather_matrix(gradients[name], layer.weight.partition_dim, parallel.tp_group)
        linalg.check_finite(whole, what=f"the loss gradient of {name} on the first global batch")
        if parallel.tp_rank == 0:
            left, right = linalg.leading_directions(whole, layer.active)
            return column_norm * left, column_norm * right
        return None

    return shared_factor_pairs(
        _shapes(layers, {n: x.active for n, x in layers.items()}), compute, parallel, device=_device(layers)
    )


def spectral_start(
    layers: Layers, initial_weight: Callable[[str], Tensor], parallel: Parallel
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(name, U0 [O, k], V0 [k, I])``: truncated SVD of each whole initial weight [O, I]."""

    def compute(name):
        return linalg.truncate(initial_weight(name), layers[name].active) if parallel.tp_rank == 0 else None

    return shared_factor_pairs(
        _shapes(layers, {n: x.active for n, x in layers.items()}), compute, parallel, device=_device(layers)
    )


@torch.no_grad()
def place_columns(layer: FactorisedLinear, left: Tensor, right: Tensor, *, start: int, absorb: bool) -> None:
    """Write whole columns ``left`` [O, c], ``right`` [c, I] into columns ``start`` ... of the layer and its
    masters.

    With ``absorb`` their product, as rounded to the parameters' dtype, is subtracted from W0.
    """
    rank, n = layer.tp_group.rank(), layer.tp_group.size()
    left, right = left.to(layer.U), right.to(layer.V)
    stop = start + left.shape[1]
    own_left, own_right = left.chunk(n, dim=0)[rank], right.chunk(n, dim=1)[rank]
    for parameter, index, value in (
        (layer.U, (slice(None), slice(start, stop)), own_left),
        (layer.V, (slice(start, stop), slice(None)), own_right),
    ):
        whole = read_master(parameter).clone()
        whole[index] = value.to(whole)
        write_master(parameter, whole)
    if absorb:
        a, b = (left, own_right) if layer.row_parallel else (own_left, right)
        layer.weight.copy_(layer.weight.float() - a.float() @ b.float())


def random_columns(
    layer: FactorisedLinear, count: int, *, norm: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``(left [O, count], right [count, I])``: random directions, every column of U and row of V of the given
    norm.
    """
    left = torch.randn(layer.output_size, count, generator=generator)
    right = torch.randn(count, layer.input_size, generator=generator)
    left *= norm / left.norm(dim=0, keepdim=True)
    right *= norm / right.norm(dim=1, keepdim=True)
    return left.to(layer.U.device), right.to(layer.V.device)


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
) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's ``(U* [O/n, r], V* [r, I/n])`` in FP32: ``W0 + U V`` truncated to so many columns.

    ``moments``: second moments of activations, at least of the layers that this replica owns, see
    ``engine/activations.py``; empty: plain truncation.
    """
    masters = _own_masters(layers, parallel)

    def shard(name: str) -> Tensor:
        layer, (u, v) = layers[name], masters[name]
        u, v = u[:, : layer.active].double(), v[: layer.active].double()
        if layer.row_parallel:
            u = linalg.gather_matrix(u, 0, parallel.tp_group)
        else:
            v = linalg.gather_matrix(v, 1, parallel.tp_group)
        return torch.addmm(layer.weight.double(), u, v)

    matrices = (
        ShardedMatrix(name, partial(shard, name), layers[name].weight.partition_dim, moments.get(name))
        for name in masters
    )
    ranks = (columns[name] for name in masters)

    def own() -> dict[str, tuple[Tensor, Tensor]]:
        results = truncate(matrices, ranks, parallel.tp_group, step=step)
        return {name: (t.left.float(), t.right.float()) for name, t in zip(masters, results, strict=True)}

    shapes = {name: (len(x.U), columns[name], x.V.shape[1]) for name, x in layers.items()}
    return shared_over_replicas(shapes, parallel.in_unison(own), parallel, device=_device(layers))


def _own_masters(layers: Layers, parallel: Parallel) -> dict[str, tuple[Tensor, Tensor]]:
    """FP32 masters of U and V, this rank's shards, of the layers that its replica computes."""
    own = set(own_layers(list(layers), parallel))
    masters = {}
    for name, layer in layers.items():  # collective over the data-parallel group: every rank goes through all
        pair = read_master(layer.U), read_master(layer.V)
        if name in own:
            masters[name] = pair
    return masters


def _shapes(layers: Layers, columns: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    return {name: (x.output_size, columns[name], x.input_size) for name, x in layers.items()}


def _device(layers: Layers) -> torch.device:
    return next(iter(layers.values())).U.device
