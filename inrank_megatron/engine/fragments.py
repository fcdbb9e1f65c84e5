"""Where DeepSpeed keeps a parameter's working copy, its FP32 master and its optimizer state.

Under ZeRO each rank holds a run of the flattened parameter: of the master and the state from stage 1 on, of
the working copy in stage 3. Reading puts a parameter together over its replicas, writing takes this rank's
part. DeepSpeed's own accessors know no stage 0, leave the working copy as it was, and in stage 3 fail where a
parameter does not divide evenly.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

FLAT_GROUPS = (
    # DeepSpeed's lists of parameters, and its flat FP32 tensors, one for each list: in BF16 of stage 0 with a
    # fused Adam and of stage 1, and of stages 1 and 2 in other precisions.
    ("fp16_groups", "fp32_groups_flat"),
    ("bf16_groups", "fp32_groups_flat_partition"),
    ("bit16_groups", "single_partition_of_fp32_groups"),
)


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + count`` of a flattened parameter lie in ``flat_buffer`` from ``offset``
    on.

    ``flat_buffer`` is an FP32 tensor that the inner optimizer steps and keys its state by.
    """

    flat_buffer: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of ``tensor``, which is laid out as ``flat_buffer``; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


@dataclass
class ShardMap:
    """What this rank holds of everything that an optimizer trains.

    Attributes:
        flat_buffers: the FP32 tensors that the inner optimizer steps, by the name of its parameter group.
        fragments: by ``id`` of the parameter; None where this rank holds no part of it.
        parameters: those that lie in a flat FP32 tensor, or lie there on other ranks, by ``id`` of that, in
            the same order on all ranks.
        partitioned: whether replicas hold parts (ZeRO), or each holds all.
    """

    flat_buffers: dict[str, list[Tensor]] = field(default_factory=dict)
    fragments: dict[int, Fragment | None] = field(default_factory=dict)
    parameters: dict[int, list[Tensor]] = field(default_factory=dict)
    partitioned: bool = True

    def groups(self) -> dict[int, str]:
        """Name of the parameter group by ``id`` of the parameter."""
        return {
            id(parameter): name
            for name, flat_buffers in self.flat_buffers.items()
            for flat_buffer in flat_buffers
            for parameter in self.parameters[id(flat_buffer)]
        }


def shard_map(optimizer) -> ShardMap:
    """Of DeepSpeed's ``optimizer``, of any stage and precision."""
    inner, result = inner_optimizer(optimizer), ShardMap()
    groups = [group["params"] for group in inner.param_groups]
    names = [group["name"] for group in inner.param_groups]
    result.flat_buffers = {name: [] for name in names}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _stage_3(optimizer, names, result)
    elif optimizer is inner:  # FP32 stage 0: each parameter is its own master
        _one_by_one(groups, groups, names, result)
    elif hasattr(optimizer, "fp32_groups"):  # BF16 stage 0
        _one_by_one(optimizer.fp16_groups, optimizer.fp32_groups, names, result)
    else:
        _flat(optimizer, names, result)
    return result


def inner_optimizer(optimizer):
    """The torch optimizer under DeepSpeed's, or that itself where DeepSpeed adds none."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _one_by_one(groups, master_weights, names: list[str], result: ShardMap) -> None:
    result.partitioned = False
    for name, group, flat_buffers in zip(names, groups, master_weights, strict=True):
        result.flat_buffers[name] += flat_buffers
        for parameter, flat_buffer in zip(group, flat_buffers, strict=True):
            result.parameters[id(flat_buffer)] = [parameter]
            result.fragments[id(parameter)] = Fragment(flat_buffer, 0, 0, flat_buffer.numel())


def _flat(optimizer, names: list[str], result: ShardMap) -> None:
    groups, flat_buffers = next((g, o) for g, o in FLAT_GROUPS if hasattr(optimizer, o))
    result.partitioned = groups != "fp16_groups"
    for name, group, flat_buffer in zip(
        names, getattr(optimizer, groups), getattr(optimizer, flat_buffers), strict=True
    ):
        result.flat_buffers[name].append(flat_buffer)
        result.parameters[id(flat_buffer)] = list(group)
        offset = 0
        for parameter in group:
            fragment = None
            if not result.partitioned:
                fragment = Fragment(flat_buffer, offset, 0, parameter.numel())
            elif (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                fragment = Fragment(flat_buffer, there.start, here.start, here.numel)
            offset += parameter.numel()
            result.fragments[id(parameter)] = fragment


def _stage_3(optimizer, names: list[str], result: ShardMap) -> None:
    for index, group in enumerate(optimizer.fp16_groups):
        flat_buffer = optimizer.fp32_partitioned_groups_flat[index]
        result.flat_buffers[names[optimizer.sub_group_to_group_id[index]]].append(flat_buffer)
        result.parameters[id(flat_buffer)] = list(group)
        for parameter in group:
            start, count = _local_part(parameter)
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            result.fragments[id(parameter)] = Fragment(flat_buffer, offset, start, count)


# ---- the working copy ----


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of this tensor-parallel rank's shard, which a parameter under ZeRO 3 does not have itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def read_value(parameter: Tensor) -> Tensor:
    """This tensor-parallel rank's shard in its own dtype. Under ZeRO 3 collective over the replicas; else the
    parameter itself.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    local, start = held_value(parameter)
    return assembled(local.to(parameter.device), start, local_shape(parameter), parameter.ds_process_group)


def held_value(parameter: Tensor) -> tuple[Tensor, int]:
    """The entries of this tensor-parallel rank's flattened shard that this rank has, and the first one's
    index: all of them but under ZeRO 3.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().reshape(-1), 0
    start, count = _local_part(parameter)
    return parameter.ds_tensor.detach()[:count], start


@torch.no_grad()
def write_value(parameter: Tensor, value: Tensor) -> None:
    """Set the working copy from ``value``, this tensor-parallel rank's shard."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    start, count = _local_part(parameter)
    parameter.ds_tensor.data[:count].copy_(value.reshape(-1)[start : start + count])
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small parameters stay gathered between steps
        parameter.data.copy_(value)


def finish_writes() -> None:
    """Wait until the device has all that :func:`write_value` was given: ZeRO 3 gathers on a stream of its
    own, which does not wait for the one that they are written on.
    """
    get_accelerator().synchronize()


def assembled(local: Tensor, start: int, shape: tuple[int, ...], group) -> Tensor:
    """The tensor of which every rank of ``group`` has the run ``local`` from ``start`` on, flattened."""
    full = local.new_zeros(torch.Size(shape).numel())
    full[start : start + len(local)] = local
    dist.all_reduce(full, group=group)  # each element has one contributor: the sum is exact
    return full.view(shape)


def _local_part(parameter: Tensor) -> tuple[int, int]:
    """Start and length of this rank's part under ZeRO 3; the last ones are padded, or padding alone."""
    part = parameter.ds_tensor.ds_numel
    start = min(part * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return start, min(part, parameter.ds_numel - start)
