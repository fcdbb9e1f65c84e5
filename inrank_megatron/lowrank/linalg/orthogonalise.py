"""Momentum orthogonalised by Newton-Schulz, and spectral norms, of sharded matrices, from Gram matrices.

Muon (Jordan et al., 2024) replaces the singular values of a matrix M by others near 1, with five odd quintic
polynomials of M. An odd polynomial of M is ``M Q`` with Q a polynomial of the Gram matrix ``G = M^T M``, so
all five are computed in k x k: ``A`` is the Gram matrix of what the iterations so far have made of M, ``Q``
the product of their factors. Of a sharded M only G is summed over the group; M Q is local.

Squaring costs digits: what is below sqrt(eps) of the largest singular value is lost in G, and the iterations
enlarge small ones up to 485 times. In FP64 that leaves an error of 3e-12 in the spectral norm of a result
whose M has singular values down to 1e-7 of the largest; in FP32 it would be 1e-3, where the plain iteration
has 1e-5 in FP32, and 0.2 to 0.4 in BF16. Everything here is FP64.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.gram import packed_gram, symmetric_product, unpack_gram

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, X X^T X and (X X^T)^2 X in each iteration; all constants as in ``torch.optim.Muon``."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
_SQUARINGS = 7
DAMPING = 1e-3
"""Added to the eigenvalues of a Gram matrix before its inverse square root, as a share of the largest."""
_ROOT_ITERATIONS, _ABOVE = 13, 1.03
_BATCH = 2**23  # entries in FP64, of which up to nine copies are there at a time: 600 MB


def orthogonalise(
    matrices: list[Tensor], dims: list[int], group: ProcessGroup, roots: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Each of the matrices [o, i] with its singular values s replaced by p(s / |M|), p five quintics.

    Args:
        matrices: shards, of any floating type, which the results have too.
        dims: the axis that is spread over the group, for each. In a group of one, where it makes no
            difference to the result, the longer axis is the cheaper one.
        roots: a symmetric R [k, k] for each, FP64, k the other axis. Then that of M R is computed, and
            multiplied by R once more; of R M, if the axis is 1.

    Elements on the wire per rank: about ``0.6 k^2`` FP64 of each, k the other axis, summed for many at once.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices, grams in _grams(matrices, dims, group):
        if roots is None:
            qs = orthogonalisers(grams)
        else:
            r = torch.stack([roots[index] for index in indices])
            qs = r @ orthogonalisers(r @ grams @ r) @ r
        for index, q in zip(indices, qs, strict=True):
            matrix = matrices[index].double()
            product = matrix @ q if dims[index] == 0 else q @ matrix
            results[index] = product.to(matrices[index].dtype)
    return results


def spectral_norms(matrices: list[Tensor], dims: list[int], group: ProcessGroup) -> Tensor:
    """Largest singular value of each matrix, FP64 [L]. Arguments and wire as in :func:`orthogonalise`."""
    norms: dict[int, Tensor] = {}
    for indices, grams in _grams(matrices, dims, group):
        norms.update(zip(indices, norms_of_grams(grams), strict=True))
    return torch.stack([norms[index] for index in range(len(matrices))])


def inverse_roots(matrices: list[Tensor], dims: list[int], group: ProcessGroup) -> list[Tensor]:
    """``(G + DAMPING |G| I)^(-1/2)`` [k, k] of the Gram matrix G of each, FP64; zero for a matrix of zeros.
    Arguments and wire as in :func:`orthogonalise`.
    """
    roots: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices, grams in _grams(matrices, dims, group):
        for index, root in zip(indices, inverse_square_roots(grams), strict=True):
            roots[index] = root
    return roots


def inverse_square_roots(grams: Tensor) -> Tensor:
    """As :func:`inverse_roots`, of Gram matrices [L, k, k]: the coupled iteration of Newton and Schulz
    (Higham, Functions of Matrices, equation 6.35), in products alone. 13 of them leave an error of 1e-11.
    """
    largest = norms_of_grams(grams).square()[:, None, None]
    scale = torch.where(largest > 0, largest * _ABOVE, 1.0)  # `largest` may be too small by a hundredth
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    y = grams / scale + DAMPING / _ABOVE * identity
    root = 1.5 * identity - 0.5 * y
    y = symmetric_product(y, root)
    for _ in range(_ROOT_ITERATIONS - 1):
        factor = 1.5 * identity - 0.5 * symmetric_product(root, y)
        y, root = symmetric_product(y, factor), symmetric_product(root, factor)
    return torch.where(largest > 0, root / scale.sqrt(), 0.0)


def orthogonalisers(grams: Tensor) -> Tensor:
    """Q [L, k, k], for which ``M Q`` is the orthogonalised M, of Gram matrices [L, k, k]."""
    norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=SMALLEST_NORM)[:, None, None]
    inner = grams / norms.square()
    q = factor = _quintic(inner)
    for _ in range(ITERATIONS - 1):
        inner = symmetric_product(symmetric_product(inner, factor), factor)
        factor = _quintic(inner)
        q = symmetric_product(q, factor)
    return q / norms


def _quintic(inner: Tensor) -> Tensor:
    """The factor by which an iteration multiplies what has the Gram matrices ``inner``."""
    a, b, c = QUINTIC
    factor = b * inner + c * symmetric_product(inner, inner)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def norms_of_grams(grams: Tensor) -> Tensor:
    """Spectral norms [L] of the matrices of these Gram matrices [L, k, k], without a state from step to step.

    128 steps of the power method, by squaring, from the best of all unit vectors; then a Rayleigh quotient.
    The result is not too large, and too small by at most ``log(k) / 512`` of itself, which it is where many
    singular values are nearly alike.
    """
    power = grams
    for _ in range(_SQUARINGS):
        power = power / _trace(power)
        power = symmetric_product(power, power)
    best = power.diagonal(dim1=1, dim2=2).argmax(1)
    vectors = power[torch.arange(len(grams), device=grams.device), :, best]
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    return torch.einsum("li,lij,lj->l", vectors, grams, vectors).clamp(min=0).sqrt()


def _trace(grams: Tensor) -> Tensor:
    trace = grams.diagonal(dim1=1, dim2=2).sum(1)
    return torch.where(trace > 0, trace, 1.0)[:, None, None]


def _grams(
    matrices: list[Tensor], dims: list[int], group: ProcessGroup
) -> Iterator[tuple[list[int], Tensor]]:
    """``M^T M`` (dim 0) or ``M M^T`` (dim 1) of the full matrices, FP64 [L, k, k], in batches of one k and
    of at most ``_BATCH`` entries, with their places; one all-reduce for each.
    """
    columns = [m if dim == 0 else m.t() for m, dim in zip(matrices, dims, strict=True)]
    places: dict[int, list[int]] = {}
    for index, matrix in enumerate(columns):
        places.setdefault(matrix.shape[1], []).append(index)
    for k, indices in places.items():
        most = max(1, _BATCH // k**2)
        for batch in (indices[start : start + most] for start in range(0, len(indices), most)):
            packed = torch.stack([packed_gram(columns[index].double()) for index in batch])
            if group.size() > 1:
                dist.all_reduce(packed, group=group)
            lower = torch.stack([unpack_gram(part, k) for part in packed]).tril()
            yield batch, lower + lower.tril(-1).mT
