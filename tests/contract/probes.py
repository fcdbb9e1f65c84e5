"""What a training holds at one moment: state, weights, gradients, losses; functions that ranks run."""

from collections.abc import Iterable

import torch
from torch import Tensor

from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.zero_state import read_state
from inrank_megatron.errors import UserError
from tests.contract.gathered import full_tensors
from tests.contract.layouts import Layout
from tests.contract.sessions import Session, build


def states(session: Session) -> dict[str, dict[str, Tensor]]:
    """This rank's shard of every trained parameter: master and moments."""
    return {
        name: {"master": state.master, **state.moments}
        for name, parameter in session.engine.parameters()
        for state in [read_state(parameter)]
    }


def snapshot(session: Session) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in full_tensors(session.engine)}


@torch.no_grad()
def input_moments(session: Session, batches: Iterable[int]) -> dict[str, Tensor]:
    """``E[x x^T]`` of every layer's input over whole global batches, FP64; on one rank alone."""
    inputs = {name: [] for name in session.engine.linears}
    hooks = [
        linear.module.register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].double())
        )
        for name, linear in session.engine.linears.items()
    ]
    for batch in batches:
        for micro_batch in session.batch(batch):
            Engine.loss(session.engine.model, micro_batch)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(seen, dim=1).flatten(0, 1) for name, seen in inputs.items()}
    return {name: x.t() @ x / len(x) for name, x in rows.items()}


def output_gradients(session: Session, batches: Iterable[int]) -> dict[str, Tensor]:
    """Mean square of every output feature's gradient of the summed loss, FP64; on one rank alone."""
    outputs = {name: [] for name in session.engine.linears}
    hooks = [
        linear.module.register_forward_hook(lambda _, args, out, name=name: outputs[name].append(out[0]))
        for name, linear in session.engine.linears.items()
    ]
    squares = {name: [] for name in outputs}
    for batch in batches:
        for micro_batch in session.batch(batch):
            total = Engine.token_losses(session.engine.model, micro_batch).sum()
            gradients = torch.autograd.grad(total, [seen.pop() for seen in outputs.values()])
            for name, gradient in zip(outputs, gradients, strict=True):
                squares[name].append(gradient.double().flatten(0, 1).square())
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(dim=0) for name, rows in squares.items()}


def dense_gradients(session: Session) -> dict[str, Tensor]:
    """Of the mean loss of batch 0 with respect to every W0 while the factors are empty; on one rank."""
    weights = {name: layer.weight for name, layer in session.engine.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    losses = [Engine.loss(session.engine.model, batch) for batch in session.batch(0)]
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: g.double() for name, g in zip(weights, gradients, strict=True)}


def first_losses(
    rank: int, world_size: int, layout: Layout, names: list[str], changes: dict
) -> dict[str, float]:
    """Loss of these methods before their first step."""
    return {name: build(name, layout, **changes).start().fixed_loss() for name in names}


def check_after(rank: int, world_size: int, layout: Layout, poisoned: str) -> str:
    """What a rank check says when one layer's factor U holds a NaN."""
    session = build("inrank", layout).start().train(1)
    with torch.no_grad():
        session.engine.layers[poisoned].U[0, 0] = torch.nan
    try:
        session.spectra()
    except UserError as error:
        return str(error)
    return "no error"
