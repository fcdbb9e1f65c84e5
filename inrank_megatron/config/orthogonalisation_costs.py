"""What Muon, Spectron and LoRA-Muon keep and compute: one moment where Adam has two, and products of k x k.

Letters as in `costs.py`; a matrix [m, k] is orthogonalised from its Gram matrix [k, k], k the side that
tensor parallelism does not shard.
"""

from collections.abc import Iterator, Mapping

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import factorises_attention, linear_shapes, qkv_layout

Columns = Mapping[str, int] | None
"""Columns of each linear's factors; None: dense linears."""
BATCH, COPIES = 2**23, 9
"""Entries [k, k] that are computed together, at least one matrix, and the copies of them (as counted)."""
PRODUCTS = 17
"""Symmetric products of k x k for a matrix's five iterations."""
FURTHER = {"muon": (0, 0, 0), "spectron": (1, 7, 0), "lora-muon": (1, 7 + 37, 4)}
"""By rule, for each matrix: Gram matrices of the factor itself; symmetric products of k x k, for its spectral
norm and the iterations of its inverse root; full products of k x k.
"""


def orthogonalised_entries(config: Config, columns: Columns) -> int:
    """Parameters with a momentum alone, over all tensor-parallel ranks."""
    return sum(m * k for m, k, _ in _matrices(config, columns))


def orthogonalisation_bytes(
    config: Config, columns: Columns, *, used: Columns, tensor_parallel: int, replicas: int, zero_stage: int
) -> int:
    """Bytes on a device that a step needs beside states and gradients, at their most: of one kind of matrices
    after the other their steps, and in FP32 the whole and the orthogonalised ones of this replica's share;
    `COPIES` of k x k in FP64 of those that are computed together. LoRA-Muon has the inverse roots of all
    factors besides, on every rank, and sums them over replicas.

    Args:
        columns, used: allocated, and in use, of which products are made.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for (m, k, rule), (*_, part, _) in zip(_matrices(config, columns), _matrices(config, used), strict=True):
        kinds.setdefault(rule, []).append((m * k, part))
    found = [0]
    for rule, matrices in kinds.items():
        entries, share = (
            sum(entries for entries, _ in matrices) // tensor_parallel,
            -(-len(matrices) // replicas),
        )
        copies = 4 * entries * (3 if zero_stage else 2 + replicas) // replicas
        together = max(min(share * k * k, max(BATCH, k * k)) for _, k in matrices)
        roots = 8 * sum(k * k for _, k in matrices) if rule == "lora-muon" else 0
        found.append(copies + roots + max(8 * COPIES * together, roots * (replicas > 1)))
    return max(found)


def orthogonalisation_flops(config: Config, columns: Columns) -> int:
    """Operations of the products of one step (a multiply-add is two), over all replicas and tensor-parallel
    ranks; those of k x k once, though every rank of a tensor-parallel group does them.

    M Q takes 2 m k^2. Gram matrices and products of k x k, all symmetric, take from half of that on, as only
    lower block triangles are computed.
    """
    total = 0
    for m, k, rule in _matrices(config, columns):
        blocks = 1 + k // 100
        grams, symmetric, full = FURTHER[rule]
        rows = m * (1 + grams) + k * (PRODUCTS + symmetric)
        total += 2 * (m + full * k) * k * k + rows * k * k * (blocks + 1) // blocks
    return total


def _matrices(config: Config, columns: Columns) -> Iterator[tuple[int, int, str]]:
    """m, k and the rule of each orthogonalised matrix."""
    settings, h, shapes = config.optimizer, config.model.hidden_size, linear_shapes(config)
    layout = qkv_layout(config)
    if settings.matrix_optimizer != "adamw":
        plain = list(shapes.values()) if columns is None else []
        if not factorises_attention(config):
            plain += [(layout.total, h), (h, layout.rows("q"))] * config.model.num_layers
        yield from ((max(shape), min(shape), "muon") for shape in plain)
    if settings.factor_optimizer != "adamw" and columns is not None:
        for name, shape in shapes.items():
            yield from ((side, columns[name], settings.factor_optimizer) for side in shape)
