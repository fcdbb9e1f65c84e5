"""Where the time of a step goes, from operations, bytes and the rates that a device attains.

Times are measured where the rates of the cluster are (``--measure``). Compute runs at one rate whatever the
shapes are; a tensor-parallel collective is waited for in full; reductions over the replicas hide behind the
backward pass where DeepSpeed overlaps them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import overlaps_reductions, precision
from inrank_megatron.config.devices import attained_flops
from inrank_megatron.config.orthogonalisation_costs import orthogonalisation_flops
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.planning.operations import step_flops
from inrank_megatron.planning.sizes import sizes_of
from inrank_megatron.planning.timeline import Phase
from inrank_megatron.planning.traffic import Sent, traffic

Link = Literal["node", "network"]
LAUNCHES = 80
"""Operators of a layer and micro-batch, forward and backward (counted: docs/evidence/traffic.md)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    tensor_communication: float
    data_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(config: Config, topology: Topology, phase: Phase, cluster: Cluster) -> StepTime:
    """Of a step in ``phase`` without a rank check."""
    on_cpu = cluster.device == "cpu"
    compute = step_flops(config, topology, phase, on_cpu=on_cpu) / rate(config, cluster)
    layer = LAUNCHES * cluster.kind.operator
    if config.parallel.zero_stage == 3:
        layer += cluster.kind.zero3_layer
    launched = layer * config.model.num_layers * topology.accumulation_steps
    compute = compute + launched if on_cpu else max(compute, launched)
    sent = traffic(config, topology, phase, on_cpu=on_cpu)
    return StepTime(
        compute=compute,
        tensor_communication=_seconds((s for s in sent if s.group == "tensor"), topology, cluster),
        data_communication=_exposed(config, topology, cluster, sent, compute),
        optimizer=_optimizer(config, topology, phase, cluster),
    )


def rate(config: Config, cluster: Cluster) -> float:
    """Operations per second that one device attains in the run's precision."""
    attained = attained_flops(cluster.kind, precision(config))
    assert attained is not None, "a precision that the device lacks is refused before"
    return attained


def link_of(topology: Topology, cluster: Cluster, group: str) -> Link:
    """What the ring of a rank's group runs over: the node's links alone, or the network between nodes too.
    Neighbouring ranks share layers.
    """
    n = topology.tensor_model_parallel_size
    inside = cluster.devices % n == 0 if group == "tensor" else cluster.nodes == 1
    return "node" if inside else "network"


def bandwidth(topology: Topology, cluster: Cluster, group: str) -> float:
    """Bytes per second at which a rank sends round the ring of its group. Between nodes, the rings that leave
    a node share its network adapters.
    """
    kind = cluster.kind
    if link_of(topology, cluster, group) == "node":
        return kind.link
    n = topology.tensor_model_parallel_size
    members = cluster.devices if group == "tensor" else max(1, cluster.devices // n)
    return min(kind.link, kind.network * members)


def _seconds(sent: Iterable[Sent], topology: Topology, cluster: Cluster) -> float:
    return sum(
        entry.sent / bandwidth(topology, cluster, entry.group) + entry.calls * cluster.kind.collective
        for entry in sent
    )


def _exposed(config: Config, topology: Topology, cluster: Cluster, sent: list[Sent], compute: float) -> float:
    """What the device waits for of the replicas' collectives: gradients hide behind the backward pass of the
    micro-batches with which they are reduced, ZeRO 3's parameters behind the forward passes.
    """
    gradients, parameters = (
        _seconds((s for s in sent if s.group == "data" and s.what == what), topology, cluster)
        for what in ("gradients", "parameters")
    )
    stage = config.parallel.zero_stage
    if not overlaps_reductions(config, cluster.device):
        return gradients + parameters
    backward = 2 / 3 * compute / (1 if stage >= 2 else topology.accumulation_steps)
    forward = compute / 3 if stage == 3 else 0.0
    return max(0.0, gradients - backward) + max(0.0, parameters - forward)


def _optimizer(config: Config, topology: Topology, phase: Phase, cluster: Cluster) -> float:
    """Reading gradients three times (norm, clipping, update), reading and writing master weights and moments,
    writing the working copy; with offload through the host's memory and over its link. Muon's products
    besides.
    """
    kind, shards = cluster.kind, topology.data_parallel_size if config.parallel.zero_stage else 1
    trained = sizes_of(config, topology, phase).trained / shards
    size = 4 if precision(config) == "fp32" else 2
    moments = 1 if config.optimizer.optimizer == "sgd" else 2
    moved = trained * (3 * 4 + 8 * (1 + moments) + size)
    products = orthogonalisation_flops(config, phase.columns) / topology.data_parallel_size
    seconds = products / double_rate(cluster)
    if config.parallel.offload_optimizer:
        return seconds + moved / kind.host_memory_bandwidth + trained * 2 * size / kind.host_link
    return seconds + moved / kind.memory_bandwidth


def double_rate(cluster: Cluster) -> float:
    """Operations per second of products in FP64: assumed as many as in FP32, as on A100 and H100."""
    attained = attained_flops(cluster.kind, "fp32")
    assert attained is not None, "every device computes in FP32"
    return attained
