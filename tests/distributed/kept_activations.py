"""What a model keeps for its backward pass, measured on the ranks of a test."""

import torch

from inrank_megatron.benchmarks.memory import LiveStorages
from inrank_megatron.config.costs import memory_per_device
from inrank_megatron.config.loading import from_flat, resolve
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import topology_of
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.gpt import DTYPES, GPTFactory, precision
from tests.groups import join

VOCABULARY = 2048
SIZES = {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "seq_length": 128, "train_iters": 1}


def kept_and_planned(
    rank: int, world_size: int, settings: dict, columns: int, frozen_base: bool
) -> tuple[int, int]:
    """Bytes on this rank, of a tensor-parallel group of all: measured, and by the plan's arithmetic.

    Args:
        columns: of every factorised linear; 0: dense. frozen_base: a frozen W0 is kept next to the factors.
    """
    flat = SIZES | {"micro_batch_size": 4, "tensor_model_parallel_size": world_size} | settings
    config = resolve(from_flat(flat), world_size=world_size)
    topology = topology_of(config, world_size=world_size, vocab_size=VOCABULARY)
    parallel = join(world_size)
    factory = GPTFactory(
        config, parallel, vocab_size=VOCABULARY, padded_vocab_size=topology.padded_vocab_size
    )
    spec = FactorSpec(capacity=columns, active_columns=columns, rank=columns, frozen_base=frozen_base)
    model = factory.build(dict.fromkeys(linear_shapes(config), spec) if columns else {})
    model.to(DTYPES[precision(config)]).train()
    parallel.seed_random(seed=1, step=1)
    tokens = torch.zeros(4, config.model.seq_length, dtype=torch.long)
    with LiveStorages() as storages:
        loss = Engine.loss(model, (tokens, tokens))
    kept = storages.alive(but=(loss, *model.parameters()))
    if precision(config) != "fp32":  # the logits themselves, gone by now, whose gradient comes as they did
        kept += tokens.numel() * topology.padded_vocab_size // world_size * 2
    planned = memory_per_device(config, topology, ranks=columns or None, frozen_base=frozen_base)
    return kept, planned.activations + planned.gathered_factors
