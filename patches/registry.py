"""The order in which the patches are applied."""

from types import ModuleType

from inrank_megatron_patches import (
    cuda_current_device,
    cuda_get_rng_state,
    cuda_manual_seed,
    cuda_synchronize,
    deepspeed_build_shm_op,
    deepspeed_is_fp16_supported,
    deepspeed_mlflow,
    deepspeed_muon,
    deepspeed_see_memory_usage,
    megatron_get_rng_state,
    megatron_jit_fuser,
    megatron_logits_max,
    megatron_set_rng_state,
    megatron_wandb,
)

CPU_PATCHES: tuple[ModuleType, ...] = (
    cuda_current_device,
    cuda_get_rng_state,
    cuda_manual_seed,
    cuda_synchronize,
    megatron_jit_fuser,  # before the patches that import Megatron-Core
    megatron_get_rng_state,
    megatron_set_rng_state,
    megatron_logits_max,
    deepspeed_build_shm_op,
    deepspeed_is_fp16_supported,
    deepspeed_muon,
)
# These act with CUDA too: they only keep a library quiet.
QUIET_PATCHES: tuple[ModuleType, ...] = (deepspeed_see_memory_usage,)
# These too: they import a library without another one that it would import.
IMPORT_PATCHES: tuple[ModuleType, ...] = (megatron_wandb, deepspeed_mlflow)
PATCHES = IMPORT_PATCHES + CPU_PATCHES + QUIET_PATCHES


def apply_all() -> None:
    """Apply every patch that this process needs. Imports Megatron-Core and DeepSpeed."""
    for patch in PATCHES:
        patch.apply()
