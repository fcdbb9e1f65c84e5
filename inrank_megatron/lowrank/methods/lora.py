"""``W = W0 + U V`` of a given rank, never merged (LoRA, arXiv 2106.09685), as a baseline of pre-training."""

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.base import PhaseShape
from inrank_megatron.lowrank.methods.changes import InitialiseFactors
from inrank_megatron.lowrank.methods.factorising import OfGivenRank


class LoRA(OfGivenRank):
    """U starts at zero and V at Kaiming's uniform entries; no factor alpha / r scales the product."""

    name = "lora"

    @classmethod
    def phases(cls, run, columns, *, break_even):
        rank = columns.capacity
        return [PhaseShape("W0 + U V", rank, rank, frozen_base=True, is_largest=True)]

    def structure(self, min_dims):
        ranks = {name: min(self.rank, d) for name, d in min_dims.items()}
        return {name: FactorSpec(capacity=r, active_columns=r, rank=r) for name, r in ranks.items()}

    def initialisation(self):
        return [InitialiseFactors(source="zero-product")]
