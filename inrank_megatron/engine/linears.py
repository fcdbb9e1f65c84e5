"""The factorisable linears of the live model, dense or factorised: what the switch needs to know of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.zero_state import read_master
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.linalg.factors import gather_matrix


@dataclass(frozen=True)
class Linear:
    """A linear with an effective matrix W [O, I]: Megatron's own of weight W, or a factorised one.

    Args:
        row_parallel: whether I is cut over the group, else O is.
        sequence_parallel: whether the tokens are cut outside of it.
        added_bias: the bias that its output has in it already, if any.
    """

    module: Any  # what torch says of its attributes is that each is a Tensor or a Module
    output_size: int
    input_size: int
    row_parallel: bool
    sequence_parallel: bool
    tp_group: ProcessGroup
    added_bias: Tensor | None

    @property
    def factorised(self) -> bool:
        return isinstance(self.module, FactorisedLinear)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def replaced(self) -> tuple[str, ...]:
        """Its parameters that the switch replaces by U* and V*."""
        return ("U", "V") if self.factorised else ("weight",)

    @property
    def max_rank(self) -> int:
        """The largest rank that W may have."""
        without_base = self.factorised and self.module.weight is None
        return self.module.active if without_base else min(self.output_size, self.input_size)

    def values(self) -> tuple[Tensor, ...]:
        """FP32 masters of :attr:`replaced`, and W0 where there is one; this rank's shards. Collective over
        the data-parallel group.
        """
        masters = tuple(read_master(getattr(self.module, leaf)) for leaf in self.replaced)
        base = self.module.weight if self.factorised else None
        return masters if base is None else (*masters, read_value(base))

    @torch.no_grad()
    def matrix(self, values: tuple[Tensor, ...]) -> Tensor:
        """This rank's share of W, FP64: [O/n, I], or [O, I/n] if row-parallel. Collective over the group."""
        if not self.factorised:
            return values[0].double()
        layer, (u, v, *base) = self.module, values
        product = own_product(layer, u[:, : layer.active].double(), v[: layer.active].double())
        return product.add_(base[0]) if base else product


def find_linears(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], group: ProcessGroup
) -> dict[str, Linear]:
    """The linears of ``model`` that ``shapes`` names with their (O, I), in that order."""
    linears = {}
    for name, (output_size, input_size) in shapes.items():
        module: Any = model.get_submodule(name)
        factorised = isinstance(module, FactorisedLinear)
        linears[name] = Linear(
            module,
            output_size,
            input_size,
            row_parallel=module.row_parallel if factorised else module.weight.partition_dim == 1,
            sequence_parallel=module.sequence_parallel,
            tp_group=group,
            added_bias=module.bias if factorised or not module.skip_bias_add else None,
        )
    return linears


def own_product(layer: FactorisedLinear, left: Tensor, right: Tensor) -> Tensor:
    """This rank's share of a product, cut as W0 is, from shards ``left`` [O/n, k] and ``right`` [k, I/n]."""
    if layer.row_parallel:
        return gather_matrix(left, 0, layer.tp_group) @ right
    return left @ gather_matrix(right, 1, layer.tp_group)
