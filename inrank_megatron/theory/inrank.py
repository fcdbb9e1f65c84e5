"""InRank's algorithm 2 on a matrix that is to be found from few numbers: ``A = W0 + U V``, W0 frozen.

The growth rule is the one of real runs; what is different here is plain gradient descent in place of AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.theory.recovery import Array, Problem


@dataclass(frozen=True)
class Grown:
    """What algorithm 2 ends with.

    Attributes:
        rank, columns: r, and the trained columns r + b.
        a: the whole matrix. update: ``U V``, of all columns.
        steps: taken. ranks: the step and the new rank of each growth.
    """

    rank: int
    columns: int
    a: Array
    update: Array
    steps: int
    ranks: list[tuple[int, int]]

    def of_rank(self) -> Array:
        """A with the update's best approximation of rank r, so without the buffer."""
        left, values, right = np.linalg.svd(self.update)
        kept = left[:, : self.rank] * values[: self.rank] @ right[: self.rank]
        return self.a - self.update + kept


def grow(
    problem: Problem,
    base: Array,
    rule: GrowthRule,
    *,
    size: float = 0.05,
    tolerance: float = 1e-10,
    rate: float = 0.1,
    steps: int = 10_000,
    watch: Callable[[int, Array], None] = lambda step, update: None,
) -> Grown:
    """Train ``U V`` by gradient descent on the cost and raise its rank by ``rule``.

    The first columns are the first singular vectors of the gradient at W0, as in algorithm 2; those added
    later are Gaussian and of a fifth of that norm, the proportion of the project's defaults.

    Args:
        base: W0 [n, n].
        size: norm of the first columns of U, and of the first rows of V.
        tolerance: it ends where the cost is at most this part of the cost of zero.
        steps: at most.
        watch: called before each step with its number and ``U V``.
    """
    n, b = len(base), rule.buffer_of(len(base))
    rank, added = rule.initial_rank, np.random.default_rng(0)
    first, _, last = np.linalg.svd(problem.gradient(base))
    u, v = -size * first[:, : rank + b], size * last[: rank + b]
    u0, v0, ranks = u, v, [(0, rank)]
    enough = tolerance * problem.cost(np.zeros_like(base))
    step = 0
    while step < steps and problem.cost(base + u @ v) > enough:
        watch(step, u @ v)
        slope = problem.gradient(base + u @ v)
        u, v = u - rate * slope @ v.T, v - rate * u.T @ slope
        step += 1
        if rule.due(step):
            values = np.linalg.svd(u @ v - u0 @ v0, compute_uv=False)
            found = rule.check(_view(values, rank, columns=rank + b, capacity=rule.capacity(n))).rank
            if found > rank:
                more, below = (_columns(added, (n, found - rank), norm=size / 5) for _ in range(2))
                u, v = np.hstack([u, more]), np.vstack([v, below.T])
                u0, v0 = np.hstack([u0, more]), np.vstack([v0, below.T])
                rank = found
                ranks.append((step, rank))
    return Grown(rank, rank + b, base + u @ v, u @ v, step, ranks)


def _view(values: Array, rank: int, *, columns: int, capacity: int) -> LayerView:
    return LayerView(
        name="planted",
        output_size=len(values),
        input_size=len(values),
        rank=rank,
        active_columns=columns,
        capacity=capacity,
        attainable_rank=len(values),
        singular_values=tuple(values.tolist()),
    )


def _columns(generator: np.random.Generator, shape: tuple[int, int], *, norm: float) -> Array:
    drawn = generator.standard_normal(shape)
    return norm * drawn / np.linalg.norm(drawn, axis=0)
