"""The rank that the criterion of the authors' released code finds in factors that were never trained.

InRank without W0 starts from Kaiming factors and judges ``U V`` itself. Growing such a product check by
check, with no data at all, comes to a rest at a rank that depends on the shape, the buffer and the threshold
alone; it is within 2 of every rank in the paper's table 3. A learned rank says something about the data only
where it differs from this one.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean

import torch

from inrank_megatron.config.checks import check
from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.lowrank.linalg.new_columns import full_columns
from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.inrank import InRank

SEEDS = (0, 1, 2)
PAPER_WIDTHS, PAPER_THRESHOLDS = (768, 1024, 1280), (0.8, 0.85, 0.9)


class UntrainedProduct:
    """``U V`` of Kaiming factors of a linear of ``shape`` (O, I); columns are drawn once, up to ``capacity``.

    The Gram matrices of all columns hold those of the first k, so a spectrum costs k^3 operations and none
    that involve O or I.
    """

    def __init__(self, shape: tuple[int, int], *, capacity: int, seed: int):
        self.shape, self.capacity = shape, capacity
        generator = torch.Generator().manual_seed(seed)
        left, right = full_columns(shape, capacity, "kaiming", capacity=capacity, generator=generator)
        left, right = left.double(), right.double()
        self._left, self._right = left.T @ left, right @ right.T
        self.spectrum = cache(self._spectrum)

    def _spectrum(self, k: int) -> tuple[float, ...]:
        """Singular values of the product of the first k columns: roots of the eigenvalues of
        ``L^T (V V^T) L`` with ``L L^T = U^T U``. Random columns are independent enough for Gram matrices.
        """
        lower = torch.linalg.cholesky(self._left[:k, :k])
        squares = torch.linalg.eigvalsh(lower.T @ self._right[:k, :k] @ lower).clamp(min=0)
        return tuple(squares.sqrt().flip(0).tolist())

    def fixed_point(self, method: InRank) -> int:
        """The rank at which the checks of ``method`` leave this product unchanged."""
        step, name = method.growth.interval, "untrained"
        spec = method.structure({name: min(self.shape)})[name]
        rank, active = spec.rank, spec.active_columns
        while True:
            view = LayerView(
                name=name,
                output_size=self.shape[0],
                input_size=self.shape[1],
                rank=rank,
                active_columns=active,
                capacity=self.capacity,
                attainable_rank=active,
                singular_values=self.spectrum(active),
            )
            [decided] = method.plan_step(step, [view]).decide([view])
            if (decided.rank, decided.active_columns) == (rank, active):
                return rank
            rank, active = decided.rank, min(decided.active_columns, self.capacity)


def released_method(config: Config) -> InRank:
    """InRank with the run's buffer, threshold and limits, and all else as in the authors' released code."""
    method = InRank.from_config(config, switch_step=None)
    growth = replace(method.growth, criterion="released", after=0)
    return replace(method, growth=growth, source="kaiming", frozen_base=False)


def untrained_ranks(config: Config) -> dict[tuple[int, int], float]:
    """The untrained fixed point of every shape (O, I) of the run's linears, the mean over ``SEEDS``."""
    method = released_method(config)
    return {
        shape: fmean(product.fixed_point(method) for product in products)
        for shape, products in _products(config).items()
    }


def _products(config: Config) -> dict[tuple[int, int], list[UntrainedProduct]]:
    method = released_method(config)
    shapes = dict.fromkeys(linear_shapes(config).values())
    capacities = {s: method.structure({"untrained": min(s)})["untrained"].capacity for s in shapes}
    return {s: [UntrainedProduct(s, capacity=k, seed=i) for i in SEEDS] for s, k in capacities.items()}


def untrained_table(
    widths: Sequence[int] = PAPER_WIDTHS, thresholds: Sequence[float] = PAPER_THRESHOLDS
) -> list[dict[str, float]]:
    """Rows ``hidden_size``, ``threshold``, ``rank``: the mean over both MLP linears and ``SEEDS``, rounded.

    The paper's table 3 has 152, 192, 254 (width 768), 168, 213, 286 (1024) and 179, 230, 312 (1280).

    Raises:
        UserError: a width that r + b does not fit into, or a threshold outside of (0, 1].
    """
    rows = []
    for width in widths:
        configs = {threshold: _released(width, threshold) for threshold in thresholds}
        products = [one for same in _products(configs[thresholds[0]]).values() for one in same]
        for threshold, config in configs.items():
            method = released_method(config)
            rank = round(fmean(product.fixed_point(method) for product in products))
            rows.append({"hidden_size": width, "threshold": threshold, "rank": rank})
    return rows


def _released(width: int, threshold: float) -> Config:
    """One block of the authors' released variant of InRank."""
    config = from_flat(
        {
            "num_layers": 1,
            "hidden_size": width,
            "num_attention_heads": 1,
            "seq_length": 1,
            "train_iters": 1,
            "method": InRank.name,
            "threshold": threshold,
            "rank_criterion": "released",
            "factor_init": "kaiming",
            "frozen_base": False,
        }
    )
    check(config, world_size=1)
    return config
