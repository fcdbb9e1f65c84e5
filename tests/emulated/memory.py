"""Bytes of tensors that are alive on the emulated device while an engine of full size trains.

``run_emulated`` calls it.
"""

import torch
from torch import Tensor

from inrank_megatron.benchmarks.blocks import Variant, preset_config
from inrank_megatron.config.costs import memory_per_device
from inrank_megatron.config.loading import replace
from inrank_megatron.config.topology import topology_of
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.model import modules
from inrank_megatron.model.gpt import GPTFactory
from tests.allocations import Allocations
from tests.emulated.device import device, rank_of
from tests.emulated.rules import NAME

VOCABULARY, REPLICAS, ACCUMULATION, STEPS = 50257, 8, 2, 2
"""The first step allocates the moments, the second has them from its start."""


def peak_and_plan(preset: str, columns: int | None, frozen_base: bool, settings: dict) -> tuple[int, int]:
    """The most bytes that are alive on rank 0 of ``REPLICAS``, from the model's construction on, and the
    planned bytes.

    Args:
        columns, frozen_base: of the factorised linears, as in ``memory_per_device``.
    """
    modules.F.scaled_dot_product_attention = _fused_attention
    with rank_of(0, REPLICAS, 1) as (parallel, _):
        config = preset_config(preset, **settings)
        config = replace(config, global_batch_size=ACCUMULATION * config.training.micro_batch_size * REPLICAS)
        topology = topology_of(config, world_size=REPLICAS, vocab_size=VOCABULARY)
        factory = GPTFactory(
            config, parallel, vocab_size=VOCABULARY, padded_vocab_size=topology.padded_vocab_size
        )
        shape = (config.training.micro_batch_size, config.model.seq_length)
        with Allocations(NAME) as allocations:
            engine = Engine(
                factory,
                Variant("", columns, frozen_base=frozen_base).factors(config),
                config=config,
                parallel=parallel,
                device=device(),
                accumulation=ACCUMULATION,
            )
            batch = tuple(torch.zeros(shape, dtype=torch.int64, device=device()) for _ in range(2))
            for step in range(1, STEPS + 1):
                engine.train_step([batch] * ACCUMULATION, step=step, lr=1e-6)
        stop_deepspeed(engine.deepspeed)
    planned = memory_per_device(config, topology, ranks=columns, frozen_base=frozen_base, device=NAME)
    return allocations.peak, planned.total


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
    """The operator that torch chooses on CUDA; for a device that it does not know it keeps all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
