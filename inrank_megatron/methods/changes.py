"""What methods see and what they ask for. Plain records: only the engine touches live parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from inrank_megatron.config import Config
from inrank_megatron.layers.spec import FactorSpec

SpectrumKind = Literal["update", "product"]
Source = Literal["gradient", "spectral", "random", "kaiming", "lora"]
Reset = Literal["full", "random", "magnitude"]


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

    ``source``: ``gradient``, the leading singular pairs of the loss gradient of the first global batch,
    averaged over the job; ``spectral``, the truncated SVD of the standard initial weight; ``random``, random
    directions; ``kaiming``, uniform entries up to 1 / sqrt(fan-in) in U (fan-in K) and V (fan-in I);
    ``lora``, the same V and U = 0.

    ``column_norm``: of every column of U and row of V, for ``gradient`` and ``random``; None: such that the
    product is as large as the standard initial weight. With ``absorb`` the product is subtracted from W0, so
    that the start is the standard initialisation. Moments: none exist yet.
    """

    source: Source
    column_norm: float | None = None
    absorb: bool = False


@dataclass(frozen=True)
class SetRank:
    """A rank check's outcome for one layer; ``rank`` may equal the rank before.

    Values: the columns from ``active`` before to ``active`` now become random directions of norm
    ``column_norm`` (None: Kaiming entries as at the start), with their product absorbed into W0 if
    ``absorb``. Moments: untouched; those of new
    columns are zero, as a column out of use has zero gradient.
    """

    layer: str
    rank: int
    active: int
    explained_ratio: float
    capped: bool
    column_norm: float | None
    absorb: bool


@dataclass(frozen=True)
class Restart:
    """ReLoRA's restart: every layer's ``U V`` is added to W0, then U = 0 and V is drawn anew (``lora``).

    Values: the effective weights stay. Moments of U and V, both of an entry at once: ``full`` sets all to
    zero, ``random`` each with probability ``share``, ``magnitude`` that ``share`` of each whole tensor which
    has the smallest second moment; step counts and every other parameter's moments stay.
    """

    reset: Reset
    share: float


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


Change = InitialiseFactors | SetRank | Restart | Refactor


class Method(Protocol):
    """A training method: decides structure and changes from spectra and step numbers alone.

    ``step`` counts completed optimizer steps. ``name`` is that of ``--method``; ``settings``: what it reads
    of the section ``inrank`` of the configuration.
    """

    name: ClassVar[str]
    settings: ClassVar[frozenset[str]]

    @classmethod
    def from_config(cls, config: Config, *, switch_step: int | None) -> "Method":
        """The method with the run's settings; ``switch_step`` from ``methods/schedule.py``."""

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
