"""Singular values of a dense matrix that one process holds, or that tensor parallelism has cut into shards.

Letters: X [m, h] has the axis that is sharded as its rows, m/n of them on this rank (uneven or none is fine);
h is the other axis; k columns. All arithmetic is FP64 on the device of the matrix.

*Exact*: of X if it is whole; else of R of ``X = Q R`` (TSQR). A rank receives ``(n-1) h^2`` numbers.

*Randomised* (subspace iteration from a random start, Halko, Martinsson and Tropp, arXiv 0909.4061)::

    Q [h, k]  random, the same on all ranks
    Q <- orthonormal basis of X^T X Q, summed over ranks       twice; k h numbers a rank
    values = the exact ones of X Q [m, k]

They are never above the exact values. Order and sign of rows and columns do not matter, so neither do strides
of a partition (gate and up of SwiGLU).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.factors import triangular_factor

_MORE_COLUMNS = 16  # than values that are asked for: the last columns of a subspace are poor
_ITERATIONS = 2


def exact_values(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """All ``min(m, h)`` singular values of X, descending, FP64, on the device of ``x``.

    ``x`` [m/n, h] is this rank's rows; None as ``group``: all of them. Collective over ``group``.
    """
    return torch.linalg.svdvals(x.double() if group is None else triangular_factor(x, group))


def leading_values(x: Tensor, count: int, group: ProcessGroup | None = None) -> Tensor:
    """The ``count`` largest singular values of X, randomised; arguments otherwise as :func:`exact_values`.

    Of a spectrum that falls like 1 / i they are within 2 % at the end of the list, far less at its head.
    """
    x, width = x.double(), x.shape[1]
    k = min(width, count + _MORE_COLUMNS)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(width, k, dtype=torch.float64, generator=generator).to(x.device)
    for _ in range(_ITERATIONS):
        image = x.t() @ (x @ q)
        if group is not None:
            dist.all_reduce(image, group=group)
        q = torch.linalg.qr(image).Q
    return exact_values(x @ q, group)[:count]
