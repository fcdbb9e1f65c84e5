"""Trainings whose rank checks overlap with the next step, and one that they must equal; ranks run these."""

from collections.abc import Iterator

from inrank_megatron.engine import decisions as decisions_module
from inrank_megatron.engine.decisions import Decision, Decisions, decide
from inrank_megatron.engine.spectra import LayerSpectra
from inrank_megatron.engine.state import engine_record, load_engine
from inrank_megatron.lowrank.methods.changes import Refactor
from tests.contract.checkpoints import Tensors
from tests.contract.layouts import Layout
from tests.contract.probes import snapshot
from tests.contract.sessions import Session, build

STEPS, SWITCH, RESUMED = 8, 7, 4


class OneStepLater:
    """The oracle: decides after each step, of what is there, and hands checks out one step later."""

    def __init__(self, session: Session):
        self._session, self._waiting = session, None

    def after(self, step: int, *, is_last: bool) -> Iterator[Decision]:
        if self._waiting:
            yield self._waiting
        session, self._waiting = self._session, None
        decision = decide(session.engine, session.method, step=step, batches=session.batch)
        if decision and (is_last or any(isinstance(change, Refactor) for change in decision.changes)):
            yield decision
        else:
            self._waiting = decision


class Counted(LayerSpectra):
    """Counts the checks that all ranks have finished together, which the threads have not."""

    finished = 0

    def finish(self, *, step):
        Counted.finished += 1
        return super().finish(step=step)


class OneUnsound(Counted):
    """A layer of the last rank needs the Householder path: the threads leave the check to all ranks."""

    def owned(self):
        return None if self._parallel.rank == self._parallel.world_size - 1 else super().owned()


class LateSpectra(Counted):
    """A planted fault: spectra of the layers as they are when the outcome is asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._made_with = args, kwargs

    def owned(self):
        return None

    def finish(self, *, step):
        args, kwargs = self._made_with
        return LayerSpectra(*args, **kwargs).finish(step=step)


def compare(rank: int, world_size: int, layout: Layout, settings: dict) -> dict[str, dict]:
    """What these leave: the oracle, an overlapping training, its resumed half, and one with the fault.

    The resumed half leaves its checks to all ranks together.
    """

    begun: list[tuple[str, int]] = []

    def overlapping(session: Session) -> Decisions:
        begun.clear()
        return Decisions(
            session.engine,
            session.method,
            batches=session.batch,
            overlap=True,
            begin=lambda *work: begun.append(work),
        )

    seen: dict = {}
    decisions_module.LayerSpectra, Counted.finished = Counted, 0
    for name, made in (("oracle", OneStepLater), ("overlapping", overlapping)):
        session = build("inrank-efficient", layout, switch=SWITCH, **settings).start()
        seen[name] = _trained(session, made(session))
    seen["begun"] = list(begun)
    session = build("inrank-efficient", layout, switch=SWITCH, **settings).start()
    before = overlapping(session)
    _trained(session, before, steps=RESUMED)
    record, tensors = engine_record(session.engine), snapshot(session)
    seen["under way"], seen["by all ranks"] = before.under_way, [Counted.finished]
    before.close()
    decisions_module.LayerSpectra = OneUnsound
    session = build("inrank-efficient", layout, switch=SWITCH, record=record, **settings)
    load_engine(session.engine, record, Tensors(tensors))
    session.step, resumed = RESUMED, overlapping(session)
    assert not list(resumed.after(RESUMED, is_last=False))  # it begins again
    seen["resumed"] = _trained(session, resumed)
    seen["by all ranks"].append(Counted.finished)
    if world_size == 1:
        decisions_module.LayerSpectra = LateSpectra
        session = build("inrank-efficient", layout, switch=SWITCH, **settings).start()
        seen["fault"] = _trained(session, overlapping(session))
    decisions_module.LayerSpectra = LayerSpectra
    return seen


def _trained(session: Session, decisions, *, steps: int = STEPS) -> dict:
    """By step: ranks, when they grew, losses and the spectra that checks saw; full tensors at the end."""
    seen = {"ranks": {}, "grown_at": {}, "losses": {}, "spectra": {}}
    while session.step < steps:
        loss = session.train_step().loss
        for decision in decisions.after(session.step, is_last=session.step == STEPS):
            session.engine.apply(decision.changes, step=decision.step, batches=session.batch)
            seen["spectra"][decision.step] = [view.singular_values for view in decision.views]
        seen["losses"][session.step] = loss
        seen["ranks"][session.step] = dict(session.engine.ranks)
        seen["grown_at"][session.step] = [view.grown_at for view in session.engine.views()]
    return seen | {"tensors": snapshot(session)}
