"""The settings of methods whose ranks grow as in InRank: presets, checks and derived values."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

from inrank_megatron.errors import UserError
from inrank_megatron.fields import Positive, Section, setting
from inrank_megatron.lowrank.methods.base import Columns, PhaseShape, Rules, Sections
from inrank_megatron.lowrank.methods.factorising import Factorising, StartSettings, smallest_dim
from inrank_megatron.lowrank.methods.growth import GrowthRule, GrowthSettings

INRANK_PRESETS = {
    "paper": {
        "initial_rank": 2,
        "buffer": 100,
        "threshold": 0.9,
        "rank_check_interval": 1,
        "rank_check_start": 0,
        "rank_criterion": "eq7",
        "eq7_window": "sliding",
        "frozen_base": True,
        "factor_init": "gradient",
        "absorb_columns": False,
        "new_column_moments": "zero",
        "final_ranks": "grown",
        "truncation": "plain",
        "rank_multiple_of": 1,
        "factor_optimizer": "adamw",
        "matrix_optimizer": "adamw",
        "factor_lr_multiplier": 1.0,
    },
    "released": {
        "initial_rank": 2,
        "buffer": 100,
        "threshold": 0.9,
        "rank_check_interval": 25,
        "rank_check_start": 200,
        "rank_criterion": "released",
        "frozen_base": False,
        "factor_init": "kaiming",
        "new_column_moments": "zero",
        "final_ranks": "grown",
        "truncation": "plain",
        "rank_multiple_of": 1,
        "factor_optimizer": "adamw",
        "matrix_optimizer": "adamw",
        "factor_lr_multiplier": 1.0,
    },
}

CALM_UPDATE = 1.25
"""Up to this multiple of the learning rate, new columns start with zero moments; 1.17 at betas 0.9, 0.95."""


class InRankSettings(Section):
    """How InRank initialises its columns, at the start and later."""

    inrank_preset: Literal["paper", "released"] | None = setting(
        "settings of InRank as in its paper or in its authors' code; a setting that you give yourself "
        "replaces the preset's",
        None,
    )
    frozen_base: bool = setting("W = W0 + U V with a frozen W0; off: W = U V (authors' code)", True)
    initial_column_norm: Positive = setting("norm of each first column of U and row of V", 0.5)
    new_column_norm: Positive = setting("norm of each column that is added later", 0.1)
    absorb_columns: bool | None = setting(
        "subtract the product of new columns from W0, so that they do not change the function at first; "
        "left out: only with a pretrained checkpoint",
        None,
    )
    new_column_moments: Literal["zero", "mean"] | None = setting(
        "Adam's second moment of columns added later: zero, or the mean of those in use; left out: zero, but "
        "mean where Adam's betas allow steps well above the learning rate",
        None,
    )


def _base(asked):
    """Settings that need a frozen W0 turn it on again; without W0, defaults follow the authors' code."""
    inrank = asked.config.inrank
    if inrank.frozen_base:
        return
    needs = {
        "rank_criterion = 'update'": inrank.rank_criterion == "update" and not asked.free("rank_criterion"),
        "absorb_columns": inrank.absorb_columns is True and not asked.free("absorb_columns"),
        "factor_init = 'gradient'": inrank.factor_init == "gradient" and not asked.free("factor_init"),
        "pretrained_checkpoint": asked.config.training.pretrained_checkpoint is not None,
    }
    wanted = [need for need, holds in needs.items() if holds]
    if asked.free("frozen_base"):
        if wanted:
            yield "frozen_base", True, f"{' and '.join(wanted)}: needs a frozen W0"
        return
    if inrank.rank_criterion == "update" and asked.free("rank_criterion"):
        yield "rank_criterion", "released", "frozen_base is off"
    if inrank.factor_init in (None, "gradient") and asked.free("factor_init"):
        yield "factor_init", "kaiming", "frozen_base is off"


def _columns(asked):
    """Lowers the first rank and the buffer until they fit into the width and below the largest rank."""
    inrank, width = asked.config.inrank, asked.min_dim
    rule = GrowthRule.from_config(asked.config)
    buffer = rule.buffer_of(width)
    rank, largest = inrank.initial_rank, inrank.max_rank
    needed = rank if largest is None else max(rank, largest)
    if needed + buffer > width and asked.free("buffer"):
        fitting = max(1, min(replace(rule, buffer=None).buffer_of(width), width - needed))
        if fitting != buffer:
            yield "buffer", fitting, f"rank {needed} and the buffer must fit into a width of {width}"
            buffer = fitting
    most = min(width - buffer, largest or width)
    if rank > most >= 1 and asked.free("initial_rank"):
        bound = f"max_rank = {largest}" if largest == most else f"buffer {buffer} in a width of {width}"
        yield "initial_rank", most, f"{bound} leaves no more"


class GrowingRank(Factorising):
    """What InRank and InRank-Efficient have in common before a run is built."""

    settings: ClassVar[Sections] = (*Factorising.settings, StartSettings, GrowthSettings, InRankSettings)
    presets = ("inrank_preset", INRANK_PRESETS)
    adaptations: ClassVar[Rules] = (_base, *Factorising.adaptations, _columns)

    @classmethod
    def check_settings(cls, run, shapes):
        super().check_settings(run, shapes)
        _check_base(run, cls.name)
        GrowthRule.from_config(run).check_settings(smallest_dim(shapes))

    @classmethod
    def derived(cls, run):
        """How new columns start. The values decide what is trained, so the run records them."""
        inrank, optimizer = run.inrank, run.optimizer
        absorbs = inrank.frozen_base and run.training.pretrained_checkpoint is not None
        calm = largest_update(optimizer.adam_beta1, optimizer.adam_beta2) <= CALM_UPDATE
        return {
            "absorb_columns": absorbs if inrank.absorb_columns is None else inrank.absorb_columns,
            "new_column_moments": inrank.new_column_moments or ("zero" if calm else "mean"),
        }

    @classmethod
    def columns(cls, run, min_dim):
        rule = GrowthRule.from_config(run)
        return Columns(rule.buffer_of(min_dim), rule.capacity(min_dim))

    @classmethod
    def phases(cls, run, columns, *, break_even):
        base, most = run.inrank.frozen_base, columns.capacity
        product = "W0 + U V" if base else "U V"
        first = run.inrank.initial_rank + columns.buffer
        return [
            PhaseShape(f"phase 1, {product}, at the start", first, most, frozen_base=base),
            PhaseShape(f"phase 1, {product}, all columns", most, most, frozen_base=base, is_largest=True),
        ]

    @classmethod
    def keeps_initial_factors(cls, run):
        return GrowthRule.from_config(run).spectrum == "update"


def _check_base(run, method: str) -> None:
    """Refuses settings that need a frozen W0 without one, and a start that does not fit."""
    inrank, source = run.inrank, run.inrank.factor_init
    if inrank.frozen_base:
        legal: tuple[str | None, ...] = (None, "gradient", "random", "kaiming")
    else:
        legal = ("random", "kaiming")
        if inrank.rank_criterion == "update":
            raise UserError(
                "rank_criterion = 'update': judges the change of W0 + U V, and frozen_base is off; give "
                "--rank-criterion released or eq7"
            )
        if inrank.absorb_columns:
            raise UserError(
                "absorb_columns on: subtracts from a frozen W0, and frozen_base is off; give "
                "--no-absorb-columns or --frozen-base"
            )
    if source not in legal:
        names = " or ".join(name for name in legal if name)
        without = "" if inrank.frozen_base else "without frozen_base "
        raise UserError(
            f"factor_init = {source!r}: method {method} {without}starts from {names}; change --factor-init"
        )
    if run.training.pretrained_checkpoint is not None and not inrank.frozen_base:
        raise UserError(
            "pretrained_checkpoint with frozen_base off: random factors without a W0 cannot use its "
            "weights; give --frozen-base, or drop --pretrained-checkpoint"
        )


def largest_update(beta1: float, beta2: float) -> float:
    """The largest update, in units of the learning rate, that Adam makes of any gradients from moments of
    zero on if its bias corrections are 1 already; infinite if there is no bound.

    ``|m| / sqrt(v) <= (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2))`` for
    ``m = (1 - beta1) sum beta1^i g_i``, ``v = (1 - beta2) sum beta2^i g_i^2`` (Cauchy-Schwarz).
    """
    if beta1**2 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
