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
    """Elements ``start`` to ``start + count`` of a flattened parameter lie in ``owner`` from ``offset`` on.

    ``owner`` is an FP32 tensor that the inner optimizer steps and keys its state by.
    """

    owner: Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of ``tensor``, which is laid out as ``owner``; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


@dataclass
class Holdings:
    """What this rank holds of everything that an optimizer trains.

    Attributes:
        owners: the FP32 tensors that the inner optimizer steps, by the name of its parameter group.
        fragments: by ``id`` of the parameter; None where this rank holds no part of it.
        partitioned: whether replicas hold parts (ZeRO), or each holds all.
    """

    owners: dict[str, list[Tensor]] = field(default_factory=dict)
    fragments: dict[int, Fragment | None] = field(default_factory=dict)
    partitioned: bool = True


def holdings(optimizer) -> Holdings:
    """Of DeepSpeed's ``optimizer``, of any stage and precision."""
    inner, result = inner_optimizer(optimizer), Holdings()
    groups = [group["params"] for group in inner.param_groups]
    names = [group["name"] for group in inner.param_groups]
    result.owners = {name: [] for name in names}
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


def _one_by_one(groups, masters, names: list[str], result: Holdings) -> None:
    result.partitioned = False
    for name, group, owners in zip(names, groups, masters, strict=True):
        result.owners[name] += owners
        for parameter, owner in zip(group, owners, strict=True):
            result.fragments[id(parameter)] = Fragment(owner, 0, 0, owner.numel())


def _flat(optimizer, names: list[str], result: Holdings) -> None:
    groups, owners = next((g, o) for g, o in FLAT_GROUPS if hasattr(optimizer, o))
    result.partitioned = groups != "fp16_groups"
    for name, group, owner in zip(names, getattr(optimizer, groups), getattr(optimizer, owners), strict=True):
        result.owners[name].append(owner)
        offset = 0
        for parameter in group:
            fragment = None
            if not result.partitioned:
                fragment = Fragment(owner, offset, 0, parameter.numel())
            elif (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                fragment = Fragment(owner, there.start, here.start, here.numel)
            offset += parameter.numel()
            result.fragments[id(parameter)] = fragment


def _stage_3(optimizer, names: list[str], result: Holdings) -> None:
    for index, group in enumerate(optimizer.fp16_groups):
        owner = optimizer.fp32_partitioned_groups_flat[index]
        result.owners[names[optimizer.sub_group_to_group_id[index]]].append(owner)
        for parameter in group:
            start, count = _own_part(parameter)
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            result.fragments[id(parameter)] = Fragment(owner, offset, start, count)


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
    own, start = held_value(parameter)
    return assembled(own.to(parameter.device), start, local_shape(parameter), parameter.ds_process_group)


def held_value(parameter: Tensor) -> tuple[Tensor, int]:
    """The entries of this tensor-parallel rank's flattened shard that this rank has, and the first one's
    index: all of them but under ZeRO 3.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().reshape(-1), 0
    start, count = _own_part(parameter)
    return parameter.ds_tensor.detach()[:count], start


@torch.no_grad()
def write_value(parameter: Tensor, value: Tensor) -> None:
    """Set the working copy from ``value``, this tensor-parallel rank's shard."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    start, count = _own_part(parameter)
    parameter.ds_tensor.data[:count].copy_(value.reshape(-1)[start : start + count])
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small parameters stay whole between steps
        parameter.data.copy_(value)


def finish_writes() -> None:
    """Wait until the device has all that :func:`write_value` was given: ZeRO 3 gathers on a stream of its
    own, which does not wait for the one that they are written on.
    """
    get_accelerator().synchronize()


def assembled(own: Tensor, start: int, shape: tuple[int, ...], group) -> Tensor:
    """The tensor of which every rank of ``group`` has the run ``own`` from ``start`` on, flattened."""
    whole = own.new_zeros(torch.Size(shape).numel())
    whole[start : start + len(own)] = own
    dist.all_reduce(whole, group=group)  # each element has one contributor: the sum is exact
    return whole.view(shape)


def _own_part(parameter: Tensor) -> tuple[int, int]:
    """Start and length of this rank's part under ZeRO 3; the last ones are padded, or padding alone."""
    part = parameter.ds_tensor.ds_numel
    start = min(part * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return start, min(part, parameter.ds_numel - start)
