"""From a spectrum to the next rank: explained ratios and growth. Pure functions of numbers.

``s`` is a spectrum in descending order, ``r`` the rank, ``b`` the buffer. Variances are population variances.
The ratio of an all-zero spectrum is 1: nothing was learnt, so no rank is too small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Growth:
    """A decided rank: ``rank`` >= the rank before, its explained ratio, and whether a limit stopped the
    growth.
    """

    rank: int
    explained_ratio: float
    capped: bool


def update_ratio(s: Sequence[float], r: int, *, length: int) -> float:
    """The released code's ratio, ``1 - var(tail) / var(all)`` over vectors of ``length`` = min(O, I) entries.

    ``s`` is padded with zeros to ``length``; the tail is the same vector with its first ``r`` entries zeroed.
    Taken on the spectrum of the cumulative update (paper, definition 1) it is the criterion ``update``.
    """
    full = np.zeros(length)
    full[: min(len(s), length)] = s[:length]
    tail = full.copy()
    tail[:r] = 0.0
    return _one_minus(tail, full)


def eq7_ratio(s: Sequence[float], r: int, *, start: int, buffer: int, window: str = "sliding") -> float:
    """Equation 7: ``1 - var(s[r+1..r+b]) / var(s[1..r+b])``, for the candidate rank ``r`` of a layer at rank
    ``start``.

    Past the trained ``start + b`` columns the spectrum is zero. ``window``: ``sliding`` moves the window of b
    values with the candidate, padding with zeros; ``fixed`` keeps the window that ends at ``start + b``.
    """
    end = (r if window == "sliding" else start) + buffer
    full = np.zeros(max(end, 1))
    full[: min(len(s), end)] = s[:end]
    tail = full[r:]
    return _one_minus(tail, full) if tail.size else 1.0


def _one_minus(tail: np.ndarray, full: np.ndarray) -> float:
    total = float(np.var(full))
    return 1.0 if total == 0.0 else 1.0 - float(np.var(tail)) / total


def grow(ratio: Callable[[int], float], rank: int, *, threshold: float, limit: int) -> Growth:
    """The smallest rank in [``rank``, ``limit``] whose ratio reaches ``threshold``; ``limit`` if none
    does.
    """
    for candidate in range(rank, limit + 1):
        value = ratio(candidate)
        if value >= threshold:
            return Growth(candidate, value, capped=False)
    return Growth(limit, value, capped=True)
