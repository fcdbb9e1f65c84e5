"""Whole new columns of factors from a generator."""

import math

import torch
from torch import Tensor


def full_columns(
    shape: tuple[int, int],
    count: int,
    source: str,
    *,
    capacity: int,
    norm: float | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """``(left [O, count], right [count, I])`` of a linear of ``shape`` (O, I), FP32, on the CPU.

    ``source``: ``random``, directions in which every column of U and row of V has ``norm``; ``kaiming``,
    uniform entries up to 1 / sqrt(fan-in) in both, U's fan-in being the ``capacity`` columns allocated;
    ``zero-product``, the same in V and zeros in U.
    """
    o, i = shape
    if source == "random":
        left = torch.randn(o, count, generator=generator)
        right = torch.randn(count, i, generator=generator)
        left *= norm / left.norm(dim=0, keepdim=True)
        right *= norm / right.norm(dim=1, keepdim=True)
        return left, right
    left = _uniform((o, count), 1 / math.sqrt(capacity), generator)
    right = _uniform((count, i), 1 / math.sqrt(i), generator)
    return (left.zero_() if source == "zero-product" else left), right


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> Tensor:
    return bound * (2 * torch.rand(shape, generator=generator) - 1)
