"""What methods see and what they ask for. Plain records: only the engine touches live parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from inrank_megatron.layers.factorised import FactorSpec

SpectrumKind = Literal["update", "product"]


@dataclass(frozen=True)
class LayerView:
    """One factorisable linear as a method sees it.

    Args:
        min_dim: min(O, I) of the whole matrix.
        rank: r, the rank decided so far. active: columns in use, k = r + buffer. capacity: columns allocated,
        K.
        singular_values: the spectrum that was asked for, descending; empty if none was.
    """

    name: str
    min_dim: int
    rank: int
    active: int
    capacity: int
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class InitialiseFactors:
    """Before the first step: fill every layer's active columns.

    ``gradient``: the leading singular pairs of the loss gradient of the first global batch, averaged over the
    job, every column of U and row of V of norm ``column_norm``. ``spectral``: the truncated SVD of the
    standard initial weight; ``column_norm`` is not used. With ``absorb`` the product is subtracted from W0,
    so that the start is exactly the standard initialisation. Moments: none exist yet.
    """

    source: Literal["gradient", "spectral"]
    column_norm: float = 1.0
    absorb: bool = False


@dataclass(frozen=True)
class SetRank:
    """A rank check's outcome for one layer; ``rank`` may equal the rank before.

    Values: the columns from ``active`` before to ``active`` now become random directions of norm
    ``column_norm``, with their product absorbed into W0 if ``absorb``. Moments: untouched; those of new
    columns are zero, as a column out of use has zero gradient.
    """

    layer: str
    rank: int
    active: int
    explained_ratio: float
    capped: bool
    column_norm: float
    absorb: bool


@dataclass(frozen=True)
class Refactor:
    """The switch: every layer's ``W0 + U V`` becomes ``U* V*`` of ``columns`` columns; W0 and buffers go.

    ``ranks`` are the decided ranks, ``columns`` those or a little more, where the device's tile asks for it.

    Values: the best approximation of so many columns, singular values shared evenly; with
    ``activation_batches`` 0 that of the matrix (plain), else that of its outputs on the inputs of so many
    global batches, the last ones trained on (activation-aware). Moments: those of U* and V* start at zero
    with a step count of their own; every other parameter keeps its moments.
    """

    ranks: Mapping[str, int]
    columns: Mapping[str, int]
    activation_batches: int = 0


Change = InitialiseFactors | SetRank | Refactor


class Method(Protocol):
    """A training method: decides structure and changes from spectra and step numbers alone.

    ``step`` counts completed optimizer steps.
    """

    name: str

    def structure(self, min_dims: Mapping[str, int]) -> dict[str, FactorSpec]:
        """Which linears start factorised, and how. Keys are layer names."""

    def start(self) -> list[Change]:
        """Changes before the first step."""

    def acts_at(self, step: int) -> bool:
        """Whether ``changes`` may return anything after ``step``."""

    def spectrum_at(self, step: int) -> SpectrumKind | None:
        """The spectra that ``changes`` wants after ``step``, if any."""

    def changes(self, step: int, layers: list[LayerView]) -> list[Change]:
        """Changes after ``step``, in the order in which they are to be carried out."""
