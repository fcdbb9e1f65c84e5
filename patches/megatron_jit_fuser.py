"""Megatron-Core leaves its small functions as they are where there is no CUDA.

Reason: it hands every function that a GPU would fuse to ``torch.compile`` at import. That imports the
compiler, for functions that a run on a CPU never calls; one that were called would need a C++ compiler.

Checked with megatron-core 0.16.
"""

import torch

from inrank_megatron_patches.imports import import_without_compiler, is_imported


def needed() -> bool:
    """Whether Megatron-Core has still to be imported."""
    return not torch.cuda.is_available() and not is_imported("megatron.core")


def apply() -> None:
    """Import Megatron-Core without the compiler."""
    if needed():
        import_without_compiler("megatron.core")
