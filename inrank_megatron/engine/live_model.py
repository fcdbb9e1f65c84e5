"""The model in training: its modules, its factorised layers' records, and DeepSpeed's engine around it."""

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.step_clock import StepClock
from inrank_megatron.engine import deepspeed_setup
from inrank_megatron.engine.linears import FactorisedLayer, Linear, find_linears
from inrank_megatron.engine.loss_scaling import LossScaling
from inrank_megatron.engine.replicated import ReplicatedGradients
from inrank_megatron.engine.truncation import Weighing
from inrank_megatron.engine.zero_state import MasterWeights
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import Metric

MicroBatch = tuple[Tensor, Tensor]  # tokens [B, S], labels [B, S], int64
Batches = Callable[[int], Iterable[MicroBatch]]
"""This rank's micro-batches of global batch i, the one that step i + 1 trains on."""


class ModelFactory(Protocol):
    """Builds models; ``model/gpt.py`` has the implementation.

    ``linear_shapes``: (O, I) of the linears that may be factorised, by module name.
    """

    @property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]: ...

    def build(self, factors: Mapping[str, FactorSpec]) -> nn.Module: ...

    def initial_weight(self, name: str) -> Tensor: ...


class LiveModel:
    """A model under DeepSpeed. The switch builds a new one in its place.

    Attributes:
        model: the bare model (no DeepSpeed wrapper), for evaluation.
        linears: a record of each factorisable linear by name, a :class:`FactorisedLayer` if it is
            factorised. The record has everything that is known of the layer.
        master_weights: FP32 master weights and optimizer state of the trained parameters.
        loss_scaling: the loss scale, and the steps that it skipped.
        clock: how long this rank takes for its steps.
        last_weighing: metric, step and result of the last measurement of ``weighing.py``; None once weights
            have changed.
    """

    model: nn.Module
    linears: dict[str, Linear]
    master_weights: MasterWeights
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
        self.clock = StepClock(device)
        self.deepspeed: Any = None
        self.last_weighing: tuple[Metric, int, Weighing] | None = None
        self.loss_scaling = LossScaling(enabled=config.training.fp16, limit=config.training.overflow_limit)
        # Under sequence parallelism Megatron draws from its streams even without dropout, also in an
        # evaluation that comes before the first step.
        parallel.seed_random(seed=config.training.seed, step=0)
        self.build(factors)

    def build(self, factors: Mapping[str, FactorSpec]) -> None:
        """Build a model with this structure; it replaces the present one, if any."""
        if self.deepspeed is not None:
            self.discard()
        self.model = self.factory.build(factors).to(self.device)
        self.linears = find_linears(self.model, self.factory.linear_shapes, factors, self.parallel.tp_group)
        self.deepspeed, self.master_weights = deepspeed_setup.start_deepspeed(
            self.model, self.config, self.parallel, accumulation=self.accumulation, extra=self.deepspeed_json
        )
        self._replicated = ReplicatedGradients(
            self.model, self.deepspeed.optimizer, self.master_weights.shard_map, self.parallel.tp_group
        )
        self.loss_scaling.attach(self.deepspeed.optimizer)

    def discard(self) -> None:
        """Free the model and DeepSpeed's engine."""
        self.loss_scaling.detach()
        deepspeed_setup.stop_deepspeed(self.deepspeed)
        self.deepspeed = None
        del self.model, self.linears, self.master_weights, self._replicated
        gc.collect()  # DeepSpeed's engine is full of cycles that would keep the old model alive

    # ---- its factorised layers ----

    @property
    def factorised(self) -> dict[str, FactorisedLayer]:
        """The records of the linears that are factorised."""
        return {name: x for name, x in self.linears.items() if isinstance(x, FactorisedLayer)}

    @property
    def layers(self) -> dict[str, FactorisedLinear]:
        """The modules of the linears that are factorised."""
        return {name: layer.module for name, layer in self.factorised.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Decided rank r of each factorised linear."""
        return {name: layer.spec.rank for name, layer in self.factorised.items()}

    @property
    def initial(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Initial values ``(U0, V0)`` of the layers that track them."""
        return {name: x.initial for name, x in self.factorised.items() if x.initial is not None}

    @property
    def in_first_phase(self) -> bool:
        """Whether there are factors whose rank may still change, or that have a W0."""
        return not all(layer.spec.final for layer in self.factorised.values())

    def factor_specs(self) -> dict[str, FactorSpec]:
        """The present structure, enough to build the same model again."""
        return {name: layer.spec for name, layer in self.factorised.items()}

    # ---- parameters and loss ----

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by name, in the model's order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

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
