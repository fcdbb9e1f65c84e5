"""FP32 masters and optimizer moments of live parameters, read and written under every ZeRO stage."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inrank_megatron.engine.fragments import (
    Fragment,
    assembled,
    holdings,
    inner_optimizer,
    local_shape,
    write_value,
)
from inrank_megatron.engine.optimizers import Kind


@dataclass(frozen=True)
class ParameterState:
    """FP32 master and optimizer moments of one parameter, each of the parameter's local shape.

    ``moments`` by the optimizer's names, ``exp_avg`` and ``exp_avg_sq`` for Adam, the second moment last.
    """

    master: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ParameterState":
        """The state with ``function`` applied to every tensor."""
        return ParameterState(
            function(self.master), {key: function(moment) for key, moment in self.moments.items()}
        )


class Masters:
    """The FP32 side of one DeepSpeed engine's parameters.

    Reading and writing are collective over the data-parallel group; :meth:`held` is not. Every optimizer has
    its state from the start: DeepSpeed would create it at the first step.
    """

    def __init__(self, optimizer, kind: Kind, group):
        self.kind, self._group = kind, group
        self._inner, self.holdings = inner_optimizer(optimizer), holdings(optimizer)
        for owners in self.holdings.owners.values():
            for owner in owners:
                self._inner.state[owner] = kind.fresh_state(owner)
        # DeepSpeed may have taken a step of zeros to create states, which a group's count remembers.
        self.set_steps({group["name"]: 0 for group in self._inner.param_groups})

    def read(self, parameter: Tensor, key: str | None = None) -> Tensor:
        """The master, or the moment ``key``: FP32, of the local shape, on the parameter's device."""
        own, start = self.held(parameter, key)
        own, shape = own.to(parameter.device), local_shape(parameter)
        return assembled(own, start, shape, self._group) if self.holdings.partitioned else own.view(shape)

    def held(self, parameter: Tensor, key: str | None = None) -> tuple[Tensor, int]:
        """What this rank holds of the flattened master, or of the moment ``key``: FP32, wherever it lies, and
        the index of its first entry. Not collective.
        """
        fragment = self.holdings.fragments[id(parameter)]
        if fragment is None:
            return torch.empty(0), 0
        return self._stored(fragment, key).to(torch.float32), fragment.start

    def write(self, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
        """Set this rank's part of the master or of the moment ``key``."""
        if (fragment := self.holdings.fragments[id(parameter)]) is not None:
            flat = value.detach().reshape(-1)
            self._stored(fragment, key).copy_(flat[fragment.start : fragment.start + fragment.count])

    def _stored(self, fragment: Fragment, key: str | None) -> Tensor:
        return fragment.of(fragment.owner if key is None else self._inner.state[fragment.owner][key])

    def steps(self) -> dict[str, int]:
        """The optimizer's step count of each parameter group by the group's name."""
        # A fused Adam over many tensors counts in the last one's state alone.
        return {
            group["name"]: max(self.kind.step(group, state) for state in states)
            for group, states in self._groups()
        }

    def set_steps(self, steps: dict[str, int]) -> None:
        """Set step counts by group name; a group that is not named keeps its own."""
        for group, states in self._groups():
            for state in states if group["name"] in steps else ():
                self.kind.set_step(group, state, steps[group["name"]])

    def _groups(self) -> list[tuple[dict, list[dict]]]:
        owners = self.holdings.owners
        return [
            (group, [self._inner.state[owner] for owner in owners[group["name"]]])
            for group in self._inner.param_groups
        ]


def read_master(parameter: Tensor) -> Tensor:
    """FP32 master of ``parameter``, its local shape. Collective over the data-parallel group unless every
    rank has it whole.
    """
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_tensor"):
        return parameter.detach()  # after every step the parameter is a copy of its master
    return parameter.masters.read(parameter)


def write_master(parameter: Tensor, value: Tensor) -> None:
    """Set the parameter and its FP32 master to ``value``."""
    parameter.masters.write(parameter, value)
    write_value(parameter, value)


def read_state(parameter: Tensor) -> ParameterState:
    """Master and moments of ``parameter``, copies. Collective over the data-parallel group."""
    masters = parameter.masters
    return ParameterState(
        read_master(parameter).clone(),
        {key: masters.read(parameter, key).clone() for key in masters.kind.moments},
    )


def write_state(parameter: Tensor, state: ParameterState) -> None:
    """Set the parameter, its FP32 master and its moments."""
    write_master(parameter, state.master)
    for key, moment in state.moments.items():
        parameter.masters.write(parameter, moment, key)
