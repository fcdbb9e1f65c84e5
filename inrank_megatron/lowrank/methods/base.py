"""What a training method is. A method overrides what it needs; each default is that of training densely."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from inrank_megatron.fields import Section
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import Change, LayerView, Plan
from inrank_megatron.lowrank.methods.settings import Rule, Run

Sections = tuple[type[Section], ...]
Rules = tuple[Rule, ...]
Shapes = Mapping[str, tuple[int, int]]
"""(O, I) of the linears that a run factorises, by module name."""


class Columns(NamedTuple):
    """Columns of the factors of an MLP linear: those trained beyond the rank, and all to allocate."""

    buffer: int = 0
    capacity: int = 0


@dataclass(frozen=True)
class PhaseShape:
    """What the plan computes the costs of one phase from.

    Args:
        columns: of each linear that count as parameters and operations; None: dense linears.
        capacity: columns that take memory.
        frozen_base: whether a frozen W0 is kept next to the factors.
        is_largest: whether the run takes the most memory here.
    """

    name: str
    columns: int | None = None
    capacity: int | None = None
    frozen_base: bool = False
    is_largest: bool = False


DENSE = PhaseShape("dense", is_largest=True)


class Method:
    """Decides structure and changes from spectra and step numbers alone.

    ``step`` counts completed optimizer steps. A method keeps no state: what it needs of the past is in the
    views, which a checkpoint restores.

    The class methods answer for a run of this method before it is built: pure functions of its settings and
    shapes, without torch.
    """

    name: ClassVar[str]
    """That of ``--method``."""
    page: ClassVar[str] = "concepts/methods.md"
    """Its place in ``docs/``, to which the plan and the list of settings point."""
    settings: ClassVar[Sections] = ()
    """Its flags; a section that several methods read is one class. Others refuse them."""
    presets: ClassVar[tuple[str, Mapping[str, Mapping[str, Any]]]] = ("", {})
    """The setting that names one of its presets, and what each of them implies for other settings."""
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of settings that say the same in several ways: a flag for one replaces a file's choice."""
    adaptations: ClassVar[Rules] = ()
    """Defaults that give way to what the user asked for, in this order."""
    switches: ClassVar[bool] = False
    """Whether the run has a second phase, whose structure is decided on the way."""

    @classmethod
    def derived(cls, run: Run) -> dict[str, Any]:
        """Values of its settings that were left out and follow from others."""
        return {}

    @classmethod
    def check_settings(cls, run: Run, shapes: Shapes) -> None:
        """Refuses settings with which the method cannot run.

        Raises:
            UserError: the value, the rule it breaks and the remedy.
        """

    @classmethod
    def columns(cls, run: Run, min_dim: int) -> Columns:
        """Of an MLP linear whose smaller dimension is ``min_dim``, in a run of legal settings."""
        return Columns()

    @classmethod
    def phases(cls, run: Run, columns: Columns, *, break_even: int) -> list[PhaseShape]:
        """The phases whose costs the plan shows; ``break_even``: the rank at which factors cost as much as
        the dense linears.
        """
        return [DENSE]

    @classmethod
    def learning_rate(cls, step: int, run: Run, schedule: Callable[[int], float]) -> float:
        """Of optimizer step ``step`` (from 1); ``schedule``: of any step by the optimizer's settings."""
        return schedule(step)

    @classmethod
    def switch_step(cls, run: Run, steps_per_epoch: int) -> int | None:
        """Optimizer steps of the first phase (algorithm 3). None: there is no second one, or it begins when
        the layers say so.

        ``switch_iters`` counts steps, ``switch_epochs`` counts epochs of ``steps_per_epoch`` optimizer steps.
        With neither it is the paper's one epoch, but at most a quarter of the run, so that a short run shows
        both phases; later switches ended no lower and cost more.

        Raises:
            UserError: a switch that would come at or after the end of the run.
        """
        return None

    @classmethod
    def keeps_initial_factors(cls, run: Run) -> bool:
        """Whether the factors' initial values stay in memory, in FP32."""
        return False

    @classmethod
    def from_config(cls, config: Run, *, switch_step: int | None) -> "Method":
        """The method with the run's settings; ``switch_step``: what :meth:`switch_step` has said."""
        return cls()

    def structure(self, min_dims: Mapping[str, int]) -> dict[str, FactorSpec]:
        """Which linears start factorised, and how. Keys are layer names."""
        return {}

    def initialisation(self) -> list[Change]:
        """Changes before the first step."""
        return []

    def plan_step(self, step: int, layers: list[LayerView]) -> Plan | None:
        """What to do after ``step``; None: nothing. ``layers`` come without spectra."""
        return None

    def unfinished(self, layers: list[LayerView]) -> str | None:
        """What the method had still to do when the run came to its end, in words; None: nothing."""
        return None
