"""The training loop: step, every k steps a rank decision, once a switch; evaluation, saving, stopping."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.weights import is_weights_only
from inrank_megatron.config import costs
from inrank_megatron.config.out_of_memory import is_shortage
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.distributed.peak_memory import Peak, PeakMemory, largest
from inrank_megatron.engine.decisions import decide
from inrank_megatron.engine.engine import Engine, StepResult
from inrank_megatron.engine.live_model import MicroBatch
from inrank_megatron.engine.replicas import check_replicas
from inrank_megatron.engine.state import engine_record, state_bytes, whole_tensors
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Refactor, SetRank
from inrank_megatron.training.evaluate import evaluate
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import Journal
from inrank_megatron.training.saving import Saver, Standing
from inrank_megatron.training.schedule import learning_rate
from inrank_megatron.training.stopping import StopRequest

PHASE_1_COLUMNS = "phase_1_columns"
PARTS = ("dense", "phase_1", "phase_2")  # by the number of the phase


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``seconds``: training time so far, over all its sessions.

    ``validation_loss``, ``validation_tokens``: of this step, over the part of the split that all validations
    of the run have in common. ``weights_only``: no step has been made since weights alone were read.
    """

    step: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None
    validation_tokens: int | None = None
    weights_only: bool = False


@dataclass
class Trainer:
    """Everything that a run needs once it is built; :meth:`train` does the rest.

    Attributes:
        windows: what to evaluate on, by split (``valid``, ``test``); a split without text is absent.
        identity: what every checkpoint records of the run, as JSON: data, switch step and, after the switch,
            the columns of each layer before it.
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
    journal: Journal
    stop: StopRequest
    identity: dict
    peak_flops: float | None
    progress: Progress = Progress()
    peak_memory: dict[str, Peak] = field(default_factory=dict)

    def train(self) -> bool:
        """Train to the end or to a stop, and leave a checkpoint. True if the run is finished."""
        self._began, self._earlier = time.monotonic(), self.progress.seconds
        self._memory = PeakMemory(self.engine.device, "start")
        self._ahead: tuple[int, Any] = (-1, [])  # a step (from 0) and its rows
        self._saved = self.progress  # the newest checkpoint's; nothing of step 0 is worth one
        self._compared_step = self.progress.step  # whole tensors were loaded, or drawn on all ranks alike
        self._saver = Saver(
            self.folder.checkpoints,
            parallel=self.engine.parallel,
            device=self.engine.device,
            journal=self.journal,
            keep_last=self.config.training.keep_last,
            verified=self.folder.checkpoint,
        )
        try:
            return self._train()
        except UserError:
            # It ends all ranks alike: what it tells the user to go on from may still be on its way.
            with suppress(UserError, RuntimeError):
                self._saver.wait()
            raise
        except (RuntimeError, MemoryError) as error:
            if is_shortage(error):  # perhaps of this rank alone
                self._saver.finish()
            raise

    def _train(self) -> bool:
        training, parallel = self.config.training, self.engine.parallel
        # Megatron's modules ask for a random state even in an evaluation, which may come before any step.
        parallel.seed_random(seed=training.seed, step=self.progress.step)
        if self.folder.checkpoint is None:
            self._start()
        else:
            if self.engine.layers:  # of weights alone no session has recorded it
                self.journal.structure(self.progress.step, "init", self.engine.views(), once=True)
            self._between_steps()  # a stop may have cut them short
        self._memory.begin(PARTS[self._phase])
        stopping = self._stopping()
        while self.progress.step < training.train_iters and not stopping:
            stopping = self._step()
            if self._between_steps():  # for however long
                stopping = self._stopping()
        finished = not self._stopping() and self._evaluate("valid")
        self._save()  # with the validation loss on record; the test needs no new one
        finished = finished and self._evaluate("test")
        if not finished:
            reason = parallel.from_first_rank(lambda: self.stop.reason() or "another rank was asked to stop")
            self.journal.message(f"stopping after step {self.progress.step}: {reason}")
        elif left := self.method.unfinished(self.engine.views()):
            self.journal.event("unfinished", self.progress.step, f"step {self.progress.step}: {left}")
        self._saver.wait()
        self._memory.since_last()
        self.peak_memory = largest(parallel.from_every_rank(self._memory.parts))
        return finished

    # ---- one step ----

    def _start(self) -> None:
        self.engine.apply(self.method.start(), step=0, batches=self._micro_batches)
        # A model that is built from here on gets the run's own state; by then the folder may be gone.
        factory: Any = self.engine.factory  # a `GPTFactory`
        self.engine.factory = replace(factory, pretrained=None)
        if self.engine.layers:
            self.journal.structure(0, "init", self.engine.views())

    def _step(self) -> bool:
        """Train a step, with what follows from it. Whether a rank was asked to stop, the same on all."""
        began = time.monotonic()
        step = self.progress.step + 1
        lr = learning_rate(step, self.config)
        result = self.engine.train_step(
            self._micro_batches(step - 1), step=step, lr=lr, meanwhile=self._meanwhile
        )
        self.progress = Progress(step, self._earlier + time.monotonic() - self._began)
        if _due(step, self.config.training.log_interval) or step == self.config.training.train_iters:
            self.journal.train(self._record(result, lr, time.monotonic() - began))
        if result.skipped:
            scale = self.engine.loss_scaling.scale
            self.journal.message(
                f"step {step}: overflow, nothing is updated; the loss scale is {scale:g} now"
            )
        stopping = self._saver.heeds(result.notice)
        self._apply_method()
        self._compare_replicas()
        return stopping

    def _meanwhile(self) -> Standing:
        """While the device computes a step: get the next one's tokens on their way to it, and say whether
        this rank was asked to stop.
        """
        following = self.progress.step + 1
        if following < self.config.training.train_iters:
            self._ahead = (following, self._rows(following))
        return self._saver.standing(self.stop.reason() is not None)

    def _compare_replicas(self) -> None:
        step, interval = self.progress.step, self.config.parallel.replica_check_interval
        if self.engine.parallel.world_size > 1 and _due(step, interval or None):
            check_replicas(self.engine, step=step, last_good=self._compared_step)
            self._compared_step = step

    def _apply_method(self) -> None:
        step, engine = self.progress.step, self.engine
        decision = decide(engine, self.method, step=step, batches=self._micro_batches)
        if decision is None:
            return
        views, changes = decision.views, decision.changes
        self.journal.checks(step, views, [c for c in changes if isinstance(c, SetRank)])
        switching, began = any(isinstance(c, Refactor) for c in changes), time.monotonic()
        form = "W"
        if switching:
            self._memory.begin("switch")
        if switching and engine.layers:
            self.identity = self.identity | {PHASE_1_COLUMNS: {view.name: view.active for view in views}}
            form = "W0 + U V" if self.config.inrank.frozen_base else "U V"
        engine.apply(changes, step=step, batches=self._micro_batches)
        if switching:
            self._memory.begin(PARTS[self._phase])
            views = engine.views()
            mean = sum(view.rank for view in views) / len(views)
            seconds = time.monotonic() - began
            self.journal.structure(step, "switch", views)
            self.journal.event(
                "switch",
                step,
                f"step {step}: {form} becomes U* V*, mean rank {mean:.1f} ({seconds:.1f} s); second phase",
                seconds=seconds,
                mean_rank=mean,
            )

    def _micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's share of the global batch of ``step`` (from 0): inputs and targets on the device."""
        known, rows = self._ahead
        if known != step:
            rows = self._rows(step)
        return ((own[:, :-1], own[:, 1:]) for own in rows)

    def _rows(self, step: int) -> list[Tensor]:
        """The rows of each micro-batch, on their way to the device."""
        parallel, micro = self.engine.parallel, self.topology.micro_batch_size
        rows = []
        for index in range(self.topology.accumulation_steps):
            first = (index * parallel.dp_size + parallel.dp_rank) * micro
            own = torch.from_numpy(self.batches.rows(step, first, first + micro))
            rows.append(to_device(own, self.engine.device))
        return rows

    @property
    def _phase(self) -> int:
        return 1 if self.engine.in_first_phase else 2 if self.engine.layers else 0

    def _record(self, result: StepResult, lr: float, seconds: float) -> dict:
        layers, topology = self.engine.layers, self.topology
        tokens = topology.global_batch_size * self.config.model.seq_length
        base = any(layer.weight is not None for layer in layers.values())
        flops = costs.flops_per_token(
            self.config,
            topology.padded_vocab_size,
            frozen_base=base,
            ranks={name: x.active for name, x in layers.items()} or None,
        )
        per_device = flops * tokens / seconds / topology.world_size
        return {
            "step": self.progress.step,
            "loss": result.loss,
            "perplexity": math.exp(min(result.loss, 700.0)),
            "lr": lr,
            "grad_norm": None if result.skipped else result.grad_norm,
            "loss_scale": self.engine.loss_scaling.scale,
            "skipped_steps": self.engine.loss_scaling.skipped,
            "tokens": tokens * self.progress.step,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / topology.world_size,
            "tflops_per_second": per_device / 1e12,
            "utilisation": per_device / self.peak_flops if self.peak_flops else None,
            "mean_rank": sum(self.engine.ranks.values()) / len(layers) if layers else None,
            "phase": self._phase,
            "elapsed_seconds": self.progress.seconds,
            **self._memory.since_last(),
        }

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
        windows, journal = self.windows.get(split), self.journal
        if windows is None:
            return True
        usual = limit = len(windows)
        if training.eval_iters is not None and split == "valid":
            usual = min(usual, training.eval_iters * self.topology.global_batch_size)
            limit = usual if step < training.train_iters else limit
        tokens = min(limit * windows.seq_length, windows.num_targets)
        recorded = self.engine.parallel.from_first_rank(
            lambda: journal.recorded_evaluation(step, split, tokens=tokens)
        )
        rows = self.topology.micro_batch_size
        result = recorded or evaluate(
            self.engine, windows, rows=rows, limit=limit, part=usual, stop=self._stopping
        )
        if result is None:
            return False
        if recorded is None:
            self.progress = replace(self.progress, seconds=self._earlier + time.monotonic() - self._began)
            journal.evaluation(step, split, result, elapsed_seconds=self.progress.seconds)
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
        return self._saver.stops(self.stop.reason() is not None)

    def _save(self) -> None:
        """Have a checkpoint of the present step written, unless the newest one is of this step already.

        One that a stop left without this step's validation is replaced; weights alone, which are the user's,
        stay what they are.
        """
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
            "engine": engine_record(engine),
        }
        self._saver.save(whole_tensors(engine), state, snapshot_bytes=state_bytes(engine))
        self._saved = self.progress


def resume_progress(checkpoint: Checkpoint) -> Progress:
    """Where the run stood when ``checkpoint`` was written."""
    state = checkpoint.state
    return Progress(
        step=state["step"],
        seconds=state["seconds"],
        validation_loss=state.get("validation_loss"),
        validation_tokens=state.get("validation_tokens"),
        weights_only=is_weights_only(state),
    )


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
