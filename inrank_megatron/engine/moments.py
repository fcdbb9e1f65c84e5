"""What becomes of Adam's moments when columns are added, and at a merge."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.engine.optimizers import ADAM_MOMENTS
from inrank_megatron.lowrank.linalg.factors import gather_matrix, shard_matrix


def fill_second_moment(parameter: Tensor, dim: int, start: int, stop: int) -> None:
    """Give columns ``start`` to ``stop`` of a factor (along ``dim``) the mean second moment of those before
    them.

    Collective over the data-parallel group. An optimizer without second moments has nothing to fill.
    """
    key, master_weights = ADAM_MOMENTS[-1], parameter.master_weights
    if key in master_weights.moments(parameter):
        second = master_weights.read(parameter, key).clone()
        mean = second.narrow(dim, 0, start).mean(dim, keepdim=True)
        second.narrow(dim, start, stop - start).copy_(mean.expand_as(second.narrow(dim, start, stop - start)))
        master_weights.write(parameter, second, key)


def kept_entries(
    second: Tensor,
    dim: int,
    group: ProcessGroup,
    *,
    stride: int = 1,
    reset: str,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Which entries of a parameter keep both their moments; bool, of the shape of the shard ``second``.

    ``second``: the second moment, sharded along ``dim`` over ``group`` with ``stride``, see ``shard_matrix``.
    ``reset``: ``full``, none; ``random``, each but with probability ``share``; ``magnitude``, all but the
    ``share`` of the full tensor with the smallest second moment. Does not depend on how the tensor is
    sharded.

    The two moments of an entry go together: an entry that lost its second moment alone would take a step of
    its first moment over Adam's epsilon, for V has no gradient as long as U is zero.
    """
    if reset == "full":
        return torch.zeros_like(second, dtype=torch.bool)
    if reset == "random":
        shape = list(second.shape)
        shape[dim] *= group.size()
        kept = torch.rand(shape, generator=generator) >= share
        return shard_matrix(kept, dim, group, stride).to(second.device)
    entries = gather_matrix(second, dim, group).flatten()
    # Not `kthvalue`, which torch's deterministic mode refuses on CUDA for the sake of its indices.
    return second > entries.sort().values[max(1, round(share * entries.numel())) - 1]
