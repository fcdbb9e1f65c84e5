"""Megatron-Core imports its inference without W&B, on a CPU and with CUDA.

Reason: every model imports the inference, which imports W&B where it is installed, for curves of servers. A
run that reports to W&B imports it itself, on one rank.

Checked with megatron-core 0.16.
"""

import importlib

from inrank_megatron_patches import megatron_jit_fuser
from inrank_megatron_patches.imports import is_imported, left_out

_MODULE = "megatron.core.inference.contexts.dynamic_context"


def needed() -> bool:
    """Whether the inference has still to be imported."""
    return not is_imported(_MODULE)


def apply() -> None:
    """Import the inference, and Megatron-Core with it, without W&B."""
    if needed():
        with left_out("wandb"):
            megatron_jit_fuser.apply()  # the first import of Megatron-Core is that of the inference too
            importlib.import_module(_MODULE)
