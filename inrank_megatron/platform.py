"""The process that training runs in: its device, its collective backend, quiet libraries, patches."""

import logging
import os
import warnings

import torch

from inrank_megatron.errors import UserError

# Remarks that a user of this project can do nothing about, as regular expressions for their start.
_NOISE = (
    # Megatron-Core at import: it falls back to torch implementations, which are the ones meant here.
    r"(Transformer Engine and Apex are|Apex is) not installed",
    # torch 2.13 renamed two collectives that Megatron-Core and DeepSpeed call by their old names.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)
# The same where there is no CUDA, by the logger that they come from.
_NOISE_WITHOUT_CUDA = {
    # A patch lets the random-state tracker fork the CPU generator itself, so that one always changes.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
    # A torch wheel with CUDA says so when DeepSpeed imports its extension builder.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def prepare_process() -> None:
    """Make this process ready for Megatron-Core and DeepSpeed; call it before either is imported.

    Sets what the libraries read from the environment (a value that the user set stays), silences
    their remarks on optional packages, shares the machine's cores among the local processes, and
    applies the patches that a run without CUDA needs, which imports both libraries.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Megatron-Core overlaps a collective with the gradient of the weight only on one queue, and reads
    # the variable on a CPU too.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        _take_device(_integer("LOCAL_RANK", default=0))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for logger in _NOISE_WITHOUT_CUDA:
            logging.getLogger(logger).addFilter(_is_worth_a_line)
        _share_cores()
    # Imported here: the patches import the libraries that all of the above must come before.
    from inrank_megatron_patches.registry import apply_all

    apply_all()


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str:
    """The device as its maker names it, e.g. ``NVIDIA H200``, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def backend() -> str:
    """The backend of ``torch.distributed`` for this device: ``nccl`` or ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def _take_device(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank}: this machine has {count} GPUs, and each process needs its own; "
            f"start at most {count} processes here (--nproc-per-node, --num_gpus)"
        )
    torch.cuda.set_device(local_rank)


def _share_cores() -> None:
    """One thread per core and process, unless the user or the launcher has said otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    # DeepSpeed's launcher sets the first, torchrun the second.
    processes = _integer("LOCAL_SIZE", default=_integer("LOCAL_WORLD_SIZE", default=1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _integer(variable: str, *, default: int) -> int:
    return int(os.environ.get(variable, default))


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE_WITHOUT_CUDA[record.name])
