"""Matrices of planted rank that are to be found from few numbers: matrix sensing and matrix completion.

Letters: n rows and columns of A, m measurements. Everything is FP64 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A convex cost ``C(A) = |x vec(A - planted)|^2 / 2`` with ``x`` [m, n n]; its minimum is zero."""

    name: str
    planted: Array
    x: Array

    def cost(self, a: Array) -> float:
        return float(np.square(self.x @ (a - self.planted).ravel()).sum() / 2)

    def gradient(self, a: Array) -> Array:
        return (self.x.T @ (self.x @ (a - self.planted).ravel())).reshape(a.shape)

    def error(self, a: Array) -> float:
        """Distance from the planted matrix, over that matrix's norm."""
        return float(np.linalg.norm(a - self.planted) / np.linalg.norm(self.planted))


def planted(n: int, values: Sequence[float], seed: int) -> Array:
    """A matrix [n, n] with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for _ in range(2))
    return left * np.asarray(values) @ right.T


def sensing(n: int, values: Sequence[float], *, measurements: int, seed: int) -> Problem:
    """Inner products with Gaussian matrices, scaled so that C is on average half the squared distance."""
    x = np.random.default_rng(1000 + seed).standard_normal((measurements, n * n))
    return Problem("sensing", planted(n, values, seed), x / np.sqrt(measurements))


def completion(n: int, values: Sequence[float], *, measurements: int, seed: int) -> Problem:
    """Some of the entries, drawn without replacement and scaled alike."""
    places = np.random.default_rng(1000 + seed).permutation(n * n)[:measurements]
    return Problem("completion", planted(n, values, seed), np.eye(n * n)[places] * n / np.sqrt(measurements))


def best_cost(problem: Problem, rank: int, *, starts: int = 3, sweeps: int = 300) -> float:
    """The least cost of a matrix of ``rank`` that alternating least squares finds from several starts."""
    rng = np.random.default_rng(0)
    right = np.linalg.svd(problem.gradient(np.zeros_like(problem.planted)))[2][:rank]
    tries = [right, *(rng.standard_normal(right.shape) for _ in range(starts - 1))]
    return min(_alternate(problem, right, sweeps) for right in tries)


def _alternate(problem: Problem, right: Array, sweeps: int) -> float:
    """Least squares for U with V = ``right`` [r, n] fixed, then for V with U fixed, and so on."""
    n, r = len(problem.planted), len(right)
    x, y = problem.x.reshape(-1, n, n), problem.x @ problem.planted.ravel()
    costs = [np.inf]
    for _ in range(sweeps):
        left = np.linalg.lstsq((x @ right.T).reshape(-1, n * r), y)[0].reshape(n, r)
        left = np.linalg.qr(left)[0]
        right = np.linalg.lstsq((left.T @ x).reshape(-1, r * n), y)[0].reshape(r, n)
        costs.append(problem.cost(left @ right))
        if costs[-2] - costs[-1] <= 1e-14 * costs[1]:
            break
    return costs[-1]
