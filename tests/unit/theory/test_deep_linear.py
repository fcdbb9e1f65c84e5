"""Gradients of deep linear networks against autograd, and what descent does with them."""

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch

from inrank_megatron.theory.deep_linear import descend, gradients, product, random_layers
from inrank_megatron.theory.recovery import sensing

PROBLEM = sensing(6, (1.0, 0.5), measurements=200, seed=0)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradients_are_those_of_autograd(depth):
    rng = np.random.default_rng(0)
    widths = [*[6, 3, 4, 5][:depth], 6]
    layers = [rng.standard_normal((o, i)) for i, o in pairwise(widths)]
    tensors = [torch.tensor(layer, requires_grad=True) for layer in layers]
    a = reduce(lambda below, layer: layer @ below, tensors)
    (torch.tensor(PROBLEM.x) @ (a - torch.tensor(PROBLEM.planted)).flatten()).square().sum().div(2).backward()
    found = gradients(layers, PROBLEM.gradient(product(layers)))
    for one, tensor in zip(found, tensors, strict=True):
        assert one == pytest.approx(tensor.grad.numpy())


def test_descent_ends_where_it_stands_still_and_says_after_how_many_steps():
    seen: list[int] = []
    first = random_layers(6, 2, seed=0, scale=0.5)
    layers, steps = descend(
        PROBLEM,
        first,
        rate=0.1,
        steps=9000,
        watch=lambda n, a: seen.append(n),
    )
    assert PROBLEM.cost(product(layers)) < 1e-12 and steps < 9000 and seen == list(range(steps + 1))
    _, cut = descend(PROBLEM, first, rate=0.1, steps=5)
    assert cut == 5
