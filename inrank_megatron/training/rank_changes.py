"""Asks the method after every step, carries out its decision on the engine, and records it."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.peak_memory import PeakMemory
from inrank_megatron.engine.decisions import Decision, Decisions
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Refactor, SetRank
from inrank_megatron.lowrank.methods.switch import size_in_words
from inrank_megatron.training.micro_batches import MicroBatches
from inrank_megatron.training.run_logger import RunLogger
from inrank_megatron.training.step_metrics import phase_name

PHASE_1_COLUMNS = "phase_1_columns"


class RankChanges:
    """Makes the changes that a method decides. Call it on all ranks alike.

    Args:
        overlap: checks are computed while the device computes the next step (``Decisions``).
        memory: told when a switch begins and which phase follows.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        *,
        batches: MicroBatches,
        overlap: bool,
        run_logger: RunLogger,
        memory: PeakMemory,
        marks: Marks,
    ):
        self._engine, self._method, self._batches = engine, method, batches
        self._overlap, self._run_logger, self._memory = overlap, run_logger, memory
        self._marks = marks
        self._decisions = Decisions(engine, method, batches=batches, overlap=overlap, begin=marks.begin)
        self._unrecorded: list[Callable[[], None]] = []

    @property
    def under_way(self) -> bool:
        """Whether a check has been begun whose outcome is still to be carried out."""
        return self._decisions.under_way

    def initialise(self) -> None:
        """Initialise the factors of a new run, as the method says."""
        self._engine.apply(self._method.initialisation(), step=0, batches=self._batches)
        # Later models get their state from the run; the folder of pretrained weights may be gone by then.
        factory: Any = self._engine.factory  # a `GPTFactory`
        self._engine.factory = replace(factory, pretrained=None)
        if self._engine.layers:
            self._run_logger.structure(0, "init", self._engine.views())

    def after(self, step: int, *, is_last: bool) -> dict:
        """Decide and carry out what is due after ``step`` steps.

        Returns:
            What every later checkpoint records: at the switch, the columns of each layer before it.
        """
        recorded: dict = {}
        for decision in self._decisions.after(step, is_last=is_last):
            checks = [change for change in decision.changes if isinstance(change, SetRank)]
            switches = any(isinstance(change, Refactor) for change in decision.changes)
            self._unrecorded.append(partial(self._run_logger.checks, step, decision.views, checks))
            if switches or not self._overlap:
                self.record()
            if switches:
                recorded |= self._switch(decision)
            else:
                self._engine.apply(decision.changes, step=decision.step, batches=self._batches)
        return recorded

    def record(self) -> None:
        """Write the records of checks. With overlap, called while the device computes and before a save."""
        while self._unrecorded:
            self._unrecorded.pop(0)()

    def close(self) -> None:
        """Wait until no thread uses a process group, before those are destroyed."""
        self._decisions.close()

    def _switch(self, decision: Decision) -> dict:
        step, engine, began = decision.step, self._engine, time.monotonic()
        form, in_first_phase = _form(engine), engine.in_first_phase
        begins = "; second phase" if in_first_phase or not engine.layers else ""
        self._marks.begin("switch", step)
        self._memory.begin("switch")
        engine.apply(decision.changes, step=step, batches=self._batches)
        self._memory.begin(phase_name(engine))
        views, seconds = engine.views(), time.monotonic() - began
        mean = sum(view.rank for view in views) / len(views)
        size = size_in_words(decision.views, {view.name: view.active_columns for view in views})
        self._run_logger.structure(step, "switch", views)
        self._run_logger.event(
            "switch",
            step,
            f"step {step}: {form} becomes U* V*, mean rank {mean:.1f}: {size} ({seconds:.1f} s){begins}",
            seconds=seconds,
            mean_rank=mean,
            size=size,
        )
        columns = {view.name: view.active_columns for view in decision.views}
        return {PHASE_1_COLUMNS: columns} if in_first_phase else {}


def _form(engine: Engine) -> str:
    """The formula of the factorisable linears' weight."""
    if not engine.layers:
        return "W"
    return "W0 + U V" if any(layer.weight is not None for layer in engine.layers.values()) else "U V"
