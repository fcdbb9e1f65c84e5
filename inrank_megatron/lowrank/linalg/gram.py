"""Gram matrices as their lower block triangles: three fifths of the products and of the elements to send; and
symmetric products by such triangles.

A k x k matrix is cut into block rows of at most 100 rows; each reaches to the right edge of its diagonal
block, and they follow one another in one flat tensor.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_BLOCK = 100  # narrower blocks skip more of the upper triangle but multiply more slowly


def packed_gram(columns: Tensor) -> Tensor:
    """The lower block triangle of ``columns^T columns`` for FP64 ``columns`` [m, k], flat."""
    k = columns.shape[1]
    packed = torch.empty(packed_size(k), dtype=columns.dtype, device=columns.device)
    for start, stop, part in _block_rows(k):
        out = packed[part].view(stop - start, stop)
        torch.mm(columns[:, start:stop].t(), columns[:, :stop], out=out)
    return packed


def unpack_gram(packed: Tensor, k: int) -> Tensor:
    """[k, k] with the lower triangle of the Gram matrix; what is above the diagonal has no meaning."""
    square = torch.zeros(k, k, dtype=packed.dtype, device=packed.device)
    for start, stop, part in _block_rows(k):
        square[start:stop, :stop] = packed[part].view(stop - start, stop)
    return square


def packed_size(k: int) -> int:
    """Elements of :func:`packed_gram`, between k^2 / 2 and k^2."""
    return sum((stop - start) * stop for start, stop, _ in _block_rows(k))


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of symmetric matrices [L, k, k] that commute, so that the product is symmetric too."""
    lower = torch.zeros_like(a)
    for start, stop, _ in _block_rows(a.shape[-1]):
        lower[:, start:stop, :stop] = a[:, start:stop] @ b[:, :, :stop]
    lower = lower.tril()
    return lower + lower.tril(-1).mT


def _block_rows(k: int) -> Iterator[tuple[int, int, slice]]:
    count = 1 + k // _BLOCK
    edges = [k * i // count for i in range(count + 1)]
    offset = 0
    for start, stop in pairwise(edges):
        size = (stop - start) * stop
        yield start, stop, slice(offset, offset + size)
        offset += size
