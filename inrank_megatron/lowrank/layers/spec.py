"""How a linear is factorised. Methods choose a spec, and layers are built from it. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_STORED = {"capacity": "columns", "active_columns": "active", "frozen_base": "base"}
"""Fields that checkpoints store under other names."""


def stored_name(field: str) -> str:
    """The key of a field in checkpoints."""
    return _STORED.get(field, field)


@dataclass(frozen=True)
class FactorSpec:
    """How one linear is factorised.

    Args:
        capacity: columns of U (rows of V) to allocate, K.
        active_columns: columns in use at initialisation, k <= K.
        rank: decided rank r <= k; the other columns in use are the buffer.
        frozen_base: whether a frozen ``W0`` is kept next to the factors.
        tracked: whether every column's initial value is kept, for the spectrum of the update.
        final: whether the rank stays as it is to the end of the run.
        grown_at: the last step after which the rank grew or a check was lost (``LostCheck``); 0 if none.
    """

    capacity: int
    active_columns: int
    rank: int
    frozen_base: bool = True
    tracked: bool = False
    final: bool = False
    grown_at: int = 0

    def to_record(self) -> dict[str, int | bool]:
        """What checkpoints store, under the names of their format."""
        return {stored_name(name): value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "FactorSpec":
        """The inverse of :meth:`to_record`; takes the field names too."""
        names = {stored: name for name, stored in _STORED.items()}
        return cls(**{names.get(name, name): value for name, value in record.items()})
