"""The training engine: a model under DeepSpeed ZeRO stage 1 whose factors grow and whose structure changes
once.

It carries out the changes that methods ask for (``methods/changes.py``) on parameters, FP32 masters and
optimizer moments, and knows no method by name.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.config import Config
from inrank_megatron.engine import deepspeed_setup, factor_surgery, zero_state
from inrank_megatron.engine.activations import activation_moments
from inrank_megatron.engine.columns import drawn_columns, norm_like
from inrank_megatron.engine.moments import kept_entries
from inrank_megatron.engine.replicated import ReplicatedGradients
from inrank_megatron.engine.zero_state import ParameterState
from inrank_megatron.errors import UserError
from inrank_megatron.layers.factorised import FactorisedLinear
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.methods.changes import Change, InitialiseFactors, LayerView, Refactor, Restart, SetRank
from inrank_megatron.model.initialise import named_generator
from inrank_megatron.parallel import Parallel

MicroBatch = tuple[Tensor, Tensor]  # tokens [B, S], labels [B, S], int64


class ModelFactory(Protocol):
    """Where models come from; see ``model/gpt.py``."""

    def build(self, factors: Mapping[str, FactorSpec]) -> nn.Module: ...

    def initial_weight(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """Mean loss a token over the global batch, global gradient norm before clipping."""

    loss: float
    grad_norm: float


class Engine:
    """A model in training.

    Attributes:
        model: the bare model (no DeepSpeed wrapper), for evaluation.
        layers: its factorised linears by name.
        ranks: decided rank r of each factorised linear.
        initial: FP32 shards ``(U0 [O/n, K], V0 [K, I/n])`` of initial values, for layers that track them.
    """

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
        self.deepspeed = None
        # Under sequence parallelism Megatron draws from its streams even without dropout, also in an
        # evaluation that comes before the first step.
        parallel.seed_random(seed=config.training.seed, step=0)
        self._build(factors)

    # ---- training ----

    def train_step(self, micro_batches: Iterable[MicroBatch], *, step: int, lr: float) -> StepResult:
        """Optimizer step number ``step`` (from 1) over this rank's micro-batches.

        A loss that is not finite raises before the update.
        """
        self.parallel.seed_random(seed=self.config.training.seed, step=step)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self._begin_micro_batch(index)
            loss = self.loss(self.deepspeed, batch)
            self.deepspeed.backward(loss)
            total += loss.detach()
            if index + 1 == self.accumulation:
                mean = self._mean_loss(total)
            self.deepspeed.step()
        for layer in self.layers.values():
            layer.whole_factor.end()
        return StepResult(loss=mean, grad_norm=float(self.deepspeed.get_global_grad_norm()))

    def _begin_micro_batch(self, index: int) -> None:
        self._replicated.last = index + 1 == self.accumulation
        for layer in self.layers.values():
            layer.whole_factor.begin(first=index == 0, last=self._replicated.last)

    def _mean_loss(self, total: Tensor) -> float:
        dist.all_reduce(total, group=self.parallel.dp_group)
        mean = total.item() / (self.accumulation * self.parallel.dp_size)
        if not math.isfinite(mean):
            raise UserError(
                f"the loss is {mean}; training stops before the update. Lower --lr or --clip-grad and "
                "continue from the last checkpoint with --resume auto"
            )
        return mean

    @staticmethod
    def token_losses(model: nn.Module, batch: MicroBatch) -> Tensor:
        """Loss of every token [B, S], FP32."""
        tokens, labels = batch
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None, labels=labels).float()

    @classmethod
    def loss(cls, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Mean loss a token of one micro-batch."""
        return cls.token_losses(model, batch).mean()

    @property
    def in_first_phase(self) -> bool:
        """Whether W0 stands beside the factors, or columns are left that have never been in use."""
        return any(x.weight is not None or x.active < x.capacity for x in self.layers.values())

    # ---- what methods see and ask for ----

    def views(self, *, spectrum: str | None = None, step: int = 0) -> list[LayerView]:
        """The factorised linears with their ranks and, if asked for, spectra; the same on every rank."""
        values = {}
        if spectrum is not None and self.layers:
            values = factor_surgery.spectra(
                self.layers, self.initial, self.parallel, kind=spectrum, step=step
            )
        return [
            LayerView(
                name=name,
                min_dim=min(x.output_size, x.input_size),
                rank=self.ranks[name],
                active=x.active,
                capacity=x.capacity,
                singular_values=tuple(values[name].tolist()) if name in values else (),
            )
            for name, x in self.layers.items()
        ]

    def apply(
        self,
        changes: Iterable[Change],
        *,
        step: int,
        batches: Callable[[int], Iterable[MicroBatch]],
    ) -> None:
        """Carry out ``changes`` in order.

        ``batches(i)`` gives this rank's micro-batches of global batch i, the one that step i + 1 trains on.
        """
        for change in changes:
            match change:
                case InitialiseFactors():
                    self._initialise(change, batches)
                case SetRank():
                    self._set_rank(change)
                case Restart():
                    self._restart(change, step)
                case Refactor():
                    self._refactor(change, step, batches)
                case _:
                    raise TypeError(f"unknown change {change!r}")

    def _initialise(self, change: InitialiseFactors, batches) -> None:
        seed, initial_weight = self.config.training.seed, self.factory.initial_weight
        if change.source == "gradient":
            self.parallel.seed_random(seed=seed, step=0)
            losses = (self.loss(self.model, batch) for batch in batches(0))
            gradients = factor_surgery.weight_gradients(self.model, self.layers, losses, self.parallel)
            shards = factor_surgery.gradient_start(
                self.layers, gradients, self.parallel, column_norm=change.column_norm, seed=seed
            )
        elif change.source == "spectral":
            shards = factor_surgery.spectral_start(self.layers, initial_weight, self.parallel)
        else:
            shards = {
                name: drawn_columns(
                    layer,
                    layer.active,
                    change.source,
                    norm=change.column_norm or norm_like(initial_weight(name), layer.active),
                    generator=named_generator(seed, f"{name}/first columns"),
                )
                for name, layer in self.layers.items()
            }
        for name, (left, right) in shards.items():
            self._place(name, left, right, start=0, absorb=change.absorb)

    def _set_rank(self, change: SetRank) -> None:
        layer, start = self.layers[change.layer], self.layers[change.layer].active
        self.ranks[change.layer] = change.rank
        if change.active == start:
            return
        generator = named_generator(self.config.training.seed, f"{change.layer}/columns from {start}")
        source = "kaiming" if change.column_norm is None else "random"
        left, right = drawn_columns(
            layer, change.active - start, source, norm=change.column_norm, generator=generator
        )
        layer.activate(change.active)
        self._place(change.layer, left, right, start=start, absorb=change.absorb)

    def _place(self, name: str, left: Tensor, right: Tensor, *, start: int, absorb: bool) -> None:
        layer = self.layers[name]
        factor_surgery.place_columns(layer, left, right, start=start, absorb=absorb)
        if name in self.initial:
            columns = slice(start, start + left.shape[1])
            u0, v0 = self.initial[name]
            u0[:, columns] = layer.U.detach()[:, columns]
            v0[columns] = layer.V.detach()[columns]

    def _restart(self, change: Restart, step: int) -> None:
        seed = self.config.training.seed
        for name, layer in self.layers.items():
            factor_surgery.merge(layer)
            fresh = drawn_columns(
                layer, layer.active, "lora", generator=named_generator(seed, f"{name}/restart at {step}")
            )
            for leaf, value in zip("UV", fresh, strict=True):
                parameter = getattr(layer, leaf)
                state = zero_state.read_state(parameter)
                kept = kept_entries(
                    state.exp_avg_sq,
                    parameter.partition_dim,
                    layer.tp_group,
                    reset=change.reset,
                    share=change.share,
                    generator=named_generator(seed, f"{name}.{leaf}/moments at {step}"),
                )
                moments = (moment * kept for moment in (state.exp_avg, state.exp_avg_sq))
                zero_state.write_state(parameter, ParameterState(value, *moments))

    def _refactor(self, change: Refactor, step: int, batches) -> None:
        """Build the second-phase model and move everything that is not a factor over, moments included."""
        moments = {}
        if change.activation_batches:
            recent = range(max(0, step - change.activation_batches), step)
            losses = (self.loss(self.model, batch) for index in recent for batch in batches(index))
            moments = activation_moments(self.model, self.layers, losses, self.parallel)
        shards = factor_surgery.truncated_weights(
            self.layers, change.columns, moments, self.parallel, step=step
        )
        # On the CPU: for a moment both the old and the new model's states are on the device.
        kept = {
            name: zero_state.read_state(p).to("cpu")
            for name, p in self.parameters()
            if not self._is_factor(name)
        }
        steps = zero_state.group_steps(self.deepspeed.optimizer)
        factors = {
            name: FactorSpec(columns=change.columns[name], active=change.columns[name], rank=rank, base=False)
            for name, rank in change.ranks.items()
        }
        self._build(factors)
        for name, (left, right) in shards.items():
            zero_state.write_master(self.layers[name].U, left)
            zero_state.write_master(self.layers[name].V, right)
        for name, parameter in self.parameters():
            if name in kept:
                zero_state.write_state(parameter, kept[name].to(parameter.device))
        zero_state.set_group_steps(self.deepspeed.optimizer, steps | {"factors": 0})

    # ---- state ----

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by name, in the model's order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def factor_specs(self) -> dict[str, FactorSpec]:
        """The present structure, enough to build the same model again."""
        return {
            name: FactorSpec(
                columns=x.capacity,
                active=x.active,
                rank=self.ranks[name],
                base=x.weight is not None,
                tracked=name in self.initial,
            )
            for name, x in self.layers.items()
        }

    def read_state(self, name: str) -> ParameterState:
        """Master and moments of a trained parameter, this rank's shard. Collective."""
        return zero_state.read_state(dict(self.parameters())[name])

    def _is_factor(self, name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        return layer in self.layers and leaf in ("U", "V")

    def _build(self, factors: Mapping[str, FactorSpec]) -> None:
        if self.deepspeed is not None:
            deepspeed_setup.stop_deepspeed(self.deepspeed)
            self.deepspeed = self.model = self.layers = None
            gc.collect()  # DeepSpeed's engine is full of cycles that would keep the old model alive
        self.model = self.factory.build(factors).to(self.device)
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, FactorisedLinear)}
        self.ranks = {name: spec.rank for name, spec in factors.items()}
        self.initial = {
            name: (
                torch.zeros_like(x.U, dtype=torch.float32).detach(),
                torch.zeros_like(x.V, dtype=torch.float32).detach(),
            )
            for name, x in self.layers.items()
            if factors[name].tracked
        }
        self._replicated = ReplicatedGradients(self.model, self.parallel.tp_group)
        self.deepspeed = deepspeed_setup.start_deepspeed(
            self.model, self.config, self.parallel, accumulation=self.accumulation, extra=self.deepspeed_json
        )
