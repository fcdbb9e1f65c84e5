"""Truncations and output energies of many linears' matrices, each computed once in the whole job.

Fisher weights: d = D^(1/2) is a weight for each output feature. The minimiser of ``E |d (W - M) x|^2`` is
``M = d^-1 M'``, where M' is the activation-aware truncation of ``d W``. Scaling rows keeps every shard local,
and the moment of a row layer's output is scaled by d on both sides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.layer_distribution import broadcast_over_replicas, gathered_spectra, local_layers
from inrank_megatron.engine.linears import Linear
from inrank_megatron.lowrank.linalg.orthogonal import product_svd
from inrank_megatron.lowrank.linalg.truncation import ShardedMatrix, output_energies, truncate

Shards = dict[str, tuple[Tensor, Tensor]]
"""By layer, this rank's ``(left [O/n, c], right [c, I/n])``, FP32, the same on all data-parallel replicas."""


class Sized(Protocol):
    """What a truncation needs to know of a layer. :class:`Linear` and the factorised layers provide it."""

    @property
    def output_size(self) -> int: ...

    @property
    def input_size(self) -> int: ...

    @property
    def row_parallel(self) -> bool: ...


@dataclass(frozen=True)
class Weighing:
    """The weights of the truncation error. If both are empty, the error of the matrix itself counts.

    Args:
        moments: second moments of activations (``activations.py``), FP32, by layer; at least those of the
            layers that this replica computes.
        outputs: d by layer: [O/n] for a column layer, [O] for a row layer.
    """

    moments: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def scaled(self, name: str, shard: Callable[[str], Tensor]) -> Tensor:
        """This rank's shard of ``d W``."""
        local = shard(name)
        return local * self.outputs[name][:, None].double() if name in self.outputs else local

    def moment(self, name: str, *, row_parallel: bool) -> Tensor | None:
        """The moment of the input of a column layer, or of the scaled output of a row layer."""
        moment = self.moments.get(name)
        if not row_parallel or name not in self.outputs:
            return moment
        d = self.outputs[name].double()
        return d[:, None] * moment.double() * d

    def local_outputs(self, name: str, layer: Sized, parallel: Parallel) -> Tensor:
        """d for the output features [O/n] of this rank's shard of U*, FP64."""
        d = self.outputs[name].double()
        return d.tensor_split(parallel.tp_size)[parallel.tp_rank] if layer.row_parallel else d


def truncated(
    layers: Mapping[str, Sized],
    shard: Callable[[str], Tensor],
    columns: Mapping[str, int],
    parallel: Parallel,
    *,
    what: str,
    step: int,
    device: torch.device,
    weighing: Weighing | None = None,
) -> Shards:
    """Truncates every layer's matrix to the given number of columns, on the replica that owns the layer.

    ``shard(name)``: this rank's shard of the matrix, sharded as W0 is; called on all ranks of that replica.
    """
    weighing = weighing or Weighing()
    local, group = local_layers(list(layers), parallel), parallel.tp_group

    def compute() -> Shards:
        matrices = _matrices(layers, shard, local, weighing, what=what)
        results = truncate(matrices, [columns[name] for name in local], group, step=step)
        shards = {}
        for name, t in zip(local, results, strict=True):
            left, right = t.left, t.right
            if name in weighing.outputs:
                d = weighing.local_outputs(name, layers[name], parallel)
                left, right = _balanced(left / d[:, None], right, parallel)
            shards[name] = left.float(), right.float()
        return shards

    n = parallel.tp_size
    shapes = {name: (x.output_size // n, columns[name], x.input_size // n) for name, x in layers.items()}
    return broadcast_over_replicas(
        shapes, parallel.call_or_raise_on_all_ranks(compute), parallel, device=device
    )


def truncated_weights(
    linears: Mapping[str, Linear],
    columns: Mapping[str, int],
    weighing: Weighing,
    parallel: Parallel,
    *,
    step: int,
) -> Shards:
    """``U*`` and ``V*`` of every linear: its matrix truncated to the given number of columns."""
    return truncated(
        linears,
        _master_weight_shards(linears, parallel),
        columns,
        parallel,
        what="the weight",
        step=step,
        device=_device(linears),
        weighing=weighing,
    )


def energies_of_outputs(
    linears: Mapping[str, Linear], weighing: Weighing, parallel: Parallel, *, step: int
) -> dict[str, Tensor]:
    """Energies of every linear's outputs, [min(O, I)] FP64, the same on every rank.

    The energies past r add up to the least error of rank r. Without weights they are squared singular values.
    """
    local, shard = local_layers(list(linears), parallel), _master_weight_shards(linears, parallel)

    def compute() -> list[Tensor]:
        matrices = _matrices(linears, shard, local, weighing, what="the weight")
        return output_energies(matrices, parallel.tp_group, step=step)

    energies = dict(zip(local, parallel.call_or_raise_on_all_ranks(compute), strict=True))
    sizes = {name: min(x.output_size, x.input_size) for name, x in linears.items()}
    return gathered_spectra(
        list(linears),
        lambda name: energies[name][: sizes[name]],
        parallel,
        length=max(sizes.values()),
        device=_device(linears),
    )


def _matrices(
    layers: Mapping[str, Sized],
    shard: Callable[[str], Tensor],
    local: list[str],
    weighing: Weighing,
    *,
    what: str,
) -> Iterator[ShardedMatrix]:
    for name in local:
        row_parallel = layers[name].row_parallel
        yield ShardedMatrix(
            f"{what} of {name}",
            partial(weighing.scaled, name, shard),
            dim=1 if row_parallel else 0,
            moment=weighing.moment(name, row_parallel=row_parallel),
        )


def _master_weight_shards(linears: Mapping[str, Linear], parallel: Parallel) -> Callable[[str], Tensor]:
    """From a name to this rank's shard of the linear's matrix, for the layers that its replica computes."""
    local = set(local_layers(list(linears), parallel))
    values = {}
    for name, linear in linears.items():  # collective over the data-parallel group: every rank reads them all
        tensors = linear.values()
        if name in local:
            values[name] = tensors
    return lambda name: linears[name].matrix(values[name])


def _balanced(left: Tensor, right: Tensor, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """The same product with its singular values shared evenly."""
    a, s, b = product_svd(left, right, left.shape[1], parallel.tp_group)
    return a * s.sqrt(), s.sqrt()[:, None] * b


def _device(linears: Mapping[str, Linear]) -> torch.device:
    return next(iter(linears.values())).device
