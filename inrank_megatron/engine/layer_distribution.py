"""Factor computations divided over the data-parallel replicas, each layer computed once in the whole job."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.distributed.process_groups import Parallel


def local_layers(names: list[str], parallel: Parallel) -> list[str]:
    """The layers that this rank's replica computes: every data-parallel replica takes its turn."""
    return names[parallel.dp_rank :: parallel.dp_size]


def broadcast_over_replicas(
    shapes: Mapping[str, tuple[int, int, int]],
    local: Mapping[str, tuple[Tensor, Tensor]],
    parallel: Parallel,
    *,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every layer's ``(left [o, c], right [c, i])``, this rank's shards in FP32, the same on all replicas.

    ``local``: those of the layers that its replica computed. ``shapes``: (o, c, i) of every layer.
    """
    shards = {}
    for index, (name, (o, c, i)) in enumerate(shapes.items()):
        left, right = local.get(name) or (torch.empty(o, c, device=device), torch.empty(c, i, device=device))
        shards[name] = left.contiguous(), right.contiguous()
        for tensor in shards[name]:
            dist.broadcast(tensor, group=parallel.dp_group, group_src=index % parallel.dp_size)
    return shards


def gathered_spectra(
    names: list[str],
    compute: Callable[[str], Tensor],
    parallel: Parallel,
    *,
    length: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Singular values or energies of every layer, [at most ``length``] FP64, bit-identical on every rank.

    ``compute`` is called on all tensor-parallel ranks of the replica that owns the layer, and only the result
    of its first rank, on the CPU, counts. One all-reduce carries all spectra and their lengths: each row has
    one contributor, so the sum is exact. The host waits for the device once.
    """
    table = torch.zeros(len(names), 1 + length, dtype=torch.float64)
    rows = {name: row for row, name in enumerate(names)}
    for name in local_layers(names, parallel):
        values = compute(name)[:length]
        if parallel.tp_rank == 0:
            row = table[rows[name]]
            row[0], row[1 : 1 + len(values)] = len(values), values
    table = to_device(table, device)
    dist.all_reduce(table)
    table = table.cpu()
    return {name: table[row, 1 : 1 + int(table[row, 0])] for name, row in rows.items()}
