"""``deepspeed.runtime.bf16_optimizer.see_memory_usage`` prints nothing, on a CPU and with CUDA.

Reason: the BF16 optimizer reports memory with ``force=True`` around every parameter group, some thirty lines
whenever an engine is built, with a garbage collection each. No setting of DeepSpeed turns them off.

Checked with deepspeed 0.19.
"""

import importlib
import inspect

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether DeepSpeed's BF16 optimizer would print its memory reports."""
    module = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    if require_symbol(module, "see_memory_usage", package="deepspeed") is _report_nothing:
        return False
    return "force=True" in inspect.getsource(module.BF16_Optimizer)


def apply() -> None:
    """Replace the symbol if it would print."""
    if needed():
        importlib.import_module("deepspeed.runtime.bf16_optimizer").see_memory_usage = _report_nothing


def _report_nothing(message: str, force: bool = False) -> None:
    """Replaces a report of memory that DeepSpeed prints unasked."""
