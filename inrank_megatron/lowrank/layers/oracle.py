"""The slow, readable factorised linear that the fast ones are tested against: it forms ``W0 + U V``."""

import torch
from torch import Tensor, nn


class SerialFactorised(nn.Module):
    """``y = x (W0 + U V)^T + b`` on one device, full matrices, plain autograd.

    Args:
        weight: W0 [O, I] or None (second phase). U: [O, k]. V: [k, I]. bias: [O] or None.
    """

    def __init__(self, weight: Tensor | None, U: Tensor, V: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.U, self.V = nn.Parameter(U.clone()), nn.Parameter(V.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        w = self.U @ self.V
        if self.weight is not None:
            w = self.weight + w
        return torch.nn.functional.linear(x, w, self.bias)
