"""Numbers of parameters that a tensor-parallel rank holds, as the traffic of ZeRO needs them."""

from collections.abc import Iterator
from dataclasses import dataclass

from inrank_megatron.config.costs import (
    LIVE_PARAMETERS,
    parameters_of_a_rank,
    replicated_parameters,
)
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import alike, factorises_attention, is_llama, qkv_layout
from inrank_megatron.config.topology import Topology
from inrank_megatron.planning.timeline import Phase

PERSISTENT = 10**5
"""Parameters of at most so many entries are not given back by ZeRO 3 between micro-batches (its default)."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of one tensor-parallel rank, before ZeRO divides anything.

    Args:
        total: all, W0 included.
        trained: those that are trained.
        kept: small ones, which ZeRO 3 gathers once per step.
        summed: replicated ones whose gradients are summed: those of the norms of heads always, others under
            sequence parallelism.
        live: gathered ones that ZeRO 3 keeps at most.
    """

    total: int
    trained: int
    kept: int
    summed: int
    live: int = LIVE_PARAMETERS


def sizes_of(config: Config, topology: Topology, phase: Phase) -> Sizes:
    """In ``phase``. All allocated columns count, not only those in use."""
    model = config.model
    total, trained = parameters_of_a_rank(
        config, topology, ranks=phase.capacity, frozen_base=phase.frozen_base
    )
    positions = 0 if is_llama(config) else model.max_position_embeddings * model.hidden_size
    replicated = replicated_parameters(config)
    large = sum(number * size for size, number in _matrices(config, topology, phase) if size > PERSISTENT)
    of_heads = 2 * model.head_size * model.num_layers if model.qk_layernorm else 0
    summed = replicated - positions if config.parallel.sequence_parallel else of_heads
    return Sizes(total=total, trained=trained, kept=total - large, summed=summed)


def _matrices(config: Config, topology: Topology, phase: Phase) -> Iterator[tuple[int, int]]:
    """Entries of this rank's shard of a matrix, and how many there are of it."""
    n, h, layers = topology.tensor_model_parallel_size, config.model.hidden_size, config.model.num_layers
    yield topology.padded_vocab_size * h // n, 1 + config.model.has_own_head
    if not is_llama(config):
        yield config.model.max_position_embeddings * h, 1
    if not factorises_attention(config):
        layout = qkv_layout(config)
        yield from ((rows * h // n, layers) for rows in (layout.total, layout.rows("q")))
    for each in alike(config, phase.capacity):
        if each.columns is None or phase.frozen_base:
            yield each.shape[0] * each.shape[1] // n, each.number
        if each.columns is not None:
            yield from ((side * each.columns // n, each.number) for side in each.shape)
