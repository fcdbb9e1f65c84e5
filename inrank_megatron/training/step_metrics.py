"""What is recorded of an optimizer step."""

import math
from dataclasses import dataclass

from inrank_megatron.config import costs
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.distributed.peak_memory import PeakMemory
from inrank_megatron.engine.engine import Engine, StepResult
from inrank_megatron.reporting.run import PHASES
from inrank_megatron.training.progress import Progress
from inrank_megatron.training.run_logger import RunLogger


def phase(engine: Engine) -> int:
    """1 while ranks may change or W0 is there, 2 after that, 0 where every linear is dense."""
    return 1 if engine.in_first_phase else 2 if engine.layers else 0


def phase_name(engine: Engine) -> str:
    return PHASES[phase(engine)]


def is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


@dataclass(frozen=True)
class StepMetrics:
    """``peak_flops``: of one device, FLOP/s; None where it is not known."""

    engine: Engine
    config: Config
    topology: Topology
    run_logger: RunLogger
    memory: PeakMemory
    peak_flops: float | None

    def record(
        self, result: StepResult, progress: Progress, *, lr: float, seconds: float, figures: dict
    ) -> None:
        """Record the step that ``progress`` ends with if it is due, with ``figures`` of others, and say so if
        it was skipped.
        """
        step, training = progress.step, self.config.training
        if is_due(step, training.log_interval) or step == training.train_iters:
            metrics = self._of(result, step=step, lr=lr, seconds=seconds)
            elapsed = {"elapsed_seconds": progress.seconds}
            self.run_logger.train(metrics | figures | elapsed | self.memory.since_last())
        if result.skipped:
            scale = self.engine.loss_scaling.scale
            self.run_logger.message(
                f"step {step}: overflow, nothing is updated; the loss scale is {scale:g} now"
            )

    def _of(self, result: StepResult, *, step: int, lr: float, seconds: float) -> dict:
        """The record of ``step``, which took ``seconds``."""
        layers, scaling, world_size = self.engine.layers, self.engine.loss_scaling, self.topology.world_size
        tokens = self.topology.global_batch_size * self.config.model.seq_length
        per_device = self._flops_per_token() * tokens / seconds / world_size
        return {
            "step": step,
            "loss": result.loss,
            "perplexity": math.exp(min(result.loss, 700.0)),
            "lr": lr,
            "grad_norm": None if result.skipped or result.forbidden else result.grad_norm,
            "loss_scale": scaling.scale,
            "skipped_steps": scaling.skipped,
            "tokens": tokens * step,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / world_size,
            "tflops_per_second": per_device / 1e12,
            "utilisation": per_device / self.peak_flops if self.peak_flops else None,
            "mean_rank": sum(self.engine.ranks.values()) / len(layers) if layers else None,
            "phase": phase(self.engine),
        }

    def _flops_per_token(self) -> float:
        layers = self.engine.layers
        return costs.flops_per_token(
            self.config,
            self.topology.padded_vocab_size,
            frozen_base=any(layer.weight is not None for layer in layers.values()),
            ranks={name: layer.active_columns for name, layer in layers.items()} or None,
        )
