"""What one rank does in one training step: operators that the device computes, collectives, what they send.

The engine as it trains, of 2 micro-batches per step, on rank 0 of 2 replicas, by ZeRO stage, without tensor
parallelism and over 2 ranks of it with sequence parallelism; the other ranks do not exist, so that one
process counts, with or without a GPU. Nothing counted depends on the values, which are wrong.

An operator is one that torch dispatches and that is not a view: on a GPU most launch one kernel, those over
lists and the ones that copy none a few or none. Where there is a GPU kernels are counted by torch.profiler
too, and the host's waits by torch's own debugging mode. Collectives among one rank do not count. Bytes
are those that a rank sends by the ring rule. ``over dense`` compares with the dense model of the same
stage.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from inrank_megatron.benchmarks.blocks import DENSE, Variant, phase_1, phase_2, preset_config, rank_0_of
from inrank_megatron.benchmarks.collectives import Wire
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.step import training_step
from inrank_megatron.distributed.platform import device
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed

REPLICAS, ACCUMULATION, VOCABULARY = 2, 2, 4096
FIRST_COLUMNS = {"tiny": 27}
"""Columns of InRank's first phase: 102 at the paper's widths."""


@dataclass(frozen=True)
class Counts:
    """Of one step of one rank. ``kernels``, ``waits``: None without a GPU."""

    operators: int
    collectives: int
    sent: float
    kernels: int | None
    waits: int | None


class Operators(TorchDispatchMode):
    """Counts what torch dispatches, except views and collectives."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.count += 1
        return function(*args, **(kwargs or {}))


def measure(preset: str, rank: int) -> Iterator[Row]:
    """Rows for every ZeRO stage, tensor-parallel size and variant."""
    variants = (DENSE, phase_1(FIRST_COLUMNS.get(preset, 102)), phase_2(rank))
    for stage in range(4):
        for size in (1, 2):
            dense = None
            for variant in variants:
                counts = count_step(preset, variant, stage=stage, tensor_parallel=size)
                dense = dense or counts
                layout = f"ZeRO {stage}, TP {size}" + (" SP" if size > 1 else "")
                yield from _rows(f"{layout}, {variant.name}", counts, dense)


def count_step(preset: str, variant: Variant, *, stage: int, tensor_parallel: int) -> Counts:
    """The second step of a training; the first one allocates."""
    config = preset_config(
        preset,
        zero_stage=stage,
        tensor_model_parallel_size=tensor_parallel,
        # Stage 0 in BF16 and tensor parallelism do not go together.
        bf16=device().type != "cpu" and (stage > 0 or tensor_parallel == 1),
    )
    with rank_0_of(tensor_parallel, replicas=REPLICAS) as parallel:
        engine, run = training_step(config, variant, parallel, VOCABULARY, accumulation=ACCUMULATION)
        run()
        with torch.autograd.set_multithreading_enabled(False), Operators() as operators, Wire() as wire:
            run()
        real = [entry for entry in wire.collectives if entry.ranks > 1]
        counts = Counts(
            operators=operators.count,
            collectives=len(real),
            sent=sum(entry.sent * entry.itemsize for entry in real),
            kernels=_kernels(run) if torch.cuda.is_available() else None,
            waits=_waits(run) if torch.cuda.is_available() else None,
        )
        stop_deepspeed(engine.deepspeed)
    return counts


def _kernels(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def _waits(run: Callable[[], object]) -> int:
    """Operations that wait, by torch's warnings; it does not see streams that are waited for."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in raised)


def _rows(case: str, counts: Counts, dense: Counts) -> Iterator[Row]:
    for quantity, name in (
        ("operators per step", "operators"),
        ("kernels per step (torch.profiler)", "kernels"),
        ("waits of the host per step", "waits"),
        ("collectives per step", "collectives"),
        ("bytes sent per step", "sent"),
    ):
        value, other = getattr(counts, name), getattr(dense, name)
        if value is not None:
            yield Row(case, quantity, value, ratio_vs_dense=value / other if other else None)
