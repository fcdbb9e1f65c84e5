"""Planted problems: their gradient, their minimum, and the best cost of a rank."""

import numpy as np
import pytest
import torch

from inrank_megatron.theory.recovery import Problem, best_cost, completion, sensing

VALUES = (1.0, 0.5)


@pytest.fixture(params=[sensing, completion], ids=lambda make: make.__name__)
def problem(request) -> Problem:
    return request.param(8, VALUES, measurements=50, seed=0)


def test_the_minimum_is_at_a_matrix_of_the_planted_values(problem):
    assert np.linalg.svd(problem.planted)[1][:3] == pytest.approx([*VALUES, 0], abs=1e-12)
    assert problem.cost(problem.planted) == problem.error(problem.planted) == 0
    assert problem.x.shape == (50, 64) and np.linalg.matrix_rank(problem.x) == 50


def test_the_gradient_is_that_of_the_cost(problem):
    a = torch.tensor(np.random.default_rng(0).standard_normal((8, 8)), requires_grad=True)
    rest = torch.tensor(problem.x) @ (a - torch.tensor(problem.planted)).flatten()
    (rest.square().sum() / 2).backward()
    assert problem.gradient(a.detach().numpy()) == pytest.approx(a.grad.numpy())
    assert problem.cost(a.detach().numpy()) == pytest.approx(rest.detach().square().sum().item() / 2)


def test_the_best_cost_is_exact_where_all_entries_are_known_and_zero_at_the_planted_rank(problem):
    """With all entries the best matrix of a rank is the truncated SVD; the scale is one then."""
    known = completion(8, VALUES, measurements=64, seed=0)
    assert best_cost(known, 1) == pytest.approx(VALUES[1] ** 2 / 2, rel=1e-9)
    assert best_cost(problem, 2) < 1e-12 < best_cost(problem, 1)
