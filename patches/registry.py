"""The order in which the patches are applied."""

from types import ModuleType

from inrank_megatron_patches import (
    cuda_current_device,
    cuda_get_rng_state,
    cuda_manual_seed,
    cuda_synchronize,
    deepspeed_build_shm_op,
    megatron_get_rng_state,
    megatron_set_rng_state,
)

PATCHES: tuple[ModuleType, ...] = (
    cuda_current_device,
    cuda_get_rng_state,
    cuda_manual_seed,
    cuda_synchronize,
    megatron_get_rng_state,
    megatron_set_rng_state,
    deepspeed_build_shm_op,
)


def apply_all() -> None:
    """Apply every patch that this process needs. Imports Megatron-Core and DeepSpeed."""
    for patch in PATCHES:
        patch.apply()
