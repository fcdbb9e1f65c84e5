"""The k x k cores that hold the singular values of products, from Gram matrices, and their decomposition.

Letters and formulas as in ``spectra.py``. Nothing here is collective. On a GPU the factorisations and cores
are its own work, the values the host's.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from inrank_megatron.distributed.device_copies import to_device

T = TypeVar("T")
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Roots:
    """Of L pairs of Gram matrices: Cholesky factors [L, k, k], ``weights`` d1 d2 [L, k], ``head`` [L, 4].

    A head is sum d1, sum d2, sum d1 d2 and the relative error that the Gram matrices may cause.
    """

    l1: Tensor
    l2: Tensor
    weights: Tensor
    head: Tensor

    @classmethod
    def of(cls, g1: Tensor, g2: Tensor) -> "Roots":
        """From lower triangles [L, k, k]."""
        d1, d2 = (g.diagonal(dim1=1, dim2=2).sqrt() for g in (g1, g2))
        weights = d1 * d2
        live = (weights > 0) & weights.isfinite().all(dim=1)[:, None]
        (l1, bound1), (l2, bound2) = _unit_cholesky(g1, d1, live), _unit_cholesky(g2, d2, live)
        head = torch.stack([d1.sum(1), d2.sum(1), weights.sum(1), bound1 + bound2], dim=1)
        return cls(l1, l2, weights, head)

    def cores(self) -> Tensor:
        """[L, k, k]; without meaning where ``head`` holds an error that is too large, or no number."""
        return self.l1.mT @ (self.weights[:, :, None] * self.l2)


def values_of_cores(cores: list[Tensor], *, came_from: torch.device) -> list[Tensor]:
    """Singular values of every matrix of the batches [L, k, k], one after the other; all on the CPU.

    A GPU would loop over matrices here, with Jacobi sweeps that take seconds for a model: what ``came_from``
    one is decomposed by each of the host's cores, one matrix at a time.
    """
    if came_from.type == "cpu":
        return [values for batch in cores for values in torch.linalg.svdvals(batch)]
    return on_host_cores(torch.linalg.svdvals, [core for batch in cores for core in batch])


def _unit_cholesky(gram: Tensor, norms: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors [L, k, k] of the unit columns' Gram matrices; the relative error they may cause [L].

    A column that is not ``live``, because it is zero in one of the two factors, is replaced by a unit vector
    orthogonal to all: it weighs nothing and must not spoil the condition. The error is infinite where the
    factorisation breaks down.
    """
    k = gram.shape[1]
    scale = torch.where(live, 1 / norms, 0.0)
    unit = torch.where(live[:, :, None] & live[:, None, :], gram * scale[:, :, None] * scale[:, None, :], 0.0)
    unit.diagonal(dim1=1, dim2=2).fill_(1.0)
    factor, info = torch.linalg.cholesky_ex(unit)
    sound = info == 0
    eye = torch.eye(k, dtype=gram.dtype, device=gram.device)
    factor = torch.where(sound[:, None, None], factor, eye)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    error = (k + 8) * _EPS / 2 * inverse.square().sum(dim=(1, 2))
    return factor, torch.where(sound & error.isfinite(), error, torch.inf)


def host_svd(matrix: Tensor, *, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.svd`` by LAPACK, wherever ``matrix`` is; the result is on its device.

    A GPU takes Jacobi sweeps over the matrix, and the host waits for the result there too.
    """
    left, values, right = (
        to_device(part, matrix.device) for part in torch.linalg.svd(matrix.cpu(), full_matrices=full_matrices)
    )
    return left, values, right


def in_background(compute: Callable[[], T]) -> Callable[[], T]:
    """Have a thread ``compute``; the function that is returned waits for its result, or raises its error.

    The thread does not keep a process alive that ends: it may wait for others that are gone.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(compute())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="rank check", daemon=True).start()
    return result.result


def on_host_cores(decompose: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """``decompose`` of every matrix, all on the CPU: as many at once as this process has cores.

    One thread each: a decomposition gains little from more, and its bits do not depend on their number.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, len(os.sched_getaffinity(0)) // local)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take it over
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(decompose, matrices))
    finally:
        torch.set_num_threads(threads)
