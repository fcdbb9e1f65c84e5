"""An instrument that sees every collective and counts the elements that a rank sends.

It sits where torch dispatches collectives, below every Python name for them, so it sees those of
Megatron-Core, of torch and of this project alike, asynchronous ones and those of the backward pass included.

Letters: n ranks of the group, k = (n - 1) / n, X elements of the full tensor. By the ring algorithm a rank
sends k X for an all-gather or a reduce-scatter, and 2 k X for an all-reduce, which is one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operator -> how often each element of the full tensor goes round the ring. A send goes to one rank.
ROUNDS = {
    "allreduce_": 2,
    "allreduce_coalesced_": 2,
    "allgather_": 1,
    "_allgather_base_": 1,
    "allgather_coalesced_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "broadcast_": 1,
    "reduce_": 1,
    "gather_": 1,
    "scatter_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
}
SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_"}


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. ``elements``: of the full tensor, X; ``itemsize``: bytes of each;
    ``members``: the ranks of its group.
    """

    operator: str
    elements: int
    members: tuple[int, ...]
    itemsize: int

    @property
    def ranks(self) -> int:
        return len(self.members)

    @property
    def sent(self) -> float:
        """Elements that the rank sends by the ring rule."""
        if self.operator == "send":
            return self.elements
        return ROUNDS[self.operator] * self.elements * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Traffic:
    """Elements that one rank sends: in proportion to the tokens, and whatever their number."""

    activation: float
    parameter: float

    @property
    def total(self) -> float:
        return self.activation + self.parameter


class Wire(TorchDispatchMode):
    """Records the collectives while it is active, in their order.

    Raises:
        NotImplementedError: for an operator whose traffic it does not know, rather than miss it.
    """

    def __init__(self):
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("_c10d_functional", "_c10d_functional_autograd", "symm_mem"):
            raise NotImplementedError(f"{namespace}::{name} is not counted; add it to the instrument")
        if namespace == "c10d" and name not in SILENT:
            if name not in ROUNDS and name != "send":
                raise NotImplementedError(f"{namespace}::{name} is not counted; add it to the instrument")
            self.collectives.append(_read(name, args))
        return function(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> list[Collective]:
    """The collectives of ``run()`` on this rank."""
    with Wire() as wire:
        run()
    return wire.collectives


def traffic(run: Callable[[int], object], tokens: int, *, more_tokens: int) -> Traffic:
    """What ``run(tokens)`` sends, attributed by what decides its size.

    It runs again with ``more_tokens``; what each collective grows by belongs to activations, in proportion to
    the tokens, and the rest to parameters. So no label and no call site has a say.

    Raises:
        RuntimeError: if the two runs differ in more than sizes.
    """
    few, many = count(lambda: run(tokens)), count(lambda: run(more_tokens))
    if [c.operator for c in few] != [c.operator for c in many]:
        raise RuntimeError(f"the collectives at {tokens} and at {more_tokens} tokens are not the same ones")
    grown = sum(c.sent for c in many) - sum(c.sent for c in few)
    activation = grown * tokens / (more_tokens - tokens)
    return Traffic(activation, sum(c.sent for c in few) - activation)


def _read(name: str, args: Sequence) -> Collective:
    sizes = [sum(t.numel() for t in _tensors(argument)) for argument in args]
    [itemsize] = {tensor.itemsize for tensor in _tensors(args)}
    return Collective(name, max(sizes), _members(args), itemsize)


def _tensors(argument) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []


def _members(args: Sequence) -> tuple[int, ...]:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and argument._type().name() == "ProcessGroup":
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    raise NotImplementedError("a collective without a process group is not counted")
