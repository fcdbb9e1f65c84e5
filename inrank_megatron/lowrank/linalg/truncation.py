"""Rank-r factors ``W -> U* V*`` of sharded dense matrices; no device ever holds a full one.

Letters: O, I features, r rank, n ranks of the group, h the feature axis that is not sharded (I of a column
layer, O of a row layer: the narrower one in an MLP), m the axis that is sharded; a shard m/n may be uneven or
empty. ``X`` [h, m/n] is this rank's shard with the sharded axis last: W^T of a column layer, W of a row
layer. U* [O/n, r] and V* [r, I/n] come out sharded in both kinds of layer, along h by taking the local slice.
All in FP64.

``minimisers.py`` has the algorithms with their equations. Here the matrices are taken n at a time, and each
rank owns one of them, so that the decompositions, which cost most, run side by side.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, repeat

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.factors import check_finite
from inrank_megatron.lowrank.linalg.gram import packed_gram, unpack_gram
from inrank_megatron.lowrank.linalg.minimisers import ColumnWeighed, Plain, RowWeighed, symmetric


@dataclass(frozen=True)
class ShardedMatrix:
    """A dense matrix sharded over the group.

    Args:
        shard: makes this rank's shard, [O/n, I] (``dim`` 0, column layer) or [O, I/n] (``dim`` 1, row layer);
            called once, when it is the matrix's turn, on all ranks of the group.
        moment: second moment with which the truncation weighs the error, the same on all ranks: [I, I] of the
            input (column layer) or [O, O] of the output before the bias (row layer). None: plain truncation.
    """

    name: str
    shard: Callable[[], Tensor]
    dim: int
    moment: Tensor | None = None

    @property
    def algorithm(self) -> type[Plain | RowWeighed | ColumnWeighed]:
        """The algorithm that truncates this matrix."""
        if self.moment is None:
            return Plain
        return ColumnWeighed if self.dim == 0 else RowWeighed

    def x(self) -> Tensor:
        """X [h, m/n], FP64."""
        return self.shard().double().t() if self.dim == 0 else self.shard().double()


@dataclass(frozen=True)
class Truncation:
    """Factors' shards ``left`` [O/n, r] and ``right`` [r, I/n] that share the singular values evenly, FP64.

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
    return [energies.cpu() for *_, energies, _ in _directions(matrices, repeat(0), group, step=step)]


def truncate(
    matrices: Iterable[ShardedMatrix], ranks: Iterable[int], group: ProcessGroup, *, step: int
) -> Iterator[Truncation]:
    """Factors of every matrix at its rank r, 1 <= r <= min(O, I). Only n matrices are under way at a time.

    If the rank of a matrix is below r, plain truncation leaves zero columns. Raises as
    :func:`output_energies`.
    """
    for matrix, owner, x, energies, basis in _directions(matrices, ranks, group, step=step):
        along_h, along_m, energies = matrix.algorithm.factors(x, energies, basis, owner, group)
        along_h = along_h.tensor_split(group.size())[group.rank()]
        left, right = (along_m, along_h) if matrix.dim == 0 else (along_h, along_m)
        yield Truncation(left, right.t(), energies.cpu())


def _directions(
    matrices: Iterable[ShardedMatrix], ranks: Iterable[int], group: ProcessGroup, *, step: int
) -> Iterator[tuple[ShardedMatrix, int, Tensor, Tensor, Tensor]]:
    """``(matrix, its owner, X [h, m/n], energies [h], leading directions [h, r])``, the last two the same on
    all ranks.
    """
    matrices, ranks = iter(matrices), iter(ranks)
    while turn := list(islice(matrices, group.size())):
        shards = [matrix.x() for matrix in turn]
        messages = [x.new_empty(len(x), 1 + r) for x, r in zip(shards, islice(ranks, len(turn)), strict=True)]
        _decompose_owned(turn, shards, messages, group)
        for owner, (matrix, x, message) in enumerate(zip(turn, shards, messages, strict=True)):
            dist.broadcast(message, group=group, group_src=owner)
            subject = matrix.name
            if matrix.moment is not None:
                subject += ", or the moment of its activations,"
            check_finite(message[:, 0], what=f"{subject} at step {step}")
            yield matrix, owner, x, message[:, 0], message[:, 1:]


def _decompose_owned(
    turn: list[ShardedMatrix], shards: list[Tensor], messages: list[Tensor], group: ProcessGroup
) -> None:
    """Fill the message of the matrix that this rank owns, if any: NaN where its matrix or moment has one, or
    where LAPACK gives up, so that all ranks learn of it.
    """
    packed: Tensor | None = None
    for owner, (matrix, x) in enumerate(zip(turn, shards, strict=True)):
        if matrix.algorithm.needs_gram:
            gram = packed_gram(x.t())
            dist.reduce(gram, group=group, group_dst=owner)
            packed = gram if owner == group.rank() else packed
    if group.rank() >= len(turn):
        return
    matrix, message = turn[group.rank()], messages[group.rank()]
    given = [] if packed is None else [symmetric(unpack_gram(packed, len(message)))]
    given += [] if matrix.moment is None else [matrix.moment.double()]
    message.fill_(torch.nan)
    if all(tensor.isfinite().all() for tensor in given):
        with suppress(torch.linalg.LinAlgError):
            energies, basis = matrix.algorithm.directions(*given, r=message.shape[1] - 1)
            message[:, 0], message[:, 1:] = energies, basis
