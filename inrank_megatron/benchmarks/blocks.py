"""The blocks that are measured: a transformer layer of a preset, dense or factorised, as the model has it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.config.loading import from_flat, replace
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.platform import backend, device
from inrank_megatron.distributed.process_groups import Parallel, initialise, shutdown
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.gpt import GPTFactory

RANKS = {"tiny": 64, "small": 254, "medium": 286, "large": 312}
"""Ranks of the InRank paper (table 1, threshold 0.9); tiny has small's share of the width."""
VOCABULARY = 512
"""Only layers are measured with it: the least that divides over any tensor-parallel group here."""


@dataclass(frozen=True)
class Variant:
    """One way of building the MLP linears: dense (``columns`` None), ``W0 + U V`` or ``U V``."""

    name: str
    columns: int | None
    frozen_base: bool = False
    fused_collectives: bool | None = None
    """Whether the factors join W0's collective; None: as the layer chooses."""

    def factors(self, config: Config) -> dict[str, FactorSpec]:
        if self.columns is None:
            return {}
        columns = {name: min(self.columns, *shape) for name, shape in linear_shapes(config).items()}
        return {name: FactorSpec(k, k, k, frozen_base=self.frozen_base) for name, k in columns.items()}


DENSE = Variant("dense", None)


def phase_1(columns: int, *, fused_collectives: bool | None = None) -> Variant:
    """Frozen ``W0`` next to ``columns`` columns."""
    mode = "" if fused_collectives is None else "-fused" if fused_collectives else "-separate"
    return Variant(
        f"phase-1{mode} k={columns}", columns, frozen_base=True, fused_collectives=fused_collectives
    )


def phase_2(rank: int) -> Variant:
    """Factors of rank ``rank`` alone."""
    return Variant(f"phase-2 r={rank}", rank)


def preset_config(preset: str, **settings) -> Config:
    """The settings of a preset, BF16 on a GPU and FP32 on a CPU, without dropout."""
    flat = {"model_preset": preset, "train_iters": 1, "bf16": device().type == "cuda"}
    return from_flat(flat | settings)


def build_layer(config: Config, variant: Variant, parallel: Parallel) -> nn.Module:
    """A transformer layer on this process's device; its MLP is ``.mlp``."""
    config = replace(config, num_layers=1)
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY)
    layer = factory.build(variant.factors(config)).decoder.layers[0]
    fill_factors(layer)
    if variant.fused_collectives is not None:
        for linear in factorised_linears(layer):
            linear.fused_collectives = variant.fused_collectives
    # Tensors without data cannot move; on a CPU nothing has to.
    return layer if device().type == "cpu" else layer.to(device())


def mlp_output(mlp: nn.Module, x: Tensor) -> Tensor:
    """What the layer's residual stream receives of the MLP: a dense MLP leaves its bias to be added."""
    y, bias = mlp(x)
    return y if bias is None else y + bias


@torch.no_grad()
def fill_factors(module: nn.Module) -> None:
    """Random factors: on zeros, with which the model is built, a GPU runs faster than in training."""
    for linear in factorised_linears(module):
        linear.U.normal_(0, 0.05)
        linear.V.normal_(0, 0.05)


def factorised_linears(module: nn.Module) -> list[FactorisedLinear]:
    return [linear for linear in module.modules() if isinstance(linear, FactorisedLinear)]


@contextmanager
def single_process() -> Iterator[Parallel]:
    """A world of this process alone."""
    with _world(backend(), size=1) as parallel:
        yield parallel


@contextmanager
def rank_0_of(size: int, *, replicas: int = 1) -> Iterator[Parallel]:
    """Rank 0 of a tensor-parallel group, and of its data-parallel replicas, whose other ranks do not exist.

    torch's ``fake`` backend accepts every collective and sends nothing. What a rank computes and sends does
    not depend on the values, so it can be counted on one process; the values are wrong.
    """
    # Importing it registers the backend.
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    with _world("fake", size=size, replicas=replicas) as parallel:
        yield parallel


@contextmanager
def _world(name: str, *, size: int, replicas: int = 1) -> Iterator[Parallel]:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=size * replicas)
    try:
        yield initialise(backend=name, tensor_model_parallel_size=size)
    finally:
        shutdown()
