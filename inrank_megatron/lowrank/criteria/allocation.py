"""Chooses final ranks from the energies of the layers' outputs. Pure functions of numbers.

``e`` are a layer's energies in descending order: those past r add up to the least error of rank r. Counts of
columns that are handed out are multiples of a tile m, except where a layer's largest rank cuts the last tile.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Demand:
    """What one layer gains and pays for columns from a shared budget.

    Args:
        energies: descending, in a unit in which layers can be compared.
        cost: parameters of one column, O + I.
        most: the largest number of columns it may have.
    """

    energies: Sequence[float]
    cost: int
    most: int


def explaining_rank(e: Sequence[float], threshold: float) -> int:
    """The smallest r >= 1 that leaves at most ``1 - threshold`` of the sum of ``e`` unexplained."""
    # Summed from the smallest up, so that a tail far below the total keeps its digits.
    tails = [0.0, *accumulate(reversed(e))]
    allowed = tails[-1] - threshold * tails[-1]
    return next(r for r in range(1, len(e) + 1) if tails[len(e) - r] <= allowed)


def share_budget(demands: Mapping[str, Demand], budget: int, *, tile: int = 1) -> dict[str, int]:
    """Columns of every layer, at most ``budget`` parameters in all, that keep the most energy.

    Every layer gets one tile. The others are given out one by one, each to the layer where it keeps the most
    energy per parameter. Energies descend, so up to the first tile that does not fit, no other division of as
    many parameters keeps more (Lagrange; exact if all columns cost the same). Later tiles that still fit use
    up the rest of the budget.

    Raises:
        ValueError: the budget is too small for one tile in every layer.
    """
    columns = {name: min(tile, d.most) for name, d in demands.items()}
    left = budget - sum(columns[name] * d.cost for name, d in demands.items())
    if left < 0:
        raise ValueError(f"a budget of {budget} parameters lacks {-left} for {tile} columns of every layer")
    queue = [_offer(name, d, columns[name], tile) for name, d in demands.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        d, width = demands[name], min(tile, demands[name].most - columns[name])
        if width > 0 and width * d.cost <= left:
            columns[name] += width
            left -= width * d.cost
            heapq.heappush(queue, _offer(name, d, columns[name], tile))
    return columns


def _offer(name: str, demand: Demand, columns: int, tile: int) -> tuple[float, str]:
    """The next tile's energy per parameter, negative because the heap gives the smallest first."""
    width = max(1, min(tile, demand.most - columns))
    return -sum(demand.energies[columns : columns + width]) / (width * demand.cost), name
