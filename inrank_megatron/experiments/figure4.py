"""Figure 4 of InRank: perplexity over fixed ranks, and the ranks that the criteria find."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from inrank_megatron.config.loading import from_flat
from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.experiments.small_runs import SmallRuns, perplexity_of
from inrank_megatron.reporting.plots import BLUE, GREEN, GREY, PURPLE, VERMILION, styled
from inrank_megatron.reporting.run import Run

STEPS = 200
RANKS = (2, 4, 8, 16, 32, 48)
FIXED = "--method fixed-rank --factor-init random --rank"
# The presets are made for width 768: their buffer of 100 is 8 here, and released's first check comes early.
CRITERIA = {
    "update": "--inrank",
    "released": "--inrank --inrank-preset released --buffer 8 --rank-check-start 5",
    "eq7": "--inrank --inrank-preset paper --buffer 8",
}
CLOSE = 1.02
"""A rank is as good as the best one if its perplexity is at most this times as high."""


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Six fixed ranks, the dense model and three criteria. Quick: ranks 4 and 32, dense and the default
    criterion, a fifth of the steps.
    """
    steps, ranks, criteria = (STEPS // 5, (4, 32), ["update"]) if quick else (STEPS, RANKS, [*CRITERIA])
    arms = {f"fixed rank {rank}": f"{FIXED} {rank}" for rank in ranks}
    arms["dense"] = "--method dense"
    arms |= {f"InRank, {name}": f"{CRITERIA[name]} {growing(steps)}" for name in criteria}
    found = Found([], [])
    with tempfile.TemporaryDirectory() as folder:
        runs = SmallRuns(Path(folder), notify)
        for arm, flags in arms.items():
            found.rows.append(summarised(arm, runs.train(arm.replace(" ", "_"), flags, steps=steps)))
    found.curves.extend(found.rows)
    notify(f"the sweep's rank: {sweep_rank(found.rows)}")
    return found


def growing(steps: int) -> str:
    """Five checks in the first quarter of a run, at whose end it switches."""
    return f"--switch-iters {steps // 4} --rank-check-interval {steps // 20}"


def summarised(arm: str, run: Run) -> Record:
    """``rank``: the mean over the layers at the end; ``untrained_rank``: the same of the ranks at which the
    criterion ``released`` ends on factors that nobody trained, with the run's buffer and threshold.
    """
    return {
        "arm": arm,
        "rank": run.train[-1]["mean_rank"],
        "untrained_rank": _untrained(run) if arm.startswith("InRank") else None,
        "test_perplexity": round(perplexity_of(run), 2),
        "parameters": int(run.last_cost("parameters") or 0),
    }


def _untrained(run: Run) -> float:
    # Imported here: torch takes seconds, and the rest needs none of it.
    from inrank_megatron.reporting.untrained import untrained_ranks

    return round(fmean(untrained_ranks(from_flat(run.settings)).values()), 1)


def sweep_rank(rows: Sequence[Record]) -> int:
    """The smallest fixed rank whose perplexity is within ``CLOSE`` of the best of all fixed ranks."""
    fixed = {row["rank"]: row["test_perplexity"] for row in rows if row["arm"].startswith("fixed")}
    return int(min(rank for rank, value in fixed.items() if value <= CLOSE * min(fixed.values())))


def draw(curves: Sequence[Record]) -> Figure:
    """Perplexity over the rank: the sweep as a line, a cross for each criterion; dotted: untrained."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = styled(figure.subplots(), x="rank", y="test perplexity", title="InRank, figure 4")
    fixed = [row for row in curves if row["arm"].startswith("fixed")]
    axes.plot(
        [row["rank"] for row in fixed],
        [row["test_perplexity"] for row in fixed],
        color=BLUE,
        marker="o",
        markersize=4,
        label="fixed rank",
    )
    marks = zip(("x", "+", "1"), (VERMILION, GREEN, PURPLE), strict=True)
    for row in curves:
        if row["arm"] == "dense":
            axes.axhline(row["test_perplexity"], color=GREY, linestyle="--", linewidth=1, label="dense")
        elif row["arm"].startswith("InRank"):
            marker, colour = next(marks)
            axes.plot(
                row["rank"], row["test_perplexity"], marker, color=colour, markersize=11, markeredgewidth=2,
                label=row["arm"],
            )  # fmt: skip
    untrained = next(row["untrained_rank"] for row in curves if row["untrained_rank"] is not None)
    axes.axvline(untrained, color=GREY, linestyle=":", linewidth=1.2, label="released, untrained factors")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8)
    return figure
