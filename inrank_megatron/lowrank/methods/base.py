"""What a training method is. A method overrides what it needs; each default is that of training densely."""

from collections.abc import Mapping
from typing import ClassVar

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import Change, LayerView, Plan
from inrank_megatron.lowrank.methods.settings import Run


class Method:
    """Decides structure and changes from spectra and step numbers alone.

    ``step`` counts completed optimizer steps. A method keeps no state: what it needs of the past is in the
    views, which a checkpoint restores. ``name`` is that of ``--method``; ``settings``: what it reads of the
    settings that belong to methods.
    """

    name: ClassVar[str]
    settings: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Run, *, switch_step: int | None) -> "Method":
        """The method with the run's settings; ``switch_step`` from ``schedule.py``."""
        return cls()

    def structure(self, min_dims: Mapping[str, int]) -> dict[str, FactorSpec]:
        """Which linears start factorised, and how. Keys are layer names."""
        return {}

    def start(self) -> list[Change]:
        """Changes before the first step."""
        return []

    def plan_step(self, step: int, layers: list[LayerView]) -> Plan | None:
        """What to do after ``step``; None: nothing. ``layers`` come without spectra."""
        return None

    def unfinished(self, layers: list[LayerView]) -> str | None:
        """What the method had still to do when the run came to its end, in words; None: nothing."""
        return None
