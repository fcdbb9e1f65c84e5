"""Ranks from energies: against brute force, and by hand."""

import itertools

import numpy as np
import pytest

from inrank_megatron.lowrank.criteria.allocation import Demand, explaining_rank, share_budget


def random_demands(seed: int, *, costs: tuple[int, ...]) -> dict[str, Demand]:
    numbers = np.random.default_rng(seed)
    return {
        f"layer{i}": Demand(sorted(numbers.exponential(size=5), reverse=True), cost, most=4)
        for i, cost in enumerate(costs)
    }


def kept(demands: dict[str, Demand], columns: dict[str, int]) -> float:
    return sum(sum(d.energies[: columns[name]]) for name, d in demands.items())


def spent(demands: dict[str, Demand], columns: dict[str, int]) -> int:
    return sum(d.cost * columns[name] for name, d in demands.items())


def most_kept(demands: dict[str, Demand], budget: int, *, tile: int = 1) -> float:
    """By trying everything: multiples of the tile, or all that a layer may have."""
    choices = [[k for k in range(1, d.most + 1) if k % tile == 0 or k == d.most] for d in demands.values()]
    trials = (dict(zip(demands, columns, strict=True)) for columns in itertools.product(*choices))
    return max(kept(demands, trial) for trial in trials if spent(demands, trial) <= budget)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile", [1, 2])
def test_no_sharing_keeps_more_where_columns_cost_the_same(seed, tile):
    demands = random_demands(seed, costs=(3, 3, 3))
    for budget in range(9 * tile, 40):
        columns = share_budget(demands, budget, tile=tile)
        assert spent(demands, columns) <= budget
        assert kept(demands, columns) == pytest.approx(most_kept(demands, budget, tile=tile))


@pytest.mark.parametrize("seed", range(4))
def test_unequal_costs_lose_less_than_one_column(seed):
    demands = random_demands(seed, costs=(2, 3, 5))
    for budget in range(10, 45):
        columns = share_budget(demands, budget)
        assert spent(demands, columns) <= budget
        shortfall = most_kept(demands, budget) - kept(demands, columns)
        nearest = [d.energies[columns[name]] for name, d in demands.items() if columns[name] < d.most]
        assert shortfall <= max(nearest, default=0.0) + 1e-12


def test_unequal_costs_are_weighed_against_the_energy():
    """By hand: after one column each, 5 parameters buy 5 of b, then half of a's next 9, then 4 of b."""
    demands = {"a": Demand([9.5, 9.0], 10, 2), "b": Demand([6.0, 5.0, 4.0, 1.0], 5, 4)}
    assert share_budget(demands, 20) == {"a": 1, "b": 2}
    assert share_budget(demands, 29) == {"a": 1, "b": 3}  # the next column of a does not fit, one of b does
    assert share_budget(demands, 30) == {"a": 2, "b": 2}


def test_tiles_are_whole_except_at_the_width():
    demands = {"a": Demand([9.0, 8.0, 7.0, 6.0, 5.0], 1, 5), "b": Demand([1.0] * 5, 1, 5)}
    assert share_budget(demands, 7, tile=2) == {"a": 5, "b": 2}
    assert share_budget(demands, 6, tile=2) == {"a": 4, "b": 2}


def test_no_layer_has_more_than_it_may():
    assert share_budget({"a": Demand([3.0, 2.0, 1.0], 1, 2)}, 100) == {"a": 2}


def test_a_budget_below_one_tile_each_is_refused():
    demands = {"a": Demand([1.0] * 4, 3, 4), "b": Demand([1.0] * 4, 3, 4)}
    with pytest.raises(ValueError, match="a budget of 11 parameters lacks 1 for 2 columns of every layer"):
        share_budget(demands, 11, tile=2)


@pytest.mark.parametrize(
    ("threshold", "rank"), [(0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.91, 3), (1.0, 3)]
)
def test_smallest_rank_that_explains_enough(threshold, rank):
    assert explaining_rank([6.0, 3.0, 1.0, 0.0], threshold) == rank


def test_a_layer_without_output_needs_one_column():
    assert explaining_rank([0.0, 0.0], 0.9) == 1
