"""The settings of the methods. Each method lists those that it reads."""

from typing import Literal, Protocol

from inrank_megatron.fields import Count, Positive, Section, Share, Steps, about


class InRankConfig(Section):
    """Ranks: W = W0 + U V with r ranked and b buffer columns (InRank), or U V alone (fixed rank), or LoRA."""

    inrank_preset: Literal["paper", "released"] | None = about(
        "InRank as its paper or its authors' code has it; a setting that is given explicitly wins", None
    )
    factorised_linears: Literal["mlp", "mlp-attention"] = about(
        "linears that are factorised: of the MLPs, or QKV and projection too", "mlp"
    )
    qkv_factors: Literal["fused", "separate"] = about(
        "query, key and value as one matrix with one rank, or as three (mlp-attention)", "fused"
    )
    initial_rank: Count = about("rank r at the start", 2)
    buffer: Count | None = about(
        "columns b that train beyond the rank; left out: 100 x width / 768, at most 100", None
    )
    threshold: Share = about("explained ratio that the rank must reach (alpha)", 0.9)
    rank_check_interval: Count = about("steps between rank checks", 25)
    rank_check_start: Steps = about("no rank check up to this step", 0)
    switch_iters: Count | None = about(
        "step after which every matrix becomes U V (inrank-efficient, warm-start)", None
    )
    switch_epochs: Positive | None = about(
        "the same in epochs; both left out: 1, at most half of train-iters", None
    )
    switch_patience: Count | None = about(
        "or: once no rank has grown at this number of rank checks in a row (inrank-efficient)", None
    )
    max_rank: Count | None = about("largest rank; left out: half the width less the buffer", None)
    rank_criterion: Literal["update", "released", "eq7"] = about(
        "what is judged: the change since the columns were added, U V as in the authors' code, or U V by "
        "equation 7",
        "update",
    )
    eq7_window: Literal["sliding", "fixed"] = about("window of equation 7 for ranks above r", "sliding")
    frozen_base: bool = about("W = W0 + U V with a frozen W0; off: W = U V (authors' code)", True)
    factor_init: Literal["gradient", "random", "kaiming", "spectral"] | None = about(
        "first columns: of the first gradient, random directions, Kaiming entries, or the initial weight's "
        "SVD; left out: gradient (InRank), spectral (fixed-rank)",
        None,
    )
    initial_column_norm: Positive = about("norm of the first columns of U and rows of V", 0.5)
    new_column_norm: Positive = about("norm of columns added later", 0.1)
    absorb_columns: bool | None = about(
        "subtract the product of columns at their start from W0, so that they do not change the function; "
        "left out: with a pretrained checkpoint only",
        None,
    )
    new_column_moments: Literal["zero", "mean"] | None = about(
        "Adam's second moment of columns added later: zero, or the mean of those in use; left out: zero, but "
        "mean where Adam's betas allow steps well above the learning rate",
        None,
    )
    rank: Count | None = about("the rank of fixed-rank, lora and relora", None)
    relora_interval: Count = about("steps between two merges of U V into W0 (relora)", 1000)
    relora_reset: Literal["full", "random", "magnitude"] = about(
        "Adam moments of the factors at a merge: set all to zero, a random part, or the smallest", "magnitude"
    )
    relora_reset_share: Share = about("fraction of the moments that is set to zero (random, magnitude)", 0.9)
    relora_warmup_iters: Steps = about("steps of warm-up after each merge", 50)
    rank_multiple_of: Count = about(
        "round columns after the switch up to a multiple of this (tile of the device)", 1
    )
    final_ranks: Literal["grown", "refound", "output"] | None = about(
        "ranks after the switch: the grown ones, those that the criterion finds anew (perhaps lower), or "
        "those that the layers' outputs need; left out: grown (inrank-efficient), output (warm-start)",
        None,
    )
    output_threshold: Share | None = about(
        "explained ratio of each layer's outputs (output); left out: 0.9, unless a budget is given", None
    )
    parameter_budget: Share | None = about(
        "or: the factors' parameters over these linears' dense ones, divided over layers by need (output)",
        None,
    )
    truncation: Literal["activation-aware", "fisher", "plain"] = about(
        "what the switch approximates: each layer's outputs on its own inputs, the same weighted by the loss "
        "gradient, or its matrix",
        "activation-aware",
    )
    activation_batches: Count = about(
        "last global batches whose activations and gradients weight the truncation", 4
    )


class Training(Protocol):
    """What a method reads of the section on training."""

    @property
    def method(self) -> str: ...

    @property
    def train_iters(self) -> int: ...

    @property
    def pretrained_checkpoint(self) -> str | None: ...


class Run(Protocol):
    """What a method reads of a run's configuration: that knows the methods, not they it."""

    @property
    def inrank(self) -> InRankConfig: ...

    @property
    def training(self) -> Training: ...
