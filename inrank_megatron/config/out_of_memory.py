"""What to say when memory runs out: what needed how much, what fills it, and which settings help most."""

import errno
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from inrank_megatron.config.checks import check
from inrank_megatron.config.costs import Memory, memory_per_device, precision
from inrank_megatron.config.loading import replace
from inrank_megatron.config.plan import largest_phase
from inrank_megatron.config.schema import Config
from inrank_megatron.config.sizes import bytes_of, shown_size
from inrank_megatron.config.topology import Topology, topology_of
from inrank_megatron.distributed.memory import available_memory
from inrank_megatron.errors import UserError

T = TypeVar("T")
SIZE = r"([\d.]+ (?:bytes|[KMGT]iB))"
ASKED = re.compile(
    rf"(?:[Tt]ried to allocate|Unable to allocate) {SIZE}|you tried to allocate (\d+ bytes)", re.DOTALL
)
OF_THE_DEVICE = re.compile(rf"total capacity of {SIZE} of which {SIZE} is free")
WORDS = (
    "out of memory",  # CUDA, NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "Unable to allocate",  # NumPy
    "Cannot allocate memory",  # Linux
    "std::bad_alloc",
)
MOST_HELP = 3
RESERVE_BYTES = 4 * 2**20
"""Of the host's memory, for the words about the shortage; until then none of its pages is touched."""


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def shortage(error: BaseException) -> str:
    """``1.20 GiB more was asked for, 0.90 GiB is free of 79.15 GiB on the GPU``, as far as it is known."""
    text = str(error)
    asked = next((group for group in match.groups() if group), "") if (match := ASKED.search(text)) else ""
    more = f"{shown_size(bytes_of(asked))} more" if asked else "more"
    if device := OF_THE_DEVICE.search(text):
        total, free = (shown_size(bytes_of(size)) for size in device.groups())
        return f"{more} was asked for, {free} is free of {total} on the GPU"
    if "DefaultCPUAllocator" in text or isinstance(error, MemoryError | OSError):
        return f"{more} was asked for, {shown_size(available_memory())} is left to this process"
    return f"{more} was asked for than is free"


def within_memory(compute: Callable[[], T], remedy: Callable[[], str]) -> T:
    """``compute()``; where memory runs out, a UserError with the ``remedy``."""
    reserve = bytearray(RESERVE_BYTES)
    try:
        return compute()
    except (RuntimeError, MemoryError, OSError) as error:
        del reserve
        if not is_shortage(error):
            raise
        raise UserError(f"out of memory: {shortage(error)}; {remedy()}") from error


def or_on_the_cpu(device: torch.device) -> str:
    """The last words of a remedy for a tool, which can do without a GPU."""
    return "" if device.type == "cpu" else ', or CUDA_VISIBLE_DEVICES="" to compute in the machine\'s memory'


def advice(config: Config, topology: Topology, *, on_cpu: bool) -> str:
    """What fills the memory of a training, and the settings that help most, by the plan's arithmetic."""
    phase = largest_phase(config)
    now = memory_per_device(config, topology, ranks=phase.capacity, frozen_base=phase.frozen_base)
    helps = savings(config, topology, on_cpu=on_cpu)
    listed = ", ".join(f"{words} (saves {shown_size(saved)})" for words, saved in helps)
    where = "in each process" if on_cpu else "on each GPU"
    remedy = f"give {listed}" if helps else "give more devices, or a smaller model"
    return (
        f"the plan of {phase.name} is {shown_size(now.total)} {where}: {_parts(now)}; {remedy}; then "
        "continue with --resume auto: checkpoints are intact"
    )


def savings(config: Config, topology: Topology, *, on_cpu: bool) -> list[tuple[str, int]]:
    """The changes of one setting that save most, at most ``MOST_HELP``, with the bytes that each saves on one
    device; those that make another run of it come last.
    """
    phase = largest_phase(config)
    held: dict[str, Any] = {"ranks": phase.capacity, "frozen_base": phase.frozen_base}
    now = memory_per_device(config, topology, **held).total
    best: dict[str, tuple[bool, int, str]] = {}
    for in_new_run, name, value in _changes(config, topology, on_cpu=on_cpu):
        try:
            changed = replace(config, **{name: value})
            check(changed, world_size=topology.world_size)
        except UserError:
            continue
        then = topology_of(changed, world_size=topology.world_size, vocab_size=topology.vocab_size)
        saved = now - memory_per_device(changed, then, **held).total
        if saved > best.get(name, (in_new_run, 0, ""))[1]:
            best[name] = (in_new_run, saved, _flag(name, value) + (" in a new run" if in_new_run else ""))
    ordered = sorted(best.values(), key=lambda change: (change[0], -change[1]))
    return [(words, saved) for _, saved, words in ordered[:MOST_HELP]]


def _changes(config: Config, topology: Topology, *, on_cpu: bool) -> Iterator[tuple[bool, str, Any]]:
    """(whether it makes another run, name, value): the smallest stage first, as only more saving counts."""
    parallel, micro = config.parallel, topology.micro_batch_size
    if micro > 1:
        yield False, "micro_batch_size", max(d for d in range(1, micro // 2 + 1) if micro % d == 0)
    yield False, "recompute_granularity", "full"
    for stage in range(parallel.zero_stage + 1, 4):
        yield False, "zero_stage", stage
    if not on_cpu:
        yield False, "offload_optimizer", True
    yield False, "tensor_model_parallel_size", 2 * topology.tensor_model_parallel_size
    yield False, "sequence_parallel", True
    if precision(config) == "fp32":
        yield True, "bf16", True
    yield True, "seq_length", config.model.seq_length // 2
    for name in ("matrix_optimizer", "factor_optimizer"):
        yield True, name, "adamw"  # whose step needs no matrices of its own


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _parts(memory: Memory) -> str:
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "master weights and moments": memory.optimizer,
        "initial factors": memory.initial_factors,
        "activations": memory.activations,
        "gathered factors": memory.gathered_factors,
        "gathered parameters": memory.gathered_parameters,
        "gradient bucket": memory.bucket,
    }
    return ", ".join(f"{name} {shown_size(size)}" for name, size in parts.items() if size)
