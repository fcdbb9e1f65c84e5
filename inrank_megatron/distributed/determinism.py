"""The deterministic mode: what makes a GPU compute the same bits each time.

A kernel that adds with atomics, or a collective that adds in another order, gives other bits each time. What
follows leaves those that always add alike. On a CPU a run repeats to the bit by itself.
"""

from collections.abc import MutableMapping

import torch

from inrank_megatron.errors import UserError

CUBLAS, CUBLAS_VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
NCCL, NCCL_VALUES = "NCCL_ALGO", ("Ring", "CollnetDirect", "CollnetChain", "^NVLS")
"""cuBLAS's own note on reproducibility, and Megatron-LM's choices; the first value is taken where none is
set. Megatron-LM no longer counts Tree among them. Ring serves all collectives.
"""


def make_deterministic(env: MutableMapping[str, str]) -> None:
    """Choose algorithms that repeat to the bit, for this process; before anything computes on its GPU.

    torch then takes the deterministic backward passes of flash and memory-efficient attention, sorts where
    others add with atomics, leaves out cuDNN's attention, and raises where it has no such kernel.

    Args:
        env: the process's environment, which cuBLAS and NCCL read when they are first used.

    Raises:
        UserError: it asks cuBLAS or NCCL for what does not repeat.
    """
    _demand(env, CUBLAS, CUBLAS_VALUES)
    _demand(env, NCCL, NCCL_VALUES)
    torch.use_deterministic_algorithms(True)
    # It would fill every tensor that is made without values with NaN; nothing here reads such a tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    # An environment can ask for TF32, and another session's may not.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def is_deterministic() -> bool:
    """Whether this process is in the mode."""
    return torch.are_deterministic_algorithms_enabled()


def _demand(env: MutableMapping[str, str], name: str, values: tuple[str, ...]) -> None:
    value = env.setdefault(name, values[0])
    if value not in values:
        raise UserError(
            f"{name} = {value!r}: deterministic_mode needs {' or '.join(values)}; unset it, or leave out "
            "--deterministic-mode"
        )
