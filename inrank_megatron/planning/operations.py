"""Operations that one device does in a step: those of the model, and what parallelism and recomputation add.

A multiply-add is two operations; n is the number of tensor-parallel ranks.
"""

from inrank_megatron.config.costs import dense_entries, flops_per_token
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import all_columns
from inrank_megatron.config.topology import Topology
from inrank_megatron.planning.timeline import Phase
from inrank_megatron.planning.traffic import fuses


def step_flops(config: Config, topology: Topology, phase: Phase, *, on_cpu: bool) -> int:
    """Of the matrix products of one device in one step, forward and backward."""
    n = topology.tensor_model_parallel_size
    tokens = topology.accumulation_steps * topology.micro_batch_size * config.model.seq_length
    per_token = model_flops(config, topology, phase) // n
    per_token += _twice_computed(config, n, phase, on_cpu=on_cpu)
    if config.training.recompute_granularity == "full":
        head = 2 * config.model.hidden_size * topology.padded_vocab_size
        per_token += (forward_flops(config, topology, phase) - head) // n
        per_token += _twice_computed(config, n, phase, on_cpu=on_cpu) // 3
    return tokens * per_token


def model_flops(config: Config, topology: Topology, phase: Phase) -> int:
    """Of a token, forward and backward, over all tensor-parallel ranks, nothing computed twice."""
    vocabulary = topology.padded_vocab_size
    return flops_per_token(config, vocabulary, ranks=phase.columns, frozen_base=phase.frozen_base)


def forward_flops(config: Config, topology: Topology, phase: Phase) -> int:
    """The part of `model_flops` in the forward pass: a third, but half of a frozen W0's."""
    frozen = dense_entries(config) if phase.frozen_base else 0
    return (model_flops(config, topology, phase) - 4 * frozen) // 3 + 2 * frozen


def _twice_computed(config: Config, n: int, phase: Phase, *, on_cpu: bool) -> int:
    """Of a token: products with a gathered factor that every tensor-parallel rank computes for all tokens,
    where sequence parallelism and separate collectives do not divide them (``lowrank/layers/factorised.py``).
    """
    if phase.columns is None or n == 1:
        return 0
    split = config.parallel.sequence_parallel
    if phase.frozen_base:
        products = 0 if split and not fuses(config, on_cpu=on_cpu) else 6
    else:
        products = 0 if split else 4
    return products * all_columns(config, phase.columns) * config.model.hidden_size * (n - 1) // n
