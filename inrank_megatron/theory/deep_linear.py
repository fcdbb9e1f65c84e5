"""Deep linear networks ``A = W^L ... W^1``, trained by gradient descent on a cost of A."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from inrank_megatron.theory.recovery import Array, Problem

Layers = list[Array]
"""W^1 to W^L, the first applied first."""


def product(layers: Sequence[Array]) -> Array:
    """A, the matrix of the whole network."""
    return reduce(lambda a, layer: layer @ a, layers)


def gradients(layers: Sequence[Array], slope: Array) -> Layers:
    """Of the cost by each layer: ``(W^L ... W^l+1)^T slope (W^l-1 ... W^1)^T``; ``slope`` is that by A."""
    below: list[Array | None] = [None]
    for layer in layers[:-1]:
        below.append(layer if below[-1] is None else layer @ below[-1])
    found: Layers = []
    for layer, under in zip(reversed(layers), reversed(below), strict=True):
        found.insert(0, slope if under is None else slope @ under.T)
        slope = layer.T @ slope
    return found


def descend(
    problem: Problem,
    layers: Layers,
    *,
    rate: float,
    steps: int,
    first: int = 0,
    watch: Callable[[int, Array], None] = lambda step, a: None,
    until: float = 1e-8,
) -> tuple[Layers, int]:
    """Gradient descent on the cost of the layers' product A.

    Args:
        rate: learning rate.
        steps: at most.
        first: number of the first step.
        watch: called before each step with its number and A.
        until: it ends where no layer's gradient has a larger norm.

    Returns:
        The layers, and the number of steps taken.
    """
    for step in range(steps):
        a = product(layers)
        watch(first + step, a)
        found = gradients(layers, problem.gradient(a))
        if max(float(np.linalg.norm(gradient)) for gradient in found) <= until:
            return layers, step
        layers = [layer - rate * gradient for layer, gradient in zip(layers, found, strict=True)]
    return layers, steps


def random_layers(n: int, depth: int, *, seed: int, scale: float) -> Layers:
    """``depth`` Gaussian layers [n, n], the standard deviation of whose entries is ``scale / sqrt(n)``."""
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((n, n)) / np.sqrt(n) for _ in range(depth)]
