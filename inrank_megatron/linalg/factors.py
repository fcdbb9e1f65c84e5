"""Algebra of sharded factors: spectra without forming a product, and truncation.

Letters: O, I features, k columns, n ranks of the group; ``/n`` is this rank's share. Every function is
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
    all the way, so nothing is squared. Returns R [min(m, k), k] in FP64; shares may be uneven or empty.
    """
    k = rows.shape[1]
    local = torch.linalg.qr(rows.double(), mode="r").R
    square = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    square[: local.shape[0]] = local
    parts = [torch.empty_like(square) for _ in range(group.size())]
    dist.all_gather(parts, square, group=group)
    return torch.linalg.qr(torch.cat(parts), mode="r").R


def product_singular_values(left: Tensor, right: Tensor, group: ProcessGroup) -> Tensor:
    """Singular values of ``left @ right`` from shards ``left`` [O/n, k] and ``right`` [k, I/n].

    ``left = Q1 R1`` and ``right^T = Q2 R2`` give the core ``R1 R2^T`` with the product's singular values.
    Returns [k] in descending order, FP64.
    """
    r1, r2 = triangular_factor(left, group), triangular_factor(right.t(), group)
    return torch.linalg.svdvals(r1 @ r2.t())


def update_factors(
    U: Tensor, V: Tensor, U0: Tensor, V0: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Factors of ``Delta = U V - U0 V0`` with 2k columns that do not cancel.

    ``Delta = [dU, c U0] [V; dV / c]`` with ``dU = U - U0``, ``dV = V - V0`` and ``c = |dU| / |U0|`` over the
    whole matrices. The obvious ``[U, U0] [V; -V0]`` subtracts nearly equal products and loses the small
    update.
    """
    U, V, U0, V0 = (t.double() for t in (U, V, U0, V0))
    dU, dV = U - U0, V - V0
    norms = torch.stack([dU.square().sum(), U0.square().sum()])
    dist.all_reduce(norms, group=group)
    c = (norms[0] / norms[1]).sqrt().item() if norms.min() > 0 else 1.0
    return torch.cat([dU, c * U0], dim=1), torch.cat([V, dV / c], dim=0)


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` factors ``U* [O, r]``, ``V* [r, I]`` of ``matrix`` [O, I], singular values
    shared evenly.

    ``U* = A sqrt(S)``, ``V* = sqrt(S) B^T`` from the SVD (InRank algorithm 3, whose line 6 drops S). FP64.
    """
    a, s, b = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return a[:, :rank] * root, root[:, None] * b[:rank]


def leading_directions(gradient: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Orthonormal ``(-u [O, c], v^T [c, I])`` of the ``columns`` leading singular pairs of a gradient [O, I].

    For ``G = sum s u v^T`` a step along ``-u v^T`` descends (InRank algorithm 2, line 3, for the untransposed
    gradient).
    """
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    return -u[:, :columns], v[:columns]


def gather_matrix(shard: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The whole matrix from even shards along ``dim``, on every rank of the group."""
    if group.size() == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
