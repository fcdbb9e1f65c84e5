"""Access to what DeepSpeed's ZeRO stage 1 keeps for a parameter: FP32 master, Adam moments, step counts.

Two optimizer wrappers occur: ``DeepSpeedZeroOptimizer`` (FP32) and ``BF16_Optimizer`` (BF16 with FP32
gradient accumulation). Both hold one flat FP32 tensor for each parameter group, cut over the data-parallel
ranks.
"""

from dataclasses import dataclass

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class ParameterState:
    """Everything the optimizer knows of one parameter, FP32, in the parameter's shape on this rank."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def to(self, device: torch.device | str) -> "ParameterState":
        """The same on ``device``."""
        return ParameterState(*(tensor.to(device) for tensor in (self.master, self.exp_avg, self.exp_avg_sq)))


def flat_partitions(zero_optimizer) -> list[Tensor]:
    """The flat FP32 masters, one for each parameter group in order, as keys of the inner optimizer's
    state.
    """
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero_optimizer, attribute):
            return list(getattr(zero_optimizer, attribute))
    raise TypeError(
        f"{type(zero_optimizer).__name__} is not a ZeRO stage 1 optimizer that this project knows"
    )


def create_adam_state(zero_optimizer) -> None:
    """Give every group zero moments at step 0, as Adam would at its first step.

    DeepSpeed creates the state lazily and cannot read or write it before.
    """
    inner = zero_optimizer.optimizer
    for flat in flat_partitions(zero_optimizer):
        inner.state[flat] = {
            "step": torch.zeros((), device=flat.device),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def group_steps(zero_optimizer) -> dict[str, int]:
    """Adam's step count of each parameter group by the group's name; bias correction depends on it."""
    inner = zero_optimizer.optimizer
    return {
        group["name"]: int(inner.state[flat]["step"].item())
        for group, flat in zip(inner.param_groups, flat_partitions(zero_optimizer), strict=True)
    }


def set_group_steps(zero_optimizer, steps: dict[str, int]) -> None:
    """Set Adam's step counts by group name; a group that is not named keeps its own."""
    inner = zero_optimizer.optimizer
    for group, flat in zip(inner.param_groups, flat_partitions(zero_optimizer), strict=True):
        if group["name"] in steps:
            inner.state[flat]["step"].fill_(steps[group["name"]])


def read_master(parameter: Tensor) -> Tensor:
    """FP32 master of ``parameter``, its own shape. Collective over the data-parallel group unless it is
    FP32.
    """
    if parameter.dtype == torch.float32:
        return parameter.detach()  # after every step the parameter is a copy of its master
    return safe_get_full_fp32_param(parameter)


def write_master(parameter: Tensor, value: Tensor) -> None:
    """Set the parameter and its FP32 master to ``value``."""
    safe_set_full_fp32_param(parameter, value.float().contiguous())
    parameter.data.copy_(value)


def read_state(parameter: Tensor) -> ParameterState:
    """Master and moments of ``parameter``. Collective over the data-parallel group."""
    return ParameterState(
        read_master(parameter).clone(), *(safe_get_full_optimizer_state(parameter, key) for key in MOMENTS)
    )


def write_state(parameter: Tensor, state: ParameterState) -> None:
    """Set the parameter, its FP32 master and its moments."""
    write_master(parameter, state.master)
    for key in MOMENTS:
        safe_set_full_optimizer_state(parameter, getattr(state, key).contiguous(), key)
