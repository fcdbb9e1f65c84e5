"""What a run on one topology takes: memory, operations, bytes and time of each phase, and of the whole
run."""

import math
from dataclasses import dataclass

from inrank_megatron.config.cluster import Cluster
from inrank_megatron.config.costs import Memory, Parameters, memory_per_device, parameters
from inrank_megatron.config.switch_costs import switch_memory
from inrank_megatron.planning.occasions import Occasions, occasions
from inrank_megatron.planning.operations import step_flops
from inrank_megatron.planning.seconds import Link, StepTime, link_of, step_time
from inrank_megatron.planning.space import Candidate
from inrank_megatron.planning.timeline import Assumed, Phase, timeline
from inrank_megatron.planning.traffic import Sent, traffic

CLOSE = 1.02
"""Times that differ by less than this factor count as equal."""
STAGES = (1, 2, 0, 3)
"""The preference among equal times: under stages 1 and 2 the host waits once a step, under the others more
often (docs/guides/throughput.md), which the predicted time does not count."""


@dataclass(frozen=True)
class PhaseForecast:
    """Of one phase.

    Args:
        parameters: of the model, without the padding of its vocabulary.
        flops: operations of a device in a step.
        memory: of a device.
        sent: by a rank in a step.
        bytes_by_link: those of ``sent``, by what their ring runs over.
        time: of a step without a rank check.
    """

    phase: Phase
    parameters: Parameters
    flops: int
    memory: Memory
    sent: list[Sent]
    bytes_by_link: dict[Link, float]
    time: StepTime

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return self.phase.steps * self.time.total


@dataclass(frozen=True)
class Forecast:
    """Of a run on one topology.

    Args:
        phases: in their order.
        switch: memory of a device at the switch between them; None: there is none.
        occasions: what comes at some steps only.
        fits: whether every phase and the switch fit into a device's memory.
        hours, device_hours: of the whole run; the second times the number of devices.
        energy: kWh of the devices alone; None where the cluster does not say their power.
        price: in the currency of the cluster's file; None where it gives none.
    """

    candidate: Candidate
    phases: list[PhaseForecast]
    switch: Memory | None
    occasions: Occasions
    fits: bool
    hours: float
    device_hours: float
    energy: float | None
    price: float | None

    @property
    def memory(self) -> int:
        """Bytes on a device at the most, slack not included."""
        return max(memory.total for memory in self.memories.values())

    @property
    def memories(self) -> dict[str, Memory]:
        """Of a device, of each phase by name and of the switch, in their order."""
        first, *rest = [(one.phase.name, one.memory) for one in self.phases]
        switch = [] if self.switch is None else [("switch", self.switch)]
        return dict([first, *switch, *rest])

    @property
    def step_seconds(self) -> float:
        """The mean over the run, with all that comes at some steps only."""
        return self.hours * 3600 / sum(phase.phase.steps for phase in self.phases)


def forecast(candidate: Candidate, cluster: Cluster, assumed: Assumed) -> Forecast:
    """Of the run on a legal topology."""
    config, topology = candidate.config, candidate.topology
    line = timeline(config, topology, assumed)
    phases = [_phase(candidate, phase, cluster, assumed) for phase in line]
    switch = memory_of_switch(candidate, line, cluster)
    memories = [phase.memory for phase in phases] + ([] if switch is None else [switch])
    extra = occasions(config, topology, line, cluster, assumed)
    hours = (sum(phase.seconds for phase in phases) + extra.total) / 3600
    device_hours = hours * cluster.world_size
    watts, price = cluster.kind.watts, cluster.device_hour
    return Forecast(
        candidate=candidate,
        phases=phases,
        switch=switch,
        occasions=extra,
        fits=all(fits(memory, cluster) for memory in memories),
        hours=hours,
        device_hours=device_hours,
        energy=None if watts is None else watts * device_hours / 1000,
        price=None if price is None else price * device_hours,
    )


def _phase(candidate: Candidate, phase: Phase, cluster: Cluster, assumed: Assumed) -> PhaseForecast:
    config, topology, on_cpu = candidate.config, candidate.topology, cluster.device == "cpu"
    sent = traffic(config, topology, phase, on_cpu=on_cpu)
    by_link: dict[Link, float] = {"node": 0.0, "network": 0.0}
    for entry in sent:
        by_link[link_of(topology, cluster, entry.group)] += entry.sent
    return PhaseForecast(
        phase=phase,
        parameters=parameters(config, assumed.vocab_size, ranks=phase.columns, frozen_base=phase.frozen_base),
        flops=step_flops(config, topology, phase, on_cpu=on_cpu),
        memory=memory_of(candidate, phase, cluster),
        sent=sent,
        bytes_by_link=by_link,
        time=step_time(config, topology, phase, cluster),
    )


def memory_of(candidate: Candidate, phase: Phase, cluster: Cluster) -> Memory:
    """Of one device."""
    return memory_per_device(
        candidate.config,
        candidate.topology,
        device=cluster.device,
        ranks=phase.capacity,
        frozen_base=phase.frozen_base,
        used=phase.columns,
    )


def memory_of_switch(candidate: Candidate, line: list[Phase], cluster: Cluster) -> Memory | None:
    """Of one device; None where the run has one phase."""
    if len(line) == 1:
        return None
    first, second = line
    return switch_memory(
        candidate.config,
        candidate.topology,
        device=cluster.device,
        ranks=first.capacity,
        frozen_base=first.frozen_base,
        columns=second.capacity,
    )


def slack_of(memory: Memory) -> int:
    """Bytes assumed for fragmentation and the workspaces of libraries: a tenth of a full device."""
    return memory.total // 9


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether a device holds it with the slack; a CPU's memory is not known."""
    return cluster.memory is None or memory.total + slack_of(memory) <= cluster.memory


def ranking(one: Forecast) -> tuple:
    """The order of forecasts: those that fit, by time, as it is known no better than to 2 %; of equal ones
    those with larger micro-batches, which need fewer launches, then `STAGES`.
    """
    parallel, training = one.candidate.config.parallel, one.candidate.config.training
    return (
        not one.fits,
        round(math.log(one.step_seconds, CLOSE)),
        parallel.offload_optimizer,
        training.recompute_granularity is not None,
        -training.micro_batch_size,
        STAGES.index(parallel.zero_stage),
    )
