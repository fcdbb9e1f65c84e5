"""Bytes per step that a real engine's rank 0 sends, counted, and those that the planner predicts."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from inrank_megatron.planning.timeline import Phase

VOCABULARY, REPLICAS = 4096, 2


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


def _bytes(case: Case) -> tuple[float, float]:
    import torch

    from inrank_megatron.benchmarks.blocks import Variant, preset_config, rank_0_of
    from inrank_megatron.benchmarks.collectives import Wire
    from inrank_megatron.benchmarks.step import training_step
    from inrank_megatron.config.loading import replace
    from inrank_megatron.config.topology import topology_of
    from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
    from inrank_megatron.planning.traffic import traffic

    config = preset_config("tiny", tensor_model_parallel_size=case.tp, **{"num_layers": 2} | case.settings)
    phase = phase_of(case, 48)
    variant = Variant(phase.name, phase.columns, frozen_base=phase.frozen_base)
    with rank_0_of(case.tp, replicas=REPLICAS) as parallel:
        engine, run = training_step(config, variant, parallel, VOCABULARY, accumulation=case.accumulation)
        run()
        with torch.autograd.set_multithreading_enabled(False), Wire() as wire:
            run()
        stop_deepspeed(engine.deepspeed)
    seen = sum(entry.sent * entry.itemsize for entry in wire.collectives)
    config = replace(config, global_batch_size=case.accumulation * REPLICAS)
    topology = topology_of(config, world_size=case.tp * REPLICAS, vocab_size=VOCABULARY)
    return seen, sum(entry.sent for entry in traffic(config, topology, phase, on_cpu=case.on_cpu))


def main() -> None:
    """Reads cases as JSON, one a line, and writes (counted, predicted) bytes of each."""
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    for line in sys.stdin:
        print(json.dumps(_bytes(Case(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
