"""The layer on one rank: what it refuses, what it hands back. Numbers are checked in tests/distributed."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised, RowParallelFactorised
from inrank_megatron.lowrank.layers.oracle import SerialFactorised
from tests.distributed.layer_parity import (
    ACTIVE,
    CAPACITY,
    INPUTS,
    Case,
    filled_layer,
    full_tensors,
    sample,
)
from tests.groups import join
from tests.harness import run_ranks

COLUMN = Case(row=False, frozen_base=True, bias=True, sequence_parallel=False)


def raised(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def activations(rank: int, world_size: int) -> list[str]:
    layer = filled_layer(COLUMN, join(1).tp_group)
    return [raised(lambda k=k: layer.activate(k)) for k in (5, 5, 4, 9, 10)]


def test_columns_in_use_never_fall_and_never_exceed_the_allocated():
    assert run_ranks(activations, 1)[0] == [
        "accepted",
        "accepted",
        "columns 4 must lie between 5 in use and 9 allocated",
        "accepted",
        "columns 10 must lie between 9 in use and 9 allocated",
    ]


def gradient_state(rank: int, world_size: int) -> tuple:
    layer = filled_layer(COLUMN, join(1).tp_group)
    layer(sample(0, 12, COLUMN))[0].sum().backward()
    trained = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    return trained, layer.weight.requires_grad, layer.weight.grad, layer.U.grad is not None


def test_w0_is_frozen():
    assert run_ranks(gradient_state, 1)[0] == (["U", "V", "bias"], False, None, True)


def outputs(rank: int, world_size: int) -> tuple:
    layer = filled_layer(COLUMN, join(1).tp_group)
    x = sample(0, 12, COLUMN)
    added, none = layer(x)
    return added.detach(), none


def test_bias_is_part_of_the_product():
    """Nothing is left for Megatron to add next to it."""
    added, none = run_ranks(outputs, 1)[0]
    assert none is None
    torch.testing.assert_close(
        added, SerialFactorised(**full_tensors(COLUMN))(sample(0, 12, COLUMN)).detach()
    )


@pytest.mark.parametrize(
    ("layer", "option"),
    [
        (ColumnParallelFactorised, {"gather_output": True}),
        (ColumnParallelFactorised, {"is_expert": True}),
        (RowParallelFactorised, {"input_is_parallel": False}),
        (RowParallelFactorised, {"is_expert": True}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_options_of_megatron_that_are_not_supported_are_refused(layer, option):
    with pytest.raises(ValueError, match=r"ParallelFactorised supports .* alone"):
        layer(12, 20, config=None, bias=False, factors=None, tp_group=None, **option)


def test_arguments_that_megatron_does_not_have_are_refused():
    with pytest.raises(TypeError, match="ColumnParallelFactorised has no argument gather_outputs"):
        ColumnParallelFactorised(
            12, 20, config=None, bias=False, factors=None, tp_group=None, gather_outputs=True
        )


def step_under_zero_3(
    rank: int, world_size: int, case: Case, active_columns: int
) -> tuple[list[bool], list[bool]]:
    """Whether anything holds what was gathered of U and V after the forward pass, and whether gradients are
    those of a layer whose parameters stay.
    """
    group = join(1).tp_group
    layer, plain = filled_layer(case, group), filled_layer(case, group)
    for each in (layer, plain):
        each.activate(active_columns)
        each.x = sample(0, INPUTS, case).requires_grad_()
        each.y = each(each.x)[0]
    factors, kept = (layer.U, layer.V), [factor.detach().clone() for factor in (layer.U, layer.V)]
    storages = [StorageWeakRef(factor.untyped_storage()) for factor in factors]
    for factor in factors:
        factor.data = torch.empty(0, dtype=factor.dtype)  # as DeepSpeed lets go of what it has gathered
    held = [not storage.expired() for storage in storages]
    for factor, value in zip(factors, kept, strict=True):
        factor.data = value
    for each in (layer, plain):
        each.y.square().sum().backward()
    pairs = [(layer.U.grad, plain.U.grad), (layer.V.grad, plain.V.grad), (layer.x.grad, plain.x.grad)]
    return held, [torch.equal(*pair) for pair in pairs]


@pytest.mark.parametrize("active", [ACTIVE, CAPACITY])
@pytest.mark.parametrize("row", [False, True])
def test_nothing_holds_gathered_factors_until_the_backward_pass(row, active):
    case = Case(row=row, frozen_base=active == ACTIVE, bias=True, sequence_parallel=False)
    assert run_ranks(step_under_zero_3, 1, case, active)[0] == ([False, False], [True, True, True])
