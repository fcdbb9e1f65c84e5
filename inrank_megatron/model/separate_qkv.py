"""Query, key and value as three linears in the place of Megatron's fused one.

Letters: S positions, B sequences, h hidden size, a heads, d = h / a, n tensor-parallel ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from inrank_megatron.config.shapes import QKV
from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised
from inrank_megatron.lowrank.layers.spec import FactorSpec


class SeparateQKV(nn.Module):
    """Column-parallel linears ``q``, ``k``, ``v`` of h outputs each, dense or factorised.

    The output [S, B, 3 h/n] has the order of the fused layer's: for every head its d query features, then
    those of key and value. Arguments are those of Megatron's linears.

    Args:
        factors: of those of ``q``, ``k`` and ``v`` that are factorised.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config, factors: Mapping[str, FactorSpec], **arguments
    ):
        super().__init__()
        self.head_features = config.kv_channels
        for part in QKV:
            own: dict[str, Any] = {"factors": factors[part]} if part in factors else {}
            kind = ColumnParallelFactorised if own else ColumnParallelLinear
            setattr(self, part, kind(input_size, output_size // 3, config=config, **arguments, **own))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``x`` [S, B, h], or [S/n, B, h] under sequence parallelism -> ``(y, None)``."""
        parts = [getattr(self, part)(x)[0].unflatten(-1, (-1, self.head_features)) for part in QKV]
        return torch.cat(parts, dim=-1).flatten(-2), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Shards for Megatron's ``dist_checkpointing``."""
        state: dict[str, Any] = {}
        for part, linear in self.named_children():
            state |= linear.sharded_state_dict(f"{prefix}{part}.", sharded_offsets, metadata)
        return state


def rows_of(fused: Tensor, part: str, *, heads: int) -> Tensor:
    """The rows [h, ...] of query, key or value (``part`` of ``q``, ``k``, ``v``) of a full fused tensor
    [3 h, ...] in Megatron's order, which is head by head.
    """
    return fused.unflatten(0, (heads, 3, -1))[:, QKV.index(part)].flatten(0, 1)
