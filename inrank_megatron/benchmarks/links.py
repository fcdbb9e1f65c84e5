"""What two processes of this machine attain between them: bandwidth, and the fixed cost of a collective."""

import socket
import statistics
import time
import warnings
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist

from inrank_megatron.distributed.platform import backend, device, device_count

CALLS = 20
"""Collectives that are timed together."""
FEWEST = {"cpu": 2**15, "cuda": 2**22}
"""Numbers whose time stands out from a collective's fixed cost."""


def links(numbers: int, *, repeats: int) -> dict[str, float]:
    """Entries of a cluster file; empty if there is a single GPU.

    The mean of an all-reduce, an all-gather and a reduce-scatter, of 2 FP32 numbers and of ``numbers``: those
    of a micro-batch's activations, since the bandwidth depends much on the size, but at least `FEWEST`.
    """
    if device_count() == 1:
        return {}
    numbers = max(numbers, FEWEST[device().type])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue: SimpleQueue[list[float]] = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, numbers, repeats, queue), nprocs=2)
    few, many = queue.get()
    # Of two ranks each sends, in an all-reduce, as many bytes as the tensor has, else half of them.
    sent = 4 * numbers * (1 + 1 / 2 + 1 / 2) / 3
    return {"link_gb_s": sent / (many - few) / 1e9, "collective_us": few * 1e6}


def _rank(rank: int, port: int, numbers: int, repeats: int, queue: "SimpleQueue[list[float]]") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has new names for two of the collectives
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(backend(), init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [_seconds(torch.zeros(size, device=device()), repeats) for size in (2, numbers)]
    dist.destroy_process_group()
    if rank == 0:
        queue.put(found)


def _seconds(tensor: torch.Tensor, repeats: int) -> float:
    """Of one collective, the median; the first round does not count."""
    half = torch.empty_like(tensor[: tensor.numel() // 2])

    def each() -> None:
        dist.all_reduce(tensor)
        dist.all_gather_into_tensor(tensor, half)
        dist.reduce_scatter_tensor(half, tensor)

    rounds = [timed(each, CALLS) / 3 for _ in range(1 + repeats)]
    return statistics.median(rounds[1:])


def timed(run, calls: int) -> float:
    """Seconds of one of ``calls`` calls; on a CPU the process's own, which other programs hardly change."""
    clock = time.process_time if device().type == "cpu" else time.perf_counter
    _wait_for_device()
    start = clock()
    for _ in range(calls):
        run()
    _wait_for_device()
    return (clock() - start) / calls


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
