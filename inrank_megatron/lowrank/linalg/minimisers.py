"""Three ways to make ``U* V*`` of a sharded matrix W: the minimisers of its plain and of its weighed error.

Letters: O, I features, r rank, n ranks of the group, h the feature axis that is not sharded (I of a column
layer, O of a row layer: the narrower one in an MLP), m the axis that is sharded; a shard m/n may be uneven or
empty. ``X`` [h, m/n] is this rank's shard with the sharded axis last: W^T of a column layer, W of a row
layer. All in FP64.

Each class is an algorithm of two steps. The *owner* of the matrix, one rank of the group, finds the leading
directions of the axis h (:meth:`directions`) and broadcasts them. Then all ranks make the factors of them
(:meth:`factors`, collective). What an owner computes is broadcast, so that the shards of all ranks fit.

The weighed error is E |(W - U* V*) x|^2. Its minimiser is ``P P^T W``, P the leading eigenvectors of
``W C W^T``, ``C = E[x x^T]``. Only the second moment of the axis h is needed, and no inverse.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.lowrank.linalg.cores import host_svd
from inrank_megatron.lowrank.linalg.factors import triangular_factor
from inrank_megatron.lowrank.linalg.gram import packed_gram, unpack_gram
from inrank_megatron.lowrank.linalg.orthogonal import orthonormal_columns

_SQUARED_LIMIT = 1e-10  # of the largest eigenvalue; under it squaring has cost the direction its digits


class Plain:
    """The minimiser of |W - U* V*| (X = A S B^T)::

        G = X X^T = A S^2 A^T          reduce h^2/2 .. h^2 to the owner, eigh there, broadcast A_r: h r, S: h
        along h: A_r sqrt(S)           along m: (A_r^T X) / sqrt(S)             local

    The product is ``A_r A_r^T W`` exactly. Squaring loses directions whose value is under 1e-5 of the
    largest; where such are kept, the owner takes S and A from the SVD of TSQR's R [h, h] instead: an
    all-gather of (n-1) h^2 and the broadcast once more.
    """

    needs_gram = True

    @staticmethod
    def directions(gram: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
        """S^2 [h] and A_r [h, r], at the owner."""
        return _eigh(gram, r)

    @staticmethod
    def factors(
        x: Tensor, energies: Tensor, basis: Tensor, owner: int, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(along h [h, r], along m [m/n, r], S^2 [h])``."""
        r = basis.shape[1]
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


class RowWeighed:
    """Row layer, moment ``Y = E[y y^T] = W C W^T`` [O, O] of the output before the bias::

    eigh(Y) at the owner           broadcast P: O r, eigenvalues: O
    N = P^T W [r, I/n]             local
    N N^T = a S^2 a^T              reduce r^2, eigh at the owner, broadcast a: r^2, S: r
    U* = P a sqrt(S) (slice)       V* = (a^T N) / sqrt(S)                   local
    """

    needs_gram = False

    @staticmethod
    def directions(moment: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues of Y [O] and P [O, r], at the owner."""
        return _eigh(moment, r)

    @staticmethod
    def factors(
        x: Tensor, energies: Tensor, basis: Tensor, owner: int, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(U* [O, r], V*^T [I/n, r], energies)``."""
        r = basis.shape[1]
        inner = basis.t() @ x
        gram = packed_gram(inner.t())
        dist.reduce(gram, group=group, group_dst=owner)
        message = x.new_empty(r, 1 + r)
        if group.rank() == owner:
            values, vectors = _eigh(unpack_gram(gram, r), r)
            message.copy_(torch.cat([values[:, None], vectors], dim=1))
        dist.broadcast(message, group=group, group_src=owner)
        root, a = message[:, 0].pow(0.25), message[:, 1:]
        return (basis @ a) * root, (inner.t() @ a) * _reciprocal(root), energies


class ColumnWeighed:
    """Column layer, moment C [I, I] of the input::

    C = L L^T, L^T (W^T W) L = Y E Y^T   W^T W reduced as in Plain, both eigh at the owner
    Z = W L Y_r = P sqrt(E)        broadcast L Y_r: I r, E: I; Z [O/n, r] local
    P = orthonormal columns of Z   TSQR, all-gather (n-1) r^2, broadcast n r^2
    N = P^T W [r, I] = a S b^T     reduce r I, SVD at the owner, broadcast a: r^2, S: r, b: r I
    U* = P a sqrt(S)               V* = sqrt(S) b^T (slice)                 local
    """

    needs_gram = True

    @staticmethod
    def directions(gram: Tensor, moment: Tensor, *, r: int) -> tuple[Tensor, Tensor]:
        """E [I] and L Y_r [I, r], at the owner."""
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp(min=0).sqrt()
        energies, y = _eigh(symmetric(root.t() @ gram @ root), r)
        return energies, root @ y

    @staticmethod
    def factors(
        x: Tensor, energies: Tensor, basis: Tensor, owner: int, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(V*^T [I, r], U* [O/n, r], energies)``."""
        r, h = basis.shape[1], len(x)
        p = orthonormal_columns(x.t() @ basis, group)
        inner = p.t() @ x.t()
        dist.reduce(inner, group=group, group_dst=owner)
        message = x.new_empty(r + 1 + h, r)
        if group.rank() == owner:
            a, s, b = host_svd(inner, full_matrices=False)
            torch.cat([a, s[None], b.t()], out=message)
        dist.broadcast(message, group=group, group_src=owner)
        a, root, b = message[:r], message[r].sqrt(), message[r + 1 :]
        return b * root, (p @ a) * root, energies


def _eigh(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and the leading r eigenvectors."""
    if r == 0:
        return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0), matrix[:, :0]
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)[:, :r]


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).t()


def _reciprocal(root: Tensor) -> Tensor:
    return torch.where(root > 0, 1 / root, 0.0)
