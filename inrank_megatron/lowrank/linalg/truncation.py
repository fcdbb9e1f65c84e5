"""Rank-r factors ``W -> U* V*`` of sharded dense matrices; no device ever holds a whole one.

Letters: O, I features, r rank, n ranks of the group, h the feature axis that is not cut (I of a column layer,
O of a row layer: the narrower one in an MLP), m the axis that is cut; a share m/n may be uneven or empty.
``X`` [h, m/n] is this rank's share with the cut axis last: W^T of a column layer, W of a row layer.
U* [O/n, r] and V* [r, I/n] come out cut in both kinds of layer, along h by taking the own slice. All in FP64.

Plain, the minimiser of |W - U* V*| (X = A S B^T)::

    G = X X^T = A S^2 A^T          reduce h^2/2 .. h^2 to the owner, eigh there, broadcast A_r: h r, S: h
    along h: A_r sqrt(S)           along m: (A_r^T X) / sqrt(S)             local

The product is ``A_r A_r^T W`` exactly. Squaring loses directions whose value is under 1e-5 of the largest;
where such are kept, the owner takes S and A from the SVD of TSQR's R [h, h] instead: an all-gather of
(n-1) h^2 and the broadcast once more.

Activation-aware, the minimiser of E |(W - U* V*) x|^2: ``M = P P^T W``, P the leading eigenvectors of
``W C W^T``, ``C = E[x x^T]``. Only the second moment of the axis h is needed, and no inverse.

Row layer, moment ``Y = E[y y^T] = W C W^T`` [O, O] of the output before the bias::

    eigh(Y) at the owner           broadcast P: O r, eigenvalues: O
    N = P^T W [r, I/n]             local
    N N^T = a S^2 a^T              reduce r^2, eigh at the owner, broadcast a: r^2, S: r
    U* = P a sqrt(S) (slice)       V* = (a^T N) / sqrt(S)                   local

Column layer, moment C [I, I] of the input::

    C = L L^T, L^T (W^T W) L = Y E Y^T   W^T W reduced as above, both eigh at the owner
    Z = W L Y_r = P sqrt(E)        broadcast L Y_r: I r, E: I; Z [O/n, r] local
    P = orthonormal columns of Z   TSQR, all-gather (n-1) r^2, broadcast n r^2
    N = P^T W [r, I] = a S b^T     reduce r I, SVD at the owner, broadcast a: r^2, S: r, b: r I
    U* = P a sqrt(S)               V* = sqrt(S) b^T (slice)                 local

The layers are taken n at a time and each rank of the group owns one of them, so that the decompositions,
which cost most, run side by side. What an owner computes is broadcast: the shares of all ranks fit together.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.cores import host_svd
from inrank_megatron.lowrank.linalg.factors import check_finite, triangular_factor
from inrank_megatron.lowrank.linalg.gram import packed_gram, unpack_gram
from inrank_megatron.lowrank.linalg.orthogonal import orthonormal_columns

_SQUARED_LIMIT = 1e-10  # of the largest eigenvalue; under it squaring has cost the direction its digits


@dataclass(frozen=True)
class ShardedMatrix:
    """A dense matrix cut over the group.

    Args:
        shard: makes this rank's share, [O/n, I] (``dim`` 0, column layer) or [O, I/n] (``dim`` 1, row layer);
            called once, when the matrix has its turn, on all ranks of the group.
        moment: second moment that the truncation weighs the error with, [I, I] of the input (column layer) or
            [O, O] of the output before the bias (row layer), the same on all ranks; None: plain truncation.
    """

    name: str
    shard: Callable[[], Tensor]
    dim: int
    moment: Tensor | None = None


@dataclass(frozen=True)
class Truncation:
    """Factors' shares ``left`` [O/n, r] and ``right`` [r, I/n] that share the singular values evenly, FP64.

    ``energies`` [h], descending, on the CPU: squared singular values, or with a moment the eigenvalues of
    ``W C W^T``. Those past r add up to the (mean) squared error.
    """

    left: Tensor
    right: Tensor
    energies: Tensor


def explained_ratios(energies: Tensor) -> Tensor:
    """``1 - E |(W - M_r) x|^2 / E |W x|^2`` for r = 0 ... h, [h + 1]; all 1 if there is nothing to explain.

    Energies without a moment stand for white noise x: the share of the squared Frobenius norm.
    """
    explained = torch.cat([energies.new_zeros(1), energies.cumsum(0)])
    return explained / explained[-1] if explained[-1] > 0 else torch.ones_like(explained)


def output_energies(matrices: Iterable[ShardedMatrix], group: ProcessGroup, *, step: int) -> list[Tensor]:
    """``energies`` of every matrix, as in :class:`Truncation`, on all ranks alike; for choosing ranks.

    Raises:
        UserError: on all ranks, if a matrix or its moment holds NaN or Inf.
    """
    results = []
    for turn in _turns(matrices, group.size()):
        shares = [_oriented(matrix) for matrix in turn]
        for owner, message in enumerate(_leading(turn, shares, [0] * len(turn), group)):
            results.append(_received(message, owner, turn[owner], group, step)[0].cpu())
    return results


def truncate(
    matrices: Iterable[ShardedMatrix], ranks: Iterable[int], group: ProcessGroup, *, step: int
) -> Iterator[Truncation]:
    """Factors of every matrix at its rank r, 1 <= r <= min(O, I). Only n matrices are under way at a time.

    A matrix of a rank below r leaves zero columns in plain truncation. Errors as :func:`output_energies`.
    """
    ranks = iter(ranks)
    for turn in _turns(matrices, group.size()):
        columns = list(islice(ranks, len(turn)))
        shares = [_oriented(matrix) for matrix in turn]
        messages = _leading(turn, shares, columns, group)
        for owner, (matrix, x, r, message) in enumerate(zip(turn, shares, columns, messages, strict=True)):
            energies, basis = _received(message, owner, matrix, group, step)
            if matrix.moment is None:
                along_h, along_m, energies = _plain(x, r, energies, basis, owner, group)
            elif matrix.dim == 1:
                along_h, along_m = _row(x, basis, owner, group)
            else:
                along_h, along_m = _column(x, basis, owner, group)
            along_h = along_h.tensor_split(group.size())[group.rank()]
            left, right = (along_m, along_h) if matrix.dim == 0 else (along_h, along_m)
            yield Truncation(left, right.t(), energies.cpu())


def _turns(matrices: Iterable[ShardedMatrix], n: int) -> Iterator[list[ShardedMatrix]]:
    matrices = iter(matrices)
    while turn := list(islice(matrices, n)):
        yield turn


def _oriented(matrix: ShardedMatrix) -> Tensor:
    shard = matrix.shard().double()
    return shard.t() if matrix.dim == 0 else shard


def _leading(
    turn: list[ShardedMatrix], shares: list[Tensor], ranks: list[int], group: ProcessGroup
) -> list[Tensor]:
    """For each matrix [h, 1 + r]: energies and leading basis at its owner, room for them elsewhere."""
    own: Tensor | None = None
    for owner, (matrix, x) in enumerate(zip(turn, shares, strict=True)):
        if matrix.moment is None or matrix.dim == 0:
            gram = packed_gram(x.t())
            dist.reduce(gram, group=group, group_dst=owner)
            own = gram if owner == group.rank() else own
    messages = [x.new_empty(len(x), 1 + r) for x, r in zip(shares, ranks, strict=True)]
    rank = group.rank()
    if rank < len(turn):
        h = len(shares[rank])
        own_gram = None if own is None else _symmetric(unpack_gram(own, h))
        energies, basis = _sound(own_gram, turn[rank].moment, ranks[rank])
        messages[rank].copy_(torch.cat([energies[:, None], basis], dim=1))
    return messages


def _sound(gram: Tensor | None, moment: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """As :func:`_decomposed`; NaN if an input is, or if LAPACK gives up, so that all ranks learn of it."""
    moment = None if moment is None else moment.double()
    given = [t for t in (gram, moment) if t is not None]
    nothing = torch.full_like(given[0][0], torch.nan), torch.full_like(given[0][:, :r], torch.nan)
    try:
        return _decomposed(gram, moment, r) if all(t.isfinite().all() for t in given) else nothing
    except torch.linalg.LinAlgError:
        return nothing


def _decomposed(gram: Tensor | None, moment: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
    """Energies [h], descending, and a basis [h, r] of the leading directions."""
    given = [t for t in (gram, moment) if t is not None]
    if moment is None or gram is None:
        return _eigh(given[0], r)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt()
    energies, basis = _eigh(_symmetric(root.t() @ gram @ root), r)
    return energies, root @ basis


def _eigh(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    if r == 0:
        return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0), matrix[:, :0]
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)[:, :r]


def _symmetric(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).t()


def _received(
    message: Tensor, owner: int, matrix: ShardedMatrix, group: ProcessGroup, step: int
) -> tuple[Tensor, Tensor]:
    dist.broadcast(message, group=group, group_src=owner)
    subject = matrix.name if matrix.moment is None else f"{matrix.name}, or the moment of its activations,"
    check_finite(message[:, 0], what=f"{subject} at step {step}")
    return message[:, 0], message[:, 1:]


def _plain(
    x: Tensor, r: int, energies: Tensor, basis: Tensor, owner: int, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    if energies[r - 1] < _SQUARED_LIMIT * energies[0]:
        triangle = triangular_factor(x.t(), group)
        message = x.new_zeros(len(x), 1 + r)
        if group.rank() == owner:
            _, s, b = host_svd(triangle)
            message[: len(s), 0], message[:, 1:] = s.square(), b[:r].t()
        dist.broadcast(message, group=group, group_src=owner)
        energies, basis = message[:, 0], message[:, 1:]
    root = energies[:r].pow(0.25)
    return basis * root, (x.t() @ basis) * _reciprocal(root), energies


def _row(x: Tensor, basis: Tensor, owner: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    r = basis.shape[1]
    inner = basis.t() @ x
    gram = packed_gram(inner.t())
    dist.reduce(gram, group=group, group_dst=owner)
    message = x.new_empty(r, 1 + r)
    if group.rank() == owner:
        values, vectors = _eigh(unpack_gram(gram, r), r)
        message.copy_(torch.cat([values[:, None], vectors], dim=1))
    dist.broadcast(message, group=group, group_src=owner)
    root, turned = message[:, 0].pow(0.25), message[:, 1:]
    return (basis @ turned) * root, (inner.t() @ turned) * _reciprocal(root)


def _column(x: Tensor, basis: Tensor, owner: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    r, h = basis.shape[1], len(x)
    own = orthonormal_columns(x.t() @ basis, group)
    inner = own.t() @ x.t()
    dist.reduce(inner, group=group, group_dst=owner)
    message = x.new_empty(r + 1 + h, r)
    if group.rank() == owner:
        a, s, b = host_svd(inner, full_matrices=False)
        torch.cat([a, s[None], b.t()], out=message)
    dist.broadcast(message, group=group, group_src=owner)
    root = message[r].sqrt()
    return message[r + 1 :] * root, (own @ message[:r]) * root


def _reciprocal(root: Tensor) -> Tensor:
    return torch.where(root > 0, 1 / root, 0.0)
