"""``torch.cuda.current_device`` gives the CPU device where there is no CUDA.

Reason: Megatron-Core allocates with ``device=torch.cuda.current_device()`` in its tensor-parallel
mappings and layers, the core attention and the global memory buffer. Without CUDA the call raises.

Checked with torch 2.11, 2.12, 2.13.
"""

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether the call fails in this process."""
    if torch.cuda.is_available():
        return False
    current_device = require_symbol(torch.cuda, "current_device", package="torch")
    try:
        current_device()
    except (AssertionError, RuntimeError):
        return True
    return False


def apply() -> None:
    """Replace the symbol if it fails."""
    if needed():
        torch.cuda.current_device = _current_device


def _current_device() -> torch.device:
    return torch.device("cpu")
