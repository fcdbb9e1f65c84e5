"""The training loop: steps, rank changes, evaluation, saving and stopping.

``parts.py`` builds the parts: ``RankChanges`` asks the method and carries out its changes, ``StepMetrics``
records steps, ``StepWatch`` looks for slow ranks and jumps of the loss, ``RecordedEvaluation`` evaluates,
``Saver`` writes checkpoints, and ``StopRequest`` says when to end.
"""

import time
from dataclasses import replace

from inrank_megatron.checkpoint.folder import step_folder
from inrank_megatron.distributed.peak_memory import largest
from inrank_megatron.engine.engine import StepResult
from inrank_megatron.engine.held import held_bytes, held_slices
from inrank_megatron.engine.replicas import check_replicas
from inrank_megatron.engine.state import engine_record
from inrank_megatron.training.failures import saves_outlive_failures
from inrank_megatron.training.loss_history import LossHistory
from inrank_megatron.training.parts import TrainingParts
from inrank_megatron.training.progress import Progress, recorded_progress
from inrank_megatron.training.saving import SaveStatus
from inrank_megatron.training.schedule import learning_rate
from inrank_megatron.training.step_metrics import is_due, phase_name
from inrank_megatron.training.watching import RolledBack


class Trainer(TrainingParts):
    """Trains from the start or a checkpoint to the end or a stop."""

    def train(self) -> bool:
        """Train to the end or to a stop, and leave a checkpoint. True if the run is finished."""
        with saves_outlive_failures(self._saver, self.marks):
            self._begin()
            stopping = self._stopping()
            while self.progress.step < self.config.training.train_iters and not stopping:
                stopping = self._step()
                if self._between_steps():  # may have taken long
                    stopping = self._stopping()
            return self._end()

    def _begin(self) -> None:
        step, engine = self.progress.step, self.engine
        # Megatron's modules ask for a random state even in an evaluation, which may come before any step.
        engine.parallel.seed_random(seed=self.config.training.seed, step=step)
        if self.folder.checkpoint is None:
            self._rank_changes.initialise()
        else:
            if engine.layers:  # a checkpoint of weights alone comes without this record
                self.run_logger.structure(step, "init", engine.views(), once=True)
            if self.progress.check_under_way:
                self._change_ranks()
            self._between_steps()  # a stop may have cut them short
        self._memory.begin(phase_name(engine))

    def _step(self) -> bool:
        """Train a step and change ranks if due. Returns whether any rank was asked to stop."""
        began, step, history = time.monotonic(), self.progress.step + 1, self.progress.history
        self.marks.begin("step", step)
        lr = learning_rate(step, self.config)
        result = self.engine.train_step(
            self._micro_batches(step - 1),
            step=step,
            lr=lr,
            meanwhile=self._meanwhile,
            forbids=self._step_watch.forbids(history),
            asks_times=self._step_watch.asks_times(step),
        )
        self.progress = Progress(step, self._seconds(), history=history)
        self._watch(result, lr=lr, seconds=time.monotonic() - began)
        stopping = self._saver.should_stop(result.notice)
        self._change_ranks()
        self._compare_replicas()
        return stopping

    def _meanwhile(self) -> SaveStatus:
        """Work for the host while the device computes a step: record the last check and fetch the tokens of
        the next step. Returns whether this rank was asked to stop.
        """
        self._rank_changes.record()
        following = self.progress.step + 1
        if following < self.config.training.train_iters:
            self._micro_batches.fetch(following)
        return self._saver.status(self.stop.reason() is not None)

    def _watch(self, result: StepResult, *, lr: float, seconds: float) -> None:
        """Record the step's ``result``, and look for slow ranks and jumps of the loss."""
        step, history = self.progress.step, self.progress.history
        self.progress = replace(self.progress, history=self._step_watch.look(result, history, step=step))
        figures = self._step_watch.figures()
        self._metrics.record(result, self.progress, lr=lr, seconds=seconds, figures=figures)
        if self._step_watch.rolls_back(result.loss, history):
            self._roll_back(history)

    def _roll_back(self, history: LossHistory) -> None:
        """Go back to the newest checkpoint, if this run has one.

        Raises:
            RolledBack: the run has a checkpoint, and continues from it.
        """
        step, saved = self.progress.step, self._saved
        if saved.step == 0 or saved.weights_only:
            self.run_logger.message(
                f"step {step}: there is no checkpoint to roll back to yet; the run goes on"
            )
            return
        self.marks.begin("rollback", step)
        self._saver.wait()
        self._rank_changes.close()
        skipped = history.skipped_batches + step - saved.step
        raise RolledBack(step_folder(self.folder.checkpoints, saved.step), step, skipped)

    def _change_ranks(self) -> None:
        step, phase = self.progress.step, phase_name(self.engine)
        changed = self._rank_changes.after(step, is_last=step == self.config.training.train_iters)
        self.identity = self.identity | changed
        if phase_name(self.engine) != phase:  # after the switch earlier losses say nothing
            self.progress = replace(self.progress, history=replace(self.progress.history, losses=()))

    def _compare_replicas(self) -> None:
        step, interval = self.progress.step, self.config.parallel.replica_check_interval
        if self.engine.parallel.world_size > 1 and is_due(step, interval or None):
            self.marks.begin("comparison of replicas", step)
            check_replicas(self.engine, step=step, last_good=self._compared_step)
            self._compared_step = step

    def _between_steps(self) -> bool:
        """Evaluate and save if due. Returns whether either was."""
        training, step = self.config.training, self.progress.step
        if step >= training.train_iters:  # `_end` evaluates and saves then
            return False
        evaluates = is_due(step, training.eval_interval)
        if evaluates:
            self._evaluate("valid")
        saves = is_due(step, training.save_interval) or step == self._saved.step
        if saves:
            self._save()
        return evaluates or saves

    def _evaluate(self, split: str) -> bool:
        """Evaluate and record, unless an earlier session has. Returns False if a stop interrupted it."""
        progress = self._evaluation.evaluate(split, self.progress)
        self.progress = progress or self.progress
        return progress is not None

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless the newest one is of this step already.

        A checkpoint that a stop left without the validation of its step is replaced. A checkpoint of weights
        alone belongs to the user and is not replaced.
        """
        self._rank_changes.record()
        progress, engine, saved = self.progress, self.engine, self._saved
        is_complete = saved.validation_tokens == progress.validation_tokens
        if saved.step == progress.step and (is_complete or saved.weights_only):
            return
        state = recorded_progress(progress, check_under_way=self._rank_changes.under_way)
        state |= {"identity": self.identity, "engine": engine_record(engine)}
        self.marks.begin("save", progress.step)
        self._saver.save(held_slices(engine), state, snapshot_bytes=held_bytes(engine))
        self._saved = progress

    def _end(self) -> bool:
        finished = not self._stopping() and self._evaluate("valid")
        self._save()  # with the validation loss on record; the test needs no new one
        finished = finished and self._evaluate("test")
        step, parallel = self.progress.step, self.engine.parallel
        if not finished:
            self.run_logger.message(f"stopping after step {step}: {self.stop.reason_of_all(parallel)}")
        elif left := self.method.unfinished(self.engine.views()):
            self.run_logger.event("unfinished", step, f"step {step}: {left}")
        self._saver.wait()
        self._rank_changes.close()
        self.marks.begin("report", step)
        self._memory.since_last()
        self.peak_memory = largest(parallel.gather_from_all_ranks(self._memory.parts))
        return finished
