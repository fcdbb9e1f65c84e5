"""When a pause of a rank is longer than it may be.

A pause ends when the rank takes a micro-batch, begins another piece of work or enters a collective. It may
last

- for ever before the training begins: preparing a text takes what it takes;
- ``longest`` seconds, after which collectives fail, while work of its kind (a step, an evaluation, a save,
  ...) has not been completed since the session began, switched or rolled back: it may compile, or read cold
  files;
- then ``least`` seconds, or ``TIMES`` the longest pause in the last ``REMEMBERED`` works of that kind if that
  is longer, but no more than ``longest``.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable

from inrank_megatron.distributed.marks import Marks, Work

TIMES = 4
REMEMBERED = 16


class Pauses:
    """The pauses of one rank.

    Args:
        marks: what the rank leaves.
        least, longest: in seconds, see above.
        clock: of seconds.
    """

    def __init__(self, marks: Marks, *, least: float, longest: float, clock: Callable[[], float]):
        self._marks, self._least, self._longest, self._clock = marks, least, longest, clock
        self._known: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._work: Work | None = None
        self._sign: object = None
        self._since = clock()
        self._in_work = 0.0  # the longest pause in the present work

    def see(self, sign: object) -> None:
        """Look at the rank. ``sign``: anything that changes as it gets on with its work."""
        work, sign = self._marks.work, (self._marks.micro_batches, sign)
        if (work, sign) == (self._work, self._sign):
            return
        self._in_work = max(self._in_work, self.seconds)
        self._since = self._clock()
        if work != self._work:
            if self._work is not None:
                self._known[self._work.kind].append(self._in_work)
            self._in_work = 0.0
        self._work, self._sign = work, sign

    @property
    def seconds(self) -> float:
        """Of the present pause."""
        return self._clock() - self._since

    @property
    def limit(self) -> float:
        """Seconds that the present pause may last."""
        if self._work is None:
            return math.inf
        if self._work.kind not in self._marks.completed:
            return self._longest
        longest_seen = max(self._known[self._work.kind], default=0.0)
        return min(self._longest, max(self._least, TIMES * longest_seen))


class WakingClock:
    """Counts the seconds in which this process runs: one that was suspended has not seen the others pause.

    Args:
        most: seconds that one look at it counts, of those since the look before.
    """

    def __init__(self, clock: Callable[[], float], *, most: float):
        self._clock, self._most = clock, most
        self._before, self._counted = clock(), 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._counted += min(now - self._before, self._most)
        self._before = now
        return self._counted
