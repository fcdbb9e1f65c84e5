"""Slow dense versions of the factor algebra, to read and to test against. All FP64, on one device.

Letters: O, I features, k columns, r rank. The sharded algorithms are in ``spectra.py`` and ``truncation.py``.
"""

import torch
from torch import Tensor


def singular_values(U: Tensor, V: Tensor) -> Tensor:
    """Singular values [min(O, I)] of ``U V`` of factors [O, k] and [k, I], by forming the product."""
    return torch.linalg.svdvals(U.double() @ V.double())


def update_singular_values(U: Tensor, V: Tensor, U0: Tensor, V0: Tensor) -> Tensor:
    """Singular values [min(O, I)] of ``Delta = U V - U0 V0``.

    The subtraction costs digits: where Delta is 1e-6 of the products, 1e-10 of its largest value.
    """
    return torch.linalg.svdvals(U.double() @ V.double() - U0.double() @ V0.double())


def truncate(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``U* [O, r]``, ``V* [r, I]``, the rank-r minimiser of ``|W - U* V*|`` (Eckart and Young, 1936)."""
    return balanced(W.double(), r)


def truncate_for_activations(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``U* [O, r]``, ``V* [r, I]``, the rank-r minimiser of ``E |(W - U* V*) x|^2``.

    ``C = E[x x^T]`` [I, I]. ``M = P P^T W`` with P the leading r eigenvectors of ``W C W^T``, the
    second moment of the output.
    """
    W, C = W.double(), C.double()
    P = torch.linalg.eigh(W @ C @ W.t()).eigenvectors.flip(1)[:, :r]
    return balanced(P @ P.t() @ W, r)


def truncate_for_loss(W: Tensor, C: Tensor, D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``U* [O, r]``, ``V* [r, I]``, the rank-r minimiser of ``E |D^(1/2) (W - U* V*) x|^2``.

    ``D`` [O], positive: the diagonal of a second moment of the loss gradient at the output.
    """
    d = D.double().sqrt()[:, None]
    left, right = truncate_for_activations(d * W.double(), C, r)
    return balanced(left / d @ right, r)


def output_energies(W: Tensor, C: Tensor) -> Tensor:
    """Eigenvalues [O] of ``W C W^T`` in descending order; those past r add up to the error of rank r."""
    return torch.linalg.eigvalsh(W.double() @ C.double() @ W.double().t()).flip(0).clamp(min=0)


def output_error(W: Tensor, M: Tensor, C: Tensor) -> Tensor:
    """``E |(W - M) x|^2``, a scalar."""
    difference = W.double() - M.double()
    return ((difference @ C.double()) * difference).sum()


def balanced(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Factors of the leading r singular triples of M that share the singular values evenly."""
    a, s, b = torch.linalg.svd(M, full_matrices=False)
    root = s[:r].sqrt()
    return a[:, :r] * root, root[:, None] * b[:r]


def orthogonalised(M: Tensor) -> Tensor:
    """M [O, I] with singular values replaced as Muon's five iterations do, from its decomposition."""
    a, s, b = torch.linalg.svd(M.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return a * s @ b


def inverse_root(M: Tensor, *, damping: float = 1e-3) -> Tensor:
    """``(M^T M + damping |M|^2 I)^(-1/2)`` [I, I] of M [O, I], from its decomposition."""
    _, s, b = torch.linalg.svd(M.double(), full_matrices=M.shape[0] < M.shape[1])
    s = torch.nn.functional.pad(s, (0, M.shape[1] - len(s)))
    return b.mT * (s.square() + damping * s[0].square()).rsqrt() @ b


def lora_muon_step(M: Tensor, R: Tensor) -> Tensor:
    """The direction of a step on U [O, k] from its momentum M and R = inverse_root(V^T) [k, k]."""
    return orthogonalised(M.double() @ R) @ R
