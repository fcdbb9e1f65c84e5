"""What the host asks of the device in one training step, by torch's profiler."""

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from inrank_megatron.distributed.platform import device
from tests.contract.sessions import Session

STEP = "one step"
BOUNDARY = "the device has all of forward and backward to do"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of CUDA's runtime and driver, which the profiler records: those that begin so, the last exactly."""


def counts_of(session: Session) -> dict[str, int]:
    """Launches, copies and waits of the next step of ``session``, waits before and after its boundary.

    On a CPU, where none of them exists, operators stand for launches and the rest is 0.
    """
    on_gpu = device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def mark() -> int:
        with record_function(BOUNDARY):
            return 0

    step = session.step + 1
    batches = list(session.batch(session.step))
    session.train_step()  # what the first step of a structure does once is over
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    # The step has a mark of its own: at its end the profiler waits for the device as well.
    with profile(activities=activities) as profiler, record_function(STEP):
        session.engine.train_step(batches, step=step + 1, lr=1e-4, meanwhile=mark)
    everything = profiler.events()
    whole, boundary = _range(everything, STEP), _range(everything, BOUNDARY)
    events = [event for event in everything if whole.start <= event.time_range.start <= whole.end]
    launches = [event for event in events if event.name.startswith(LAUNCHES)]
    if on_gpu and not launches:
        raise RuntimeError("the profiler saw no launch: this machine lets no user profile its GPUs (CUPTI)")
    operators = [event for event in events if event.name.startswith("aten::")]
    before = [event.time_range.start < boundary.start for event in events if _is_wait(event.name)]
    return {
        "launches": len(launches if on_gpu else operators),
        "copies": sum(event.name.startswith(COPIES) for event in events),
        "waits before the step": sum(before),
        "waits of the step": len(before) - sum(before),
        "peak bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def _range(events, name: str):
    """When the host was in ``record_function(name)``; the device has events of that name as well."""
    [found] = [e.time_range for e in events if e.name == name and e.device_type == DeviceType.CPU]
    return found


def _is_wait(name: str) -> bool:
    return name.startswith(WAITS[:-1]) or name == WAITS[-1]
