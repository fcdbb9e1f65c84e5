"""Backward passes outside of training steps, of which DeepSpeed must not learn."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
