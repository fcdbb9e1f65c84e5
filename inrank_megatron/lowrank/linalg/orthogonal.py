"""Orthonormal factors and singular vectors of sharded matrices, by Householder QR all the way (TSQR).

Letters: O, I, m features, k columns, r rank, n ranks of the group; ``/n`` is this rank's shard, which may be
uneven or empty. Small factorisations are done by the first rank and broadcast: where columns are dependent
the orthogonal factor is not unique, and shards of two different ones would not fit together.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.cores import host_svd


def product_svd(left: Tensor, right: Tensor, r: int, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triples of ``left @ right`` as shards: A [O/n, r], s [r], B [r, I/n], FP64.

    ``left`` [O/n, k] = Q1 R1, ``right`` [k, I/n] = (Q2 R2)^T, ``R1 R2^T = a s b^T``, ``A = Q1 a``,
    ``B = (Q2 b)^T``; r <= min(O, k, I). Elements on the wire per rank: two all-gathers of ``(n-1) k (k+1)``,
    a broadcast of ``2 n k r + r``.
    """
    k, n = right.shape[0], group.size()
    q1, stack1 = _local_qr(left, group)
    q2, stack2 = _local_qr(right.t(), group)
    message = torch.empty(2 * n * k + 1, r, dtype=torch.float64, device=left.device)
    if group.rank() == 0:
        (inner1, r1), (inner2, r2) = _joint_qr(stack1), _joint_qr(stack2)
        a, s, b = host_svd(r1 @ r2.t())
        torch.cat([inner1 @ a[:, :r], inner2 @ b[:r].t(), s[None, :r]], out=message)
    dist.broadcast(message, group=group, group_src=0)
    local = slice(group.rank() * k, (group.rank() + 1) * k)
    return q1 @ message[: n * k][local], message[-1], (q2 @ message[n * k : -1][local]).t()


def orthonormal_columns(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Q [m/n, k] of the QR factorisation of a matrix whose rows [m/n, k] are spread over the group, k <= m.

    Orthonormal to rounding also where the matrix has dependent or zero columns. Elements on the wire per
    rank: an all-gather of ``(n-1) k (k+1)``, a broadcast of ``n k^2``.
    """
    k = rows.shape[1]
    q, stack = _local_qr(rows, group)
    inner = torch.empty(len(stack), k, dtype=torch.float64, device=rows.device)
    if group.rank() == 0:
        inner.copy_(_joint_qr(stack)[0])
    dist.broadcast(inner, group=group, group_src=0)
    return q @ inner[group.rank() * k : (group.rank() + 1) * k]


def _local_qr(rows: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Q [m/n, k] of this rank's rows, and every rank's R [k, k] below one another with a column of ones.

    With fewer than k rows both are padded with zeros, and the ones mark the true rows.
    """
    m, k = rows.shape
    q, r = torch.linalg.qr(rows.double())
    wide = torch.zeros(m, k, dtype=torch.float64, device=rows.device)
    marked = torch.zeros(k, k + 1, dtype=torch.float64, device=rows.device)
    wide[:, : q.shape[1]], marked[: len(r), :k], marked[: len(r), k] = q, r, 1.0
    parts = [torch.empty_like(marked) for _ in range(group.size())]
    dist.all_gather(parts, marked, group=group)
    return wide, torch.cat(parts)


def _joint_qr(stack: Tensor) -> tuple[Tensor, Tensor]:
    """QR of the stacked R [n k, k]. Padding has no part in it: a dependent column could else end up there."""
    true_rows = stack[:, -1] > 0
    q, r = torch.linalg.qr(stack[true_rows, :-1])
    inner = torch.zeros(len(stack), q.shape[1], dtype=q.dtype, device=q.device)
    inner[true_rows] = q
    return inner, r
