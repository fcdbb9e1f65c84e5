"""Backward passes outside of training steps, of which DeepSpeed must not learn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from inrank_megatron.distributed.process_groups import Parallel

SCALE_STEP = 16  # of 40 binary orders of float16: coarse, but no gradient vanishes for it


@contextmanager
def input_gradients_only(model: nn.Module) -> Iterator[None]:
    """Within it no trained parameter takes a gradient, but the hidden states still pass theirs on.

    DeepSpeed's hooks wait for the gradients of parameters; a backward pass then wakes none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    # Recomputation runs a backward pass of its own, only below a hidden state that asks for a gradient.
    hook = model.embedding.register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def at_a_loss_scale(
    compute: Callable[[float], dict[str, Tensor]],
    *,
    scale: float | None,
    parallel: Parallel,
    device: torch.device,
) -> dict[str, Tensor]:
    """``compute(scale)``, from gradients of losses multiplied by the largest scale that overflows on no rank.

    ``scale``: the first to try, the training's; None: 1. Collective.
    """
    scale = scale or 1.0
    while True:
        values = compute(scale)
        overflow = not all(value.isfinite().all() for value in values.values())
        if scale <= 1 or not parallel.any_rank(overflow, device):
            return values
        scale = max(1.0, scale / SCALE_STEP)
