"""Algorithm 1: the rank rises one by one, each stage at the best of its rank, up to the planted rank."""

import numpy as np
import pytest

from inrank_megatron.theory.deep_linear import descend, product, random_layers
from inrank_megatron.theory.glrl import _wider, glrl
from inrank_megatron.theory.recovery import best_cost, completion, sensing

VALUES = (1.0, 0.7, 0.4)


@pytest.mark.parametrize("make", [sensing, completion])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_it_finds_the_planted_rank_by_way_of_the_best_lower_ranks(make, depth):
    problem = make(10, VALUES, measurements=80, seed=0)
    stages = glrl(problem, depth)
    assert [stage.width for stage in stages] == [1, 2, 3]
    for stage in stages[:-1]:
        assert stage.cost == pytest.approx(best_cost(problem, stage.width), rel=1e-6)
        assert np.linalg.matrix_rank(stage.a, tol=1e-3) == stage.width
    assert stages[-1].cost < 1e-12 and problem.error(stages[-1].a) < 1e-5


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_wider_network_is_the_same_but_for_one_step_down_the_gradient(depth):
    """A changes by ``-size^L u v^T``: the first singular vectors of the gradient, with the right sign."""
    slope = np.random.default_rng(0).standard_normal((6, 6))
    u, _, v = np.linalg.svd(slope)
    first = _wider(None, slope, depth, 0.1)
    more = _wider(first, slope.T, depth, 0.1)
    assert [w.shape for w in more] == [(2, 6), *[(2, 2)] * (depth - 2), (6, 2)]
    assert product(first) == pytest.approx(-(0.1**depth) * np.outer(u[:, 0], v[0]))
    u, _, v = np.linalg.svd(slope.T)
    assert product(more) - product(first) == pytest.approx(-(0.1**depth) * np.outer(u[:, 0], v[0]))


def test_it_stops_at_the_given_width_if_the_minimum_is_not_reached():
    problem = sensing(10, VALUES, measurements=80, seed=0)
    assert [stage.width for stage in glrl(problem, 2, most=2)] == [1, 2]


def test_only_a_small_start_of_a_wide_network_finds_the_planted_matrix():
    problem = sensing(10, VALUES, measurements=80, seed=0)
    errors = {
        scale: problem.error(
            product(descend(problem, random_layers(10, 3, seed=0, scale=scale), rate=0.1, steps=6000)[0])
        )
        for scale in (0.05, 1.0)
    }
    assert errors[0.05] < 0.03 and errors[1.0] > 0.3
