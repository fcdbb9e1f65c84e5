"""What follows an optimizer step: a method looks at the layers and decides, the engine carries it out."""

from collections.abc import Sequence
from dataclasses import dataclass

from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.live_model import Batches
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Change, LayerView


@dataclass(frozen=True)
class Decision:
    """What a method decided, the same on every rank, and the layers as it saw them after ``step`` steps."""

    step: int
    views: Sequence[LayerView]
    changes: Sequence[Change]


def decide(engine: Engine, method: Method, *, step: int, batches: Batches) -> Decision | None:
    """The decision of ``method`` after ``step`` completed steps; None: it has nothing to decide. Collective.

    ``engine.apply`` carries it out.
    """
    plan = method.plan_step(step, engine.views())
    if plan is None:
        return None
    views = engine.views(spectrum=plan.spectrum, step=step, batches=batches)
    changes = engine.parallel.from_first_rank(lambda: plan.decide(views))
    return Decision(step, views, changes)
