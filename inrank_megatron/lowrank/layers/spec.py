"""How a linear is factorised: what methods decide on and layers are built from. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FactorSpec:
    """How one linear is factorised.

    Args:
        columns: columns of U (rows of V) to allocate, K.
        active: columns in use at the start, k <= K.
        rank: decided rank r <= k; the rest of the columns in use are buffer.
        base: whether a frozen ``W0`` stands beside the factors.
        tracked: whether every column's initial value is kept, for the spectrum of the update.
        final: whether the rank stays as it is to the end of the run.
        grown_at: the step after which the rank last grew or a check was lost, 0 if neither ever was.
    """

    columns: int
    active: int
    rank: int
    base: bool = True
    tracked: bool = False
    final: bool = False
    grown_at: int = 0
