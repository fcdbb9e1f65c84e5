"""The training engine: a model under DeepSpeed ZeRO whose factors grow and whose structure changes once.

It carries out the changes that methods ask for (``lowrank/methods/changes.py``) on parameters, FP32 master
weights and optimizer moments, and knows no method by name.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.platform import release_memory
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine import deepspeed_setup, factor_updates, truncation, zero_state
from inrank_megatron.engine.activations import activation_moments, output_gradient_scales
from inrank_megatron.engine.diagnosis import first_non_finite
from inrank_megatron.engine.factor_init import drawn_columns, norm_like
from inrank_megatron.engine.fragments import finish_writes
from inrank_megatron.engine.linears import Linear, find_linears
from inrank_megatron.engine.loss_scaling import LossScaling
from inrank_megatron.engine.moments import fill_second_moment, kept_entries
from inrank_megatron.engine.replicated import ReplicatedGradients
from inrank_megatron.engine.step_report import StepReport, norms_through
from inrank_megatron.engine.zero_state import Masters, ParameterState
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import (
    Change,
    InitialiseFactors,
    LayerView,
    LostCheck,
    Metric,
    Refactor,
    Restart,
    SetRank,
    Spectrum,
)
from inrank_megatron.model.initialise import named_generator

START_SCALE_STEP = 16  # of 40 binary orders of float16: coarse, but no gradient vanishes for it
MicroBatch = tuple[Tensor, Tensor]  # tokens [B, S], labels [B, S], int64
Batches = Callable[[int], Iterable[MicroBatch]]
"""This rank's micro-batches of global batch i, the one that step i + 1 trains on."""


class ModelFactory(Protocol):
    """Where models come from; see ``model/gpt.py``.

    ``linear_shapes``: (O, I) of the linears that may be factorised, by module name.
    """

    @property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]: ...

    def build(self, factors: Mapping[str, FactorSpec]) -> nn.Module: ...

    def initial_weight(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """Mean loss per token over the global batch, global gradient norm before clipping.

    ``skipped``: the gradient overflowed under loss scaling and nothing was updated; its norm is infinite.
    ``notice``: the largest that any rank gave.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    notice: int = 0


class Engine:
    """A model in training.

    Attributes:
        model: the bare model (no DeepSpeed wrapper), for evaluation.
        linears: its factorisable linears by name, dense or factorised.
        layers: those of them that are factorised.
        ranks: decided rank r of each factorised linear.
        masters: FP32 masters and optimizer state of its trained parameters.
        loss_scaling: the loss scale, and the steps that it skipped.
        initial: FP32 shards ``(U0 [O/n, K], V0 [K, I/n])`` of initial values, for layers that track them.
    """

    model: nn.Module
    linears: dict[str, Linear]
    layers: dict[str, FactorisedLinear]
    masters: Masters
    _replicated: ReplicatedGradients

    def __init__(
        self,
        factory: ModelFactory,
        factors: Mapping[str, FactorSpec],
        *,
        config: Config,
        parallel: Parallel,
        device: torch.device,
        accumulation: int,
        deepspeed_json: dict | None = None,
    ):
        self.config, self.parallel, self.device = config, parallel, device
        self.accumulation, self.deepspeed_json = accumulation, deepspeed_json
        self.factory = factory
        self.deepspeed: Any = None
        self._weighed: tuple[Metric, int, truncation.Weighing] | None = None
        self.loss_scaling = LossScaling(enabled=config.training.fp16, limit=config.training.overflow_limit)
        # Under sequence parallelism Megatron draws from its streams even without dropout, also in an
        # evaluation that comes before the first step.
        parallel.seed_random(seed=config.training.seed, step=0)
        self._build(factors)

    # ---- training ----

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        *,
        step: int,
        lr: float,
        meanwhile: Callable[[], int] = lambda: 0,
    ) -> StepResult:
        """Optimizer step number ``step`` (from 1) over this rank's micro-batches, at learning rate ``lr``.

        A loss or gradient norm that is not finite on any rank skips the update under loss scaling; else it
        raises before the update, on every rank, and says where it came from.

        Args:
            meanwhile: called when the device has all of the forward and backward passes to do. What it
                returns is told to all ranks (``StepReport``).
        """
        self.parallel.seed_random(seed=self.config.training.seed, step=step)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        seen, total = [], torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            seen.append(batch)
            self._begin_micro_batch(index)
            loss = self.loss(self.deepspeed, batch)
            self.deepspeed.backward(loss)
            total += loss.detach()
            if index + 1 == self.accumulation:
                self._replicated.sum()
                report = StepReport(
                    total,
                    self.accumulation * self.parallel.dp_size,
                    meanwhile(),
                    self.parallel,
                    need_finite=not self.loss_scaling.enabled,
                )
                norm = self._update(step, report, seen)
            else:
                self.deepspeed.step()
        self._end_step()
        skipped = self.loss_scaling.enabled and not math.isfinite(norm)
        self.loss_scaling.count(overflow=skipped, step=step)
        return StepResult(loss=report.loss, grad_norm=norm, skipped=skipped, notice=report.notice)

    def _update(self, step: int, report: StepReport, seen: list[MicroBatch]) -> float:
        """The optimizer's step; the gradient norm, infinite if the step was left out for that."""
        if self.config.parallel.zero_stage == 0:
            norm = self._update_without_zero(report)
        else:
            with norms_through(report.fetch):
                self.deepspeed.step()
            if not getattr(self.deepspeed.optimizer, "persistent_parameters", True):
                # ZeRO 3 else waits for its update in the gather of parameters that stay whole between steps.
                finish_writes()
            norm = self._norm_of_deepspeed()
            if report.loss is None:  # it has seen an overflow before it came to the norm
                report.fetch()
        if not self.loss_scaling.enabled:
            if not math.isfinite(report.loss):
                self._stop_for(f"the loss is {report.loss}", step, seen)
            if not math.isfinite(norm):
                what = f"the loss is {report.loss:.4f} but the gradient norm is not finite"
                self._stop_for(what, step, seen)
        return norm

    def _update_without_zero(self, report: StepReport) -> float:
        """In FP32 DeepSpeed steps whatever the gradients are, in BF16 whatever the loss is."""
        squares = None
        if isinstance(self.deepspeed.optimizer, torch.optim.Optimizer):
            squares = self._gradient_squares()
        fetched = report.fetch(squares)
        if not math.isfinite(report.loss) or not fetched.isfinite():
            return math.inf
        self.deepspeed.step()
        return self._norm_of_deepspeed() if squares is None else math.sqrt(fetched.item())

    def _norm_of_deepspeed(self) -> float:
        overflow = getattr(self.deepspeed.optimizer, "overflow", False)
        return math.inf if overflow else float(self.deepspeed.get_global_grad_norm())

    def _gradient_squares(self) -> Tensor:
        """Square of the global norm in FP32 without ZeRO, where DeepSpeed clips but does not tell."""
        trained = [p for _, p in self.parameters() if p.grad is not None]
        own = [p for p in trained if getattr(p, "tensor_model_parallel", False) or self.parallel.tp_rank == 0]
        squares = sum((p.grad.square().sum() for p in own), torch.zeros((), device=self.device))
        dist.all_reduce(squares, group=self.parallel.tp_group)
        return squares

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
            layer.whole_factor.end()

    def _begin_micro_batch(self, index: int) -> None:
        last = index + 1 == self.accumulation
        for layer in self.layers.values():
            layer.whole_factor.begin(first=index == 0, last=last)

    @staticmethod
    def token_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
        """Loss of every token [B, S], FP32."""
        tokens, labels = batch
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None, labels=labels).float()

    @classmethod
    def loss(cls, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Mean loss per token of one micro-batch."""
        return cls.token_losses(model, batch).mean()

    @property
    def in_first_phase(self) -> bool:
        """Whether there are factors whose rank may still change, or that come with a W0."""
        return not all(self._built[name].final for name in self.layers)

    # ---- what methods see and ask for ----

    def views(
        self, *, spectrum: Spectrum | None = None, step: int = 0, batches: Batches | None = None
    ) -> list[LayerView]:
        """The factorisable linears with their ranks and, if asked for, spectra; the same on every rank.

        ``batches``: for a metric that is not plain.
        """
        values = {}
        if isinstance(spectrum, Metric):
            weighing = self._weighing(spectrum, step, batches)
            self._weighed = (spectrum, step, weighing)
            values = truncation.energy_roots(self.linears, weighing, self.parallel, step=step)
        elif spectrum is not None and self.layers:
            values = factor_updates.spectra(
                self.layers, self.initial, self.parallel, kind=spectrum, step=step
            )
        views = []
        for name, linear in self.linears.items():
            layer, d = self.layers.get(name), min(linear.output_size, linear.input_size)
            view = LayerView(
                name=name,
                output_size=linear.output_size,
                input_size=linear.input_size,
                rank=self.ranks.get(name, d),
                active=layer.active if layer else d,
                capacity=layer.capacity if layer else d,
                max_rank=linear.max_rank,
                final=layer is not None and self._built[name].final,
                grown_at=self.grown_at.get(name, 0),
                updated=self.loss_scaling.in_a_row == 0,
                singular_values=tuple(values[name].tolist()) if name in values else (),
            )
            views.append(view)
        return views

    def apply(
        self,
        changes: Iterable[Change],
        *,
        step: int,
        batches: Batches,
    ) -> None:
        """Carry out ``changes`` in order, after ``step`` completed steps."""
        for change in changes:
            match change:
                case InitialiseFactors():
                    self._initialise(change, batches)
                case SetRank():
                    self._set_rank(change, step)
                case LostCheck():
                    self.grown_at[change.layer] = step
                case Restart():
                    self._restart(change, step)
                case Refactor():
                    self._refactor(change, step, batches)
                    release_memory()  # what held the first phase, or much of it, is free by now
                case _:
                    raise TypeError(f"unknown change {change!r}")
            self._weighed = None  # it was of the weights before
        finish_writes()

    def _initialise(self, change: InitialiseFactors, batches) -> None:
        seed, initial_weight = self.config.training.seed, self.factory.initial_weight
        if change.source == "gradient":
            shards = factor_updates.gradient_start(
                self.layers,
                self._at_a_loss_scale(partial(self._first_gradients, batches)),
                self.parallel,
                column_norm=change.column_norm,
                seed=seed,
            )
        elif change.source == "spectral":
            shards = factor_updates.spectral_start(self.layers, initial_weight, self.parallel)
        else:
            shards = {
                name: drawn_columns(
                    layer,
                    layer.active,
                    change.source,
                    norm=self._first_norm(change, name),
                    generator=named_generator(seed, f"{name}/first columns"),
                )
                for name, layer in self.layers.items()
            }
        for name, (left, right) in shards.items():
            self._place(name, left, right, start=0, absorb=change.absorb)

    def _first_norm(self, change: InitialiseFactors, name: str) -> float | None:
        if change.column_norm or change.source != "random":  # the others have norms of their own
            return change.column_norm
        return norm_like(self.factory.initial_weight(name), self.layers[name].active)

    def _at_a_loss_scale(self, compute: Callable[[float], dict[str, Tensor]]) -> dict[str, Tensor]:
        """``compute(scale)``, from gradients of losses multiplied by a scale that float16 bears."""
        scale = self.loss_scaling.scale or 1.0
        while True:
            values = compute(scale)
            overflow = not all(value.isfinite().all() for value in values.values())
            if scale <= 1 or not self.parallel.any_rank(overflow, self.device):
                return values
            scale = max(1.0, scale / START_SCALE_STEP)

    def _first_gradients(self, batches, scale: float) -> dict[str, Tensor]:
        """Of the loss of global batch 0 with respect to every W0."""
        self.parallel.seed_random(seed=self.config.training.seed, step=0)
        losses = (self.loss(self.model, batch) for batch in batches(0))
        return factor_updates.weight_gradients(self.model, self.layers, losses, self.parallel, scale=scale)

    def _set_rank(self, change: SetRank, step: int) -> None:
        layer, start = self.layers[change.layer], self.layers[change.layer].active
        if change.rank > self.ranks[change.layer]:
            self.grown_at[change.layer] = step
        self.ranks[change.layer] = change.rank
        if change.active == start:
            return
        generator = named_generator(self.config.training.seed, f"{change.layer}/columns from {start}")
        source = "kaiming" if change.column_norm is None else "random"
        left, right = drawn_columns(
            layer, change.active - start, source, norm=change.column_norm, generator=generator
        )
        if change.moments == "mean":
            for parameter, dim in ((layer.U, 1), (layer.V, 0)):
                fill_second_moment(parameter, dim, start, change.active)
        layer.activate(change.active)
        self._place(change.layer, left, right, start=start, absorb=change.absorb)

    def _place(self, name: str, left: Tensor, right: Tensor, *, start: int, absorb: bool) -> None:
        layer = self.layers[name]
        left, right = factor_updates.place_columns(layer, left, right, start=start, absorb=absorb)
        if name in self.initial:
            columns = slice(start, start + left.shape[1])
            u0, v0 = self.initial[name]
            u0[:, columns], v0[columns] = left, right

    def _restart(self, change: Restart, step: int) -> None:
        seed = self.config.training.seed
        for name, layer in self.layers.items():
            factor_updates.merge(layer)
            fresh = drawn_columns(
                layer, layer.active, "lora", generator=named_generator(seed, f"{name}/restart at {step}")
            )
            for leaf, value in zip("UV", fresh, strict=True):
                parameter = getattr(layer, leaf)
                moments = zero_state.read_state(parameter).moments
                if moments:
                    kept = kept_entries(
                        list(moments.values())[-1].abs(),
                        parameter.partition_dim,
                        layer.tp_group,
                        stride=parameter.partition_stride,
                        reset=change.reset,
                        share=change.share,
                        generator=named_generator(seed, f"{name}.{leaf}/moments at {step}"),
                    )
                    moments = {key: moment * kept for key, moment in moments.items()}
                zero_state.write_state(parameter, ParameterState(value, moments))

    def _refactor(self, change: Refactor, step: int, batches) -> None:
        """Build the second-phase model and move over all that it does not replace, moments included."""
        weighing = self._known_weighing(change.metric, step) or self._weighing(change.metric, step, batches)
        linears = {name: self.linears[name] for name in change.columns}
        shards = truncation.truncated_weights(linears, change.columns, weighing, self.parallel, step=step)
        replaced = {f"{name}.{leaf}" for name, linear in linears.items() for leaf in linear.replaced}
        # On the CPU: for a moment both the old and the new model's states are on the device.
        kept = {
            name: zero_state.read_state(p).map(Tensor.cpu)
            for name, p in self.parameters()
            if name not in replaced
        }
        steps = self.masters.steps()
        factors = {
            name: FactorSpec(columns=k, active=k, rank=change.ranks[name], base=False, final=True)
            for name, k in change.columns.items()
        }
        self._weighed = None
        del linears, weighing  # the modules are those of the model that is about to go
        self._build(factors)
        for name, (left, right) in shards.items():
            zero_state.write_master(self.layers[name].U, left)
            zero_state.write_master(self.layers[name].V, right)
        for name, parameter in self.parameters():
            if name in kept:
                zero_state.write_state(parameter, kept[name].map(lambda t, p=parameter: t.to(p.device)))  # type: ignore[misc]
        self.masters.set_steps(steps | {"factors": 0})

    def _known_weighing(self, metric: Metric, step: int) -> truncation.Weighing | None:
        """That which ranks have just been chosen with, of the same weights; None: another or none."""
        if self._weighed is None or self._weighed[:2] != (metric, step):
            return None
        return self._weighed[2]

    def _weighing(self, metric: Metric, step: int, batches: Batches | None) -> truncation.Weighing:
        """What ``metric`` weighs with, over the last batches that the steps up to ``step`` trained on."""
        if metric.kind == "plain":
            return truncation.Weighing()
        finish_writes()  # of changes just before, as ranks that grow
        recent = range(max(0, step - metric.batches), step)

        def losses():
            return (self.loss(self.model, batch) for index in recent for batch in batches(index))

        moments = activation_moments(self.model, self.linears, losses(), self.parallel)
        outputs = {}
        if metric.kind == "fisher":

            def scales(loss_scale: float) -> dict[str, Tensor]:
                self.parallel.seed_random(seed=self.config.training.seed, step=step)
                return output_gradient_scales(
                    self.model, self.linears, losses(), self.parallel, scale=loss_scale
                )

            outputs = self._at_a_loss_scale(scales)
        return truncation.Weighing(moments, outputs)

    # ---- state ----

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by name, in the model's order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def factor_specs(self) -> dict[str, FactorSpec]:
        """The present structure, enough to build the same model again."""
        return {
            name: replace(
                self._built[name], active=x.active, rank=self.ranks[name], grown_at=self.grown_at[name]
            )
            for name, x in self.layers.items()
        }

    def _build(self, factors: Mapping[str, FactorSpec]) -> None:
        if self.deepspeed is not None:
            self.loss_scaling.detach()
            deepspeed_setup.stop_deepspeed(self.deepspeed)
            self.deepspeed = None
            del self.model, self.layers, self.linears, self.masters, self._replicated
            gc.collect()  # DeepSpeed's engine is full of cycles that would keep the old model alive
        self.model = self.factory.build(factors).to(self.device)
        self.linears = find_linears(self.model, self.factory.linear_shapes, self.parallel.tp_group)
        self.layers = {name: linear.module for name, linear in self.linears.items() if linear.factorised}
        self._built = dict(factors)
        self.ranks = {name: spec.rank for name, spec in factors.items()}
        self.grown_at = {name: spec.grown_at for name, spec in factors.items()}
        self.initial = {
            name: (
                torch.zeros_like(x.U, dtype=torch.float32).detach(),
                torch.zeros_like(x.V, dtype=torch.float32).detach(),
            )
            for name, x in self.layers.items()
            if factors[name].tracked
        }
        self.deepspeed, self.masters = deepspeed_setup.start_deepspeed(
            self.model, self.config, self.parallel, accumulation=self.accumulation, extra=self.deepspeed_json
        )
        self._replicated = ReplicatedGradients(
            self.model, self.deepspeed.optimizer, self.masters.holdings, self.parallel.tp_group
        )
        self.loss_scaling.attach(self.deepspeed.optimizer)
