"""DeepSpeed leaves its Muon optimizer as it is where there is no CUDA.

Reason: it imports the optimizer to see whether a run uses it, and that import hands a function to
``torch.compile``, which imports the compiler.

Checked with deepspeed 0.19.
"""

import torch

from inrank_megatron_patches.imports import import_without_compiler, is_imported

_MODULE = "deepspeed.runtime.zero.muon.original_muon"


def needed() -> bool:
    """Whether the optimizer has still to be imported."""
    return not torch.cuda.is_available() and not is_imported(_MODULE)


def apply() -> None:
    """Import the optimizer without the compiler."""
    if needed():
        import_without_compiler(_MODULE)
