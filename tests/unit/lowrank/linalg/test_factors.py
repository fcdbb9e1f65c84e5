"""Algebra of factors: against dense FP64 arithmetic, and shards over real ranks against the whole."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg import factors
from tests.harness import run_ranks

ROWS, COLUMNS = 30, 22


def random_factors(k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, k, generator=numbers, dtype=torch.float64),
        torch.randn(k, COLUMNS, generator=numbers, dtype=torch.float64),
    )


def rank_deficient() -> tuple[Tensor, Tensor]:
    left, right = random_factors(8)
    left[:, 5] = 2 * left[:, 1] - left[:, 3]
    return left, right


def zero_columns() -> tuple[Tensor, Tensor]:
    left, right = random_factors(8)
    left[:, 4:6], right[4:6], right[7] = 0, 0, 0
    return left, right


def repeated_values() -> tuple[Tensor, Tensor]:
    left, right = random_factors(8)
    return torch.linalg.qr(left).Q, 3 * torch.linalg.qr(right.t()).Q.t()


PAIRS = {
    "random": random_factors(8),
    "one column": random_factors(1),
    "more columns than the matrix has": random_factors(40),
    "rank deficient": rank_deficient(),
    "zero columns": zero_columns(),
    "repeated values": repeated_values(),
    "all zero": tuple(torch.zeros_like(t) for t in random_factors(8)),
    "badly scaled": tuple(
        t * torch.logspace(0, -12, 8, dtype=torch.float64).sqrt().view(shape)
        for t, shape in zip(random_factors(8), ((1, -1), (-1, 1)), strict=True)
    ),
    "BF16": tuple(t.bfloat16() for t in random_factors(8)),
}

# Rows of U and columns of V on each rank; 22 = COLUMNS and 30 = ROWS in all.
SHARES = {
    "whole": ([30], [22]),
    "even": ([15, 15], [11, 11]),
    "uneven": ([29, 1], [3, 19]),
    "one empty": ([0, 30], [22, 0]),
    "four, shorter than k": ([2, 0, 25, 3], [6, 7, 1, 8]),
}


def local_shards(
    rank: int, left: Tensor, right: Tensor, shares: tuple[list[int], list[int]]
) -> tuple[Tensor, Tensor]:
    return left.split(shares[0])[rank], right.split(shares[1], dim=1)[rank]


def gram_of_triangle(
    rank: int, world_size: int, left: Tensor, right: Tensor, shares
) -> tuple[Tensor, Tensor]:
    own = local_shards(rank, left, right, shares)
    r = [factors.triangular_factor(t, dist.group.WORLD) for t in (own[0], own[1].t())]
    return r[0].t() @ r[0], r[1].t() @ r[1]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("pair", PAIRS)
def test_triangular_factor_of_spread_rows(pair, shares):
    """``R^T R`` is the Gram matrix of the whole, on all ranks alike, however the features are spread."""
    left, right = PAIRS[pair]
    results = run_ranks(gram_of_triangle, len(SHARES[shares][0]), left, right, SHARES[shares])
    expected = left.double().t() @ left.double(), right.double() @ right.double().t()
    for result in results:
        for got, first, full in zip(result, results[0], expected, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, full, rtol=0, atol=1e-13 * max(float(full.abs().max()), 1e-300))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(poison):
    matrix = torch.zeros(3, 3)
    factors.check_finite(matrix, what="a sound matrix")
    matrix[1, 2] = poison
    with pytest.raises(UserError, match=r"^factor U of layer 3 at step 7 holds NaN or Inf.*lower --lr"):
        factors.check_finite(matrix, what="factor U of layer 3 at step 7")


def sharded_and_gathered(rank: int, world_size: int, matrix: Tensor, dim: int, stride: int) -> tuple:
    shard = factors.shard_matrix(matrix, dim, dist.group.WORLD, stride)
    return shard, factors.gather_matrix(shard, dim, dist.group.WORLD, stride)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_gathered_shards_are_the_matrix(world_size, dim, stride):
    """Of each of the parts that lie one after the other a rank has its share, as Megatron splits SwiGLU's."""
    matrix = torch.arange(128.0).view(8, 16)
    results = run_ranks(sharded_and_gathered, world_size, matrix, dim, stride)
    for rank, (shard, full) in enumerate(results):
        parts = [part.chunk(world_size, dim)[rank] for part in matrix.chunk(stride, dim)]
        assert torch.equal(shard, torch.cat(parts, dim))
        assert torch.equal(full, matrix)
