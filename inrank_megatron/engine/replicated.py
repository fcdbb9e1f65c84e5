"""Gradients of parameters that no tensor-parallel rank shards, while each sees its local tokens only."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from inrank_megatron.engine.fragments import ShardMap


class ReplicatedGradients:
    """Sums, once per step and in one all-reduce, the gradients of all parameters that ``sequence_parallel``
    marks over the group.

    Under sequence parallelism nothing else does: neither Megatron (outside its own optimizer) nor DeepSpeed.
    It sums what DeepSpeed has averaged over the replicas, as the two sums commute: of that a rank holds its
    part alone from stage 1 on, and the ranks of the group hold the same parts.

    Args:
        optimizer: DeepSpeed's. held: what it holds of the model's parameters.
    """

    def __init__(self, model: nn.Module, optimizer, shard_map: ShardMap, group: ProcessGroup):
        self._optimizer, self._shard_map, self._group = optimizer, shard_map, group
        trained = (p for p in model.parameters() if p.requires_grad)
        self._parameters = [p for p in trained if getattr(p, "sequence_parallel", False)]

    @torch.no_grad()
    def sum(self) -> None:
        """After the step's last backward pass, before the optimizer looks at its gradients."""
        if not self._parameters:
            return
        if self._offloaded:  # where the host has to wait for what the device sends it
            get_accelerator().synchronize()
        parts = [(parameter, part) for parameter, part in self._parts() if part.numel()]
        if not parts:  # nor has any rank of the group
            return
        sizes = [part.numel() for _, part in parts]
        flat = torch.cat([part for _, part in parts]).to(parts[0][0].device, torch.float32)
        dist.all_reduce(flat, group=self._group)
        sums = flat.to(parts[0][1].device).split(sizes)
        torch._foreach_copy_([part for _, part in parts], list(sums))
        if self._offloaded:
            norms = self._optimizer.norm_for_param_grads
            for (parameter, _), total in zip(parts, sums, strict=True):
                norms[self._optimizer.get_param_id(parameter)] = total.norm()

    @property
    def _offloaded(self) -> bool:
        """Whether gradients are in the host's memory, and the norm of each is computed on the way there."""
        optimizer = self._optimizer
        return getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)

    def _parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What this rank has of the averaged gradient of each, flat."""
        if not self._shard_map.partitioned:
            yield from ((parameter, parameter.grad.view(-1)) for parameter in self._parameters)
        elif self._offloaded:
            for parameter in self._parameters:
                if (fragment := self._shard_map.fragments[id(parameter)]) is not None:
                    yield parameter, fragment.of(fragment.flat_buffer.grad)
        else:
            gradients = dict(self._averaged())
            yield from ((p, gradients[id(p)].view(-1)) for p in self._parameters if id(p) in gradients)

    def _averaged(self) -> Iterator[tuple[int, Tensor]]:
        """(``id`` of the parameter, gradient) of all that DeepSpeed has averaged for this rank.

        Stage 1 in BF16 can keep gradients unsharded, stage 3 has a list for each group, and stages 1 and 2
        have one of the parameters that this rank has a part of, with padding between and after them.
        """
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups_gradients"):
            for parameters, full_gradients in zip(
                optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
            ):
                yield from zip(map(id, parameters), full_gradients, strict=True)
            return
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for index, parameters in enumerate(groups):
            parts = optimizer.averaged_gradients[index]
            real = (part for part in parts if not getattr(part, "_zero_padding", False))
            for parameter, part in zip(parameters, real, strict=False):
                if (fragment := self._shard_map.fragments[id(parameter)]) is not None:
                    yield id(parameter), part.view(-1)[: fragment.count]  # stage 3 pads each of them
