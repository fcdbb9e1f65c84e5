"""The methods that are compared, and what is pure about comparing them: rates, sizes, equal operations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from inrank_megatron.config.schema import ModelConfig
from inrank_megatron.lowrank.criteria.buffer import default_buffer

FIRST = "InRank-Efficient, grown"
"""The arm whose ranks size the arms that are compared at "the found rank"."""

# In the order in which they run. {found} is the mean rank that FIRST came to over all seeds, rounded up,
# {found_share} the same as a parameter budget; {rank} and {budget} are given, {ffn} is the MLP's width within
# the budget, {switch} a quarter of the steps, {warmup} a fortieth. The presets are made for width 768 and for
# long runs: {buffer} is theirs in proportion to the width, and {warmup} stands for their 200 steps before the
# first check.
ARMS = {
    "dense": "--method dense",
    "dense, narrower MLP": "--method dense --ffn-hidden-size {ffn}",
    FIRST: "--inrank --switch-iters {switch} --final-ranks grown",
    "fixed rank, random, found rank": "--method fixed-rank --rank {found} --factor-init random",
    "InRank-Efficient, output, found size": (
        "--inrank --switch-iters {switch} --final-ranks output --parameter-budget {found_share}"
    ),
    "InRank-Efficient, output, budget": (
        "--inrank --switch-iters {switch} --final-ranks output --parameter-budget {budget}"
    ),
    "InRank-Efficient, output, threshold": (
        "--inrank --switch-iters {switch} --final-ranks output --output-threshold 0.9"
    ),
    "warm start, budget": "--method warm-start --switch-iters {switch} --parameter-budget {budget}",
    "fixed rank, random, budget": "--method fixed-rank --rank {rank} --factor-init random",
    "InRank-Efficient, re-estimated": "--inrank --switch-iters {switch} --final-ranks re-estimated",
    "warm start, found size": "--method warm-start --switch-iters {switch} --parameter-budget {found_share}",
    "fixed rank, spectral, found rank": "--method fixed-rank --rank {found} --factor-init spectral",
    "InRank": "--method inrank",
    "LoRA, budget": "--method lora --rank {rank}",
    "ReLoRA, budget": (
        "--method relora --rank {rank} --relora-interval {switch} --relora-warmup-iters {warmup}"
    ),
    "InRank-Efficient, plain truncation": "--inrank --switch-iters {switch} --truncation plain",
    "InRank-Efficient, Fisher truncation": "--inrank --switch-iters {switch} --truncation fisher",
    "InRank-Efficient, criterion eq7": "--inrank --switch-iters {switch} --rank-criterion eq7",
    "InRank-Efficient, criterion released": "--inrank --switch-iters {switch} --rank-criterion released",
    "InRank-Efficient, random start": "--inrank --switch-iters {switch} --factor-init random",
    "InRank-Efficient, without W0": (
        "--inrank --switch-iters {switch} --no-frozen-base --factor-init kaiming --rank-criterion released"
    ),
    "InRank-Efficient, preset paper": (
        "--inrank --inrank-preset paper --switch-iters {switch} --buffer {buffer} --factor-lr-multiplier 1"
    ),
    "InRank-Efficient, preset released": (
        "--inrank --inrank-preset released --switch-iters {switch} --buffer {buffer} "
        "--rank-check-start {warmup} --factor-lr-multiplier 1"
    ),
    "InRank-Efficient, one rate": "--inrank --switch-iters {switch} --factor-lr-multiplier 1",
    "fixed rank, random, found rank, one rate": (
        "--method fixed-rank --rank {found} --factor-init random --factor-lr-multiplier 1"
    ),
}


@dataclass(frozen=True)
class Size:
    """``rank`` of every factorised linear, and these factors over the dense linears (``share``)."""

    rank: float
    share: float


@dataclass(frozen=True)
class Result:
    """What one finished run left.

    Attributes:
        valid, test: perplexity a token; test None: the data has no text for it.
        size: mean rank and share at the end; None: dense linears.
        parameters: at the end, frozen ones included.
        flops: of training. seconds: of training without evaluations at the end.
    """

    valid: float
    test: float | None
    size: Size | None
    parameters: int
    flops: float
    seconds: float


def flags(
    arm: str, *, steps: int, found: Size | None, budget: Size, model: ModelConfig, multiplier: float = 1.0
) -> list[str] | None:
    """The launcher's flags of an arm; None as long as it lacks the size that InRank finds.

    ``multiplier``: learning rate of factors over that of the rest, where the arm does not fix it.
    """
    if found is None and "{found" in ARMS[arm]:
        return None
    own = (
        ARMS[arm]
        .format(
            switch=max(1, steps // 4),
            warmup=max(1, steps // 40),
            found=found and math.ceil(found.rank - 1e-9),
            # A budget is a number of parameters, rounded down: a little more than the share, not less.
            found_share=found and f"{found.share + 1e-6:.6f}",
            rank=int(budget.rank),
            budget=f"{budget.share:g}",
            buffer=default_buffer(model.hidden_size),
            ffn=int(budget.share * model.ffn_hidden_size),
        )
        .split()
    )
    if "--method dense" in ARMS[arm] or "--factor-lr-multiplier" in own:
        return own
    return [*own, "--factor-lr-multiplier", f"{multiplier:g}"]


def best_rate(by_rate: Mapping[float, Result | None]) -> float | None:
    """The rate of the lowest validation perplexity; a run that failed (None) has none."""
    ended = {rate: result.valid for rate, result in by_rate.items() if result is not None}
    return min(ended, key=ended.__getitem__, default=None)


def missing_rates(given: Sequence[float], tried: Mapping[float, Result | None]) -> list[float]:
    """The rates to try next: those given, then one beyond an edge as long as the best lies there."""
    if missing := [rate for rate in given if rate not in tried]:
        return missing
    best = best_rate(tried)
    if best is None or len(tried) < 2:
        return []
    beyond = {min(tried): best / 2, max(tried): best * 2}
    return [beyond[best]] if best in beyond else []


def equal_flops_steps(steps: int, *, dense: Result, arm: Result) -> int:
    """The steps in which an arm does the operations of the dense run of ``steps``."""
    return max(1, round(steps * dense.flops / arm.flops))


def row(arm: str, rate: float, results: Sequence[Result], *, dense: Result, steps: int) -> dict:
    """A table row: means over the seeds, and the standard deviation of the test perplexity."""
    tests = [result.test for result in results if result.test is not None]
    sizes = [result.size for result in results if result.size]
    return {
        "arm": arm,
        "steps": steps,
        "lr": rate,
        "test_perplexity": [round(test, 2) for test in tests],
        "mean": round(fmean(tests), 2),
        "deviation": round(stdev(tests), 2) if len(tests) > 1 else None,
        "rank": round(fmean(size.rank for size in sizes), 1) if sizes else None,
        "parameters": round(fmean(result.parameters for result in results)),
        "FLOPs_over_dense": round(fmean(result.flops for result in results) / dense.flops, 3),
        "seconds": round(fmean(result.seconds for result in results)),
    }
