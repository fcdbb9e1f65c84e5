"""Megatron-Core's ``_set_cuda_rng_state`` writes the CPU generator where there is no CUDA.

Reason: the random-state tracker and activation recomputation switch streams with it. Without CUDA
the call is queued for a device that never comes: nothing raises, all streams are one, and
tensor-parallel ranks drop the same elements.

Checked with megatron-core 0.16.
"""

import torch

from inrank_megatron_patches.versions import require_symbol

_PROBE_SEED = 20230702


def needed() -> bool:
    """Whether the call leaves the CPU generator, which draws in this process, as it was."""
    if torch.cuda.is_available():
        return False
    from megatron.core.tensor_parallel import random

    set_state = require_symbol(random, "_set_cuda_rng_state", package="megatron-core")
    generator = torch.default_generator
    state, wanted = generator.get_state(), torch.Generator().manual_seed(_PROBE_SEED).get_state()
    try:
        set_state(wanted)
        return not torch.equal(generator.get_state(), wanted)
    finally:
        generator.set_state(state)


def apply() -> None:
    """Replace the symbol if it does nothing."""
    if not needed():
        return
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = _set_rng_state


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)
