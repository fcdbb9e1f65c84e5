"""The process that training runs in: its device, its collective backend, quiet libraries, patches."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from inrank_megatron.distributed.determinism import make_deterministic
from inrank_megatron.distributed.launcher import Ranks, adopt_ranks
from inrank_megatron.errors import UserError

# Remarks that a user of this project can do nothing about, as regular expressions for their start.
_NOISE = (
    # Megatron-Core at import: it falls back to torch implementations, which are the ones meant here.
    r"(Transformer Engine and Apex are|Apex is) not installed",
    # torch 2.13 renamed two collectives that Megatron-Core and DeepSpeed call by their old names.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    # torch with NCCL, of the barriers with which DeepSpeed builds ZeRO 3; the device has been set before.
    r"barrier\(\): using the device under current context",
)
# The same by the logger that they come from.
_NOISE_OF_LOGGERS = {
    # For every optimizer but Adam, Muon among them: the tests compare each with one process without ZeRO.
    "DeepSpeed": "**** You are using ZeRO with an untested optimizer",
}
# And where there is no CUDA.
_NOISE_WITHOUT_CUDA = {
    # A patch lets the random-state tracker fork the CPU generator itself, so that one always changes.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
    # A torch wheel with CUDA says so when DeepSpeed imports its extension builder.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
# How CUDA_VISIBLE_DEVICES says that there shall be none; batch systems write the last.
_NO_DEVICE = ("", "-1", "NoDevFiles")


def prepare_process(*, tensor_model_parallel_size: int = 1, deterministic: bool = False) -> None:
    """Make this process ready for Megatron-Core and DeepSpeed; call it before either is imported.

    Sets what the libraries read from the environment (a value that the user set stays), silences
    their remarks on optional packages, shares the machine's cores among the local processes, and
    applies the patches that a run without CUDA needs, which imports both libraries.

    Args:
        tensor_model_parallel_size: of the run; some settings depend on it.
        deterministic: on a GPU, compute the same bits each time (``determinism.py``).

    Raises:
        UserError: the launcher's variables are contradictory, there are GPUs and none for this process, or
            the environment contradicts ``deterministic``.
    """
    ranks = adopt_ranks()
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for logger in _NOISE_OF_LOGGERS:
        logging.getLogger(logger).addFilter(_is_worth_a_line)
    os.environ |= cuda_settings(os.environ, tensor_model_parallel_size=tensor_model_parallel_size)
    if torch.cuda.is_available():
        if deterministic:
            make_deterministic(os.environ)
        take_device(device_index(ranks, torch.cuda.device_count()))
    else:
        if reason := unusable_gpus(os.environ, Path("/dev"), cuda_fault):
            raise UserError(reason)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core asks for it on a CPU too
        for logger in _NOISE_WITHOUT_CUDA:
            logging.getLogger(logger).addFilter(_is_worth_a_line)
    _share_cores(ranks)
    # Imported here: the patches import the libraries that all of the above must come before.
    from inrank_megatron_patches.registry import apply_all

    apply_all()


def cuda_settings(env: Mapping[str, str], *, tensor_model_parallel_size: int) -> dict[str, str]:
    """What CUDA and torch shall find in the environment when they start, where the user has set nothing."""
    settings = {}
    # Megatron-Core overlaps a tensor-parallel collective with the gradient of the weight only on one queue.
    # Without one, a second queue lets the gathers and reductions of ZeRO's own streams overlap.
    if tensor_model_parallel_size > 1 and "CUDA_DEVICE_MAX_CONNECTIONS" not in env:
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Ranks that grow ask for activations of ever new sizes, which fit badly into the blocks of old ones.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys():
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return settings


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_count() -> int:
    """The CUDA devices that this process sees."""
    return torch.cuda.device_count()


def device_name() -> str:
    """The device as its maker names it, e.g. ``NVIDIA H200``, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def mixed_devices(found: list[tuple[str, str]]) -> list[str]:
    """What to say of a job on devices of several kinds.

    Args:
        found: host and name of the device of every rank.
    """
    hosts: dict[str, dict[str, None]] = {}
    for host, name in found:
        hosts.setdefault(name, {})[host] = None
    if len(hosts) == 1:
        return []
    listed = "; ".join(f"{name} on {', '.join(there)}" for name, there in hosts.items())
    return [
        f"GPUs of several kinds ({listed}): all wait for the slowest, and utilisation is of rank 0's kind"
    ]


def backend() -> str:
    """The backend of ``torch.distributed`` for this device: ``nccl`` or ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def release_memory() -> None:
    """Give memory that torch's allocator keeps for reuse back to the device. Nothing to do on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def tensor_cores() -> Iterator[None]:
    """FP32 matrix products with inputs of 10 bits of mantissa (TF32) on a GPU that has them, not on a CPU.

    They are the same for values that were float16 or bfloat16, at several times the rate. Others, such as
    sums of these, lose what float16 would lose of them.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def device_index(ranks: Ranks, count: int) -> int:
    """Which of the ``count`` devices that this process sees is its own.

    A launcher may show all of the machine's to each process, or (`srun --gpus-per-task=1`) to each its own;
    whether two have one device in common is found where they meet.
    """
    if ranks.local_rank < count:
        return ranks.local_rank
    if count == 1:
        return 0
    raise UserError(
        f"local rank {ranks.local_rank}: this machine has {count} GPUs, and each process needs its own; "
        f"start at most {count} processes here (--nproc-per-node, --num_gpus, --ntasks-per-node)"
    )


def check_precision(*, bf16: bool) -> None:
    """Raise UserError for BF16 on a GPU that would emulate it."""
    if torch.cuda.is_available() and (
        reason := bf16_fault(bf16, device_name(), torch.cuda.get_device_capability())
    ):
        raise UserError(reason)


def bf16_fault(bf16: bool, name: str, capability: tuple[int, int]) -> str | None:
    """What to say of ``bf16`` on the GPU of that name and compute capability; None if it computes in it.

    torch and DeepSpeed take it on older ones too, and then products leave the tensor cores.
    """
    if not bf16 or capability >= (8, 0):
        return None
    return (
        f"bf16 = True: {name} (compute capability {capability[0]}.{capability[1]}) has no BF16, and emulates "
        "it several times slower; give --fp16"
    )


def take_device(index: int) -> None:
    """Make the device of that index this process's own, for DeepSpeed too, which takes LOCAL_RANK for the
    index, also where each process is shown its own device alone, and compares what Open MPI says with it.
    """
    torch.cuda.set_device(index)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(index)


def device_identity() -> str | None:
    """The GPU of this process, by a name that no other device has; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return identity_of(visible, index, str(torch.cuda.get_device_properties(index).uuid))


def identity_of(visible: str, index: int, uuid: str) -> str:
    """``uuid``, or the name in the list of visible devices where it is a slice of a GPU (MIG), as slices of
    one GPU can have its UUID.
    """
    names = [name.strip() for name in visible.split(",")]
    return names[index] if index < len(names) and names[index].startswith("MIG-") else uuid


def unusable_gpus(env: Mapping[str, str], devices: Path, fault: Callable[[], str]) -> str | None:
    """What to say of NVIDIA GPUs that torch cannot use; None where there are none or the user hides them.

    Args:
        devices: ``/dev``. fault: gives torch's own reason.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    there = [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    if not there or (visible is not None and visible.split(",")[0].strip() in _NO_DEVICE):
        return None
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return (
        f"this machine has {len(there)} NVIDIA GPUs, and torch cannot use them{shown}: {fault()}; change "
        'that, or set CUDA_VISIBLE_DEVICES="" to run on the CPU'
    )


def cuda_fault() -> str:
    """Why torch has no CUDA device, in words."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA (bash launch/setup_env.sh chooses one with)"
        )
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0].rstrip(".")
    return "it finds no device"


def _share_cores(ranks: Ranks) -> None:
    """One thread per core and process, unless the user or the launcher has said otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith((_NOISE_OF_LOGGERS | _NOISE_WITHOUT_CUDA)[record.name])
