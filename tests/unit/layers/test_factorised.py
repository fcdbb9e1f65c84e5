"""The layer on one rank: what it refuses, what it hands back. Numbers are checked in tests/distributed."""

import pytest
import torch

from inrank_megatron.layers.factorised import ColumnParallelFactorised, RowParallelFactorised
from inrank_megatron.layers.oracle import SerialFactorised
from tests.distributed.layer_parity import Case, filled_layer, sample, whole_tensors
from tests.groups import join
from tests.harness import run_ranks

COLUMN = Case(row=False, base=True, bias=True, sequence_parallel=False)


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
    """Nothing is left for Megatron to add beside it."""
    added, none = run_ranks(outputs, 1)[0]
    assert none is None
    torch.testing.assert_close(
        added, SerialFactorised(**whole_tensors(COLUMN))(sample(0, 12, COLUMN)).detach()
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
    with pytest.raises(ValueError, match=r"a factorised .* layer supports"):
        layer(12, 20, config=None, bias=False, factors=None, tp_group=None, **option)
