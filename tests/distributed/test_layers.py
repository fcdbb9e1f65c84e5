"""The tensor-parallel factorised linears against the serial oracle that forms ``W0 + U V``."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.distributed.layer_parity import (
    ACTIVE,
    BATCH,
    GROWN,
    GROWTH_STEP,
    INPUTS,
    OUTPUTS,
    SEQUENCE,
    STEPS,
    Case,
    build_layer,
    collectives,
    exact_products,
    filled_layer,
    full_tensors,
    merge,
    train_oracle,
    train_shards,
)
from tests.groups import join
from tests.harness import run_ranks


def variants(ranks: int, *biases: bool) -> list:
    result = []
    for row, frozen_base, bias, parallel in itertools.product(
        (False, True), (False, True), biases, (False, True)
    ):
        if ranks > 1 or not parallel:  # sequence parallelism needs ranks
            words = [
                "row" if row else "column",
                "W0+UV" if frozen_base else "UV",
                "bias" if bias else "plain",
            ]
            name = "-".join([*words, f"TP{ranks}", *["SP"] * parallel])
            result.append(pytest.param(ranks, Case(row, frozen_base, bias, parallel), id=name))
            if frozen_base and parallel:
                case = Case(row, frozen_base, bias, parallel, separate_collectives=True)
                result.append(pytest.param(ranks, case, id=f"{name}-separate"))
    return result


def with_optimizer(variants: list, *names: str) -> list:
    return [pytest.param(*v.values, name, id=f"{v.id}-{name}") for v in variants for name in names]


@pytest.mark.parametrize(
    ("ranks", "case", "optimizer"),
    [
        *with_optimizer(variants(1, True), "AdamW"),
        *with_optimizer(variants(2, False, True), "SGD", "AdamW"),
        *with_optimizer(variants(4, True), "AdamW"),
    ],
)
def test_sharded_training_matches_serial(ranks, case, optimizer):
    """Outputs, gradients (of the input too) and 20 steps of training, columns added midway: FP64, 1e-10.

    Among the factors are those that every rank holds whole. Under sequence parallelism each sees only its
    share of the tokens, and a bridge to Megatron-Core once forgot to sum their gradients over the group
    (mcore-bridge issue 173): each rank trained another factor.
    """
    expected = train_oracle(case, optimizer)
    merged = merge(run_ranks(train_shards, ranks, case, optimizer), case)
    assert merged.keys() - expected.keys() <= {"final weight"}
    for key, value in expected.items():
        torch.testing.assert_close(
            merged[key], value, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(("ranks", "case"), [*variants(1, True), *variants(2, True)])
def test_active_columns_train_and_w0_is_frozen(ranks, case):
    """Gradients beyond the columns in use are exactly zero; W0 has none at all."""
    shards = run_ranks(train_shards, ranks, case, "AdamW")
    merged = merge(shards, case)
    for step in range(STEPS):
        used = ACTIVE if step < GROWTH_STEP else GROWN
        left, right = merged[f"{step} dU"], merged[f"{step} dV"]
        assert not left[:, used:].any()
        assert not right[used:].any()
        assert left[:, :used].any(dim=0).all()
        assert right[:used].any(dim=1).all()
        assert f"{step} dweight" not in merged
    if case.frozen_base:
        assert torch.equal(merged["final weight"], full_tensors(case)["weight"])


@pytest.mark.parametrize(("ranks", "case"), [*variants(1, True), *variants(2, True)])
def test_tile_padding_changes_no_bit(ranks, case):
    """In half precision the products run over 8 columns where 3 are in use. On numbers whose sums are exact
    every output and gradient is the same to the bit, and those of the other columns are zero.
    """
    case = replace(case, dtype=torch.float16 if ranks == 1 else torch.bfloat16)
    for widths, (tiled, exact) in run_ranks(exact_products, ranks, case):
        assert widths == [8, ACTIVE]
        for one, other in zip(tiled, exact, strict=True):
            assert torch.equal(one, other) and one.any()
        *_, left, right = tiled
        assert not left[:, ACTIVE:].any() and not right[ACTIVE:].any()


@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("frozen_base", [False, True], ids=["UV", "W0+UV"])
def test_fp32_matches_fp64_to_rounding(row, frozen_base):
    """First step, where no optimizer amplifies anything: 1e-5 of each tensor's norm."""
    case = Case(row, frozen_base, bias=True, sequence_parallel=True, dtype=torch.float32)
    expected = train_oracle(Case(row, frozen_base, bias=True, sequence_parallel=True), "SGD")
    merged = merge(run_ranks(train_shards, 4, case, "SGD"), case)
    for key in (k for k in expected if k.startswith("0 ")):
        assert (merged[key] - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


TOKENS = SEQUENCE * BATCH
COLUMN_FACTOR, ROW_FACTOR = ACTIVE * INPUTS, ACTIVE * OUTPUTS
ON_THE_WIRE = {
    # (row, frozen_base, sequence parallel, separate): (forward, backward), each in elements
    (False, True, True, True): (
        [("gather", COLUMN_FACTOR), ("gather", TOKENS * INPUTS), ("gather", TOKENS * ACTIVE)],
        [("scatter", COLUMN_FACTOR), ("scatter", TOKENS * INPUTS), ("scatter", TOKENS * ACTIVE)],
    ),
    (True, True, True, True): (
        [("gather", ROW_FACTOR), ("scatter", TOKENS * OUTPUTS), ("scatter", TOKENS * ACTIVE)],
        [("gather", TOKENS * OUTPUTS), ("gather", TOKENS * ACTIVE), ("scatter", ROW_FACTOR)],
    ),
    (False, True, True): (
        [("gather", COLUMN_FACTOR), ("gather", TOKENS * INPUTS)],
        [("scatter", COLUMN_FACTOR), ("scatter", TOKENS * INPUTS)],
    ),
    (False, True, False): (
        [("gather", COLUMN_FACTOR)],
        [("reduce", TOKENS * INPUTS), ("scatter", COLUMN_FACTOR)],
    ),
    (False, False, True): (
        [("gather", COLUMN_FACTOR), ("gather", TOKENS * ACTIVE)],
        [("scatter", COLUMN_FACTOR), ("scatter", TOKENS * ACTIVE)],
    ),
    (False, False, False): ([("gather", COLUMN_FACTOR)], [("reduce", TOKENS * ACTIVE)]),
    (True, True, True): (
        [("gather", ROW_FACTOR), ("scatter", TOKENS * OUTPUTS)],
        [("gather", TOKENS * OUTPUTS), ("scatter", ROW_FACTOR)],
    ),
    (True, True, False): ([("gather", ROW_FACTOR), ("reduce", TOKENS * OUTPUTS)], [("scatter", ROW_FACTOR)]),
    (True, False, True): (
        [("gather", ROW_FACTOR), ("scatter", TOKENS * ACTIVE)],
        [("gather", TOKENS * ACTIVE), ("scatter", ROW_FACTOR)],
    ),
    (True, False, False): ([("gather", ROW_FACTOR), ("reduce", TOKENS * ACTIVE)], []),
}


@pytest.mark.parametrize("variant", ON_THE_WIRE, ids=str)
def test_collectives_carry_the_documented_shapes(variant):
    """The documented collectives and no others. Without W0, activations travel at the width of the rank."""
    row, frozen_base, parallel, *separate = variant
    forward, backward = ON_THE_WIRE[variant]
    for sent in run_ranks(
        collectives,
        2,
        Case(row, frozen_base, bias=False, sequence_parallel=parallel, separate_collectives=bool(separate)),
    ):
        assert sent == (sorted(forward), sorted(backward))


def sharded_layout(rank: int, world_size: int, case: Case) -> dict:
    group = join(world_size).tp_group
    state = filled_layer(case, group).sharded_state_dict(prefix="fc.")
    return {key: (tensor.global_shape, tensor.global_offset) for key, tensor in state.items()}


@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
def test_sharded_state_has_global_shapes_and_offsets(row):
    """What Megatron's distributed checkpoints need to reshard the layer."""
    case = Case(row, frozen_base=True, bias=True, sequence_parallel=False)
    for rank, layout in enumerate(run_ranks(sharded_layout, 2, case)):
        expected = {
            "fc.U": ((OUTPUTS, 9), (rank * OUTPUTS // 2, 0)),
            "fc.V": ((9, INPUTS), (0, rank * INPUTS // 2)),
        }
        expected["fc.weight"] = (
            (OUTPUTS, INPUTS),
            (0, rank * INPUTS // 2) if row else (rank * OUTPUTS // 2, 0),
        )
        expected["fc.bias"] = ((OUTPUTS,), (0,) if row else (rank * OUTPUTS // 2,))
        assert layout == expected


def message_of_odd_size(rank: int, world_size: int) -> str:
    group = join(world_size).tp_group
    try:
        build_layer(Case(False, True, True, False), tp_group=group, output_size=21)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_indivisible_features_are_refused():
    assert (
        run_ranks(message_of_odd_size, 2)[1]
        == "feature size 21 is not divisible by the 2 tensor-parallel ranks"
    )
