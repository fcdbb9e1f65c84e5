"""The training engine: optimizer steps of a model under DeepSpeed ZeRO, views for methods, and their changes.

The engine knows no method by name. ``live_model.py`` holds the model, and ``changes.py`` carries out what
methods decide.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.engine.changes import carry_out
from inrank_megatron.engine.diagnosis import first_non_finite
from inrank_megatron.engine.fragments import finish_writes
from inrank_megatron.engine.live_model import Batches, LiveModel, MicroBatch
from inrank_megatron.engine.step_report import StepReport, norms_through
from inrank_megatron.engine.views import layer_views
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.changes import Change, LayerView, Spectrum


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step, the same on all ranks.

    Attributes:
        loss: mean loss per token over the global batch.
        grad_norm: global gradient norm before clipping; infinite if the step was skipped or forbidden.
        skipped: whether the gradient overflowed under loss scaling, so that nothing was updated.
        notice: the largest notice that any rank gave (``meanwhile`` of :meth:`Engine.train_step`).
        forbidden: whether the update was left out because of the loss.
        rank_seconds: seconds of each rank's own work per step since the times were last asked for.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    notice: int = 0
    forbidden: bool = False
    rank_seconds: Sequence[float] = ()


class Engine(LiveModel):
    """A model in training: :meth:`train_step`, and between steps :meth:`views` and :meth:`apply`."""

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        *,
        step: int,
        lr: float,
        meanwhile: Callable[[], int] = lambda: 0,
        forbids: Callable[[float], bool] = lambda loss: False,
        asks_times: bool = False,
    ) -> StepResult:
        """Optimizer step number ``step`` (from 1) over this rank's micro-batches, at learning rate ``lr``.

        If a loss or gradient norm is not finite on any rank, loss scaling skips the update. Without loss
        scaling, every rank raises before the update; the message says where the value came from.

        Args:
            meanwhile: called when all forward and backward passes have been sent to the device. All ranks
                receive the largest value that it returns on any of them (``StepReport``).
            forbids: whether a step of this loss must not update anything; the same on all ranks.
            asks_times: whether the result has ``rank_seconds``.
        """
        self.clock.begin()
        self.parallel.seed_random(seed=self.config.training.seed, step=step)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        seen, total = self._accumulate(micro_batches)
        self._replicated.sum()
        report = StepReport(
            total,
            self.accumulation * self.parallel.dp_size,
            meanwhile(),
            self.parallel,
            need_finite=not self.loss_scaling.enabled,
            forbids=forbids,
            seconds=self.clock.take() if asks_times else None,
        )
        with self.loss_scaling.unless(lambda: report.forbidden):
            norm = self._update(step, report, seen)
        self._end_step()
        skipped = self.loss_scaling.enabled and not math.isfinite(norm) and not report.forbidden
        if not report.forbidden:
            self.loss_scaling.count(overflow=skipped, step=step)
        return StepResult(
            loss=report.loss,
            grad_norm=norm,
            skipped=skipped,
            notice=report.notice,
            forbidden=report.forbidden,
            rank_seconds=report.rank_seconds,
        )

    def _accumulate(self, micro_batches: Iterable[MicroBatch]) -> tuple[list[MicroBatch], Tensor]:
        """Forward and backward passes. Returns the micro-batches, and the sum of their losses in FP64."""
        seen, total = [], torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            seen.append(batch)
            self._begin_micro_batch(index)
            loss = self.loss(self.deepspeed, batch)
            if index + 1 == self.accumulation:
                self.clock.forward_done()
            self.deepspeed.backward(loss)
            total += loss.detach()
            if index + 1 < self.accumulation:
                self.deepspeed.step()  # counts the micro-batch
        self.clock.backward_done()
        return seen, total

    def _update(self, step: int, report: StepReport, seen: list[MicroBatch]) -> float:
        """The optimizer's step. Returns the gradient norm, which is infinite if the step was left out."""
        if self.deepspeed.zero_optimization_stage() == 0:
            norm = self._update_without_zero(report)
        else:
            with norms_through(report.fetch):
                self.deepspeed.step()
            if not getattr(self.deepspeed.optimizer, "persistent_parameters", True):
                # Else ZeRO 3 waits for its update when it gathers the parameters that stay gathered between
                # steps.
                finish_writes()
            norm = self._norm_of_deepspeed()
            if report.loss is None:  # DeepSpeed found an overflow before it computed the norm
                report.fetch()
        if not self.loss_scaling.enabled and not report.forbidden:
            if not math.isfinite(report.loss):
                self._stop_for(f"the loss is {report.loss}", step, seen)
            if not math.isfinite(norm):
                what = f"the loss is {report.loss:.4f} but the gradient norm is not finite"
                self._stop_for(what, step, seen)
        return norm

    def _update_without_zero(self, report: StepReport) -> float:
        """Checks first: in stage 0 DeepSpeed steps whatever the gradients (FP32) or the loss (BF16) are."""
        plain = isinstance(self.deepspeed.optimizer, torch.optim.Optimizer)
        norm = report.fetch(self._gradient_norm() if plain else None)
        if (
            report.forbidden
        ):  # only where `plain`; DeepSpeed counts the step, and its optimizer finds nothing to do
            for _, parameter in self.parameters():
                parameter.grad = None
            self.deepspeed.step()
            return math.inf
        if not math.isfinite(report.loss) or not norm.isfinite():
            return math.inf
        if plain:
            self._clip(norm)
        self.deepspeed.step()
        return norm.item() if plain else self._norm_of_deepspeed()

    def _norm_of_deepspeed(self) -> float:
        overflow = getattr(self.deepspeed.optimizer, "overflow", False)
        return math.inf if overflow else float(self.deepspeed.get_global_grad_norm())

    def _gradient_norm(self) -> Tensor:
        """The global norm in FP32 without ZeRO, added up as DeepSpeed's ZeRO does: the bits are the same."""
        groups = [group["params"] for group in self.deepspeed.optimizer.param_groups]
        squares = torch.stack([self._squares(parameters) for parameters in groups])
        dist.all_reduce(squares, group=self.parallel.tp_group)
        return torch.linalg.vector_norm(squares.sqrt())

    def _squares(self, parameters: list[Tensor]) -> Tensor:
        """Sum of squares of this rank's part of the gradients; rank 0 of the group counts unsharded ones."""
        counted = [
            parameter.grad
            for parameter in parameters
            if parameter.grad is not None
            and (getattr(parameter, "tensor_model_parallel", False) or self.parallel.tp_rank == 0)
        ]
        if not counted:
            return torch.zeros((), device=self.device)
        return torch.stack(torch._foreach_norm(counted, dtype=torch.float64)).square().sum().float()

    def _clip(self, norm: Tensor) -> None:
        """Clip by the global ``norm``, a scalar on the host, with DeepSpeed's arithmetic."""
        if (limit := self.config.optimizer.clip_grad) and (excess := (norm + 1e-6) / limit) > 1:
            gradients = [p.grad for _, p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, (1 / excess).item())

    def _stop_for(self, what: str, step: int, seen: list[MicroBatch]) -> NoReturn:
        self._end_step()
        self.parallel.seed_random(seed=self.config.training.seed, step=step)
        where = first_non_finite(self.model, lambda: (self.loss(self.model, batch) for batch in seen))
        raise UserError(
            f"step {step}: {what}; nothing was updated. {where}. Lower --lr or --clip-grad and continue from "
            "the last checkpoint with --resume auto"
        )

    def _end_step(self) -> None:
        for layer in self.layers.values():
            layer.full_factor.end()

    def _begin_micro_batch(self, index: int) -> None:
        last = index + 1 == self.accumulation
        for layer in self.layers.values():
            layer.full_factor.begin(first=index == 0, last=last)

    # ---- what methods see and ask for ----

    def views(
        self, *, spectrum: Spectrum | None = None, step: int = 0, batches: Batches | None = None
    ) -> list[LayerView]:
        """The factorisable linears with their ranks and, if asked for, spectra; the same on every rank.

        ``batches``: for a metric that is not plain.
        """
        return layer_views(self, spectrum=spectrum, step=step, batches=batches)

    def apply(self, changes: Iterable[Change], *, step: int, batches: Batches) -> None:
        """Carry out ``changes`` in order, after ``step`` completed steps."""
        carry_out(self, changes, step=step, batches=batches)
