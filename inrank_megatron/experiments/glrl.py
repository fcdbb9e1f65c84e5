"""Algorithm 1 of InRank on planted problems: ``measure`` it and ``draw`` it."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record, rounded
from inrank_megatron.reporting.plots import GREY, VERMILION, styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.theory.glrl import Stage, glrl
from inrank_megatron.theory.recovery import Array, Problem, best_cost, completion, sensing

SIZE, MEASUREMENTS, WATCHED = 16, 180, 50
SHOWN = 6  # singular values of a picture


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Ranks 2 and 4, depths 2 to 4, both problems, three seeds; quick: rank 2, depths 2 and 3, one seed."""
    found = Found([], [])
    for make in (sensing, completion):
        for rank in (2,) if quick else (2, 4):
            for seed in range(1 if quick else 3):
                problem = make(SIZE, planted_values(rank), measurements=MEASUREMENTS, seed=seed)
                best = [best_cost(problem, r) for r in range(1, rank)]
                for depth in (2, 3) if quick else (2, 3, 4):
                    notify(f"{problem.name}, rank {rank}, seed {seed}, depth {depth}")
                    _one(found, problem, depth, best, seed=seed)
    return found


def planted_values(rank: int) -> list[float]:
    """From 1 down to 0.4 in equal steps."""
    return np.linspace(1.0, 0.4, rank).tolist()


def watcher(curves: list[Record], **about) -> Callable[[int, Array], None]:
    """Notes the leading singular values of A now and then."""

    def watch(step: int, a: Array) -> None:
        if step % WATCHED == 0:
            values = rounded(np.linalg.svd(a, compute_uv=False)[:SHOWN])
            curves.append({**about, "step": step, "values": values})

    return watch


def _one(found: Found, problem: Problem, depth: int, best: Sequence[float], *, seed: int) -> None:
    rank = len(best) + 1
    curves: list[Record] = []
    stages = glrl(
        problem, depth, most=rank + 3, watch=watcher(curves, problem=problem.name, depth=depth, rank=rank)
    )
    if seed == 0 and problem.name == "sensing":
        found.curves.extend(curves)
        found.curves.extend(_end(stage, depth, rank) for stage in stages)
    over = [stage.cost / least - 1 for stage, least in zip(stages, best, strict=False)]
    found.rows.append(
        {
            "problem": problem.name,
            "depth": depth,
            "planted_rank": rank,
            "seed": seed,
            "found_rank": stages[-1].width,
            "loss": stages[-1].cost,
            "relative_error": problem.error(stages[-1].a),
            "largest_over_best": max(over),
            "steps": stages[-1].steps,
        }
    )


def _end(stage: Stage, depth: int, rank: int) -> Record:
    return {
        "problem": "sensing",
        "depth": depth,
        "rank": rank,
        "step": stage.steps,
        "width": stage.width,
    }


def draw(curves: Sequence[Record]) -> Figure:
    """Singular values of A over steps, a panel for each depth; widths as dotted lines."""
    rank = max(point["rank"] for point in curves)
    depths = sorted({point["depth"] for point in curves})
    figure = Figure(figsize=(3.6 * len(depths), 3.2), layout="constrained")
    for panel, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        points = [point for point in curves if (point["depth"], point["rank"]) == (depth, rank)]
        draw_spectra(panel, {point["step"]: point["values"] for point in points if "values" in point})
        for value in planted_values(rank):
            panel.axhline(value, color=VERMILION, linewidth=0.8, linestyle="--")
        for point in points:
            if "width" in point:
                panel.axvline(point["step"], color=GREY, linewidth=0.8, linestyle=":")
                panel.text(point["step"], 1.06, f" {point['width']}", fontsize=8, ha="right")
        styled(panel, x="gradient step", y="singular values of A", title=f"depth {depth}")
    figure.suptitle(
        "InRank, algorithm 1: sensing; dashed: planted values, dotted: end of each width", fontsize=10
    )
    return figure
