"""Truncation weighed by loss gradients, on shards, against the dense oracle."""

import pytest
import torch
from torch import Tensor

from inrank_megatron.engine.linears import Linear
from inrank_megatron.engine.truncation import Weighing, truncated
from inrank_megatron.lowrank.linalg import oracle
from inrank_megatron.lowrank.linalg.factors import gather_matrix
from tests.groups import join
from tests.harness import run_ranks

SIZES = {"wide": (24, 10), "narrow": (10, 24), "square": (12, 12)}
RANK = 4


def problem(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """W [O, I], C [I, I] and D [O], whose last features have next to no gradient."""
    generator = torch.Generator().manual_seed(len(name))
    o, i = SIZES[name]
    W = torch.randn(o, i, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * i, i, generator=generator, dtype=torch.float64) * torch.arange(1, i + 1)
    D = torch.rand(o, generator=generator, dtype=torch.float64) + 0.1
    D[-o // 4 :] = 1e-6 * D.mean()
    return W, x.t() @ x / len(x), D


def truncate_shards(rank: int, world_size: int, row_parallel: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Whole factors of every matrix, gathered."""
    parallel = join(world_size)
    problems = {name: problem(name) for name in SIZES}
    layers = {
        name: Linear(None, *SIZES[name], row_parallel, False, parallel.tp_group, None) for name in SIZES
    }

    def own(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(world_size, dim)[rank]

    moments, outputs = {}, {}
    for name, (W, C, D) in problems.items():
        moments[name] = W @ C @ W.t() if row_parallel else C
        outputs[name] = D.sqrt() if row_parallel else own(D.sqrt(), 0)
    shards = truncated(
        layers,
        lambda name: own(problems[name][0], 1 if row_parallel else 0),
        dict.fromkeys(SIZES, RANK),
        parallel,
        what="the weight",
        step=0,
        device=torch.device("cpu"),
        weighing=Weighing(moments, outputs),
    )
    return {
        name: (gather_matrix(left, 0, parallel.tp_group), gather_matrix(right, 1, parallel.tp_group))
        for name, (left, right) in shards.items()
    }


@pytest.mark.parametrize("row_parallel", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_factors_match_the_oracle(ranks, row_parallel):
    """Rows that hardly matter to the loss come out as exactly as all others, and both factors balance."""
    for factors in run_ranks(truncate_shards, ranks, row_parallel):
        for name, (left, right) in factors.items():
            W, C, D = problem(name)
            expected = torch.mm(*oracle.truncate_for_loss(W, C, D, RANK))
            got = left.double() @ right.double()
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(W.norm()))
            torch.testing.assert_close(left.square().sum(0), right.square().sum(1), rtol=1e-5, atol=0)


def test_feature_without_gradient_is_fitted_after_the_others():
    """As its weight goes to zero its row of the minimiser tends to the regression on what is kept."""
    W, C, D = problem("wide")
    weighed = D > 1e-3
    kept = torch.mm(*oracle.truncate_for_loss(W[weighed], C, D[weighed], RANK))
    basis = torch.linalg.svd(kept, full_matrices=False).Vh[:RANK]
    regression = W @ C @ basis.t() @ torch.linalg.inv(basis @ C @ basis.t()) @ basis
    truncated = torch.mm(*oracle.truncate_for_loss(W, C, D, RANK))
    torch.testing.assert_close(truncated, regression, rtol=0, atol=1e-3 * float(W.norm()))
