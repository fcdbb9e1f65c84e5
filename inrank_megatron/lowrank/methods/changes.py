"""What methods see and what they ask for. Plain records: only the engine touches live parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["gradient", "spectral", "random", "random-like-weight", "kaiming", "zero-product"]
NewColumns = Literal["random", "kaiming"]
Reset = Literal["full", "random", "magnitude"]
NewMoments = Literal["zero", "mean"]
MetricKind = Literal["plain", "activation-aware", "fisher"]


@dataclass(frozen=True)
class Metric:
    """What measures the error of a matrix M of rank r in the place of W.

    Args:
        kind: ``plain``, ``|W - M|^2``; ``activation-aware``, ``E |(W - M) x|^2`` over the layer's own inputs
            x; ``fisher``, ``E |D^(1/2) (W - M) x|^2`` with D the diagonal of ``E[g g^T]``, g the gradient of
            the summed loss with respect to the layer's output at one token.
        batches: global batches, the last ones trained on, that the means are taken over; 0 for ``plain``.
    """

    kind: MetricKind = "plain"
    batches: int = 0


PLAIN = Metric()


Spectrum = Literal["update", "product"] | Metric
"""What a method may ask to see of every layer: singular values of ``U V - U0 V0`` (``update``) or of ``U V``
(``product``), or the energies in which a metric measures the layer's outputs."""


@dataclass(frozen=True)
class LayerView:
    """One factorisable linear as a method sees it, dense or factorised.

    Args:
        output_size: O. input_size: I, of the full matrix.
        rank: r, the rank decided so far. active_columns: columns in use, k = r + buffer. capacity: columns
            allocated, K. All three are min(O, I) for a dense linear.
        attainable_rank: the largest rank that the effective matrix may have: that of ``U V`` is at most k.
        final, grown_at: as in ``FactorSpec``.
        updated: whether the last step changed the weights; not if it overflowed, and then no rank grows.
        singular_values: descending; empty unless ``update`` or ``product`` was asked for.
        output_energies: by the metric that was asked for, descending; those past r add up to the least error
            that rank r can have. Empty if none was.
    """

    name: str
    output_size: int
    input_size: int
    rank: int
    active_columns: int
    capacity: int
    attainable_rank: int
    final: bool = False
    grown_at: int = 0
    updated: bool = True
    singular_values: tuple[float, ...] = ()
    output_energies: tuple[float, ...] = ()

    @property
    def min_dim(self) -> int:
        """min(O, I)."""
        return min(self.output_size, self.input_size)


@dataclass(frozen=True)
class InitialiseFactors:
    """Before the first step: fill every layer's active columns.

    ``source``: ``gradient``, the leading singular pairs of the loss gradient of the first global batch,
    averaged over the job; ``spectral``, the truncated SVD of the standard initial weight; ``random``, random
    directions; ``random-like-weight``, random directions whose product is as large as that weight;
    ``kaiming``, uniform entries up to 1 / sqrt(fan-in) in U (fan-in K) and V (fan-in I);
    ``zero-product``, the same V and U = 0.

    ``column_norm``: of every column of U and row of V, for ``gradient`` and ``random``; None for the others,
    which say themselves how large their columns are. With ``absorb`` the product is subtracted from W0, so
    that the start is the standard initialisation. Moments: none exist yet.
    """

    source: Source
    column_norm: float | None = None
    absorb: bool = False


@dataclass(frozen=True)
class SetRank:
    """A rank check's outcome for one layer; ``rank`` may equal the rank before.

    Values: the columns from ``active_columns`` before to ``active_columns`` now come from ``source``, as in
    :class:`InitialiseFactors`: random directions of norm ``column_norm``, or Kaiming entries, which say
    themselves how large they are (``column_norm`` None). Their product is absorbed into W0 if ``absorb``.
    Moments of columns in use: untouched. Those of new columns: the first is zero; the second is
    zero too with ``moments`` ``zero``, and with ``mean`` the mean over the columns that were in use, row by
    row of U and column by column of V, so that Adam, which counts steps for all columns together, starts them
    no faster than the others.
    """

    layer: str
    rank: int
    active_columns: int
    explained_ratio: float
    capped: bool
    source: NewColumns
    column_norm: float | None
    absorb: bool
    moments: NewMoments = "zero"


@dataclass(frozen=True)
class LostCheck:
    """A rank check in whose step nothing was learnt, as it overflowed. Whether the rank would have grown
    is not known: the layer's ``grown_at`` becomes this step. Values, moments and ranks stay.
    """

    layer: str


@dataclass(frozen=True)
class MergeAndReinitialise:
    """ReLoRA's merge: every layer's ``U V`` is added to W0, then both are initialised again
    (``zero-product``).

    Values: the effective weights stay. Moments of U and V, both of an entry at once: ``full`` sets all to
    zero, ``random`` each with probability ``share``, ``magnitude`` that ``share`` of each full tensor which
    has the smallest second moment; step counts and every other parameter's moments stay.
    """

    reset: Reset
    share: float


@dataclass(frozen=True)
class Refactor:
    """The switch: every layer's matrix becomes ``U* V*`` of ``target_columns`` columns.

    The matrix is ``W0 + U V`` or ``U V``, whose buffers go as W0 does, or the weight ``W`` of a dense linear.
    ``ranks`` are the decided ranks, ``target_columns`` those or a little more, where the device's tile asks
    for it.

    Values: the best approximation by ``metric`` with that number of columns, singular values shared evenly.
    Moments: those of U* and V* start at zero with a step count of their own; every other parameter keeps its
    moments.
    """

    ranks: Mapping[str, int]
    target_columns: Mapping[str, int]
    metric: Metric = PLAIN


Change = InitialiseFactors | SetRank | LostCheck | MergeAndReinitialise | Refactor


@dataclass(frozen=True)
class Plan:
    """What a method does after a step.

    Args:
        decide: from the layers, with ``spectrum``, the changes in the order in which they are carried out.
        spectrum: what it needs to see of every layer; None: nothing.
        may_come_late: whether the changes may be carried out one step later than what they were decided on.
    """

    decide: Callable[[list[LayerView]], list[Change]]
    spectrum: Spectrum | None = None
    may_come_late: bool = False
