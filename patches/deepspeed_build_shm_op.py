"""``deepspeed.comm.torch.build_shm_op`` builds nothing where there is no CUDA.

Reason: on a CPU, DeepSpeed compiles a shared-memory operator when the process group starts: half a
minute at the first run, and a crash on a machine without a C++ compiler. Gloo carries the same
collectives without it.

Checked with deepspeed 0.19.
"""

import importlib

import torch

from inrank_megatron_patches.versions import require_symbol


def needed() -> bool:
    """Whether DeepSpeed would compile the operator in this process."""
    if torch.cuda.is_available():
        return False
    import deepspeed

    backend = importlib.import_module("deepspeed.comm.torch")
    if require_symbol(backend, "build_shm_op", package="deepspeed") is _build_nothing:
        return False
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    return builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False)


def apply() -> None:
    """Replace the symbol if it would compile."""
    if needed():
        importlib.import_module("deepspeed.comm.torch").build_shm_op = _build_nothing


def _build_nothing() -> None:
    """DeepSpeed's own answer where the operator is not compatible: use the torch backend alone."""
