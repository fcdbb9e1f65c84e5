"""After an optimizer step, a method looks at the layers and decides. The engine carries out the decision."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.live_model import Batches
from inrank_megatron.engine.spectra import LayerSpectra
from inrank_megatron.lowrank.linalg.cores import in_background
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Change, LayerView, Metric, Plan

T = TypeVar("T")


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

    With ``overlap``, a check that may come late begins after step s. The host computes it while the device
    computes step s + 1, and it is carried out after step s + 1, however fast the host is. It sees nothing of
    step s + 1. So runs repeat bit for bit, and a run that is resumed between the two steps begins the check
    again, from the same values.

    Args:
        begin: called with the kind of work and the step when a decision begins (``Marks.begin``).
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        *,
        batches: Batches,
        overlap: bool,
        begin: Callable[[str, int], None] = lambda kind, step: None,
    ):
        self._engine, self._method, self._batches = engine, method, batches
        self._begin = begin
        self._under_way: _Check | None = None
        self._side = SideGroup(engine.parallel) if overlap else None

    @property
    def under_way(self) -> bool:
        """Whether a check has been begun whose outcome is still to be carried out."""
        return self._under_way is not None

    def close(self) -> None:
        """Wait until no thread uses a process group, before those are destroyed."""
        if self._under_way is not None:
            self._under_way.agreed()

    def after(self, step: int, *, is_last: bool) -> Iterator[Decision]:
        """Decisions to carry out after ``step``; carry out each before you ask for the next. Collective.

        ``is_last``: no step follows, so no check may be left under way.
        """
        if self._under_way is not None:
            self._begin("rank check", step)
            check, self._under_way = self._under_way, None
            yield check.finish()
        views = self._engine.views()
        plan = self._method.plan_step(step, views)
        if plan is None:
            return
        if self._side is not None and plan.may_come_late and not is_last:
            # Marked as another kind of work than a check, because its duration differs.
            self._begin("start of a rank check", step)
            self._under_way = _Check(self._engine, plan, views, self._side, step=step)
        else:
            self._begin("rank check" if isinstance(plan.spectrum, str) else "choice of ranks", step)
            yield _decide(self._engine, plan, step=step, batches=self._batches)


class _Check:
    """A check under way. It judges the values and ranks at the time when it was made.

    A thread of each rank decomposes this rank's layers on the host and sends the values to rank 0. The thread
    of rank 0 decides and sends the decision back. The device and the training continue without waiting.

    Args:
        views: the layers as they are now.
        side: a process group for these threads alone.
    """

    def __init__(self, engine: Engine, plan: Plan, views: Sequence[LayerView], side: SideGroup, *, step: int):
        if plan.spectrum is None or isinstance(plan.spectrum, Metric):
            raise ValueError(f"{plan} may not come late: it is not decided by spectra of factors")
        self._step, self._plan, self._parallel, self._side = step, plan, engine.parallel, side
        self._views = views
        self._spectra = LayerSpectra(
            engine.layers, engine.initial, engine.parallel, kind=plan.spectrum, overlap=True
        )
        self.agreed = in_background(self._agree)
        """Waits for the decision; None if it is left to :meth:`finish`."""

    def finish(self) -> Decision:
        if (decision := self.agreed()) is not None:
            return decision
        values = self._spectra.finish(step=self._step)
        views = self._seen(values)
        return Decision(
            self._step, views, self._parallel.broadcast_from_rank_0(lambda: self._plan.decide(views))
        )

    def _agree(self) -> Decision | None:
        parts = self._side.to_first(_or_none(self._owned))
        sound = [part for part in parts if part is not None]
        outcome = _or_none(lambda: self._decide(sound)) if sound and len(sound) == len(parts) else None
        # Every rank's thread comes here, whatever went wrong; what did, finish() meets and reports.
        outcome = self._side.from_first(outcome)
        if outcome is None:
            return None
        values, changes = outcome
        return Decision(self._step, self._seen(values), changes)

    def _owned(self) -> dict[str, np.ndarray] | None:
        owned = self._spectra.owned()
        return None if owned is None else {name: values.numpy() for name, values in owned.items()}

    def _decide(self, parts: list[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], Sequence[Change]]:
        values = {name: row for part in parts for name, row in part.items()}
        return values, self._plan.decide(self._seen(values))

    def _seen(self, values: Mapping[str, Any]) -> list[LayerView]:
        """The layers with their values [at most min(O, I)] FP64."""
        return [replace(view, singular_values=tuple(values[view.name].tolist())) for view in self._views]


def _or_none(compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except Exception:
        return None
