"""Singular values of many sharded products ``U V`` at once, without forming any.

Letters: O, I features, k columns, n ranks of the group, L products; ``/n`` is this rank's share, which may be
uneven or empty. Every function is collective over its group and computes in FP64.

Gram way, for every product from its shards U [O/n, k], V [k, I/n]::

    G1 = sum over ranks of U^T U,  G2 = sum over ranks of V V^T        [k, k]
    d1 = sqrt(diag G1),            d2 = sqrt(diag G2)                  norms of U's columns, V's rows
    G1 = D1 L1 L1^T D1,            G2 = D2 L2 L2^T D2                  Cholesky of unit columns' Gram matrices
    singular values of U V  =  those of the core  L1^T (D1 D2) L2      [k, k]

The unit diagonal makes the result independent of any scaling ``(U S)(S^-1 V)`` of the columns. A rounding
error E of the unit Gram matrix H = L L^T changes every singular value by a factor within
``1 +- |E| |H^-1| / 2``, because x^T (H + E) x lies within ``1 +- |E| |H^-1|`` of x^T H x for every x. ``|E|``
stays under (k + 8) eps, ``|H^-1|`` is at most the squared Frobenius norm of ``L^-1``. Where this bound leaves
less than the accuracy, or the Cholesky factorisation breaks down, the product goes the Householder way: TSQR
of both factors, then the core ``R1 R2^T``. Cholesky-QR twice would pass over the factors three times and
costs more than TSQR, so there are these two ways and no third.

A product is decomposed by one rank, its owner, and everybody takes over the owner's numbers, error bound
included. The choice of the way and the values are therefore the same bits on all ranks, whatever each
computed.

On a GPU the products, Gram matrices and cores are its own work, the values of the cores the host's; the host
waits for the device a fixed number of times a round, however many layers there are.

Elements on the wire a rank, k' = (n-1)/n, up to block edges and padding: reduce-scatter of the Gram matrices'
lower triangles, ``k' sum over L of k^2``; all-gather of the values, ``k' sum over L of k``. A product on the
Householder way adds two all-gathers of ``(n-1) k^2`` and its k values to one more broadcast.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby, islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg.cores import Roots, values_of_cores
from inrank_megatron.lowrank.linalg.factors import check_finite, triangular_factor
from inrank_megatron.lowrank.linalg.gram import packed_gram, packed_size, unpack_gram

ACCURACY = 1e-6  # of the largest singular value, at least
_GRAM_ACCURACY = ACCURACY / 2  # that much of it may go to the Gram matrices
_EPS = torch.finfo(torch.float64).eps
_ROUND_ELEMENTS = 2**25  # of Gram matrices under way at once (256 MiB), however many layers there are
_HEAD = 4  # numbers that precede the singular values in an owner's row


@dataclass(frozen=True)
class Product:
    """``U V`` from this rank's shards ``U`` [O/n, k] and ``V`` [k, I/n], any floating-point dtype.

    ``name`` is for messages. Values are expected within the range of FP32, so that FP64 holds their squares.
    """

    name: str
    U: Tensor
    V: Tensor

    @property
    def columns(self) -> int:
        return self.V.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.U.double(), self.V.double()


@dataclass(frozen=True)
class Update:
    """``Delta = U V - U0 V0`` as a product of 2k columns that do not cancel::

        Delta = [dU, U0] [V; dV],  dU = U - U0,  dV = V - V0

    Each column's contribution is as small as the update itself, and FP64 holds the difference of two FP32
    numbers to rounding. Scaling the halves against each other changes nothing: both ways are invariant to it.
    """

    name: str
    U: Tensor
    V: Tensor
    U0: Tensor
    V0: Tensor

    @property
    def columns(self) -> int:
        return 2 * self.V.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V, U0, V0 = (t.double() for t in (self.U, self.V, self.U0, self.V0))
        return torch.cat([U - U0, U0], dim=1), torch.cat([V, V - V0])


def singular_values(products: Sequence[Product | Update], group: ProcessGroup, *, step: int) -> list[Tensor]:
    """Singular values of every product, each [columns], descending, FP64, on the CPU, the same on all ranks.

    They are exact to 1e-6 of the product's own largest value; beyond min(O, I) they are zero to rounding.

    Raises:
        UserError: on all ranks, naming layer and ``step``, for NaN or Inf, and for columns that cancel so far
            that FP64 does not hold the accuracy.
    """
    order = sorted(range(len(products)), key=lambda i: -products[i].columns)
    values: dict[int, Tensor] = {}
    for indices in _rounds(order, products):
        rows = _gram_rows([products[i] for i in indices], group)
        for i, row in zip(indices, rows, strict=True):
            for norm, letter in zip(row[:2], "UV", strict=True):
                check_finite(norm, what=f"factor {letter} of {products[i].name} at step {step}")
        values |= {i: row[_HEAD : _HEAD + products[i].columns] for i, row in zip(indices, rows, strict=True)}
        poor = [i for i, row in zip(indices, rows, strict=True) if row[3] > _GRAM_ACCURACY]
        if poor:
            values |= zip(poor, _householder([products[i] for i in poor], group), strict=True)
        for i, row in zip(indices, rows, strict=True):
            _check_cancellation(values[i], float(row[2]), products[i].name, step)
    return [values[i] for i in range(len(products))]


def _rounds(order: list[int], products: Sequence[Product | Update]) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for i in order:
        size = 2 * packed_size(products[i].columns)
        if batch and total + size > _ROUND_ELEMENTS:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += size
    if batch:
        yield batch


def _gram_rows(products: Sequence[Product | Update], group: ProcessGroup) -> list[Tensor]:
    """A row for each product, on the CPU: sum d1, sum d2, sum d1 d2, error bound, singular values.

    ``products`` come with the widest first. Product i belongs to rank i mod n, which evens out the work.
    """
    n, rank = group.size(), group.rank()
    parts = [_local_grams(products[r::n], products[0].U.device) for r in range(n)]
    parts = [_padded(p, parts[0].numel()) for p in parts]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    rows = _owner_rows([p.columns for p in products[rank::n]], own, width=_HEAD + products[0].columns)
    table = to_device(_padded(rows, -(-len(products) // n)), own.device)
    tables = [torch.empty_like(table) for _ in range(n)]
    dist.all_gather(tables, table, group=group)
    everyones = torch.stack(tables).cpu()
    return [everyones[i % n, i // n] for i in range(len(products))]


def _local_grams(products: Sequence[Product | Update], device: torch.device) -> Tensor:
    grams = [torch.empty(0, dtype=torch.float64, device=device)]
    for product in products:
        left, right = product.factors()
        grams += [packed_gram(left), packed_gram(right.t())]
    return torch.cat(grams)


def _padded(tensor: Tensor, length: int) -> Tensor:
    if tensor.shape[0] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])


def _owner_rows(columns: list[int], packed: Tensor, *, width: int) -> Tensor:
    """Rows of :func:`_gram_rows`, on the CPU, for products with these ``columns``, equal ones in a batch.

    The host waits for the device twice, however many products there are: for what precedes the values, which
    says what has a core, and for the cores.
    """
    batches, offset = [], 0
    for k, same in groupby(columns):
        count, size = len(list(same)), packed_size(k)
        grams = packed[offset : offset + 2 * count * size].view(count, 2, size)
        lefts, rights = (torch.stack([unpack_gram(g, k) for g in grams[:, side]]) for side in (0, 1))
        batches.append(Roots.of(lefts, rights))
        offset += 2 * count * size
    rows = torch.zeros(len(columns), width, dtype=packed.dtype)
    if not batches:
        return rows
    rows[:, :_HEAD] = torch.cat([batch.head for batch in batches]).cpu()
    good = ((rows[:, 3] <= _GRAM_ACCURACY) & rows[:, 2].isfinite()).tolist()
    chosen = iter(good)
    cores = [batch.cores(list(islice(chosen, len(batch.head)))) for batch in batches]
    for i, values in zip(compress(range(len(good)), good), values_of_cores(cores), strict=True):
        rows[i, _HEAD : _HEAD + columns[i]] = values
    return rows


def _householder(products: Sequence[Product | Update], group: ProcessGroup) -> list[Tensor]:
    """Singular values, each [columns], on the CPU: TSQR of both factors, the core on the first rank."""
    cores = []
    for product in products:
        left, right = product.factors()
        r1, r2 = triangular_factor(left, group), triangular_factor(right.t(), group)
        if group.rank() == 0:
            cores.append((r1 @ r2.t())[None])
    columns = [p.columns for p in products]
    flat = torch.cat(values_of_cores(cores)) if cores else torch.zeros(sum(columns), dtype=torch.float64)
    flat = to_device(flat, products[0].U.device)
    dist.broadcast(flat, group=group, group_src=0)
    return list(flat.cpu().split(columns))


def _check_cancellation(values: Tensor, weight: float, name: str, step: int) -> None:
    """``weight`` is the sum of all columns' norms |u| |v|; k eps of it is lost when they are added up."""
    lost, largest = len(values) * _EPS * weight, float(values[0])
    if lost > ACCURACY * largest:
        raise UserError(
            f"the columns of {name} at step {step} cancel: norms of {weight:.3g} in all leave a largest "
            f"singular value of {largest:.3g}, which must be exact to {ACCURACY:g} of itself. "
            "Resume from an earlier checkpoint, with a lower --lr"
        )
