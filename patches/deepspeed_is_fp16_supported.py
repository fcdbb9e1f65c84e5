"""DeepSpeed's CPU accelerator says yes to float16.

Reason: DeepSpeed asks oneDNN, which on most processors multiplies no float16 matrices; torch multiplies them
all the same, slowly. A run in float16 without a GPU is for trying it out, and for tests of loss scaling.

Checked with deepspeed 0.19.
"""

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether DeepSpeed would refuse float16 in this process."""
    if torch.cuda.is_available():
        return False
    from deepspeed.accelerator import cpu_accelerator, get_accelerator

    accelerator = require_symbol(cpu_accelerator, "CPU_Accelerator", package="deepspeed")
    require_symbol(accelerator, "is_fp16_supported", package="deepspeed")
    return not get_accelerator().is_fp16_supported()


def apply() -> None:
    """Replace the method if it would refuse."""
    if needed():
        from deepspeed.accelerator import cpu_accelerator

        cpu_accelerator.CPU_Accelerator.is_fp16_supported = _yes


def _yes(self) -> bool:
    return True
