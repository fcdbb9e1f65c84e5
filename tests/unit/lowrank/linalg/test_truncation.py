"""Truncation of one dense matrix: against dense oracles, on one rank."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg import oracle, truncation
from inrank_megatron.lowrank.linalg.truncation import ShardedMatrix, Truncation
from tests.harness import run_ranks

COLUMN, ROW = 0, 1
KINDS = pytest.mark.parametrize("dim", [COLUMN, ROW], ids=["column", "row"])
SHAPES = pytest.mark.parametrize("shape", [(48, 20), (20, 48), (24, 24)], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_values(values: Tensor, rows: int = 48, columns: int = 20) -> Tensor:
    a, b = (torch.linalg.qr(normal(size, len(values), seed=size)).Q for size in (rows, columns))
    return a * values @ b.t()


def second_moment(features: int, tokens: int) -> Tensor:
    """Of inputs with a few strong directions, as activations have; deficient if tokens < features."""
    x = normal(tokens, features, seed=2) * torch.logspace(0, -2, features, dtype=torch.float64)
    return x.t() @ x / tokens


def truncated(
    rank: int, world_size: int, matrix: Tensor, dim: int, moment: Tensor | None, r: int
) -> tuple[Truncation, Tensor]:
    given = ShardedMatrix("fc1", lambda: matrix, dim, moment)
    (energies,) = truncation.output_energies([given], dist.group.WORLD, step=7)
    (result,) = truncation.truncate([given], [r], dist.group.WORLD, step=7)
    return result, energies


def moment_of(W: Tensor, C: Tensor, dim: int) -> Tensor:
    return C if dim == COLUMN else W @ C @ W.t()


def assert_balanced(result: Truncation) -> None:
    """``U*^T U* = V* V*^T``, diagonal: each singular value is shared evenly."""
    left, right = result.left.t() @ result.left, result.right @ result.right.t()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9 * float(left.max()))
    torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=0, atol=1e-9 * float(left.max()))


@KINDS
@SHAPES
@pytest.mark.parametrize("r", [1, 7, 20])
def test_plain_truncation_is_the_best_one(shape, dim, r):
    W = normal(*shape)
    result, energies = run_ranks(truncated, 1, W, dim, None, r)[0]
    best = (W - torch.mm(*oracle.truncate(W, r))).norm()
    assert (W - result.left @ result.right).norm() <= best * (1 + 1e-9) + 1e-12
    assert_balanced(result)
    s = torch.linalg.svdvals(W)
    for given in (energies, result.energies):
        torch.testing.assert_close(given[: len(s)], s.square())
        assert (given[len(s) :] < 1e-12).all()
        assert len(given) == shape[1 - dim]


STEEP = {
    "condition 1e12": torch.logspace(0, -12, 20, dtype=torch.float64),
    "rank 6": torch.tensor([3.0, 2.0, 2.0, 1.0, 1.0, 1e-3]),
    "equal values": torch.ones(20),
    "zero": torch.zeros(4),
}


@KINDS
@pytest.mark.parametrize("values", STEEP)
@pytest.mark.parametrize("r", [4, 15])
def test_plain_truncation_of_steep_spectra(values, r, dim):
    """Squaring loses what is under 1e-8 of the largest value; the error is the dense SVD's nevertheless."""
    W = with_values(STEEP[values].double())
    result, _ = run_ranks(truncated, 1, W, dim, None, r)[0]
    best = (W - torch.mm(*oracle.truncate(W, r))).norm()
    assert (W - result.left @ result.right).norm() - best <= 1e-13 * W.norm()
    assert result.left.isfinite().all()
    assert result.right.isfinite().all()


@KINDS
@SHAPES
@pytest.mark.parametrize("tokens", [300, 15], ids=["full moment", "deficient moment"])
@pytest.mark.parametrize("r", [1, 8, 18])
def test_activation_aware_truncation_reaches_the_minimum(shape, tokens, r, dim):
    """A moment of 15 tokens has rank 15: past it nothing is left to explain, and nothing breaks down."""
    W, C = normal(*shape), second_moment(shape[1], tokens)
    result, energies = run_ranks(truncated, 1, W, dim, moment_of(W, C, dim), r)[0]
    zero_error = oracle.output_error(W, torch.zeros_like(W), C)
    least = oracle.output_error(W, torch.mm(*oracle.truncate_for_activations(W, C, r)), C)
    reached = oracle.output_error(W, result.left @ result.right, C)
    assert (reached - least).abs() <= 1e-12 * zero_error
    assert_balanced(result)
    assert (result.left.norm(dim=0) > 1e-3).all()  # a zero column could never learn
    ratios = truncation.explained_ratios(energies)
    torch.testing.assert_close(ratios[r], 1 - reached / zero_error, rtol=0, atol=1e-12)
    assert torch.equal(ratios[[0, -1]], torch.tensor([0.0, 1.0], dtype=torch.float64))
    expected = oracle.output_energies(W, C)
    known = min(len(expected), len(energies))
    torch.testing.assert_close(energies[:known], expected[:known], rtol=0, atol=1e-12 * float(zero_error))


def test_activations_change_what_is_kept():
    """Otherwise plain truncation would do: on the inputs' strong directions it errs several times as much."""
    W, C = normal(48, 20), second_moment(20, 300)
    errors = [
        oracle.output_error(W, result.left @ result.right, C)
        for result, _ in (run_ranks(truncated, 1, W, COLUMN, moment, 6)[0] for moment in (None, C))
    ]
    assert errors[0] > 3 * errors[1]


def test_nothing_to_explain():
    assert torch.equal(truncation.explained_ratios(torch.zeros(3)), torch.ones(4))


def failure(rank: int, world_size: int, *args) -> str:
    try:
        truncated(rank, world_size, *args)
    except UserError as error:
        return str(error)
    return "none"


@KINDS
@pytest.mark.parametrize("where", ["matrix", "moment"])
def test_values_that_are_not_finite_are_named(where, dim):
    W, C = normal(48, 20), second_moment(20, 300)
    moment = moment_of(W, C, dim) if where == "moment" else None
    (W if moment is None else moment)[2, 3] = float("nan")
    message = run_ranks(failure, 1, W, dim, moment, 5)[0]
    subject = "fc1" if moment is None else "fc1, or the moment of its activations,"
    assert message.startswith(f"{subject} at step 7 holds NaN or Inf")
