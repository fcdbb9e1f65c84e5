"""Bytes that a rank sends in a step, by collective and by group.

Letters: T tokens of a micro-batch, h hidden_size, k columns, n ranks of a group. By the ring rule a rank
sends (n - 1) / n of X bytes for an all-gather or a reduce-scatter, and twice that for an all-reduce. The
layers' collectives are in ``lowrank/layers/factorised.py``. Votes and norms, a few numbers each, do not
count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from inrank_megatron.config.costs import precision
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama, linear_shapes, smallest_dim
from inrank_megatron.config.topology import Topology
from inrank_megatron.planning.sizes import sizes_of
from inrank_megatron.planning.timeline import Phase

Collective = Literal["all-gather", "reduce-scatter", "all-reduce"]
ROUNDS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
OPERATIONS_PER_ELEMENT = {"cpu": 2300, "gpu": 4000}
"""As in ``lowrank/layers/factorised.py``, which needs torch; a test compares."""


@dataclass(frozen=True)
class Sent:
    """What a rank sends in one step for one purpose.

    Args:
        group: the ranks that share a layer, or the replicas. payload: bytes of the full tensors, all calls
            together. sent: bytes that leave the rank. calls: collectives.
    """

    what: str
    collective: Collective
    group: Literal["tensor", "data"]
    payload: int
    sent: float
    calls: int


def traffic(config: Config, topology: Topology, phase: Phase, *, on_cpu: bool) -> list[Sent]:
    """All of a step; empty for a single process."""
    groups: list[tuple[Literal["tensor", "data"], int, Iterator[tuple[str, Collective, int, int]]]] = [
        ("tensor", topology.tensor_model_parallel_size, _tensor(config, topology, phase, on_cpu)),
        ("data", topology.data_parallel_size, _data(config, topology, phase)),
    ]
    return [
        Sent(what, collective, group, payload, ROUNDS[collective] * payload * (n - 1) / n, calls)
        for group, n, entries in groups
        if n > 1
        for what, collective, payload, calls in entries
        if payload
    ]


def fuses(config: Config, *, on_cpu: bool) -> bool:
    """Whether a first-phase layer under sequence parallelism lets its factors join W0's collectives."""
    return 3 * smallest_dim(config) < OPERATIONS_PER_ELEMENT["cpu" if on_cpu else "gpu"]


def _tensor(config: Config, topology: Topology, phase: Phase, on_cpu: bool):
    """(what, collective, bytes, calls) in the group that shares the layers."""
    h, layers = config.model.hidden_size, config.model.num_layers
    micro_batches, size = topology.accumulation_steps, _size(config)
    tokens = topology.micro_batch_size * config.model.seq_length
    split = config.parallel.sequence_parallel
    linears, again = linear_shapes(config), config.training.recompute_granularity == "full"
    factorised = 0 if phase.columns is None else len(linears)
    wide = 4 * layers - (0 if phase.frozen_base else factorised)  # linears that send activations of width h
    # Those whose input is gathered once more for the gradient of a dense weight; half are column-parallel.
    regathered = (4 * layers - factorised) // 2 if split else 0
    unit = tokens * h * size
    if split:
        fused = fuses(config, on_cpu=on_cpu) or not phase.frozen_base
        narrow = factorised if not phase.frozen_base or not fused else 0
        for collective, extra in (("all-gather", regathered), ("reduce-scatter", 0)):
            calls = micro_batches * (wide + extra) + micro_batches * again * wide // 2
            yield "activations", collective, calls * unit, calls
            calls = micro_batches * narrow + micro_batches * again * narrow // 2
            yield "rank-sized activations", collective, calls * tokens * (phase.columns or 0) * size, calls
        yield from _vocabulary(config, micro_batches, unit)
        replicated = sizes_of(config, topology, phase).summed
        whole = (
            on_cpu and config.training.bf16 and config.parallel.zero_stage == 1
        )  # by DeepSpeed's BF16 optimizer
        shards = topology.data_parallel_size if config.parallel.zero_stage and not whole else 1
        yield "gradients of replicated parameters", "all-reduce", 4 * replicated // shards, 1
    else:
        calls = micro_batches * wide + micro_batches * again * wide // 2
        yield "activations", "all-reduce", calls * unit, calls
        narrow = 0 if phase.frozen_base else factorised
        calls = micro_batches * narrow + micro_batches * again * narrow // 2
        yield "rank-sized activations", "all-reduce", calls * tokens * (phase.columns or 0) * size, calls
        yield "vocabulary", "all-reduce", micro_batches * 2 * unit, 2 * micro_batches
    yield "loss", "all-reduce", micro_batches * 3 * tokens * 4, 3 * micro_batches
    gathered = factorised * h * (phase.columns or 0) * size
    yield "factors", "all-gather", gathered, factorised
    if split or phase.frozen_base:  # else every rank has the full gradient of its shard
        yield "gradients of factors", "reduce-scatter", gathered, factorised


def _vocabulary(config: Config, micro_batches: int, unit: int):
    """Embedding and head under sequence parallelism."""
    if is_llama(config):
        yield "vocabulary", "all-gather", 3 * micro_batches * unit, 3 * micro_batches
        yield "vocabulary", "reduce-scatter", 2 * micro_batches * unit, 2 * micro_batches
    else:  # positions are added to all tokens
        yield "vocabulary", "all-reduce", micro_batches * unit, micro_batches
        yield "vocabulary", "all-gather", 3 * micro_batches * unit, 3 * micro_batches
        yield "vocabulary", "reduce-scatter", micro_batches * unit, micro_batches


def _data(config: Config, topology: Topology, phase: Phase):
    """(what, collective, bytes, calls) among the replicas."""
    stage, size, micro_batches = config.parallel.zero_stage, _size(config), topology.accumulation_steps
    sizes = sizes_of(config, topology, phase)
    layers = config.model.num_layers
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        yield "gradients", "all-reduce", times * sizes.trained * size, times
        if stage:
            yield "parameters", "all-gather", sizes.trained * size, 1
        return
    yield "gradients", "reduce-scatter", micro_batches * sizes.trained * size, micro_batches
    gathers = micro_batches * (1 if sizes.total <= sizes.live else 2)
    yield (
        "parameters",
        "all-gather",
        (sizes.kept + gathers * (sizes.total - sizes.kept)) * size,
        gathers * layers,
    )


def _size(config: Config) -> int:
    return 4 if precision(config) == "fp32" else 2
