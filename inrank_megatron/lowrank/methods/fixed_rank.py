"""``W = U V`` of a given rank from the first step on (the baseline of the paper's table 2)."""

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, Source


class FixedRank(Method):
    """``rank``: columns of every factorised linear, cut to min(O, I) where it is larger.

    ``source``: ``spectral``, the truncated SVD of the standard initial weight, singular values shared evenly,
    or ``random-like-weight``, random directions whose product has that weight's norm.
    """

    name = "fixed-rank"
    settings = frozenset({"rank", "factorised_linears", "qkv_factors", "factor_init", "factor_lr_multiplier"})

    def __init__(self, rank: int, *, source: Source = "spectral"):
        self.rank, self.source = rank, source

    @classmethod
    def from_config(cls, config, *, switch_step):
        random = config.inrank.factor_init == "random"
        return cls(config.inrank.rank, source="random-like-weight" if random else "spectral")

    def structure(self, min_dims):
        ranks = {name: min(self.rank, d) for name, d in min_dims.items()}
        return {
            name: FactorSpec(columns=r, active=r, rank=r, base=False, final=True) for name, r in ranks.items()
        }

    def start(self):
        return [InitialiseFactors(source=self.source)]
