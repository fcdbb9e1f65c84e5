"""One line of the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What was measured, next to what it may be.

    Args:
        limit: the largest value that passes; None: shown for itself.
        over_dense: the figure over that of the dense model.
        judged: False: beyond the limit it does not fail, as a time in a rehearsal.
    """

    name: str
    measured: float
    limit: float | None = None
    over_dense: float | None = None
    judged: bool = True

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.limit is None or not self.judged or self.measured <= self.limit
