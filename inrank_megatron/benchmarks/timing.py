"""Times of alternatives, taken in turns so that a change of the machine's load falls on all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each alternative, one a round; the i-th entries of all belong to the same round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median over the rounds, seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of ``name`` over ``other``: steadier under load than a ratio of medians."""
        return statistics.median(self._ratios(name, other))

    def interval(self, name: str, other: str) -> tuple[float, float]:
        """Between which ratios the median of ever more rounds would lie, with 95 % confidence at least.

        By the sign test, which assumes nothing of how the ratios scatter; the extremes below six rounds.
        """
        ratios, chance, outside = sorted(self._ratios(name, other)), 0.0, -1
        while chance <= 0.025:
            outside += 1
            chance += math.comb(len(ratios), outside) / 2 ** len(ratios)
        first = max(0, outside - 1)
        return ratios[first], ratios[-1 - first]

    def _ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Run every alternative once to warm up, then in ``repeats`` rounds, each starting one further on.

    Args:
        clock: seconds; ``time.process_time`` for the CPU time of this process, which other programs on the
            machine hardly change.
    """
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_seconds(alternatives[name], clock))
    return Times(seconds)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    _wait_for_device()
    start = clock()
    run()
    _wait_for_device()
    return clock() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
