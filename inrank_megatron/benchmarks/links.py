"""What two processes of this machine attain between them: bandwidth, and the fixed cost of a collective."""

import socket
import statistics
import time
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist

from inrank_megatron.distributed.platform import backend, device, device_count

CALLS = {1: 100, 4 * 2**20: 4}
"""Numbers in an all-reduce, and how many are timed together."""


def links(*, repeats: int) -> dict[str, float]:
    """Entries of a cluster file; empty if there is a single GPU."""
    if device_count() == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue: SimpleQueue[list[float]] = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, repeats, queue), nprocs=2)
    few, many = queue.get()
    # Of two ranks each sends as many bytes as the tensor has.
    return {"link_gb_s": 4 * max(CALLS) / (many - few) / 1e9, "collective_us": few * 1e6}


def _rank(rank: int, port: int, repeats: int, queue: "SimpleQueue[list[float]]") -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(backend(), init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [_seconds(torch.zeros(size, device=device()), calls, repeats) for size, calls in CALLS.items()]
    dist.destroy_process_group()
    if rank == 0:
        queue.put(found)


def _seconds(tensor: torch.Tensor, calls: int, repeats: int) -> float:
    """Of one all-reduce, the median; the first round does not count."""
    rounds = [timed(lambda: dist.all_reduce(tensor), calls) for _ in range(1 + repeats)]
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
