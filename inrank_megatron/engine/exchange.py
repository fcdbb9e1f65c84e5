"""Matrices of which replicas hold parts: each put together on one replica, and what becomes of it sent back.

Each replica computes a share of them, so that none is computed twice. Where a replica holds all of a matrix,
as nearly always in ZeRO 1 and 2, nothing is sent. In ZeRO 3, where each holds a part of every one, each sends
(n - 1) / n of what it holds there and of its share back, n the replicas. Without ZeRO nothing is sent there,
and the results back to all.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Run = tuple[int, int]
"""First entry and number of entries that a replica holds of a flattened matrix."""


class Exchange:
    """Of one list of matrices. Both ways are collective over the replicas.

    Args:
        runs: what every replica holds of each; (0, 0) for nothing.
        sizes: entries of each.
        owner: the replica that computes each.

    Attributes:
        own: those that this replica computes, by their places in the list.
    """

    def __init__(self, runs: list[list[Run]], sizes: list[int], owner: list[int], group: ProcessGroup):
        self._runs, self._sizes, self._group, self._rank = runs, sizes, group, group.rank()
        self.own = [index for index, rank in enumerate(owner) if rank == self._rank]
        ranks, places = range(group.size()), range(len(sizes))
        held = [{i for i in places if self._runs[rank][i][1]} for rank in ranks]
        # Which matrices are on the way from a holder to an owner, and back to a holder, [from][to].
        lacking = [i for i in places if self._runs[owner[i]][i][1] < sizes[i]]
        self._there = [
            [[i for i in lacking if owner[i] == to != rank and i in held[rank]] for to in ranks]
            for rank in ranks
        ]
        self._back = [
            [[i for i in places if owner[i] == rank != to and i in held[to]] for to in ranks]
            for rank in ranks
        ]

    def collect(self, parts: list[Tensor]) -> dict[int, Tensor]:
        """The matrices of ``own`` by place, flat and new, from each replica's ``parts`` of all: flat, on one
        device, of one type.
        """
        wholes = {i: parts[i].new_empty(self._sizes[i]) for i in self.own}
        arrived = self._swap(
            self._there, lambda i, to: parts[i], lambda i, source: self._runs[source][i][1], like=parts[0]
        )
        for (source, i), part in (arrived | {(self._rank, i): parts[i] for i in self.own}).items():
            _part(wholes[i], self._runs[source][i]).copy_(part)
        return wholes

    def spread(self, wholes: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """This replica's part of every matrix by place, from the ``wholes`` of all replicas' ``own``; nothing
        of what it has no part of. ``like``: of their type, on their device.
        """
        arrived = self._swap(
            self._back,
            lambda i, to: _part(wholes[i], self._runs[to][i]),
            lambda i, source: self._runs[self._rank][i][1],
            like=like,
        )
        own = {i: _part(wholes[i], self._runs[self._rank][i]) for i in self.own}
        return own | {i: part for (_, i), part in arrived.items()}

    def _swap(
        self,
        plan: list[list[list[int]]],
        piece: Callable[[int, int], Tensor],
        count: Callable[[int, int], int],
        *,
        like: Tensor,
    ) -> dict[tuple[int, int], Tensor]:
        """What arrives, by replica and place.

        Args:
            piece: what goes, of (place, to whom). count: entries of what arrives, of (place, from whom).
        """
        if not any(any(row) for row in plan):
            return {}
        ranks = range(len(plan))
        sent = [[piece(i, to) for i in plan[self._rank][to]] for to in ranks]
        arriving = [(source, i) for source in ranks for i in plan[source][self._rank]]
        counts = [count(i, source) for source, i in arriving]
        received = like.new_empty(sum(counts))
        dist.all_to_all_single(
            received,
            torch.cat([like.new_empty(0), *(part for parts in sent for part in parts)]),
            [sum(count(i, source) for i in plan[source][self._rank]) for source in ranks],
            [sum(part.numel() for part in parts) for parts in sent],
            group=self._group,
        )
        return dict(zip(arriving, received.split(counts), strict=True))


def owners(held: list[list[int]], work: list[float]) -> list[int]:
    """The replica that computes each matrix: of those that hold much of it the one with least to do so far.

    Args:
        held: by replica, the entries that it holds of each matrix. Much is half of what the largest part has:
            the last one of several even ones is often cut short.
        work: operations of each.
    """
    load, result = [0.0] * len(held), [0] * len(work)
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        counts = [counts[index] for counts in held]
        candidates = [rank for rank, count in enumerate(counts) if 2 * count >= max(counts)]
        result[index] = min(candidates, key=load.__getitem__)
        load[result[index]] += work[index]
    return result


def _part(whole: Tensor, run: Run) -> Tensor:
    return whole[run[0] : run[0] + run[1]]
