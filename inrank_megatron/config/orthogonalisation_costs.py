"""What Muon and Spectron keep and compute: one moment where Adam has two, and products of k x k.

Letters as in `costs.py`; a matrix [m, k] is orthogonalised from its Gram matrix [k, k], k the side that
tensor parallelism does not shard.
"""

from collections.abc import Iterator, Mapping

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import factorises_attention, linear_shapes

Columns = Mapping[str, int] | None
"""Columns of each linear's factors; None: dense linears."""
PRODUCTS, NORM_PRODUCTS = 17, 7
"""Products of k x k for a matrix's five iterations, and for a spectral norm."""


def orthogonalised_entries(config: Config, columns: Columns) -> int:
    """Parameters with a momentum alone, over all tensor-parallel ranks."""
    return sum(m * k for m, k, _ in _matrices(config, columns))


def orthogonalisation_flops(config: Config, columns: Columns) -> int:
    """Operations of the products of one step (a multiply-add is two), over all replicas and tensor-parallel
    ranks; those of k x k once, though every rank of a tensor-parallel group does them.

    M Q takes 2 m k^2. Gram matrices and products of k x k, all symmetric, take from half of that on, as only
    lower block triangles are computed. Spectron takes another Gram matrix, of the factor itself.
    """
    total = 0
    for m, k, spectron in _matrices(config, columns):
        blocks = 1 + k // 100
        rows = m * (1 + spectron) + k * (PRODUCTS + NORM_PRODUCTS * spectron)
        total += 2 * m * k * k + rows * k * k * (blocks + 1) // blocks
    return total


def _matrices(config: Config, columns: Columns) -> Iterator[tuple[int, int, bool]]:
    """m, k and whether Spectron steps it, of each orthogonalised matrix."""
    settings, h, shapes = config.optimizer, config.model.hidden_size, linear_shapes(config)
    if settings.matrix_optimizer != "adamw":
        plain = list(shapes.values()) if columns is None else []
        if not factorises_attention(config):
            plain += [(3 * h, h), (h, h)] * config.model.num_layers
        yield from ((max(shape), min(shape), False) for shape in plain)
    if settings.factor_optimizer != "adamw" and columns is not None:
        for name, shape in shapes.items():
            yield from ((side, columns[name], settings.factor_optimizer == "spectron") for side in shape)
