"""The line on memory that ran out: by what libraries raise, and by the plan's arithmetic."""

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch

from inrank_megatron.config.costs import memory_per_device
from inrank_megatron.config.loading import from_flat, resolve
from inrank_megatron.config.out_of_memory import advice, is_shortage, savings, shortage, within_memory
from inrank_megatron.config.plan import columns_of
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 3 has a total capacity of 79.15 GiB of which 898.19 "
    "MiB is free. Including non-PyTorch memory, this process has 78.26 GiB memory in use. Of the allocated "
    "memory 70.11 GiB is allocated by PyTorch, and 6.01 GiB is reserved by PyTorch but unallocated."
)


def raised(compute) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        compute()
    return caught.value


def test_gpu_out_of_memory_advice():
    error = torch.OutOfMemoryError(ON_A_GPU)
    assert is_shortage(error)
    assert shortage(error) == "2.25 GiB more was asked for, 898.2 MiB is free of 79.15 GiB on the GPU"


@pytest.mark.parametrize(
    ("compute", "more"),
    [
        (lambda: torch.empty(2**50), "4,194,304.00 GiB more"),
        (lambda: np.empty(2**46), "524,288.00 GiB more"),
        (lambda: bytearray(2**60), "more"),
    ],
    ids=["torch", "NumPy", "Python"],
)
def test_host_out_of_memory_advice(compute, more):
    """What the libraries themselves raise."""
    error = raised(compute)
    assert is_shortage(error)
    assert shortage(error).startswith(f"{more} was asked for, ")
    assert shortage(error).endswith("is left to this process")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["NCCL", "cuBLAS", "Linux"],
)
def test_other_out_of_memory_errors_are_recognised(error):
    assert is_shortage(error)
    assert "more was asked for" in shortage(error)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        within_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3), lambda: "")
    with pytest.raises(UserError, match=r"^out of memory: .*; buy some$"):
        within_memory(lambda: torch.empty(2**50), lambda: "buy some")


def test_the_words_have_memory_where_none_is_left():
    code = """
import ctypes, resource, psutil
from inrank_megatron.config.out_of_memory import within_memory
from inrank_megatron.errors import UserError

def exhaust():
    limit = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    for piece in (2**16, 2**12, 2**8, 2**6):
        while malloc(piece):
            pass
    raise MemoryError

try:
    within_memory(exhaust, lambda: f"{len(bytearray(2**20))} bytes of words")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("out of memory: "), done.stderr
    assert done.stdout.endswith("; 1048576 bytes of words\n")


def run_of(world_size, **settings):
    config = resolve(
        from_flat({"model_preset": "medium", "train_iters": 8} | settings), world_size=world_size
    )
    return config, topology_of(config, world_size=world_size)


def test_advice_names_the_settings_that_save_most():
    config, topology = run_of(8, method="inrank-efficient", bf16=True, micro_batch_size=8)
    helps = dict(savings(config, topology, on_cpu=False))
    assert len(helps) == 3
    assert list(helps.values()) == sorted(helps.values(), reverse=True)
    ranks = {"ranks": columns_of(config).capacity, "frozen_base": True}
    now = memory_per_device(config, topology, **ranks)
    changed, then = run_of(
        8, method="inrank-efficient", bf16=True, micro_batch_size=8, recompute_granularity="full"
    )
    saved = now.total - memory_per_device(changed, then, **ranks).total
    assert helps["--recompute-granularity full"] == saved > now.activations / 2
    line = advice(config, topology, on_cpu=False)
    assert all(words in line for words in helps) and "on each GPU: parameters " in line


def test_ineffective_settings_are_not_advised():
    """One process without a GPU: no replicas to shard over, no ranks to share layers, no host next to it."""
    config, topology = run_of(1, micro_batch_size=1, recompute_granularity="full", global_batch_size=2)
    # Nor half precision, which needs master weights and a bucket where FP32 without ZeRO has neither.
    assert [words for words, _ in savings(config, topology, on_cpu=True)] == ["--seq-length 512 in a new run"]
    config, topology = run_of(1, micro_batch_size=6)
    assert [words for words, _ in savings(config, topology, on_cpu=True)][:2] == [
        "--recompute-granularity full", "--micro-batch-size 3",
    ]  # fmt: skip


def test_where_muons_step_takes_the_most_another_optimizer_is_advised():
    config, topology = run_of(
        1, micro_batch_size=1, seq_length=64, zero_stage=0, matrix_optimizer="muon", global_batch_size=2
    )
    helps = dict(savings(config, topology, on_cpu=True))
    assert helps["--matrix-optimizer adamw in a new run"] == max(helps.values())
