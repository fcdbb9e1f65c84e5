"""What the algebra of sharded factors is built on: spread QR, gathering, checks.

Letters: O, I features, k columns, n ranks of the group; ``/n`` is this rank's shard. Every function is
collective over ``group``; with a group of one it is the serial algorithm. All arithmetic is FP64.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.errors import UserError


def check_finite(tensor: Tensor, *, what: str) -> None:
    """Raise if ``tensor`` holds NaN or Inf, naming ``what``: no decision is taken on such values."""
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{what} holds NaN or Inf; ranks are decided on finite weights only. The run has diverged: "
            "lower --lr or --clip-grad, or resume from an earlier checkpoint"
        )


def triangular_factor(rows: Tensor, group: ProcessGroup) -> Tensor:
    """R of the QR factorisation of a matrix whose rows are spread over the group (TSQR).

    Each rank factors its ``rows`` [m/n, k]; the small R are gathered, stacked and factored again. Householder
    all the way, so nothing is squared. Returns R [min(m, k), k] in FP64; shards may be uneven or empty.
    """
    k = rows.shape[1]
    local = torch.linalg.qr(rows.double(), mode="r").R
    square = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    square[: local.shape[0]] = local
    parts = [torch.empty_like(square) for _ in range(group.size())]
    dist.all_gather(parts, square, group=group)
    return torch.linalg.qr(torch.cat(parts), mode="r").R


def shard_matrix(full: Tensor, dim: int, group: ProcessGroup, stride: int = 1) -> Tensor:
    """This rank's even shard of ``full`` along ``dim``.

    With ``stride`` 2 the axis has two parts of equal length one after the other (gate and up of SwiGLU), and
    every rank has its shard of each, one after the other; so for more.
    """
    if group.size() == 1:
        return full
    pieces = full.chunk(stride * group.size(), dim)[group.rank() :: group.size()]
    return pieces[0] if stride == 1 else torch.cat(pieces, dim)


def gather_matrix(shard: Tensor, dim: int, group: ProcessGroup, stride: int = 1) -> Tensor:
    """The full matrix from what :func:`shard_matrix` gives each rank, on every rank of the group."""
    if group.size() == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    if stride > 1:
        pieces = [part.chunk(stride, dim) for part in parts]
        parts = [pieces[rank][index] for index in range(stride) for rank in range(len(parts))]
    return torch.cat(parts, dim=dim)
