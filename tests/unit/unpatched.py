"""Run by test_patches in a process of its own: what each third-party symbol does before and after its patch.

Prints one JSON object: patch name -> {"needed_before", "failure", "needed_after"}, without the patches that
act on an import: here everything has been imported.
"""

import contextlib
import importlib
import io
import json

import torch
from deepspeed.accelerator import get_accelerator
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode

from inrank_megatron_patches.registry import PATCHES


def failure(patch_name: str) -> str | None:
    """What goes wrong with the symbol as upstream has it, or None if nothing does."""
    try:
        return _UPSTREAM[patch_name]()
    except Exception as error:  # whatever upstream raises is the answer
        return f"{type(error).__name__}: {error}"


def _seed_lost() -> str | None:
    torch.manual_seed(1)
    torch.cuda.manual_seed(2)
    return None if torch.initial_seed() == 2 else "the seed is lost"


def _state_lost() -> str | None:
    wanted = torch.Generator().manual_seed(3).get_state()
    random._set_cuda_rng_state(wanted)
    return None if torch.equal(torch.get_rng_state(), wanted) else "the state is lost"


def _memory_report() -> str | None:
    module = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.see_memory_usage("report", force=True)
    return printed.getvalue() or None


def _indices_found() -> str | None:
    found = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(function)
            return function(*args, **(kwargs or {}))

    with Operators():
        VocabParallelCrossEntropy.calculate_logits_max(torch.ones(2, 3))
    return "looks for indices" if torch.ops.aten.max.dim in found else None


def _float16_refused() -> str | None:
    return None if get_accelerator().is_fp16_supported() else "float16 is refused"


_UPSTREAM = {
    "cuda_current_device": lambda: torch.cuda.current_device() and None,
    "cuda_get_rng_state": lambda: torch.cuda.get_rng_state() is None or None,
    "cuda_manual_seed": _seed_lost,
    "cuda_synchronize": torch.cuda.synchronize,
    "megatron_get_rng_state": lambda: random._get_cuda_rng_state() is None or None,
    "megatron_logits_max": _indices_found,
    "megatron_set_rng_state": _state_lost,
    "deepspeed_build_shm_op": lambda: importlib.import_module("deepspeed.comm.torch").build_shm_op() and None,
    "deepspeed_is_fp16_supported": _float16_refused,
    "deepspeed_see_memory_usage": _memory_report,
}


if __name__ == "__main__":
    names = {patch: patch.__name__.rpartition(".")[2] for patch in PATCHES}
    names = {patch: name for patch, name in names.items() if name in _UPSTREAM}
    # All are looked at before any is applied: one patch must not hide that another is needed.
    before = {patch: {"needed_before": patch.needed(), "failure": failure(names[patch])} for patch in names}
    for patch in names:
        patch.apply()
    print(json.dumps({names[patch]: {**before[patch], "needed_after": patch.needed()} for patch in names}))
