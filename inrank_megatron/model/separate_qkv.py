"""Query, key and value as three linears in the place of Megatron's fused one.

Letters: S positions, B sequences, h hidden size, a heads, g groups of heads that share key and value, d
features of a head, n tensor-parallel ranks.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from inrank_megatron.config.shapes import QKV, QKVLayout
from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised
from inrank_megatron.lowrank.layers.spec import FactorSpec


class SeparateQKV(nn.Module):
    """Column-parallel linears ``q`` of a d outputs and ``k``, ``v`` of g d, dense or factorised.

    Arguments are those of Megatron's linears, but for the outputs, which ``layout`` has.

    Args:
        factors: of those of ``q``, ``k`` and ``v`` that are factorised.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        layout: QKVLayout,
        factors: Mapping[str, FactorSpec],
        **arguments,
    ):
        super().__init__()
        for part in QKV:
            own: dict[str, Any] = {"factors": factors[part]} if part in factors else {}
            kind = ColumnParallelFactorised if own else ColumnParallelLinear
            setattr(self, part, kind(input_size, layout.rows(part), config=config, **arguments, **own))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` [S, B, h], or [S/n, B, h] under sequence parallelism -> query [S, B, a d/n], key and value
        [S, B, g d/n].
        """
        return self.q(x)[0], self.k(x)[0], self.v(x)[0]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Shards for Megatron's ``dist_checkpointing``."""
        state: dict[str, Any] = {}
        for part, linear in self.named_children():
            state |= linear.sharded_state_dict(f"{prefix}{part}.", sharded_offsets, metadata)
        return state


class SeparateQKVAttention(SelfAttention):
    """Megatron's self-attention on a :class:`SeparateQKV`."""

    def get_query_key_value_tensors(
        self, hidden_states, key_value_states=None, output_gate=False, split_qkv=True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [S, B, a/n, d], key and value [S, B, g/n, d]; with fewer groups than ranks [S, B, 1, d], that
        of this rank's queries, of which every rank has computed a part.
        """
        groups, d = self.config.num_query_groups, self.hidden_size_per_attention_head
        query, *shared = self.linear_qkv(hidden_states)
        if groups < self.world_size:
            group = self.tp_group.rank() * groups // self.world_size
            every = (all_gather_last_dim_from_tensor_parallel_region(x, group=self.tp_group) for x in shared)
            shared = [x[..., group * d : (group + 1) * d] for x in every]
        query, key, value = (x.unflatten(-1, (-1, d)) for x in (query, *shared))
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return query, key, value


def rows_of(fused: Tensor, part: str, *, layout: QKVLayout) -> Tensor:
    """The rows of query, key or value (``part`` of ``q``, ``k``, ``v``) of a full fused tensor [(a + 2 g) d,
    ...] in Megatron's order, which is group by group.
    """
    return layout.view(fused, part).flatten(0, 2)
