"""What rank 0 of a real engine does in a step, counted: bytes that it sends, operations, bytes of memory; and
what the planner predicts."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from inrank_megatron.planning.timeline import Phase

VOCABULARY, REPLICAS = 4096, 2
SIZES = {"num_layers": 4, "micro_batch_size": 2}


@dataclass(frozen=True)
class Case:
    """``phase``: 0 dense, 1 with W0, 2 without. ``tp``: tensor-parallel ranks; there are two replicas.
    ``on_cpu``: whether the prediction is for one; where no ranks are there, layers choose as on GPUs.
    """

    phase: int
    tp: int
    settings: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 2
    on_cpu: bool = True


def phase_of(case: Case, columns: int) -> Phase:
    used = columns if case.phase else None
    return Phase(f"phase {case.phase}", used, used, case.phase == 1, 1)


def _figures(case: Case) -> dict[str, tuple[float, float]]:
    """(counted, predicted) of ``sent``, ``flops`` and ``memory``."""
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
        rank_0_of(case.tp, replicas=REPLICAS) as parallel,
        torch.autograd.set_multithreading_enabled(False),  # the dispatch modes are the thread's own
    ):
        with Allocations() as allocations:
            engine, run = training_step(config, variant, parallel, VOCABULARY, accumulation=case.accumulation)
            run()
            with Wire() as wire:
                run()
        flops = count_flops(run)
        stop_deepspeed(engine.deepspeed)
    sent = sum(entry.sent * entry.itemsize for entry in wire.collectives)
    sequences = case.accumulation * config.training.micro_batch_size * REPLICAS
    config = replace(config, global_batch_size=sequences)
    topology = topology_of(config, world_size=case.tp * REPLICAS, vocab_size=VOCABULARY)
    memory = memory_per_device(config, topology, ranks=phase.capacity, frozen_base=phase.frozen_base)
    entries = traffic(config, topology, phase, on_cpu=case.on_cpu)
    return {
        "sent": (sent, sum(entry.sent for entry in entries)),
        "flops": (flops, step_flops(config, topology, phase, on_cpu=case.on_cpu)),
        "memory": (allocations.peak, memory.total),
    }


def main() -> None:
    """Reads cases as JSON, one a line, and writes the figures of each."""
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    for line in sys.stdin:
        print(json.dumps(_figures(Case(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
