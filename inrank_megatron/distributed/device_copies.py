"""Copies between host and device for which the host does not wait."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which lies in the host's memory, on ``device``; the host does not wait for the copy.

    From pinned memory, which torch keeps until the copy is done: of other memory each copy waits for the work
    before it.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def start_copies(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy ``tensors``, all of one device, to the host, which does not wait.

    Returns:
        A function that waits for the copies, and for no work that the device got after them, and returns
        them. Any thread may call it.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return lambda: list(tensors)
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch puts them in pinned memory
    copied = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
    copied.record()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait
