"""``torch.cuda.manual_seed`` seeds the CPU generator where there is no CUDA.

Reason: Megatron-Core's ``model_parallel_cuda_manual_seed`` seeds each stream of its tracker with it.
Without CUDA the call is queued for a device that never comes: nothing raises, every stream starts
from the same state, and tensor-parallel ranks drop the same elements.

Checked with torch 2.11, 2.12, 2.13.
"""

import torch

from inrank_megatron_patches.versions import require_symbol

_PROBE_SEED = 20230702


def needed() -> bool:
    """Whether the call leaves the CPU generator, which draws in this process, as it was."""
    if torch.cuda.is_available():
        return False
    manual_seed = require_symbol(torch.cuda, "manual_seed", package="torch")
    generator = torch.default_generator
    state = generator.get_state()
    try:
        manual_seed(_PROBE_SEED)
        return not torch.equal(generator.get_state(), torch.Generator().manual_seed(_PROBE_SEED).get_state())
    finally:
        generator.set_state(state)


def apply() -> None:
    """Replace the symbol if it does nothing."""
    if needed():
        torch.cuda.manual_seed = _manual_seed


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
