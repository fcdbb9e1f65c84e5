"""The base class of all training methods. Its defaults are those of dense training."""

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
"""Maps the module name of each linear that a run factorises to its shape (O, I)."""


class Columns(NamedTuple):
    """How many columns the factors of an MLP linear have: trained beyond the rank, and allocated in all."""

    buffer: int = 0
    capacity: int = 0


@dataclass(frozen=True)
class PhaseShape:
    """Describes one phase of a run, so that the plan can compute its costs.

    Args:
        columns: columns of each linear that count as parameters and operations; None: the linears are dense.
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
    """Decides the structure of the model and its changes, from spectra and step numbers alone.

    ``step`` counts completed optimizer steps. A method keeps no state: the views of the layers have what it
    needs to know of the past, and a checkpoint restores them.

    The class methods answer questions about a run before it is built. They are pure functions of the run's
    settings and shapes, and do not need torch.
    """

    name: ClassVar[str]
    """The value of ``--method`` that selects this method."""
    page: ClassVar[str] = "concepts/methods.md"
    """The page in ``docs/`` to which the plan and the list of settings point."""
    settings: ClassVar[Sections] = ()
    """The settings that it reads, in classes that methods share. Methods without a class refuse its flags."""
    presets: ClassVar[tuple[str, Mapping[str, Mapping[str, Any]]]] = ("", {})
    """The setting that selects a preset, and the values that each preset gives to other settings."""
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of settings of which only one applies: a flag for one replaces another that a file sets."""
    adaptations: ClassVar[Rules] = ()
    """Rules that change a default which does not fit what the user gave; applied in this order."""
    switches: ClassVar[bool] = False
    """Whether the run has a second phase, whose structure is decided during the run."""

    @classmethod
    def derived(cls, run: Run) -> dict[str, Any]:
        """Values for settings that were left out and follow from others, by name."""
        return {}

    @classmethod
    def check_settings(cls, run: Run, shapes: Shapes) -> None:
        """Refuses settings with which the method cannot run.

        Raises:
            UserError: the value, the rule it breaks and the remedy.
        """

    @classmethod
    def columns(cls, run: Run, min_dim: int) -> Columns:
        """The columns of an MLP linear whose smaller dimension is ``min_dim``. The settings are legal."""
        return Columns()

    @classmethod
    def phases(cls, run: Run, columns: Columns, *, break_even: int) -> list[PhaseShape]:
        """The phases whose costs the plan shows.

        ``break_even`` is the rank at which factors cost as much as the dense linears.
        """
        return [DENSE]

    @classmethod
    def learning_rate(cls, step: int, run: Run, schedule: Callable[[int], float]) -> float:
        """The learning rate at ``step`` (from 1); ``schedule`` follows the optimizer's settings."""
        return schedule(step)

    @classmethod
    def switch_step(cls, run: Run, steps_per_epoch: int) -> int | None:
        """The number of steps in the first phase (algorithm 3). None: there is no second phase, or the ranks
        decide when it begins.

        ``switch_iters`` counts steps, ``switch_epochs`` counts epochs of ``steps_per_epoch`` optimizer steps.
        With neither, the switch comes after one epoch, as in the paper, but at most after a quarter of the
        run, so that a short run shows both phases. Later switches cost more and gave no lower loss.

        Raises:
            UserError: the switch would come at or after the end of the run.
        """
        return None

    @classmethod
    def keeps_initial_factors(cls, run: Run) -> bool:
        """Whether the initial values of the factors stay in memory, in FP32."""
        return False

    @classmethod
    def from_config(cls, config: Run, *, switch_step: int | None) -> "Method":
        """Builds the method from the run's settings and the result of :meth:`switch_step`."""
        return cls()

    def structure(self, min_dims: Mapping[str, int]) -> dict[str, FactorSpec]:
        """The linears that start factorised, and how: a spec by layer name."""
        return {}

    def initialisation(self) -> list[Change]:
        """The changes to make before the first step."""
        return []

    def plan_step(self, step: int, layers: list[LayerView]) -> Plan | None:
        """What to do after step ``step``; None: nothing. ``layers`` have no spectra yet."""
        return None

    def unfinished(self, layers: list[LayerView]) -> str | None:
        """A sentence about what the method had left to do when the run ended; None: nothing."""
        return None
