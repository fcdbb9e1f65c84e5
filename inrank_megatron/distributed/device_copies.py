"""Copies of what the host has made to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which lies in the host's memory, on ``device``; the host does not wait for the copy.

    From pinned memory, which torch keeps until the copy is done: of other memory each copy waits for the work
    before it.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
