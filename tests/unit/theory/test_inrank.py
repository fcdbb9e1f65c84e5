"""Algorithm 2 on planted problems: from W0 = 0 it finds what algorithm 1 finds."""

import numpy as np
import pytest

from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.theory.inrank import grow
from inrank_megatron.theory.recovery import sensing


def rule(threshold: float, *, initial: int = 1, buffer: int = 1) -> GrowthRule:
    return GrowthRule(initial_rank=initial, buffer=buffer, threshold=threshold, interval=25, max_rank=7)


def test_from_zero_it_finds_the_planted_rank_one_after_the_other():
    problem = sensing(10, (1.0, 0.7, 0.4), measurements=80, seed=0)
    grown = grow(problem, np.zeros((10, 10)), rule(0.99), steps=4000)
    assert [rank for _, rank in grown.ranks] == [1, 2, 3] and grown.columns == 4
    assert np.linalg.matrix_rank(grown.of_rank(), tol=1e-6) == 3
    assert problem.error(grown.of_rank()) < 0.01


def test_a_lower_threshold_leaves_the_smallest_value_to_the_buffer():
    """The buffer is trained as well, so the cost falls all the same."""
    problem = sensing(10, (1.0, 0.7, 0.2), measurements=80, seed=0)
    grown = grow(problem, np.zeros((10, 10)), rule(0.9), steps=2000)
    assert grown.rank == 2 and problem.error(grown.a) < 0.05 < problem.error(grown.of_rank())


def test_w0_is_part_of_the_matrix_and_what_no_measurement_sees_of_it_stays():
    problem = sensing(10, (1.0, 0.4), measurements=80, seed=0)
    base = np.random.default_rng(1).standard_normal((10, 10)) / np.sqrt(10)
    grown = grow(problem, base, rule(0.99, buffer=2), steps=3000)
    assert grown.a == pytest.approx(base + grown.update)
    assert problem.cost(grown.a) < 1e-3 * problem.cost(base) and problem.error(grown.a) > 1
    assert grown.rank > 3
