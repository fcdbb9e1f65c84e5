"""What a plan sets beside the run: the other methods on the same topology, and the largest model that
fits."""

from inrank_megatron.config.checks import check
from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.registry import METHODS
from inrank_megatron.planning.forecast import Forecast, forecast, memory_of, memory_of_switch, slack_of
from inrank_megatron.planning.space import Candidate, candidates, changed, needs_offload
from inrank_megatron.planning.timeline import Assumed, timeline, with_method

PROBES = (64, 128)
"""Numbers of layers from which memory is extrapolated, as it is linear in them."""
MOST_LAYERS = 10_000
"""That a run may have."""


def other_methods(one: Forecast, cluster: Cluster, assumed: Assumed) -> list[Forecast | tuple[str, str]]:
    """Every method on the topology of ``one``, dense first; or its name and why it cannot train there."""
    found: list[Forecast | tuple[str, str]] = []
    for name in METHODS:
        config, topology = one.candidate.config, one.candidate.topology
        try:
            if name != config.training.method:
                config = with_method(config, name, assumed.final_rank)
                check(config, world_size=topology.world_size)
            found.append(forecast(Candidate(config, topology), cluster, assumed))
        except UserError as error:
            found.append((name, str(error).split("; ")[0]))
    return found


def most_layers(config: Config, cluster: Cluster, assumed: Assumed) -> int | None:
    """Layers of the deepest model of this width that fits on some topology, without offload unless the
    optimizer needs it; None: the memory is not known.
    """
    if cluster.memory is None:
        return None
    least = {"micro_batch_size": 1, "recompute_granularity": "full"}
    least["offload_optimizer"] = needs_offload(config)
    found = candidates(changed(config, least), cluster, vocab_size=assumed.vocab_size, pinned=tuple(least))
    return max(_deepest(one.config, cluster, assumed) for one in found if isinstance(one, Candidate))


def _deepest(config: Config, cluster: Cluster, assumed: Assumed) -> int:
    """Layers that fit: extrapolated, then lowered until they do."""
    assert cluster.memory is not None, "asked for only where it is known"
    few, many = (_most_memory(config, layers, cluster, assumed) for layers in PROBES)
    each = (many - few) / (PROBES[1] - PROBES[0])
    layers = min(MOST_LAYERS, max(0, int(PROBES[0] + (cluster.memory - few) / each)))
    while layers and _most_memory(config, layers, cluster, assumed) > cluster.memory:
        layers -= 1 + layers // 50
    return layers


def _most_memory(config: Config, layers: int, cluster: Cluster, assumed: Assumed) -> int:
    """Bytes on a device of the same model with so many layers, slack included."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})
    topology = topology_of(config, world_size=cluster.world_size, vocab_size=assumed.vocab_size)
    one = Candidate(config, topology)
    line = timeline(config, topology, assumed)
    memories = [memory_of_switch(one, line, cluster), *(memory_of(one, phase, cluster) for phase in line)]
    return max(memory.total + slack_of(memory) for memory in memories if memory is not None)
