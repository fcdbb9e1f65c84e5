"""Seconds of what comes at some steps only: rank checks, the switch, evaluations, saves. None is measured on
GPUs.

The formulas are those of docs/evidence/decision_costs.md and saving.md.
"""

from dataclasses import dataclass

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import alike, number_of_linears
from inrank_megatron.config.switch_costs import weighed_at_a_time
from inrank_megatron.config.topology import Topology
from inrank_megatron.lowrank.methods.registry import METHODS
from inrank_megatron.planning.operations import forward_flops
from inrank_megatron.planning.seconds import double_rate, rate
from inrank_megatron.planning.sizes import sizes_of
from inrank_megatron.planning.timeline import Assumed, Phase, known_epoch_steps

DECOMPOSING = 1 / 16
"""Share of the rate of FP32 products that Gram matrices and decompositions attain in FP64: a tenth of an
A100's FP64 peak."""
VALIDATION = 30 / 969
"""Tokens of the validation text for each of the training text, by the default of ``split``."""


@dataclass(frozen=True)
class Occasions:
    """Seconds in the whole run."""

    rank_checks: float
    switch: float
    evaluation: float
    saves: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def occasions(
    config: Config, topology: Topology, line: list[Phase], cluster: Cluster, assumed: Assumed
) -> Occasions:
    """Of the run with these phases."""
    return Occasions(
        rank_checks=sum(_checks(config, topology, phase, cluster) for phase in line if phase.checks_ranks),
        switch=_switch(config, topology, line, cluster),
        evaluation=_evaluation(config, topology, line, cluster, assumed),
        saves=_saves(config, topology, line, cluster),
    )


def _checks(config: Config, topology: Topology, phase: Phase, cluster: Cluster) -> float:
    """Gram matrices of both factors, shared by all ranks; host threads decompose them during the next
    step."""
    method = METHODS[config.training.method]
    # The initial factors are decomposed beside the present ones.
    times = 2 if method.keeps_initial_factors(config) else 1
    flops = copied = 0.0
    for each in alike(config, phase.columns):
        squares = each.number * (times * (each.columns or 0)) ** 2
        flops += 2 * squares * sum(each.shape) / topology.world_size
        copied += 8 * squares / topology.world_size
    one = flops / (double_rate(cluster) * DECOMPOSING) + copied / cluster.kind.host_link
    inrank = config.inrank
    return max(0, phase.steps - inrank.rank_check_start) // inrank.rank_check_interval * one


def _switch(config: Config, topology: Topology, line: list[Phase], cluster: Cluster) -> float:
    """Truncations shared by all ranks, and the forward passes whose activations weight them."""
    if len(line) == 1:
        return 0.0
    flops = 0.0
    for (out, inp), columns, _, number in alike(config, line[1].columns):
        small = min(out, inp)
        flops += number * (9 * small**3 + 3 * out * inp * ((columns or 0) if out < inp else 2 * small))
    batches = 0 if config.inrank.truncation == "plain" else config.inrank.activation_batches
    batches *= -(-number_of_linears(config) // weighed_at_a_time(config, topology.data_parallel_size))
    tokens = batches * topology.global_batch_size * config.model.seq_length
    passes = _forward_seconds(config, topology, line[0], cluster, tokens)
    return passes + flops / topology.world_size / (double_rate(cluster) * DECOMPOSING)


def _evaluation(
    config: Config, topology: Topology, line: list[Phase], cluster: Cluster, assumed: Assumed
) -> float:
    """Forward passes over the validation text, or over ``eval_iters`` batches; 0 if its length is not
    known."""
    epoch = assumed.epoch_steps or known_epoch_steps(config, topology)
    batches = config.training.eval_iters or (epoch or 0) * VALIDATION
    tokens = batches * topology.global_batch_size * config.model.seq_length
    steps = config.training.train_iters
    interval = config.training.eval_interval or steps
    return sum(
        phase.steps / interval * _forward_seconds(config, topology, phase, cluster, tokens) for phase in line
    )


def _forward_seconds(
    config: Config, topology: Topology, phase: Phase, cluster: Cluster, tokens: float
) -> float:
    return tokens * forward_flops(config, topology, phase) / topology.world_size / rate(config, cluster)


def _saves(config: Config, topology: Topology, line: list[Phase], cluster: Cluster) -> float:
    """Training waits while each rank copies its share to the host: 12 bytes per trained parameter, and W0."""
    interval = config.training.save_interval or config.training.train_iters
    replicas, seconds = topology.data_parallel_size, 0.0
    for phase in line:
        sizes = sizes_of(config, topology, phase)
        copied = (12 * sizes.trained + 4 * (sizes.total - sizes.trained)) / replicas
        seconds += phase.steps / interval * copied / cluster.kind.host_link
    return seconds
