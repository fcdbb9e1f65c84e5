"""``torch.cuda.get_rng_state`` reads the CPU generator where there is no CUDA.

Reason: Megatron-Core's random-state tracker saves the state around the seeding of a new stream with
it. Without CUDA the call raises.

Checked with torch 2.11, 2.12, 2.13.
"""

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether the call fails in this process."""
    if torch.cuda.is_available():
        return False
    get_rng_state = require_symbol(torch.cuda, "get_rng_state", package="torch")
    try:
        get_rng_state()
    except (AssertionError, RuntimeError, IndexError):
        return True
    return False


def apply() -> None:
    """Replace the symbol if it fails."""
    if needed():
        torch.cuda.get_rng_state = _get_rng_state


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()
