"""New columns of factors from a generator: drawn whole, so that they do not depend on how a layer is cut."""

import math

import torch
from torch import Tensor

from inrank_megatron.layers.factorised import FactorisedLinear


def drawn_columns(
    layer: FactorisedLinear,
    count: int,
    source: str,
    *,
    norm: float | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """This rank's shards ``(left [O/n, count], right [count, I/n])``, FP32.

    ``source``: ``random``, directions in which every whole column of U and row of V has ``norm``;
    ``kaiming``, uniform entries up to 1 / sqrt(fan-in) in both, U's fan-in being the columns allocated;
    ``lora``, the same in V and zeros in U.
    """
    o, i = layer.output_size, layer.input_size
    if source == "random":
        left = torch.randn(o, count, generator=generator)
        right = torch.randn(count, i, generator=generator)
        left *= norm / left.norm(dim=0, keepdim=True)
        right *= norm / right.norm(dim=1, keepdim=True)
    else:
        left = _uniform((o, count), 1 / math.sqrt(layer.capacity), generator)
        right = _uniform((count, i), 1 / math.sqrt(i), generator)
        if source == "lora":
            left.zero_()
    rank, n, device = layer.tp_group.rank(), layer.tp_group.size(), layer.U.device
    return left.chunk(n, dim=0)[rank].to(device), right.chunk(n, dim=1)[rank].to(device)


def norm_like(matrix: Tensor, columns: int) -> float:
    """The norm of ``columns`` random directions on either side whose product is as large as ``matrix``."""
    return (matrix.norm().item() ** 2 / columns) ** 0.25


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> Tensor:
    return bound * (2 * torch.rand(shape, generator=generator) - 1)
