"""New columns of a layer's factors: drawn for the full matrix, so that sharding does not change them."""

import torch
from torch import Tensor

from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.linalg.factors import shard_matrix
from inrank_megatron.lowrank.linalg.new_columns import full_columns


def drawn_columns(
    layer: FactorisedLinear,
    count: int,
    source: str,
    *,
    norm: float | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """This rank's shards ``(left [O/n, count], right [count, I/n])`` of ``full_columns``, FP32."""
    left, right = full_columns(
        (layer.output_size, layer.input_size),
        count,
        source,
        capacity=layer.capacity,
        norm=norm,
        generator=generator,
    )
    left = shard_matrix(left, 0, layer.tp_group, layer.U.partition_stride)
    right = shard_matrix(right, 1, layer.tp_group)
    return to_device(left, layer.U.device), to_device(right, layer.U.device)


def norm_like(matrix: Tensor, columns: int) -> float:
    """The norm of ``columns`` random directions on either side whose product is as large as ``matrix``."""
    return (matrix.norm().item() ** 2 / columns) ** 0.25
