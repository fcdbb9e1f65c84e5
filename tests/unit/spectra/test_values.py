"""Singular values against numpy: exact, randomised, and of shards on real ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import group

from inrank_megatron.spectra.values import exact_values, leading_values
from tests.harness import run_ranks

SHARES = ([40, 0, 13, 7], [15, 15, 15, 15])


def spread(m: int = 300, h: int = 200) -> Tensor:
    """A matrix whose i-th singular value is 1 / i."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(s, h, generator=generator).double()).Q for s in (m, h))
    return left / torch.arange(1, h + 1) @ right.t()


def of_shards(rank: int, world_size: int, whole: Tensor, sizes: list[int]) -> tuple[list, list]:
    shard = whole.split(sizes)[rank]
    return exact_values(shard, group.WORLD).tolist(), leading_values(shard, 8, group.WORLD).tolist()


def test_the_randomised_values_are_close_and_never_above():
    found, exact = leading_values(spread(), 20), 1 / np.arange(1, 21)
    assert len(found) == 20 and (found.numpy() <= exact * (1 + 1e-12)).all()
    assert found[:5].numpy() == pytest.approx(exact[:5], rel=1e-4)
    assert found.numpy() == pytest.approx(exact, rel=0.02)


def test_a_matrix_of_lower_rank_is_decomposed_to_rounding():
    low = spread()[:, :12] @ torch.randn(12, 90, generator=torch.Generator().manual_seed(1)).double()
    exact = np.linalg.svd(low.numpy(), compute_uv=False)
    assert leading_values(low, 20)[:12].numpy() == pytest.approx(exact[:12], rel=1e-10)


@pytest.mark.parametrize("sizes", SHARES, ids=("uneven", "even"))
def test_shards_have_the_values_of_the_whole_on_every_rank(sizes):
    whole = spread(60, 24)
    exact, leading = exact_values(whole).tolist(), leading_values(whole, 8).tolist()
    for found in run_ranks(of_shards, 4, whole, sizes):
        assert found[0] == pytest.approx(exact, rel=1e-9)
        assert found[1] == pytest.approx(leading, rel=1e-9)
