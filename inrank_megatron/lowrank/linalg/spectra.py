"""Singular values of many sharded products ``U V`` at once, without forming any.

Letters: O, I features, k columns, n ranks of the group, L products; ``/n`` is this rank's shard, which may be
uneven or empty. Every function is collective over its group and computes in FP64.

Gram path, for every product from its shards U [O/n, k], V [k, I/n]::

    G1 = sum over ranks of U^T U,  G2 = sum over ranks of V V^T        [k, k]
    d1 = sqrt(diag G1),            d2 = sqrt(diag G2)                  norms of U's columns, V's rows
    G1 = D1 L1 L1^T D1,            G2 = D2 L2 L2^T D2                  Cholesky of unit columns' Gram matrices
    singular values of U V  =  those of the core  L1^T (D1 D2) L2      [k, k]

The unit diagonal makes the result independent of any scaling ``(U S)(S^-1 V)`` of the columns. A rounding
error E of the unit Gram matrix H = L L^T changes every singular value by a factor within
``1 +- |E| |H^-1| / 2``, because x^T (H + E) x lies within ``1 +- |E| |H^-1|`` of x^T H x for every x. ``|E|``
stays under (k + 8) eps, ``|H^-1|`` is at most the squared Frobenius norm of ``L^-1``. Where this bound leaves
less than the accuracy, or the Cholesky factorisation breaks down, the product takes the Householder path:
TSQR of both factors, then the core ``R1 R2^T``. There is no third path: Cholesky-QR twice would pass over the
factors three times and costs more than TSQR.

One rank, the owner, decomposes a product, and all ranks take its numbers, error bound included. So the
choice of the path and the values are the same bits on all ranks.

On a GPU, the device computes the products, Gram matrices and cores, and the host the singular values of the
cores. Threads of the host may do so while the device continues with other work. The host waits for the
device a fixed number of times per round, however many layers there are.

Elements on the wire per rank, k' = (n-1)/n, up to block edges and padding: reduce-scatter of the Gram
matrices' lower triangles, ``k' sum over L of k^2``; all-gather of the values, ``k' sum over L of k``. A
product on the Householder path adds two all-gathers of ``(n-1) k^2`` and its k values to one more broadcast.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby, islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.distributed.device_copies import start_copies, to_device
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg.cores import Roots, in_background, values_of_cores
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
    numbers to rounding. Scaling the halves against each other changes nothing, on either path.
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
    return SpectraUnderWay(products, group).finish(step=step)


class SpectraUnderWay:
    """:func:`singular_values` in two parts, both collective: making one starts the work on the device, and
    :meth:`finish` returns the values.

    Args:
        products: their factors must not change before :meth:`finish` has returned.
        overlap: a thread decomposes the cores as soon as they are on the host, while the device and the
            caller continue. Without overlap :meth:`finish` decomposes them.
    """

    def __init__(self, products: Sequence[Product | Update], group: ProcessGroup, *, overlap: bool = False):
        order = sorted(range(len(products)), key=lambda i: -products[i].columns)
        self._products, self._group = products, group
        self._rounds = [
            (indices, _Round([products[i] for i in indices], group, overlap=overlap))
            for indices in _rounds(order, products)
        ]

    def owned(self) -> dict[int, Tensor] | None:
        """Values of the products that this rank owns, by their place. Not collective; any thread may ask.

        None if one of them is not sound: :meth:`finish` then takes the Householder path, or raises the error.
        """
        values: dict[int, Tensor] = {}
        for indices, one in self._rounds:
            for i, row in zip(
                indices[self._group.rank() :: self._group.size()], one.own_rows(), strict=False
            ):
                values[i] = row[_HEAD : _HEAD + self._products[i].columns]
                sound = bool(row.isfinite().all()) and row[3] <= _GRAM_ACCURACY
                if not sound or _cancels(values[i], float(row[2])):
                    return None
        return values

    def finish(self, *, step: int) -> list[Tensor]:
        """The values; errors as those of :func:`singular_values`."""
        values: dict[int, Tensor] = {}
        for indices, one in self._rounds:
            rows = dict(zip(indices, one.rows(), strict=True))
            for i, row in rows.items():
                for norm, letter in zip(row[:2], "UV", strict=True):
                    check_finite(norm, what=f"factor {letter} of {self._products[i].name} at step {step}")
                values[i] = row[_HEAD : _HEAD + self._products[i].columns]
            poor = [i for i, row in rows.items() if row[3] > _GRAM_ACCURACY]
            if poor:
                values |= zip(poor, _householder([self._products[i] for i in poor], self._group), strict=True)
            for i, row in rows.items():
                _check_cancellation(values[i], float(row[2]), self._products[i].name, step)
        return [values[i] for i in range(len(self._products))]


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


class _Round:
    """Products on the Gram path, the widest first.

    Product i belongs to rank i mod n, which evens out the work. ``own_rows()`` returns the rows
    of this rank's products.
    """

    def __init__(self, products: Sequence[Product | Update], group: ProcessGroup, *, overlap: bool):
        n, rank = group.size(), group.rank()
        parts = [_local_grams(products[r::n], products[0].U.device) for r in range(n)]
        parts = [_padded(p, parts[0].numel()) for p in parts]
        local = torch.empty_like(parts[0])
        dist.reduce_scatter(local, parts, group=group)
        self._group, self._count, self._device = group, len(products), local.device
        own_rows = _owner_rows(
            [p.columns for p in products[rank::n]], local, width=_HEAD + products[0].columns
        )
        self.own_rows = in_background(own_rows) if overlap else own_rows

    def rows(self) -> list[Tensor]:
        """A row for each product, on the CPU: sum d1, sum d2, sum d1 d2, error bound, singular values."""
        n = self._group.size()
        table = to_device(_padded(self.own_rows(), -(-self._count // n)), self._device)
        tables = [torch.empty_like(table) for _ in range(n)]
        dist.all_gather(tables, table, group=self._group)
        everyones = torch.stack(tables).cpu()
        return [everyones[i % n, i // n] for i in range(self._count)]


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


def _owner_rows(columns: list[int], packed: Tensor, *, width: int) -> Callable[[], Tensor]:
    """Rows of :class:`_Round`, on the CPU, for products with these ``columns``, equal ones in a batch.

    Cores are on their way to the host when this returns; the function that is returned waits for them.
    """
    batches, offset = [], 0
    for k, same in groupby(columns):
        count, size = len(list(same)), packed_size(k)
        grams = packed[offset : offset + 2 * count * size].view(count, 2, size)
        lefts, rights = (torch.stack([unpack_gram(g, k) for g in grams[:, side]]) for side in (0, 1))
        batches.append(Roots.of(lefts, rights))
        offset += 2 * count * size
    copies = start_copies([tensor for batch in batches for tensor in (batch.head, batch.cores())])

    def rows() -> Tensor:
        rows = torch.zeros(len(columns), width, dtype=packed.dtype)
        if not batches:
            return rows
        arrived = copies()
        rows[:, :_HEAD] = torch.cat(arrived[::2])
        good = ((rows[:, 3] <= _GRAM_ACCURACY) & rows[:, 2].isfinite()).tolist()
        flags = iter(good)
        cores = [_chosen(batch, list(islice(flags, len(batch)))) for batch in arrived[1::2]]
        places = compress(range(len(good)), good)
        for i, values in zip(places, values_of_cores(cores, came_from=packed.device), strict=True):
            rows[i, _HEAD : _HEAD + columns[i]] = values
        return rows

    return rows


def _chosen(batch: Tensor, flags: list[bool]) -> Tensor:
    return batch if all(flags) else batch[[i for i, flag in enumerate(flags) if flag]]


def _householder(products: Sequence[Product | Update], group: ProcessGroup) -> list[Tensor]:
    """Singular values, each [columns], on the CPU: TSQR of both factors, the core on the first rank."""
    cores = []
    for product in products:
        left, right = product.factors()
        r1, r2 = triangular_factor(left, group), triangular_factor(right.t(), group)
        if group.rank() == 0:
            cores.append((r1 @ r2.t())[None])
    columns, device = [p.columns for p in products], products[0].U.device
    flat = torch.zeros(sum(columns), dtype=torch.float64)
    if cores:
        flat = torch.cat(values_of_cores(start_copies(cores)(), came_from=device))
    flat = to_device(flat, device)
    dist.broadcast(flat, group=group, group_src=0)
    return list(flat.cpu().split(columns))


def _check_cancellation(values: Tensor, weight: float, name: str, step: int) -> None:
    """``weight`` is the sum of all columns' norms |u| |v|; k eps of it is lost when they are added up."""
    if _cancels(values, weight):
        raise UserError(
            f"the columns of {name} at step {step} cancel: norms of {weight:.3g} in all leave a largest "
            f"singular value of {float(values[0]):.3g}, which must be exact to {ACCURACY:g} of itself. "
            "Resume from an earlier checkpoint, with a lower --lr"
        )


def _cancels(values: Tensor, weight: float) -> bool:
    return len(values) * _EPS * weight > ACCURACY * float(values[0])
