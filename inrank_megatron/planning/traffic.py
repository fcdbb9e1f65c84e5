"""Bytes that a rank sends in a step, by collective and by group.

With ring collectives a rank of a group of n sends (n - 1) / n of X bytes for an all-gather or a
reduce-scatter, and twice that for an all-reduce. The layers' collectives are in
``lowrank/layers/factorised.py``. Norms, and what ranks agree on (overflows, stopping), are not counted: a few
numbers each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from inrank_megatron.config.activation_costs import shared_features
from inrank_megatron.config.costs import keeps_whole_gradients, precision
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import alike, factorises_attention, is_llama, smallest_dim
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
        what: the purpose, in words.
        group: the ranks that share a layer, or the replicas.
        payload: bytes of the full tensors, all calls together.
        sent: bytes that leave the rank.
        calls: number of collectives.
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
    h, size, times = config.model.hidden_size, _size(config), topology.accumulation_steps
    tokens, split = topology.micro_batch_size * config.model.seq_length, config.parallel.sequence_parallel
    dense, factorised = _linears(config, phase)
    columns = _columns(config, phase)
    with_base = factorised if phase.frozen_base else (0, 0)
    joined = phase.frozen_base and (not split or fuses(config, on_cpu=on_cpu))
    wide = (dense[0] + with_base[0], dense[1] + with_base[1])
    narrow = ((0, 0), (0, 0)) if joined else (factorised, columns)
    again = config.training.recompute_granularity == "full"
    for collective, calls in _of_linears(*wide, split=split, again=again).items():
        calls = times * (calls + (dense[0] if collective == "all-gather" else 0))  # gathered once more
        yield "activations", collective, calls * tokens * h * size, calls
    calls_of, features = (_of_linears(*each, split=split, again=again) for each in narrow)
    for collective, calls in calls_of.items():
        sent = times * features[collective] * tokens * size
        yield "rank-sized activations", collective, sent, times * calls
    yield from _shared_keys(config, topology, tokens * size, again=again)
    yield from _vocabulary(config, times, tokens * h * size)
    yield "loss", "all-reduce", times * 3 * tokens * 4, 3 * times
    stage = config.parallel.zero_stage
    whole = keeps_whole_gradients(config, "cpu" if on_cpu else "gpu", stage)
    shards = 1 if whole or not stage else topology.data_parallel_size
    summed = sizes_of(config, topology, phase).summed
    yield "gradients of replicated parameters", "all-reduce", 4 * summed // shards, 1
    gathered = h * sum(columns) * size
    yield "factors", "all-gather", gathered, sum(factorised)
    if split or phase.frozen_base:  # else every rank has the full gradient of its shard
        yield "gradients of factors", "reduce-scatter", gathered, sum(factorised)


def _linears(config: Config, phase: Phase) -> tuple[tuple[int, int], tuple[int, int]]:
    """Column- and row-parallel linears of all layers: dense ones, and factorised ones."""
    rest = 0 if factorises_attention(config) else config.model.num_layers
    rows, columns = (
        sum(each.number for each in alike(config, None) if each.row_parallel == kind)
        for kind in (True, False)
    )
    if phase.columns is None:
        return (columns + rest, rows + rest), (0, 0)
    return (rest, rest), (columns, rows)


def _columns(config: Config, phase: Phase) -> tuple[int, int]:
    """Of the factors of all column-parallel linears together, and of all row-parallel ones."""
    rows, columns = (
        sum(
            each.number * (each.columns or 0)
            for each in alike(config, phase.columns)
            if each.row_parallel == kind
        )
        for kind in (True, False)
    )
    return columns, rows


def _of_linears(columns: int, rows: int, *, split: bool, again: bool) -> dict[Collective, int]:
    """Calls of a micro-batch for ``columns`` column-parallel and ``rows`` row-parallel linears. What enters
    the first is gathered and what leaves the others is summed; in the backward pass the other way round.
    ``again``: the forward pass is repeated.
    """
    if split:
        both = columns + rows
        return {"all-gather": both + again * columns, "reduce-scatter": both + again * rows}
    return {"all-reduce": columns + rows + again * rows}


def _shared_keys(config: Config, topology: Topology, unit: int, *, again: bool):
    """Keys and values that several ranks share; ``unit``: bytes of one feature of a micro-batch."""
    times, layers = topology.accumulation_steps, config.model.num_layers
    features = shared_features(config, topology.tensor_model_parallel_size)
    forward = times * (1 + again) * layers
    yield "shared keys", "all-gather", forward * features * unit, forward
    yield "shared keys", "reduce-scatter", times * layers * features * unit, times * layers


def _vocabulary(config: Config, times: int, unit: int):
    """Embedding and head; ``unit``: bytes of the activations of a micro-batch."""
    if not config.parallel.sequence_parallel:
        calls = {"all-reduce": 2}
    elif is_llama(config):
        calls = {"all-gather": 3, "reduce-scatter": 2}
    else:  # positions are added to all tokens
        calls = {"all-reduce": 1, "all-gather": 3, "reduce-scatter": 1}
    for collective, count in calls.items():
        yield "vocabulary", collective, times * count * unit, times * count


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
