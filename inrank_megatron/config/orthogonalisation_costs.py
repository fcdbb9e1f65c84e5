"""What Muon, Spectron and LoRA-Muon keep and compute: one moment where Adam has two, and products of k x k.

Letters as in `costs.py`; a matrix [m, k] is orthogonalised from its Gram matrix [k, k], k the side that
tensor parallelism does not shard.
"""

from collections.abc import Iterator

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import Ranks, alike, factorises_attention, qkv_layout
from inrank_megatron.config.topology import Topology

BATCH, COPIES = 2**23, 9
"""Entries [k, k] that are computed together, at least one matrix, and the copies of them (as counted)."""
PRODUCTS = 17
"""Symmetric products of k x k for a matrix's five iterations."""
FURTHER = {"muon": (0, 0, 0), "spectron": (1, 7, 0), "lora-muon": (1, 7 + 37, 4)}
"""By rule, for each matrix: Gram matrices of the factor itself; symmetric products of k x k, for its spectral
norm and the iterations of its inverse root; full products of k x k.
"""


def orthogonalised_entries(config: Config, ranks: Ranks) -> int:
    """Parameters with a momentum alone, over all tensor-parallel ranks."""
    return sum(number * m * k for m, k, _, number in _matrices(config, ranks))


def orthogonalisation_bytes(
    config: Config, topology: Topology, ranks: Ranks, *, used: Ranks, zero_stage: int
) -> int:
    """Bytes on a device that a step needs beside states and gradients, at their most.

    Of plain matrices, then of factors: their steps, and in FP32 the whole and the orthogonalised ones of this
    replica's share; `COPIES` of k x k in FP64 of those that are computed together. LoRA-Muon has the inverse
    roots of its share besides.

    Args:
        ranks, used: columns allocated, and in use, of which products are made.
    """
    found, replicas = [0], topology.data_parallel_size
    for kind in (_plain, _factors):
        allocated, in_use = list(kind(config, ranks)), list(kind(config, used))
        if not allocated:
            continue
        matrices = sum(number for *_, number in allocated)
        entries = sum(number * m * k for m, k, _, number in allocated) // topology.tensor_model_parallel_size
        paired = 2 if allocated[0][2] == "lora-muon" else 1  # both factors of a layer are one replica's
        share = paired * -(-matrices // (paired * replicas))
        copies = 4 * entries * (3 if zero_stage else 2 + replicas) // replicas
        together = max(min(share * k * k, max(BATCH, k * k)) for _, k, *_ in in_use)
        squares = sum(number * k * k for _, k, _, number in in_use)
        roots = 8 * share * squares // matrices if paired == 2 else 0
        found.append(copies + roots + 8 * COPIES * together)
    return max(found)


def orthogonalisation_flops(config: Config, ranks: Ranks) -> int:
    """Operations of the products of one step (a multiply-add is two), over all replicas and tensor-parallel
    ranks; those of k x k once, though every rank of a tensor-parallel group does them.

    M Q takes 2 m k^2. Gram matrices and products of k x k, all symmetric, take from half of that on, as only
    lower block triangles are computed.
    """
    total = 0
    for m, k, rule, number in _matrices(config, ranks):
        blocks = 1 + k // 100
        grams, symmetric, full = FURTHER[rule]
        rows = m * (1 + grams) + k * (PRODUCTS + symmetric)
        total += number * (2 * (m + full * k) * k * k + rows * k * k * (blocks + 1) // blocks)
    return total


def _matrices(config: Config, ranks: Ranks) -> Iterator[tuple[int, int, str, int]]:
    """m, k and the rule of orthogonalised matrices, and how many there are of them."""
    yield from _plain(config, ranks)
    yield from _factors(config, ranks)


def _plain(config: Config, ranks: Ranks) -> Iterator[tuple[int, int, str, int]]:
    settings, h, layout = config.optimizer, config.model.hidden_size, qkv_layout(config)
    if settings.matrix_optimizer == "adamw":
        return
    shapes = [(each.shape, each.number) for each in alike(config, None)] if ranks is None else []
    if not factorises_attention(config):
        shapes += [(shape, config.model.num_layers) for shape in ((layout.total, h), (h, layout.rows("q")))]
    yield from ((max(shape), min(shape), "muon", number) for shape, number in shapes)


def _factors(config: Config, ranks: Ranks) -> Iterator[tuple[int, int, str, int]]:
    rule = config.optimizer.factor_optimizer
    if rule == "adamw" or ranks is None:
        return
    for each in alike(config, ranks):
        yield from ((side, each.columns or 0, rule, each.number) for side in each.shape)
