"""What the methods that factorise linears have in common, and the base of those with a given rank."""

from typing import ClassVar, Literal

from inrank_megatron.errors import UserError
from inrank_megatron.fields import Count, Section, setting
from inrank_megatron.lowrank.methods.base import Columns, Method, Rules, Sections


class FactorSettings(Section):
    """Which linears have factors."""

    factorised_linears: Literal["mlp", "mlp-attention"] = setting(
        "linears that are factorised: those of the MLPs, or also QKV and the output projection of attention",
        "mlp",
    )
    qkv_factors: Literal["fused", "separate"] = setting(
        "query, key and value as one matrix with one rank, or as three with a rank each (mlp-attention)",
        "fused",
    )


class StartSettings(Section):
    """Where the first columns come from; for methods that have a choice."""

    factor_init: Literal["gradient", "random", "kaiming", "spectral"] | None = setting(
        "where the first columns come from: the first gradient, random directions, Kaiming entries, or "
        "the SVD of the initial weight; left out: gradient (InRank), spectral (fixed-rank)",
        None,
    )


class RankSettings(Section):
    """A rank that the user gives."""

    rank: Count | None = setting("the rank of fixed-rank, lora and relora", None)


def _attention_too(asked):
    inrank = asked.config.inrank
    alone = inrank.qkv_factors == "separate" and inrank.factorised_linears == "mlp"
    if alone and asked.free("factorised_linears"):
        yield "factorised_linears", "mlp-attention", "qkv_factors = 'separate' is about attention"


def _grouped_apart(asked):
    """With grouped queries, key and value are smaller than query, so one rank for all three suits none."""
    inrank, model = asked.config.inrank, asked.config.model
    fused = inrank.factorised_linears == "mlp-attention" and inrank.qkv_factors == "fused"
    if fused and model.query_groups < model.num_attention_heads and asked.free("qkv_factors"):
        reason = f"num_query_groups = {model.query_groups} make key and value smaller than query"
        yield "qkv_factors", "separate", reason


class Factorising(Method):
    """A method that factorises the linears that the run names, at the start or at a switch."""

    settings: ClassVar[Sections] = (FactorSettings,)
    adaptations: ClassVar[Rules] = (_attention_too, _grouped_apart)

    @classmethod
    def check_settings(cls, run, shapes):
        inrank = run.inrank
        if inrank.qkv_factors != "fused" and inrank.factorised_linears != "mlp-attention":
            raise UserError(
                f"qkv_factors = {inrank.qkv_factors!r}: with factorised_linears = "
                f"{inrank.factorised_linears!r} query, key and value have no factors; give "
                "--factorised-linears mlp-attention"
            )


class OfGivenRank(Factorising):
    """Every factorised linear has ``rank`` columns, or min(O, I) if that is less."""

    settings: ClassVar[Sections] = (*Factorising.settings, RankSettings)

    def __init__(self, rank: int):
        self.rank = rank

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls(config.inrank.rank)

    @classmethod
    def check_settings(cls, run, shapes):
        super().check_settings(run, shapes)
        rank, min_dim = run.inrank.rank, smallest_dim(without_narrow_parts(shapes))
        if rank is None:
            raise UserError(f"rank: method {cls.name} needs one; give --rank, from 1 to {min_dim}")
        if rank > min_dim:
            raise UserError(f"rank = {rank}: must not exceed {width(min_dim)}; lower --rank")

    @classmethod
    def columns(cls, run, min_dim):
        return Columns(capacity=run.inrank.rank)


def smallest_dim(shapes) -> int:
    """The largest rank that every factorised linear can have."""
    return min(map(min, shapes.values()))


def without_narrow_parts(shapes):
    """``shapes`` without separate keys and values, whose few features limit their rank."""
    return {name: shape for name, shape in shapes.items() if not name.endswith((".k", ".v"))}


def width(min_dim: int) -> str:
    """The smallest dimension with its meaning, for messages."""
    return f"{min_dim}, the smaller of hidden_size and ffn_hidden_size (or of one part of QKV)"
