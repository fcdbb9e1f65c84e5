"""Megatron-Core's ``_get_cuda_rng_state`` reads the CPU generator where there is no CUDA.

Reason: the random-state tracker and activation recomputation save the state of the device's generator
with it. Without CUDA there is none, and the call raises.

Checked with megatron-core 0.16.
"""

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether the call fails in this process."""
    if torch.cuda.is_available():
        return False
    from megatron.core.tensor_parallel import random

    get_state = require_symbol(random, "_get_cuda_rng_state", package="megatron-core")
    try:
        get_state()
    except (AssertionError, RuntimeError, IndexError, TypeError):
        return True
    return False


def apply() -> None:
    """Replace the symbol if it fails."""
    if not needed():
        return
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _get_rng_state


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.default_generator.get_state()
