"""The newest losses, when a loss is a spike, and what was left out of the training because of spikes."""

import math
from dataclasses import dataclass, replace
from statistics import median

WINDOW = 128  # losses; this and the next two are the defaults of SkipStepOptimizer in OLMo-core
FEWEST = WINDOW // 2  # before there are so many, no loss is a spike
FACTOR = 6.0
TO_SIGMA = 1.4826  # from the median absolute deviation to a normal distribution's standard deviation


@dataclass(frozen=True)
class LossHistory:
    """Part of every checkpoint, so that a resumed run finds the same spikes.

    Attributes:
        losses: the newest ``WINDOW``, nats per token, the newest last.
        skipped_steps: whose update was left out.
        skipped_batches: global batches that rollbacks passed over: step s trains on batch s - 1 plus these.
    """

    losses: tuple[float, ...] = ()
    skipped_steps: tuple[int, ...] = ()
    skipped_batches: int = 0

    def limit(self) -> float | None:
        """The largest loss that is no spike: the median of the window plus ``FACTOR`` standard deviations, by
        the median absolute deviation, which spikes in the window hardly move. None while there are too few.
        """
        if len(self.losses) < FEWEST:
            return None
        middle = median(self.losses)
        return middle + FACTOR * TO_SIGMA * median(abs(loss - middle) for loss in self.losses)

    def is_spike(self, loss: float) -> bool:
        """Whether the next ``loss`` would be a spike: one that is not finite is an overflow, or an error."""
        limit = self.limit()
        return limit is not None and limit < loss < math.inf

    def after(self, step: int, loss: float, *, skipped: bool) -> "LossHistory":
        """With ``loss``, which is finite, of ``step``. ``skipped``: whether its update was left out."""
        steps = (*self.skipped_steps, step) if skipped else self.skipped_steps
        return replace(self, losses=(*self.losses, loss)[-WINDOW:], skipped_steps=steps)
