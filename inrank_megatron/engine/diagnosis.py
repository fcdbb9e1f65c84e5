"""Where a loss or a gradient stopped being finite, found by running the step once more."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.gradients import input_gradients_only


def first_non_finite(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> str:
    """What first went wrong on which ranks, the same text on every rank. Collective.

    ``losses()`` computes the losses of the step's micro-batches on ``model`` lazily. Names a parameter, or
    the module whose output, or the gradient at whose output, was the first that is not finite.
    """
    # All ranks repeat the step or none: its collectives wait for everyone.
    places = _on_ranks(_bad_parameter(model)) or _on_ranks(_bad_module(model, losses))
    if not places:
        return "no rank saw it again when the step was repeated, which points at the machine or the network"
    return "; ".join(f"{place} on rank {', '.join(map(str, ranks))}" for place, ranks in places.items())


def _on_ranks(place: str | None) -> dict[str, list[int]]:
    """The places of all ranks, each with the ranks that found it; the same on every rank."""
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, place)
    return {found: [r for r, p in enumerate(everywhere) if p == found] for found in everywhere if found}


def _bad_parameter(model: nn.Module) -> str | None:
    bad = None
    for name, parameter in model.named_parameters():
        value = read_value(parameter)  # collective under ZeRO 3: all ranks go through all
        if bad is None and not value.isfinite().all():
            bad = f"the parameter {name} is not finite"
    return bad


def _bad_module(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> str | None:
    found: list[str] = []
    hooks = [m.register_forward_hook(_watch(name, found)) for name, m in model.named_modules() if name]
    with input_gradients_only(model):
        for loss in losses():
            if loss.requires_grad:
                loss.backward()
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]):
    def look(module, inputs, outputs):
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        # Logits of padding are -inf on purpose.
        if not found and (output.isnan() | (output == torch.inf)).any():
            found.append(f"the output of {name} is not finite")
        if output.requires_grad:
            output.register_hook(look_back)

    def look_back(gradient: Tensor) -> None:
        if not found and not gradient.isfinite().all():
            found.append(f"the loss's gradient at the output of {name} is not finite")

    return look
