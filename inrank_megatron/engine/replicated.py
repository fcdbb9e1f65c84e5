"""Gradients of parameters that every tensor-parallel rank holds whole while it sees only its own tokens."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class ReplicatedGradients:
    """Sums, once a step, the gradients of all parameters that ``sequence_parallel`` marks over the group.

    Under sequence parallelism nobody else does: neither Megatron (outside its own optimizer) nor DeepSpeed.
    DeepSpeed takes gradients as the last micro-batch leaves them, so that one carries the sum and those
    before it carry zero.

    Attributes:
        last: whether the micro-batch under way is the step's last.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup):
        self.last = True
        self._group = group
        for parameter in model.parameters():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                self._register(parameter)

    def _register(self, parameter: nn.Parameter) -> None:
        local = torch.zeros_like(parameter, dtype=torch.float32)

        def total(gradient: Tensor) -> Tensor:
            local.add_(gradient)
            if not self.last:
                return torch.zeros_like(gradient)
            dist.all_reduce(local, group=self._group)
            result = local.to(gradient.dtype, copy=True)
            local.zero_()
            return result

        parameter.register_hook(total)
