"""What methods see (:class:`LayerView`) and the changes that they return.

All are plain records. Only the engine touches live parameters.
"""

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
    """How the error is measured when a matrix M of rank r replaces W.

    Args:
        kind: ``plain``, ``|W - M|^2``; ``activation-aware``, ``E |(W - M) x|^2`` over the layer's own inputs
            x; ``fisher``, ``E |D^(1/2) (W - M) x|^2`` with D the diagonal of ``E[g g^T]``, g the gradient of
            the summed loss with respect to the layer's output at one token.
        batches: the means are taken over this number of the last global batches; 0 for ``plain``.
    """

    kind: MetricKind = "plain"
    batches: int = 0


PLAIN = Metric()


Spectrum = Literal["update", "product"] | Metric
"""What a method may ask to see of every layer: the singular values of ``U V - U0 V0`` (``update``) or of
``U V`` (``product``), or the energies of the layer's outputs, as a metric measures them."""


@dataclass(frozen=True)
class LayerView:
    """One factorisable linear as a method sees it, dense or factorised.

    Args:
        output_size: O. input_size: I, of the full matrix.
        rank: r, the rank decided so far. active_columns: columns in use, k = r + buffer. capacity: columns
            allocated, K. All three are min(O, I) for a dense linear.
        attainable_rank: the largest rank that the effective matrix can have; without W0 it is k.
        final, grown_at: as in ``FactorSpec``.
        updated: whether the last step changed the weights. A step that overflowed did not, and then no rank
            grows.
        singular_values: descending; empty unless the method asked for ``update`` or ``product``.
        output_energies: descending; the energies past r add up to the least error that rank r can have.
            Empty unless the method asked for a metric.
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

    ``column_norm``: the norm of every column of U and row of V, for ``gradient`` and ``random``; None for the
    other sources, which determine the norms. With ``absorb`` the product is subtracted from W0, so that the
    run starts from the standard initialisation. Moments: none exist yet.
    """

    source: Source
    column_norm: float | None = None
    absorb: bool = False


@dataclass(frozen=True)
class SetRank:
    """The outcome of a rank check for one layer; ``rank`` may equal the rank before.

    Values: the columns from the old to the new ``active_columns`` are filled from ``source``, as in
    :class:`InitialiseFactors`: random directions of norm ``column_norm``, or Kaiming entries (``column_norm``
    None). Their product is absorbed into W0 if ``absorb``.

    Moments: those of columns in use stay. New columns have a first moment of zero. Their second moment is
    zero too (``moments="zero"``), or the mean over the columns that were in use, row by row of U and column
    by column of V (``"mean"``). Adam counts steps for all columns together; with the mean, new columns start
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
    """A rank check at a step that overflowed, so that nothing was learnt. Whether the rank would have grown
    is unknown, so the layer's ``grown_at`` becomes this step. Values, moments and ranks stay.
    """

    layer: str


@dataclass(frozen=True)
class MergeAndReinitialise:
    """ReLoRA's merge: every layer's ``U V`` is added to W0, then U and V are initialised again
    (``zero-product``).

    Values: the effective weights stay. Moments of U and V: ``full`` sets all to zero, ``random`` sets those
    of each entry to zero with probability ``share``, and ``magnitude`` those of the fraction ``share`` of
    each full tensor with the smallest second moments. Both moments of an entry are reset together. Step
    counts and the moments of all other parameters stay.
    """

    reset: Reset
    share: float


@dataclass(frozen=True)
class Refactor:
    """The switch: every layer's matrix becomes ``U* V*`` of ``target_columns`` columns.

    The matrix is ``W0 + U V`` or ``U V``, or the weight ``W`` of a dense linear. W0 and the buffers
    disappear. ``ranks`` are the decided ranks. ``target_columns`` are the ranks, rounded up where the
    device's tile requires it.

    Values: the best approximation by ``metric`` with that number of columns; the singular values are divided
    evenly between U* and V*. Moments: those of U* and V* start at zero, with a step count of their own; all
    other parameters keep theirs.
    """

    ranks: Mapping[str, int]
    target_columns: Mapping[str, int]
    metric: Metric = PLAIN


Change = InitialiseFactors | SetRank | LostCheck | MergeAndReinitialise | Refactor


@dataclass(frozen=True)
class Plan:
    """What a method does after a step.

    Args:
        decide: computes the changes from the layers with their ``spectrum``, in the order to carry them out.
        spectrum: what ``decide`` needs to see of every layer; None: nothing.
        may_come_late: whether the changes may be carried out one step after the step that they were decided
            on.
    """

    decide: Callable[[list[LayerView]], list[Change]]
    spectrum: Spectrum | None = None
    may_come_late: bool = False
