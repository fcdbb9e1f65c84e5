"""The factorisable linears of the live model, dense or factorised: one record for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.zero_state import read_master_weight
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg.factors import gather_matrix


@dataclass(eq=False)
class Linear:
    """A linear with an effective matrix W [O, I]. This class is for Megatron's dense linear, of weight W.

    Args:
        row_parallel: whether I is sharded over the group; otherwise O is.
        sequence_parallel: whether the tokens are sharded outside the linear.
        added_bias: the bias that the output already contains, if any.
    """

    module: Any  # torch's types say only that an attribute is a Tensor or a Module
    output_size: int
    input_size: int
    row_parallel: bool
    sequence_parallel: bool
    tp_group: ProcessGroup
    added_bias: Tensor | None

    replaced: ClassVar[tuple[str, ...]] = ("weight",)
    """Its parameters that the switch replaces by U* and V*."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def attainable_rank(self) -> int:
        """The largest rank that W may have."""
        return min(self.output_size, self.input_size)

    def values(self) -> tuple[Tensor, ...]:
        """This rank's shards from which :meth:`matrix` computes W: FP32 master weights, and W0 if present.
        Collective over the data-parallel group.
        """
        return tuple(read_master_weight(getattr(self.module, leaf)) for leaf in self.replaced)

    def matrix(self, values: tuple[Tensor, ...]) -> Tensor:
        """This rank's shard of W, FP64: [O/n, I], or [O, I/n] if row-parallel. Collective over the group."""
        return values[0].double()


@dataclass(eq=False)
class FactorisedLayer(Linear):
    """A factorised linear, W = W0 + U V or U V, with what its module does not store.

    Args:
        spec: its structure as it is now.
        initial: FP32 shards ``(U0 [O/n, K], V0 [K, I/n])`` of initial values, if the layer tracks them.
    """

    module: FactorisedLinear
    spec: FactorSpec
    initial: tuple[Tensor, Tensor] | None

    replaced: ClassVar[tuple[str, ...]] = ("U", "V")

    @property
    def attainable_rank(self) -> int:
        return self.module.active_columns if self.module.weight is None else super().attainable_rank

    def values(self) -> tuple[Tensor, ...]:
        base = self.module.weight
        return super().values() if base is None else (*super().values(), read_value(base))

    @torch.no_grad()
    def matrix(self, values: tuple[Tensor, ...]) -> Tensor:
        layer, (u, v, *base) = self.module, values
        product = local_product(
            layer, u[:, : layer.active_columns].double(), v[: layer.active_columns].double()
        )
        return product.add_(base[0]) if base else product


def find_linears(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    factors: Mapping[str, FactorSpec],
    group: ProcessGroup,
) -> dict[str, Linear]:
    """The linears of ``model`` that ``shapes`` names with their (O, I), in that order.

    ``factors``: the specs with which the factorised ones were built. Tracked initial values begin at zero.
    """
    linears = {}
    for name, (output_size, input_size) in shapes.items():
        module: Any = model.get_submodule(name)
        factorised = isinstance(module, FactorisedLinear)
        settings = {
            "module": module,
            "output_size": output_size,
            "input_size": input_size,
            "row_parallel": module.row_parallel if factorised else module.weight.partition_dim == 1,
            "sequence_parallel": module.sequence_parallel,
            "tp_group": group,
            "added_bias": module.bias if factorised or not module.skip_bias_add else None,
        }
        linears[name] = Linear(**settings)
        if factorised:
            linears[name] = FactorisedLayer(
                **settings, spec=factors[name], initial=_zeros(module) if factors[name].tracked else None
            )
    return linears


def _zeros(layer: FactorisedLinear) -> tuple[Tensor, Tensor]:
    u, v = (torch.zeros_like(factor, dtype=torch.float32).detach() for factor in (layer.U, layer.V))
    return u, v


def local_product(layer: FactorisedLinear, left: Tensor, right: Tensor) -> Tensor:
    """This rank's shard of a product, sharded as W0 is, from shards ``left`` [O/n, k] and ``right`` [k,
    I/n].
    """
    if layer.row_parallel:
        return gather_matrix(left, 0, layer.tp_group) @ right
    return left @ gather_matrix(right, 1, layer.tp_group)
