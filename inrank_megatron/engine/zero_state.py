"""FP32 master weights and optimizer moments of live parameters, read and written under every ZeRO stage."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inrank_megatron.engine.fragments import (
    Fragment,
    assembled,
    inner_optimizer,
    local_shape,
    shard_map,
    write_value,
)
from inrank_megatron.engine.optimizers import Kind


@dataclass(frozen=True)
class ParameterState:
    """FP32 master and optimizer moments of one parameter, each of the parameter's local shape.

    ``moments`` by the optimizer's names, ``exp_avg`` and ``exp_avg_sq`` for Adam, the second moment last,
    ``momentum_buffer`` for Muon.
    """

    master: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ParameterState":
        """The state with ``function`` applied to every tensor."""
        return ParameterState(
            function(self.master), {key: function(moment) for key, moment in self.moments.items()}
        )


class MasterWeights:
    """The FP32 side of one DeepSpeed engine's parameters.

    Args:
        optimizer: DeepSpeed's.
        kind_of: the optimizer of each parameter group, by the group's name.
        group: the data-parallel one.

    Reading and writing are collective over the data-parallel group; those of what a rank holds are not. Every
    optimizer has its state from the start: DeepSpeed would create it at the first step.
    """

    def __init__(self, optimizer, kind_of: Callable[[str], Kind], group):
        self._kind_of, self._group = kind_of, group
        self._inner, self.shard_map = inner_optimizer(optimizer), shard_map(optimizer)
        for name, flat_buffers in self.shard_map.flat_buffers.items():
            for flat_buffer in flat_buffers:
                self._inner.state[flat_buffer] = kind_of(name).fresh_state(flat_buffer)
        self._names = self.shard_map.groups()
        # DeepSpeed may have taken a step of zeros to create states, which a group's count remembers.
        self.set_steps({group["name"]: 0 for group in self._inner.param_groups})

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """The moments that its optimizer keeps of a parameter, by name."""
        return self._kind_of(self._names[id(parameter)]).moments

    def read(self, parameter: Tensor, key: str | None = None) -> Tensor:
        """The master, or the moment ``key``: FP32, of the local shape, on the parameter's device."""
        local, start = self.held(parameter, key)
        local, shape = local.to(parameter.device), local_shape(parameter)
        return (
            assembled(local, start, shape, self._group) if self.shard_map.partitioned else local.view(shape)
        )

    def held(self, parameter: Tensor, key: str | None = None) -> tuple[Tensor, int]:
        """What this rank holds of the flattened master, or of the moment ``key``: FP32, wherever it lies, and
        the index of its first entry. Not collective.
        """
        fragment = self.shard_map.fragments[id(parameter)]
        if fragment is None:
            return torch.empty(0), 0
        return self._stored(fragment, key).to(torch.float32), fragment.start

    def write(self, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
        """Set this rank's part of the master or of the moment ``key``."""
        if (fragment := self.shard_map.fragments[id(parameter)]) is not None:
            flat = value.detach().reshape(-1)
            self._stored(fragment, key).copy_(flat[fragment.start : fragment.start + fragment.count])

    def write_held(self, parameter: Tensor, values: Tensor, key: str | None = None) -> None:
        """Set what :meth:`held` gives. Not collective, and the working copy stays as it is."""
        if (fragment := self.shard_map.fragments[id(parameter)]) is not None:
            self._stored(fragment, key).copy_(values)

    def _stored(self, fragment: Fragment, key: str | None) -> Tensor:
        return fragment.of(
            fragment.flat_buffer if key is None else self._inner.state[fragment.flat_buffer][key]
        )

    def steps(self) -> dict[str, int]:
        """The optimizer's step count of each parameter group by the group's name."""
        # A fused Adam over many tensors counts in the last one's state alone.
        return {
            group["name"]: max(self._kind_of(group["name"]).step(group, state) for state in states)
            for group, states in self._groups()
        }

    def set_steps(self, steps: dict[str, int]) -> None:
        """Set step counts by group name; a group that is not named keeps its own."""
        for group, states in self._groups():
            for state in states if group["name"] in steps else ():
                self._kind_of(group["name"]).set_step(group, state, steps[group["name"]])

    def _groups(self) -> list[tuple[dict, list[dict]]]:
        flat_buffers = self.shard_map.flat_buffers
        return [
            (group, [self._inner.state[flat_buffer] for flat_buffer in flat_buffers[group["name"]]])
            for group in self._inner.param_groups
        ]


def read_master_weight(parameter: Tensor) -> Tensor:
    """FP32 master of ``parameter``, its local shape. Collective over the data-parallel group unless every
    rank has all of it.
    """
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_tensor"):
        return parameter.detach()  # after every step the parameter is a copy of its master
    return parameter.master_weights.read(parameter)


def write_master_weight(parameter: Tensor, value: Tensor) -> None:
    """Set the parameter and its FP32 master to ``value``."""
    parameter.master_weights.write(parameter, value)
    write_value(parameter, value)


def read_state(parameter: Tensor) -> ParameterState:
    """Master and moments of ``parameter``, copies. Collective over the data-parallel group."""
    master_weights = parameter.master_weights
    return ParameterState(
        read_master_weight(parameter).clone(),
        {key: master_weights.read(parameter, key).clone() for key in master_weights.moments(parameter)},
    )


def write_state(parameter: Tensor, state: ParameterState) -> None:
    """Set the parameter, its FP32 master and its moments."""
    write_master_weight(parameter, state.master)
    for key, moment in state.moments.items():
        parameter.master_weights.write(parameter, moment, key)
