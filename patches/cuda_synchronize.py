"""``torch.cuda.synchronize`` does nothing where there is no CUDA.

Reason: Megatron-Core's distributed checkpoints wait for the device with it before they write, and
after the creation of process groups with a time limit. Without CUDA the call raises.

Checked with torch 2.11, 2.12, 2.13.
"""

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether the call fails in this process."""
    if torch.cuda.is_available():
        return False
    synchronize = require_symbol(torch.cuda, "synchronize", package="torch")
    try:
        synchronize()
    except (AssertionError, RuntimeError):
        return True
    return False


def apply() -> None:
    """Replace the symbol if it fails."""
    if needed():
        torch.cuda.synchronize = _synchronize


def _synchronize(device: object = None) -> None:
    """A CPU has finished when it returns."""
