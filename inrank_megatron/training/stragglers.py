"""Which rank is slower than the others, step after step, from the times that all ranks have sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

INTERVAL = 10  # steps after which ranks send their times, unless lines of metrics are further apart
LOOK_SECONDS = 2.0  # of work that a look is over at least: a shared core is uneven for as long
FACTOR = 4 / 3  # a score of 0.75: the default threshold of NVIDIA's resiliency extension
PATIENCE = 3  # looks in a row: a pause during one of them is none


@dataclass(frozen=True)
class Straggler:
    """``seconds`` per step of ``rank`` on ``host``; ``factor``: over the median of the other ranks."""

    rank: int
    host: str
    seconds: float
    factor: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} takes {self.factor:.1f} times as long as the other ranks"


class Stragglers:
    """Remembers which ranks were slow at the last looks. Args: ``hosts``: of each rank."""

    def __init__(self, hosts: Sequence[str]):
        self._hosts = hosts
        self._slow_looks = [0] * len(hosts)
        self._sums, self._count = [0.0] * len(hosts), 0
        self.known: dict[int, Straggler] = {}

    def add(self, seconds: Sequence[float], steps: int) -> tuple[list[Straggler], list[int]]:
        """What is new with the ``seconds`` per step of each rank over more ``steps``: stragglers, and ranks
        that were.

        A rank counts as slow if it takes ``FACTOR`` times the median of the others, and as a straggler after
        ``PATIENCE`` such looks in a row.
        """
        self._sums = [total + steps * own for total, own in zip(self._sums, seconds, strict=True)]
        self._count += steps
        if max(self._sums) < LOOK_SECONDS:
            return [], []
        means = [total / self._count for total in self._sums]
        self._sums, self._count = [0.0] * len(seconds), 0
        return self._look(means)

    def _look(self, seconds: Sequence[float]) -> tuple[list[Straggler], list[int]]:
        slow = {rank: found for rank in range(len(seconds)) if (found := self._slow(rank, seconds))}
        self._slow_looks = [count + 1 if rank in slow else 0 for rank, count in enumerate(self._slow_looks)]
        now = {rank: found for rank, found in slow.items() if self._slow_looks[rank] >= PATIENCE}
        new = [found for rank, found in now.items() if rank not in self.known]
        over = [rank for rank in self.known if rank not in slow]
        self.known = now
        return new, over

    def _slow(self, rank: int, seconds: Sequence[float]) -> Straggler | None:
        others = [value for other, value in enumerate(seconds) if other != rank]
        usual = median(others) if others else 0.0
        if usual <= 0.0 or seconds[rank] < FACTOR * usual:
            return None
        return Straggler(rank, self._hosts[rank], seconds[rank], seconds[rank] / usual)
