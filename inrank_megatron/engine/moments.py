"""What becomes of Adam's moments at a restart."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.linalg.factors import gather_matrix


def kept_entries(
    second: Tensor, dim: int, group: ProcessGroup, *, reset: str, share: float, generator: torch.Generator
) -> Tensor:
    """Which entries of a parameter keep both their moments; bool, of the shape of the shard ``second``.

    ``second``: the second moment, cut along ``dim`` over ``group``. ``reset``: ``full``, none; ``random``,
    each but with probability ``share``; ``magnitude``, all but the ``share`` of the whole tensor with the
    smallest second moment. Does not depend on how the tensor is cut.

    The two moments of an entry go together: an entry that lost its second moment alone would take a step of
    its first moment over Adam's epsilon, for V has no gradient as long as U is zero.
    """
    if reset == "full":
        return torch.zeros_like(second, dtype=torch.bool)
    if reset == "random":
        shape = list(second.shape)
        shape[dim] *= group.size()
        kept = torch.rand(shape, generator=generator) >= share
        return kept.chunk(group.size(), dim)[group.rank()].to(second.device)
    entries = gather_matrix(second, dim, group).flatten()
    return second > entries.kthvalue(max(1, round(share * entries.numel()))).values
