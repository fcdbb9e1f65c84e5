"""Every method with the settings that the tests train it by, and the checks that each row gets.

A new method is one row of ``CASES``.
"""

from dataclasses import dataclass
from enum import Enum, auto

CHECK = 3
"""Steps between two rank checks."""
SWITCH = 4 * CHECK
GLOBAL_BATCH, ACCUMULATION = 4, 2
STEPS = 50
"""Of the longest comparisons: rank checks every 3, the switch after 12, restarts every 6."""

SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_iters": STEPS,
    "global_batch_size": GLOBAL_BATCH,
    "lr": 1e-3,
    "clip_grad": 0.5,
}


class Tag(Enum):
    """A check that some rows get, or what they need to pass one."""

    PAIRWISE = auto()
    """Compared with one process on every pair of engine settings. Without it once, on TP2 SP DP2: what such
    a row has of its own is decided or drawn, and that happens in one place."""
    LONG = auto()
    """Compared over 50 steps on TP2 SP, far past its last change."""
    HALF = auto()
    """Compared in BF16 and FP16 too."""
    WITHOUT_SP = auto()
    """Compared without sequence parallelism too, where layers have other collectives: dense, with W0 and
    without it, and LLaMA's."""
    APEX = auto()
    """Compared under the stand-in for Apex's Adam too: a case per ZeRO stage that it may have."""
    ORTHOGONALISED = auto()
    """Its matrices are orthogonalised, which replicas divide: compared once on each kind of state."""
    MORE_LAYOUTS = auto()
    """Compared on TP4 and with factors in rank space too."""
    RANKS_FALL = auto()
    """Its ranks fall at the switch, and nowhere else."""
    STARTS_AS_DENSE = auto()
    """The loss before the first step is the dense model's."""
    STARTS_LOWER = auto()
    """There is a step down the gradient in the initial factors."""
    STARTS_TRUNCATED = auto()
    """The initial factors are a truncation of the dense weights."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference of a loss and of a gradient norm, and largest difference of a rank."""

    loss: float
    grad_norm: float
    rank: int


# In FP32 only rounding differs.
FP32 = Tolerance(2e-6, 3e-5, 0)
# Columns that start at the default norm of 0.5: next to weights of width 64 their products are large, and so
# is the rounding of what is computed from them.
FP32_OF_LARGE_COLUMNS = Tolerance(1e-5, 3e-4, 0)


@dataclass(frozen=True)
class Case:
    """A method, and what the tests ask of it.

    Args:
        settings: flat, over ``SIZES``.
        tags: the checks that it gets besides those of every row.
        steps: of its comparisons that do not take all 50: past every change that the method makes.
        tolerance: of its comparisons in FP32.
    """

    settings: dict
    tags: frozenset[Tag] = frozenset()
    steps: int = 14
    tolerance: Tolerance = FP32

    @property
    def grows(self) -> bool:
        return self.settings["method"].startswith("inrank")

    @property
    def dense(self) -> str:
        """The row that trains the same model without factors."""
        return "llama-dense" if self.settings.get("model_type") == "llama" else "dense"


def _case(method: str, *tags: Tag, steps: int = 14, tolerance: Tolerance = FP32, **settings) -> Case:
    return Case({"method": method, **settings}, frozenset(tags), steps, tolerance)


# A start on the scale of these small weights, whose largest singular values are a third of those at width
# 768: the default's magnifies rounding, see `FP32_OF_LARGE_COLUMNS`.
GROWING = {"rank_check_interval": CHECK, "buffer": 8, "initial_column_norm": 0.1}
LLAMA = {"model_type": "llama"}
ATTENTION = {"factorised_linears": "mlp-attention"}
SEPARATE = {**ATTENTION, "qkv_factors": "separate"}
MERGES = {"rank": 8, "relora_interval": 2 * CHECK, "relora_warmup_iters": 2}
MUON = {"matrix_optimizer": "muon"}
MUON_ON_FACTORS = {"factor_optimizer": "muon"}
RECOMPUTE = {"recompute_granularity": "full"}

CASES = {
    "dense": _case("dense", Tag.PAIRWISE, Tag.HALF, Tag.WITHOUT_SP, steps=10),
    "fixed-rank": _case("fixed-rank", Tag.PAIRWISE, Tag.HALF, Tag.STARTS_TRUNCATED, steps=10, rank=15),
    "fixed-rank-random": _case("fixed-rank", steps=10, rank=15, factor_init="random"),
    "fixed-rank-attention": _case("fixed-rank", steps=10, rank=15, **SEPARATE),
    "lora": _case("lora", Tag.PAIRWISE, Tag.HALF, Tag.STARTS_AS_DENSE, steps=10, rank=8),
    "lora-attention": _case("lora", steps=10, rank=8, **ATTENTION),
    "relora": _case("relora", Tag.PAIRWISE, Tag.HALF, Tag.STARTS_AS_DENSE, **MERGES),
    "inrank": _case("inrank", Tag.PAIRWISE, Tag.HALF, Tag.STARTS_LOWER, steps=10, **GROWING),
    "inrank-random": _case(
        "inrank",
        factor_init="random",
        rank_criterion="eq7",
        eq7_window="fixed",
        threshold=0.6,
        **GROWING,
    ),
    "inrank-kaiming": _case("inrank", factor_init="kaiming", **GROWING),
    "inrank-efficient": _case(
        "inrank-efficient",
        Tag.PAIRWISE,
        Tag.LONG,
        Tag.HALF,
        Tag.WITHOUT_SP,
        Tag.APEX,
        Tag.MORE_LAYOUTS,
        **GROWING,
    ),
    "inrank-efficient-default-start": _case(
        "inrank-efficient", tolerance=FP32_OF_LARGE_COLUMNS, rank_check_interval=CHECK, buffer=8
    ),
    "inrank-efficient-attention": _case(
        "inrank-efficient", Tag.PAIRWISE, **ATTENTION, **RECOMPUTE, **GROWING
    ),
    "llama-dense": _case("dense", steps=10, **LLAMA),
    "llama-lora": _case("lora", Tag.STARTS_AS_DENSE, steps=10, **LLAMA, rank=8),
    # Heads share keys, and norms of heads get their gradient from a part of the heads and of the sequence.
    "llama-lora-grouped": _case(
        "lora", steps=10, **LLAMA, **SEPARATE, num_query_groups=2, qk_layernorm=True, rank=8
    ),
    "llama-inrank": _case("inrank", Tag.STARTS_LOWER, **LLAMA, **ATTENTION, **GROWING),
    "llama-warm-start": _case("warm-start", **LLAMA, **ATTENTION, truncation="fisher"),
    "llama-fixed-rank": _case("fixed-rank", steps=10, **LLAMA, rank=15),
    "llama-relora": _case(
        "relora",
        Tag.PAIRWISE,
        Tag.HALF,
        Tag.STARTS_AS_DENSE,
        **LLAMA,
        **ATTENTION,
        **MERGES,
        relora_reset="random",
    ),
    "llama-inrank-efficient": _case(
        "inrank-efficient",
        Tag.PAIRWISE,
        Tag.WITHOUT_SP,
        Tag.STARTS_AS_DENSE,
        **LLAMA,
        **SEPARATE,
        **RECOMPUTE,
        absorb_columns=True,
        **GROWING,
    ),
    "inrank-efficient-eq7": _case(
        "inrank-efficient",
        Tag.STARTS_AS_DENSE,
        rank_criterion="eq7",
        threshold=0.6,
        absorb_columns=True,
        **GROWING,
    ),
    "inrank-efficient-released": _case(
        "inrank-efficient",
        Tag.PAIRWISE,
        rank_criterion="released",
        frozen_base=False,
        factor_init="kaiming",
        **GROWING,
    ),
    # Its buffer and its 200 steps before the first check are those of larger models and longer runs.
    "inrank-efficient-preset-released": _case(
        "inrank-efficient", inrank_preset="released", rank_check_start=0, **GROWING
    ),
    "inrank-efficient-patience": _case(
        "inrank-efficient",
        switch_patience=2,
        truncation="plain",
        rank_multiple_of=4,
        new_column_moments="mean",
        **GROWING,
    ),
    # Starts with more than it needs, so that ranks fall at the switch.
    "inrank-efficient-re-estimated": _case(
        "inrank-efficient", Tag.RANKS_FALL, final_ranks="re-estimated", initial_rank=10, **GROWING
    ),
    "inrank-efficient-fisher": _case(
        "inrank-efficient",
        Tag.PAIRWISE,
        Tag.HALF,
        truncation="fisher",
        final_ranks="output",
        parameter_budget=0.3,
        **GROWING,
    ),
    "inrank-efficient-paper": _case("inrank-efficient", Tag.STARTS_LOWER, inrank_preset="paper", **GROWING),
    "dense-muon": _case("dense", steps=10, **MUON),
    "llama-relora-muon": _case("relora", **LLAMA, **ATTENTION, **MERGES, **MUON_ON_FACTORS),
    "inrank-efficient-spectron": _case(
        "inrank-efficient", Tag.ORTHOGONALISED, factor_optimizer="spectron", **MUON, **GROWING
    ),
    # The start of LoRA, U = 0, is where the rule has least to go by.
    "lora-lora-muon": _case("lora", steps=15, rank=8, factor_optimizer="lora-muon"),
    "inrank-efficient-lora-muon": _case("inrank-efficient", factor_optimizer="lora-muon", **GROWING),
    "warm-start": _case("warm-start", Tag.PAIRWISE, Tag.HALF, Tag.STARTS_AS_DENSE),
    "warm-start-budget": _case("warm-start", **ATTENTION, parameter_budget=0.4),
}

METHODS = {name: case.settings for name, case in CASES.items()}


def tagged(*tags: Tag) -> tuple[str, ...]:
    """The rows that have all these tags."""
    return tuple(name for name, case in CASES.items() if case.tags.issuperset(tags))
