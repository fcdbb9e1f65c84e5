"""What the record of a factorisable linear says of it."""

from torch import nn

from inrank_megatron.engine.linears import find_linears
from inrank_megatron.lowrank.layers.spec import FactorSpec
from tests.distributed.layer_parity import ACTIVE, CAPACITY, Case, filled_layer
from tests.groups import join
from tests.harness import run_ranks


def attainable_ranks(rank: int, world_size: int) -> dict[bool, tuple[int, int]]:
    """By whether there is a W0: the largest rank that the layer's matrix may have, and min(O, I)."""
    group, found = join(1).tp_group, {}
    for frozen_base in (True, False):
        layer = filled_layer(
            Case(row=False, frozen_base=frozen_base, bias=True, sequence_parallel=False), group
        )
        spec = FactorSpec(capacity=CAPACITY, active_columns=ACTIVE, rank=ACTIVE, frozen_base=frozen_base)
        shape = layer.output_size, layer.input_size
        linears = find_linears(nn.ModuleDict({"fc": layer}), {"fc": shape}, {"fc": spec}, group)
        found[frozen_base] = linears["fc"].attainable_rank, min(shape)
    return found


def test_without_w0_a_matrix_has_no_more_rank_than_columns_in_use():
    (ranks,) = run_ranks(attainable_ranks, 1)
    assert ranks[True] == (ranks[True][1],) * 2
    assert ranks[False][0] == ACTIVE < ranks[False][1]
