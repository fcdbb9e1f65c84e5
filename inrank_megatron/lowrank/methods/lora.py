"""``W = W0 + U V`` of a given rank, never merged (LoRA, arXiv 2106.09685), as a baseline of pre-training."""

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import InitialiseFactors


class LoRA(Method):
    """``rank``: columns of every factorised linear, cut to min(O, I) where it is larger.

    U starts at zero and V at Kaiming's uniform entries; no factor alpha / r scales the product.
    """

    name = "lora"
    settings = frozenset({"rank", "factorised_linears", "qkv_factors", "factor_lr_multiplier"})

    def __init__(self, rank: int):
        self.rank = rank

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls(config.inrank.rank)

    def structure(self, min_dims):
        ranks = {name: min(self.rank, d) for name, d in min_dims.items()}
        return {name: FactorSpec(columns=r, active=r, rank=r) for name, r in ranks.items()}

    def start(self):
        return [InitialiseFactors(source="zero-product")]
