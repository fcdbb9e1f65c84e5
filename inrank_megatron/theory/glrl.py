"""Greedy low-rank learning, algorithm 1 of InRank (arXiv 2306.11250; Li et al., arXiv 2012.09839).

The paper prints the loop as ``while C(A) < C_min + eps``. It would end before its first pass, because C is
large at the start; from a minimum it would never end. It must be ``while C(A) > C_min + eps``. The paper also
has one letter for this tolerance and for the size of new entries; here they are two numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inrank_megatron.theory.deep_linear import Layers, descend, product
from inrank_megatron.theory.recovery import Array, Problem


@dataclass(frozen=True)
class Stage:
    """The end of the training at one width: the cost C, the matrix A, and the steps so far."""

    width: int
    cost: float
    a: Array
    steps: int


def glrl(
    problem: Problem,
    depth: int,
    *,
    size: float = 0.05,
    tolerance: float = 1e-10,
    rate: float = 0.1,
    steps: int = 40_000,
    most: int | None = None,
    watch: Callable[[int, Array], None] = lambda step, a: None,
) -> list[Stage]:
    """Raise the width of a deep linear network one by one until the cost is at its minimum, which is zero.

    Args:
        depth: layers, L >= 2.
        size: of the new entries of each layer, the paper's epsilon.
        tolerance: on the cost, as a part of C(0).
        rate, steps: of each stage's gradient descent, which ends sooner where it stands still.
        most: widths; None: n.
        watch: called before each step with its number and A.

    Returns:
        The stages; the width of the last is the rank that was found.
    """
    zero = np.zeros_like(problem.planted)
    enough, most = tolerance * problem.cost(zero), most or len(zero)
    layers = _wider(None, problem.gradient(zero), depth, size)
    stages: list[Stage] = []
    while not stages or (stages[-1].cost > enough and stages[-1].width < most):
        if stages:
            layers = _wider(layers, problem.gradient(stages[-1].a), depth, size)
        before = stages[-1].steps if stages else 0
        layers, taken = descend(problem, layers, rate=rate, steps=steps, first=before, watch=watch)
        a = product(layers)
        stages.append(Stage(layers[0].shape[0], problem.cost(a), a, before + taken))
    return stages


def _wider(layers: Layers | None, slope: Array, depth: int, size: float) -> Layers:
    """One more unit between all layers, along the first singular vectors u, v of the gradient ``slope``.

    W^1 gets the row ``-size v^T``, W^L the column ``size u``, those between ``size`` on their diagonal; so A
    changes by ``-size^L u v^T``.
    """
    left, _, right = np.linalg.svd(slope)
    first, last, between = -size * right[:1], size * left[:, :1], np.full((1, 1), size)
    if layers is None:
        return [first, *[between] * (depth - 2), last]
    return [
        np.vstack([layers[0], first]),
        *(np.block([[w, np.zeros((len(w), 1))], [np.zeros((1, len(w))), between]]) for w in layers[1:-1]),
        np.hstack([layers[-1], last]),
    ]
