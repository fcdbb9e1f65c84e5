"""The training loop: step, every k steps a rank decision, once a switch; evaluation, saving, stopping."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from inrank_megatron.config.out_of_memory import is_shortage
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.distributed.peak_memory import Peak, PeakMemory, largest
from inrank_megatron.engine.decisions import Decision, Decisions
from inrank_megatron.engine.engine import Engine, StepResult
from inrank_megatron.engine.held import held_bytes, held_slices
from inrank_megatron.engine.replicas import check_replicas
from inrank_megatron.engine.state import engine_record
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Refactor, SetRank
from inrank_megatron.training.evaluate import evaluate
from inrank_megatron.training.micro_batches import MicroBatches
from inrank_megatron.training.progress import Progress
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import RunLogger
from inrank_megatron.training.saving import Saver, SaveStatus
from inrank_megatron.training.schedule import learning_rate
from inrank_megatron.training.step_metrics import StepMetrics, phase
from inrank_megatron.training.stopping import StopRequest

PHASE_1_COLUMNS = "phase_1_columns"
OVERLAP = "overlap_rank_check"
PARTS = ("dense", "phase_1", "phase_2")  # by the number of the phase


@dataclass
class Trainer:
    """Everything that a run needs once it is built; :meth:`train` does the rest.

    Attributes:
        windows: what to evaluate on, by split (``valid``, ``test``); a split without text is absent.
        identity: what every checkpoint records of the run, as JSON: data, switch step, whether rank checks
            overlap with steps and, after the switch, the columns of each layer before it.
        peak_flops: of one device, for the utilisation; None where it is not known.
        peak_memory: the largest of all ranks, by part of the run; empty until the training has ended.
    """

    config: Config
    topology: Topology
    engine: Engine
    method: Method
    batches: TrainBatches
    windows: dict[str, EvalWindows]
    folder: RunFolder
    run_logger: RunLogger
    stop: StopRequest
    identity: dict
    peak_flops: float | None
    progress: Progress = field(default_factory=Progress)
    peak_memory: dict[str, Peak] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parallel, device = self.engine.parallel, self.engine.device
        self._began, self._earlier = time.monotonic(), self.progress.seconds
        self._micro_batches = MicroBatches(self.batches, self.topology, parallel, device)
        self._memory = PeakMemory(device, "start")
        self._metrics = StepMetrics(self.engine, self.config, self.topology, self.peak_flops)
        self._overlaps = self.identity.get(OVERLAP, False)  # not in runs that began before that was possible
        self._decisions = Decisions(
            self.engine, self.method, batches=self._micro_batches, overlap=self._overlaps
        )
        self._unrecorded: list[Callable[[], None]] = []
        self._saved = self.progress  # the newest checkpoint's; nothing of step 0 is worth one
        self._compared_step = self.progress.step  # full tensors were loaded, or drawn on all ranks alike
        self._saver = Saver(
            self.folder.checkpoints,
            parallel=parallel,
            device=device,
            run_logger=self.run_logger,
            keep_last=self.config.training.keep_last,
            verified=self.folder.checkpoint,
        )

    def train(self) -> bool:
        """Train to the end or to a stop, and leave a checkpoint. True if the run is finished."""
        with self._saves_outlive_failures():
            self._begin()
            stopping = self._stopping()
            while self.progress.step < self.config.training.train_iters and not stopping:
                stopping = self._step()
                if self._between_steps():  # for however long
                    stopping = self._stopping()
            return self._end()

    # ---- the start ----

    def _begin(self) -> None:
        step, engine = self.progress.step, self.engine
        # Megatron's modules ask for a random state even in an evaluation, which may come before any step.
        engine.parallel.seed_random(seed=self.config.training.seed, step=step)
        if self.folder.checkpoint is None:
            self._initialise()
        else:
            if engine.layers:  # of weights alone no session has recorded it
                self.run_logger.structure(step, "init", engine.views(), once=True)
            if self.progress.check_under_way:
                self._apply_method()
            self._between_steps()  # a stop may have cut them short
        self._memory.begin(PARTS[phase(engine)])

    def _initialise(self) -> None:
        self.engine.apply(self.method.initialisation(), step=0, batches=self._micro_batches)
        # A model that is built from here on gets the run's own state; by then the folder may be gone.
        factory: Any = self.engine.factory  # a `GPTFactory`
        self.engine.factory = replace(factory, pretrained=None)
        if self.engine.layers:
            self.run_logger.structure(0, "init", self.engine.views())

    # ---- one step ----

    def _step(self) -> bool:
        """Train a step, with what follows from it. Whether a rank was asked to stop, the same on all."""
        began, step = time.monotonic(), self.progress.step + 1
        lr = learning_rate(step, self.config)
        result = self.engine.train_step(
            self._micro_batches(step - 1), step=step, lr=lr, meanwhile=self._meanwhile
        )
        self.progress = Progress(step, self._seconds())
        self._log(result, lr=lr, seconds=time.monotonic() - began)
        stopping = self._saver.should_stop(result.notice)
        self._apply_method()
        self._compare_replicas()
        return stopping

    def _meanwhile(self) -> SaveStatus:
        """While the device computes a step: record the check before it, get the next one's tokens on their
        way, and say whether this rank was asked to stop.
        """
        self._record_checks()
        following = self.progress.step + 1
        if following < self.config.training.train_iters:
            self._micro_batches.fetch(following)
        return self._saver.status(self.stop.reason() is not None)

    def _log(self, result: StepResult, *, lr: float, seconds: float) -> None:
        step, training = self.progress.step, self.config.training
        if _due(step, training.log_interval) or step == training.train_iters:
            metrics = self._metrics.of(result, step=step, lr=lr, seconds=seconds)
            elapsed = {"elapsed_seconds": self.progress.seconds}
            self.run_logger.train(metrics | elapsed | self._memory.since_last())
        if result.skipped:
            scale = self.engine.loss_scaling.scale
            self.run_logger.message(
                f"step {step}: overflow, nothing is updated; the loss scale is {scale:g} now"
            )

    def _apply_method(self) -> None:
        step = self.progress.step
        for decision in self._decisions.after(step, is_last=step == self.config.training.train_iters):
            changes = decision.changes
            checks = [change for change in changes if isinstance(change, SetRank)]
            switches = any(isinstance(change, Refactor) for change in changes)
            self._unrecorded.append(partial(self.run_logger.checks, step, decision.views, checks))
            if switches or not self._overlaps:
                self._record_checks()
            if switches:
                self._switch(decision)
            else:
                self.engine.apply(changes, step=decision.step, batches=self._micro_batches)

    def _record_checks(self) -> None:
        """With overlap the records of a check are written while the device computes, and before a save."""
        while self._unrecorded:
            self._unrecorded.pop(0)()

    def _switch(self, decision: Decision) -> None:
        step, engine, began = decision.step, self.engine, time.monotonic()
        form = _form(engine)
        begins = "; second phase" if engine.in_first_phase or not engine.layers else ""
        self._memory.begin("switch")
        if engine.in_first_phase:
            columns = {view.name: view.active_columns for view in decision.views}
            self.identity = self.identity | {PHASE_1_COLUMNS: columns}
        engine.apply(decision.changes, step=step, batches=self._micro_batches)
        self._memory.begin(PARTS[phase(engine)])
        views, seconds = engine.views(), time.monotonic() - began
        mean = sum(view.rank for view in views) / len(views)
        self.run_logger.structure(step, "switch", views)
        self.run_logger.event(
            "switch",
            step,
            f"step {step}: {form} becomes U* V*, mean rank {mean:.1f} ({seconds:.1f} s){begins}",
            seconds=seconds,
            mean_rank=mean,
        )

    def _compare_replicas(self) -> None:
        step, interval = self.progress.step, self.config.parallel.replica_check_interval
        if self.engine.parallel.world_size > 1 and _due(step, interval or None):
            check_replicas(self.engine, step=step, last_good=self._compared_step)
            self._compared_step = step

    # ---- between steps ----

    def _between_steps(self) -> bool:
        """Evaluate and save where that is due; whether it was."""
        training, step = self.config.training, self.progress.step
        evaluates = _due(step, training.eval_interval) and step < training.train_iters
        if evaluates:
            self._evaluate("valid")
        saves = _due(step, training.save_interval) or step == self._saved.step
        saves = saves and step < training.train_iters
        if saves:
            self._save()
        return evaluates or saves

    def _evaluate(self, split: str) -> bool:
        """Evaluate and record, unless an earlier session has; False if a stop ended it.

        A split without text is done at once.
        """
        training, step = self.config.training, self.progress.step
        windows, run_logger = self.windows.get(split), self.run_logger
        if windows is None:
            return True
        usual = limit = len(windows)
        if training.eval_iters is not None and split == "valid":
            usual = min(usual, training.eval_iters * self.topology.global_batch_size)
            limit = usual if step < training.train_iters else limit
        tokens = min(limit * windows.seq_length, windows.num_targets)
        recorded = self.engine.parallel.broadcast_from_rank_0(
            lambda: run_logger.recorded_evaluation(step, split, tokens=tokens)
        )
        rows = self.topology.micro_batch_size
        result = recorded or evaluate(
            self.engine, windows, rows=rows, limit=limit, part=usual, stop=self._stopping
        )
        if result is None:
            return False
        if recorded is None:
            self.progress = replace(self.progress, seconds=self._seconds())
            run_logger.evaluation(step, split, result, elapsed_seconds=self.progress.seconds)
        if split == "valid":
            common = result.part or result
            self.progress = replace(
                self.progress, validation_loss=common.loss, validation_tokens=common.tokens
            )
        return True

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks.

        Raises:
            UserError: on all ranks, if the checkpoint being written could not be.
        """
        return self._saver.any_rank_stops(self.stop.reason() is not None)

    def _save(self) -> None:
        """Have a checkpoint of the present step written, unless the newest one is of this step already.

        One that a stop left without this step's validation is replaced; weights alone, which are the user's,
        stay what they are.
        """
        self._record_checks()
        step, engine, saved = self.progress.step, self.engine, self._saved
        is_complete = saved.validation_tokens == self.progress.validation_tokens
        if saved.step == step and (is_complete or saved.weights_only):
            return
        loss = self.progress.validation_loss
        state = {
            "step": step,
            "seconds": self.progress.seconds,
            "identity": self.identity,
            "weights_only": False,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "validation_tokens": self.progress.validation_tokens,
            "rank_check_under_way": self._decisions.under_way,
            "engine": engine_record(engine),
        }
        self._saver.save(held_slices(engine), state, snapshot_bytes=held_bytes(engine))
        self._saved = self.progress

    # ---- the end ----

    def _end(self) -> bool:
        finished = not self._stopping() and self._evaluate("valid")
        self._save()  # with the validation loss on record; the test needs no new one
        finished = finished and self._evaluate("test")
        step, parallel = self.progress.step, self.engine.parallel
        if not finished:
            reason = parallel.broadcast_from_rank_0(
                lambda: self.stop.reason() or "another rank was asked to stop"
            )
            self.run_logger.message(f"stopping after step {step}: {reason}")
        elif left := self.method.unfinished(self.engine.views()):
            self.run_logger.event("unfinished", step, f"step {step}: {left}")
        self._saver.wait()
        self._memory.since_last()
        self.peak_memory = largest(parallel.gather_from_all_ranks(self._memory.parts))
        return finished

    @contextmanager
    def _saves_outlive_failures(self) -> Iterator[None]:
        """What a message says to continue from may still be on its way to the disk."""
        try:
            yield
        except UserError:  # which ends all ranks alike
            with suppress(UserError, RuntimeError):
                self._saver.wait()
            raise
        except (RuntimeError, MemoryError) as error:
            if is_shortage(error):  # perhaps of this rank alone
                self._saver.finish()
            raise

    def _seconds(self) -> float:
        """Training time over all sessions."""
        return self._earlier + time.monotonic() - self._began


def _form(engine: Engine) -> str:
    """What a factorisable linear is, in a formula."""
    if not engine.layers:
        return "W"
    return "W0 + U V" if any(layer.weight is not None for layer in engine.layers.values()) else "U V"


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
