"""Predicted and measured step times on the CPU of this machine: docs/evidence/data/planned_step_times.csv.

    OMP_NUM_THREADS=1 python docs/scripts/planned_step_times.py

The rates are measured first, as by `tools/plan.py --measure`, on other computations than the steps. All times
are the CPU time of rank 0, which other programs on the machine hardly change.
"""

import csv
import socket
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/evidence/data/planned_step_times.csv"
VOCABULARY, LAYERS, ACCUMULATION, STEPS = 4096, 4, 2, 7


@dataclass(frozen=True)
class Case:
    """One process, or two that share layers (``tp`` 2) or are replicas. ``phase``: 0 is dense."""

    tp: int
    dp: int
    zero: int
    phase: int
    precision: str
    width: int


CASES = (
    Case(1, 1, 1, 0, "fp32", 192),
    Case(1, 1, 1, 1, "fp32", 192),
    Case(1, 1, 1, 2, "bf16", 192),
    Case(1, 1, 1, 2, "fp32", 384),
    Case(1, 1, 1, 0, "bf16", 384),
    Case(1, 2, 0, 0, "fp32", 192),
    Case(1, 2, 1, 2, "bf16", 192),
    Case(1, 2, 2, 1, "fp32", 384),
    Case(1, 2, 3, 0, "bf16", 192),
    Case(1, 2, 3, 2, "fp32", 384),
    Case(2, 1, 1, 0, "fp32", 192),
    Case(2, 1, 1, 1, "bf16", 384),
    Case(2, 1, 1, 2, "fp32", 384),
    Case(2, 1, 1, 2, "fp32", 192),
)


def settings(case: Case):
    """The run of a case."""
    from inrank_megatron.benchmarks.blocks import preset_config

    return preset_config(
        "tiny",
        hidden_size=case.width,
        bf16=case.precision == "bf16",
        zero_stage=case.zero,
        tensor_model_parallel_size=case.tp,
        micro_batch_size=1,
        global_batch_size=ACCUMULATION * case.dp,
    )


def measured(rank: int, port: int, cases: list[Case], queue) -> None:
    """Puts the seconds of a step of each case, on rank 0; all cases have the same ranks."""
    import os

    world = cases[0].tp * cases[0].dp
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process(tensor_model_parallel_size=cases[0].tp)
    import torch
    import torch.distributed as dist

    from inrank_megatron.benchmarks.blocks import Variant
    from inrank_megatron.benchmarks.links import timed
    from inrank_megatron.benchmarks.step import training_step
    from inrank_megatron.distributed.process_groups import initialise, shutdown
    from inrank_megatron.engine.deepspeed_setup import stop_deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    parallel = initialise(backend="gloo", tensor_model_parallel_size=cases[0].tp)
    found = []
    for case in cases:
        columns = case.width // 4 if case.phase else None
        variant = Variant(f"phase {case.phase}", columns, frozen_base=case.phase == 1)
        engine, run = training_step(settings(case), variant, parallel, VOCABULARY, accumulation=ACCUMULATION)
        timed(run, 2)
        found.append(statistics.median(timed(run, 1) for _ in range(STEPS)))
        stop_deepspeed(engine.deepspeed)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    shutdown()


def predicted(case: Case, cluster) -> float:
    """Seconds of a step by the planner."""
    from inrank_megatron.config.topology import topology_of
    from inrank_megatron.planning.seconds import step_time
    from inrank_megatron.planning.timeline import Phase

    config = settings(case)
    topology = topology_of(config, world_size=case.tp * case.dp, vocab_size=VOCABULARY)
    columns = case.width // 4 if case.phase else None
    phase = Phase(f"phase {case.phase}", columns, columns, case.phase == 1, 1)
    return step_time(config, topology, phase, cluster).total


def main() -> None:
    """Measures the rates, then the steps, and writes and prints the rows."""
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    import torch

    from inrank_megatron.benchmarks.rates import rates
    from inrank_megatron.config.cluster import parse_cluster, with_rates

    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        key = (case.width, case.precision)
        if key not in found:
            found[key] = rates(settings(case))
            print(key, found[key], file=sys.stderr, flush=True)
    rows = []
    for (tp, dp), group in groupby(CASES, lambda case: (case.tp, case.dp)):
        cases = list(group)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(measured, (port, cases, queue), nprocs=tp * dp)
        for case, seconds in zip(cases, queue.get(), strict=True):
            cluster = with_rates(parse_cluster(f"{tp * dp}xcpu"), found[case.width, case.precision])
            ahead = predicted(case, cluster)
            rows.append(asdict(case) | {"predicted_seconds": f"{ahead:.4f}", "seconds": f"{seconds:.4f}"})
            print(*rows[-1].values(), f"{ahead / seconds - 1:+.0%}", file=sys.stderr, flush=True)
    with DATA.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
