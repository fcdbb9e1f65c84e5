"""Matrices of which replicas hold parts: together on one of them, and back."""

import pytest
import torch
import torch.distributed as dist

from inrank_megatron.engine.exchange import Exchange, owners
from tests.harness import run_ranks

SIZES = [12, 7, 1, 30]
WHOLES = [torch.arange(size) + 100.0 * index for index, size in enumerate(SIZES)]
# What each of two replicas holds: of all, of a part, of all of some, of an uneven part.
RUNS = {
    "without ZeRO": [[(0, size) for size in SIZES]] * 2,
    "ZeRO 2": [[(0, 12), (0, 5), (0, 0), (0, 0)], [(0, 0), (5, 2), (0, 1), (0, 30)]],
    "ZeRO 3": [[(0, 6), (0, 4), (0, 1), (0, 15)], [(6, 6), (4, 3), (1, 0), (15, 15)]],
}


def there_and_back(rank, world_size, runs):
    parts = [whole[start : start + count] for whole, (start, count) in zip(WHOLES, runs[rank], strict=True)]
    owner = owners([[count for _, count in held] for held in runs], [float(size) for size in SIZES])
    exchange = Exchange(runs, SIZES, owner, dist.group.WORLD)
    wholes = exchange.collect(parts)
    assert all(torch.equal(whole, WHOLES[i]) for i, whole in wholes.items())
    back = exchange.spread({i: -whole for i, whole in wholes.items()}, like=torch.empty(0))
    assert all(torch.equal(back[i], -part) for i, part in enumerate(parts) if part.numel())
    return exchange.own


@pytest.mark.parametrize("runs", RUNS)
def test_parts_come_together_on_one_replica_and_go_back(runs):
    """Each matrix on one replica alone, and work on both."""
    own = run_ranks(there_and_back, 2, RUNS[runs])
    assert sorted(own[0] + own[1]) == [0, 1, 2, 3]
    assert all(own)


def test_who_holds_all_computes_it():
    assert owners([[12, 0, 0], [0, 7, 9]], [1.0, 1.0, 1.0]) == [0, 1, 1]


def test_work_is_even_where_all_hold_alike():
    """As in ZeRO 3, whose last replica has a little less."""
    held = [[10] * 6, [10] * 6, [8] * 6]
    work = [5.0, 3.0, 3.0, 2.0, 1.0, 1.0]
    owner = owners(held, work)
    loads = [sum(w for w, o in zip(work, owner, strict=True) if o == rank) for rank in range(3)]
    assert loads == [5.0, 5.0, 5.0]
