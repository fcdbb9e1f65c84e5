"""What follows an optimizer step: a method looks at the layers and decides, the engine carries it out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.live_model import Batches
from inrank_megatron.engine.spectra import LayerSpectra
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Change, LayerView, Metric, Plan


@dataclass(frozen=True)
class Decision:
    """What a method decided, the same on every rank, and the layers as it saw them after ``step`` steps.

    ``engine.apply`` carries it out.
    """

    step: int
    views: Sequence[LayerView]
    changes: Sequence[Change]


def decide(engine: Engine, method: Method, *, step: int, batches: Batches) -> Decision | None:
    """What ``method`` decides after ``step`` completed steps; None: it has nothing to decide. Collective."""
    plan = method.plan_step(step, engine.views())
    return None if plan is None else _decide(engine, plan, step=step, batches=batches)


def _decide(engine: Engine, plan: Plan, *, step: int, batches: Batches) -> Decision:
    views = engine.views(spectrum=plan.spectrum, step=step, batches=batches)
    return Decision(step, views, engine.parallel.broadcast_from_rank_0(lambda: plan.decide(views)))


class Decisions:
    """The decisions of a training, step by step.

    With ``overlap`` a check that may come late is begun after step s, computed on the host while the device
    computes step s + 1, and carried out after that. It sees nothing of step s + 1, and however fast the host
    is, it comes after that step: runs repeat bit for bit, and a run that is resumed between the two steps
    begins the check again, from the same values.
    """

    def __init__(self, engine: Engine, method: Method, *, batches: Batches, overlap: bool):
        self._engine, self._method, self._batches, self._overlap = engine, method, batches, overlap
        self._under_way: _Check | None = None

    @property
    def under_way(self) -> bool:
        """Whether a check has been begun whose outcome is still to be carried out."""
        return self._under_way is not None

    def after(self, step: int, *, is_last: bool) -> Iterator[Decision]:
        """Decisions to carry out after ``step``, each before the next is asked for. Collective.

        ``is_last``: no step follows, so that nothing may be left under way.
        """
        if self._under_way is not None:
            check, self._under_way = self._under_way, None
            yield check.finish()
        plan = self._method.plan_step(step, self._engine.views())
        if plan is None:
            return
        if self._overlap and plan.may_come_late and not is_last:
            self._under_way = _Check(self._engine, plan, step=step)
        else:
            yield _decide(self._engine, plan, step=step, batches=self._batches)


class _Check:
    """A check under way, of the values and ranks at which it was made."""

    def __init__(self, engine: Engine, plan: Plan, *, step: int):
        if plan.spectrum is None or isinstance(plan.spectrum, Metric):
            raise ValueError(f"{plan} may not come late: it is not decided by spectra of factors")
        self._step, self._plan, self._parallel = step, plan, engine.parallel
        self._views = engine.views()
        self._spectra = LayerSpectra(
            engine.layers, engine.initial, engine.parallel, kind=plan.spectrum, overlap=True
        )

    def finish(self) -> Decision:
        values = self._spectra.finish(step=self._step)
        views = [replace(view, singular_values=tuple(values[view.name].tolist())) for view in self._views]
        return Decision(
            self._step, views, self._parallel.broadcast_from_rank_0(lambda: self._plan.decide(views))
        )
