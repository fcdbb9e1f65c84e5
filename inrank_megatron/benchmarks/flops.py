"""Operations of a computation: matrix products as torch counts them, decompositions by formula.

The formulas are the leading terms in Golub and Van Loan, Matrix Computations (4th edition, chapters 4, 5 and
8), for an m x n matrix with m >= n. They are counted by the function that is called, because below it torch
asks for singular vectors whenever a counter is active.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """Operations of ``run()``, a multiply-add being two; element-wise work does not count.

    Attention runs as plain matrix products meanwhile: on a CPU the counter does not know the fused kernel.
    """
    decompositions = _Decompositions()
    products = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_in_place})
    with sdpa_kernel(SDPBackend.MATH), decompositions, products:
        run()
    return products.get_total_flops() + decompositions.total


def _addmm_in_place(total: tuple, a: tuple, b: tuple, **kwargs) -> int:
    """Of shapes; the counter knows only the product that does not add in place."""
    return 2 * a[0] * a[1] * b[1]


class _Decompositions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        formula = _FORMULAS.get(function)
        if formula is not None:
            self.total += math.prod(args[0].shape[:-2]) * formula(args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _sides(matrix: Tensor) -> tuple[int, int]:
    return max(matrix.shape[-2:]), min(matrix.shape[-2:])


def _qr(args: tuple, kwargs: dict) -> int:
    m, n = _sides(args[0])
    triangle = 2 * m * n * n - 2 * n**3 // 3
    without_q = kwargs.get("mode", args[1] if len(args) > 1 else "reduced") == "r"
    return triangle if without_q else 2 * triangle


def _svd(args: tuple, kwargs: dict) -> int:
    m, n = _sides(args[0])
    return 6 * m * n * n + 20 * n**3


def _singular_values(args: tuple, kwargs: dict) -> int:
    m, n = _sides(args[0])
    return 2 * m * n * n + 2 * n**3


def _eigh(args: tuple, kwargs: dict) -> int:
    return 9 * args[0].shape[-1] ** 3


def _eigenvalues(args: tuple, kwargs: dict) -> int:
    return 4 * args[0].shape[-1] ** 3 // 3


def _cholesky(args: tuple, kwargs: dict) -> int:
    return args[0].shape[-1] ** 3 // 3


def _solve_triangular(args: tuple, kwargs: dict) -> int:
    return args[0].shape[-1] * math.prod(args[1].shape[-2:])


_FORMULAS = {
    torch.linalg.qr: _qr,
    torch.linalg.svd: _svd,
    torch.linalg.svdvals: _singular_values,
    torch.linalg.eigh: _eigh,
    torch.linalg.eigvalsh: _eigenvalues,
    torch.linalg.cholesky: _cholesky,
    torch.linalg.cholesky_ex: _cholesky,
    torch.linalg.solve_triangular: _solve_triangular,
}
