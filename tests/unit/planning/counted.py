"""What rank 0 of a real engine does in a step, counted: bytes that it sends, operations, bytes of memory; and
what the planner predicts."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from inrank_megatron.planning.timeline import Phase

VOCABULARY, REPLICAS = 4096, 2
SIZES = {"num_layers": 4, "micro_batch_size": 2}


@dataclass(frozen=True)
class Case:
    """``phase``: 0 dense, 1 with W0, 2 without. ``tp``: tensor-parallel ranks; there are two replicas.
    ``on_cpu``: whether the prediction is for one; where no ranks are there, layers choose as on GPUs.
    ``final``: columns after the switch; None: the case has none.
    """

    phase: int
    tp: int
    settings: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 2
    on_cpu: bool = True
    final: int | None = None
    replicas: int = REPLICAS


def phase_of(case: Case, columns: int) -> Phase:
    used = columns if case.phase else None
    return Phase(f"phase {case.phase}", used, used, case.phase == 1, 1)


def _figures(case: Case) -> dict[str, tuple[float, float]]:
    """(counted, predicted) of ``sent``, ``flops`` and ``memory``, and of the memory of the switch, with and
    without what waits on the host."""
    import torch

    from inrank_megatron.benchmarks.blocks import Variant, preset_config, rank_0_of
    from inrank_megatron.benchmarks.collectives import Wire
    from inrank_megatron.benchmarks.flops import count_flops
    from inrank_megatron.benchmarks.step import training_step
    from inrank_megatron.config.costs import memory_per_device
    from inrank_megatron.config.loading import replace
    from inrank_megatron.config.topology import topology_of
    from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
    from inrank_megatron.planning.operations import step_flops
    from inrank_megatron.planning.traffic import traffic
    from tests.allocations import Allocations

    config = preset_config("tiny", tensor_model_parallel_size=case.tp, **SIZES | case.settings)
    phase = phase_of(case, 48)
    variant = Variant(phase.name, phase.columns, frozen_base=phase.frozen_base)
    with (
        rank_0_of(case.tp, replicas=case.replicas) as parallel,
        torch.autograd.set_multithreading_enabled(False),  # the dispatch modes are the thread's own
    ):
        with Allocations() as allocations:
            engine, run = training_step(config, variant, parallel, VOCABULARY, accumulation=case.accumulation)
            run()
            with Wire() as wire:
                run()
            peak = allocations.peak
            switch = None if case.final is None else _switch(engine, case, allocations)
        flops = 0 if switch else count_flops(run)
        stop_deepspeed(engine.deepspeed)
    sent = sum(entry.sent * entry.itemsize for entry in wire.collectives)
    sequences = case.accumulation * config.training.micro_batch_size * case.replicas
    config = replace(config, global_batch_size=sequences)
    topology = topology_of(config, world_size=case.tp * case.replicas, vocab_size=VOCABULARY)
    memory = memory_per_device(config, topology, ranks=phase.capacity, frozen_base=phase.frozen_base)
    entries = traffic(config, topology, phase, on_cpu=case.on_cpu)
    return {
        "sent": (sent, sum(entry.sent for entry in entries)),
        "flops": (flops, step_flops(config, topology, phase, on_cpu=case.on_cpu)),
        "memory": (peak, memory.total),
    } | _switch_figures(case, config, topology, phase, switch)


def _switch_figures(case: Case, config, topology, phase: Phase, counted) -> dict[str, tuple[float, float]]:
    from inrank_megatron.config.switch_costs import switch_memory

    if counted is None:
        return {}
    held = {"ranks": phase.capacity, "frozen_base": phase.frozen_base, "columns": case.final}
    devices = {"switch": "cpu", "switch beside a host": "some GPU"}
    return {
        name: (bytes_, switch_memory(config, topology, **held, device=device).total)
        for (name, device), bytes_ in zip(devices.items(), counted, strict=True)
    }


def _switch(engine, case: Case, allocations) -> tuple[int, int]:
    """The most bytes during the switch, and without what would wait on another host than the device."""
    import torch

    from inrank_megatron.config.shapes import linear_shapes
    from inrank_megatron.engine import zero_state
    from inrank_megatron.lowrank.methods.changes import Metric, Refactor

    config, read_state = engine.config, zero_state.read_state
    highest, beside, waiting = [0], [0], [0]
    size = (config.training.micro_batch_size, config.model.seq_length)
    batch = tuple(torch.zeros(size, dtype=torch.int64) for _ in range(2))

    def note() -> None:
        highest[0] = max(highest[0], allocations.peak)
        beside[0] = max(beside[0], allocations.peak - waiting[0])
        allocations.peak = allocations.alive

    def reading(parameter):
        note()
        before, state = allocations.alive, read_state(parameter)
        note()
        waiting[0] += allocations.alive - before
        allocations.peak = allocations.alive
        return state

    columns = {name: min(case.final, *shape) for name, shape in linear_shapes(config).items()}
    kind = config.inrank.truncation
    change = Refactor(dict(columns), dict(columns), Metric(kind, 0 if kind == "plain" else 2))
    with _sound_values(), patch.object(zero_state, "read_state", reading):
        allocations.peak = allocations.alive
        engine.apply([change], step=2, batches=lambda index: [batch] * case.accumulation)
        note()
    return highest[0], beside[0]


@contextmanager
def _sound_values() -> Iterator[None]:
    """What ranks that do not exist would have sent holds no numbers, and a truncation refuses that."""
    from inrank_megatron.engine.linears import FactorisedLayer, Linear
    from inrank_megatron.engine.truncation import Weighing

    def of(function, fill):
        def sound(*given, **named):
            tensor = function(*given, **named)
            return tensor if tensor is None else fill(tensor)

        return sound

    def fill_diagonal(moment):
        return moment.zero_().fill_diagonal_(1)

    with ExitStack() as stack:
        for owner in (Linear, FactorisedLayer):
            fill = of(owner.matrix, lambda matrix: matrix.normal_())
            stack.enter_context(patch.object(owner, "matrix", fill))
        stack.enter_context(patch.object(Weighing, "moment", of(Weighing.moment, fill_diagonal)))
        yield


def main() -> None:
    """Reads cases as JSON, one a line, and writes the figures of each."""
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    for line in sys.stdin:
        print(json.dumps(_figures(Case(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
