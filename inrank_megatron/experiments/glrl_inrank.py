"""Greedy low-rank learning (algorithm 1) and InRank (algorithm 2) on the same planted problems."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.experiments.glrl import MEASUREMENTS, SIZE, planted_values, watcher
from inrank_megatron.lowrank.methods.growth import GrowthRule
from inrank_megatron.reporting.plots import GREY, VERMILION, styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.theory.glrl import glrl
from inrank_megatron.theory.inrank import grow
from inrank_megatron.theory.recovery import Array, Problem, completion, sensing

CASES = [(start, alpha) for start in (0.0, 0.1, 1.0) for alpha in (0.9, 0.99)]
"""Of InRank: W0's entries have the standard deviation ``start / sqrt(n)``; alpha is the threshold."""
STEPS, BUFFER = 6000, 2


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Ranks 2 and 4, both problems, three seeds; quick: rank 4, sensing, one seed."""
    found = Found([], [])
    for make in (sensing,) if quick else (sensing, completion):
        for rank in (4,) if quick else (2, 4):
            for seed in range(1 if quick else 3):
                problem = make(SIZE, planted_values(rank), measurements=MEASUREMENTS, seed=seed)
                shown = seed == 0 and (problem.name, rank) == ("sensing", 4)
                about = {"problem": problem.name, "planted_rank": rank, "seed": seed}
                notify(f"{problem.name}, rank {rank}, seed {seed}")
                _greedy(found, problem, about, shown=shown)
                for start, alpha in CASES:
                    _grown(found, problem, about, start=start, alpha=alpha, shown=shown and alpha == 0.99)
    return found


def _greedy(found: Found, problem: Problem, about: Record, *, shown: bool) -> None:
    panel: Record = {"case": "GLRL"}
    curves: list[Record] = []
    stages = glrl(problem, 2, most=about["planted_rank"] + 3, watch=watcher(curves, **panel))
    last = stages[-1]
    found.rows.append(
        {"algorithm": "GLRL", "W0": 0.0, "alpha": None}
        | about
        | _result(problem, last.a, last.a, rank=last.width, columns=last.width, steps=last.steps)
    )
    if shown:
        starts = [0, *(stage.steps for stage in stages)]
        changes = [
            panel | {"step": step, "rank": stage.width} for step, stage in zip(starts, stages, strict=False)
        ]
        found.curves.extend(curves + changes)


def _grown(found: Found, problem: Problem, about: Record, *, start: float, alpha: float, shown: bool) -> None:
    n = len(problem.planted)
    base = start * np.random.default_rng(500 + about["seed"]).standard_normal((n, n)) / np.sqrt(n)
    rule = GrowthRule(initial_rank=2, buffer=BUFFER, threshold=alpha, interval=25, max_rank=n - BUFFER)
    panel: Record = {"case": f"InRank, $W_0$ of scale {start:g}"}
    curves: list[Record] = []
    grown = grow(problem, base, rule, steps=STEPS, watch=watcher(curves, **panel))
    size = {"rank": grown.rank, "columns": grown.columns, "steps": grown.steps}
    found.rows.append(
        {"algorithm": "InRank", "W0": start, "alpha": alpha}
        | about
        | _result(problem, grown.a, grown.of_rank(), **size)
    )
    if shown:
        found.curves.extend(curves + [panel | {"step": step, "rank": rank} for step, rank in grown.ranks])


def _result(problem: Problem, a: Array, of_rank: Array, *, rank: int, columns: int, steps: int) -> Record:
    """``loss``: the cost over that of zero. ``error_of_rank``: the relative error without the buffer."""
    return {
        "found_rank": rank,
        "columns": columns,
        "loss": problem.cost(a) / problem.cost(np.zeros_like(a)),
        "relative_error": problem.error(a),
        "error_of_rank": problem.error(of_rank),
        "steps": steps,
    }


def draw(curves: Sequence[Record]) -> Figure:
    """Singular values of ``A - W0`` over steps, a panel for each case; dotted: the rank from there on."""
    cases = list(dict.fromkeys(point["case"] for point in curves))
    figure = Figure(figsize=(3.4 * len(cases), 3.2), layout="constrained")
    for panel, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        points = [point for point in curves if point["case"] == case]
        draw_spectra(panel, {point["step"]: point["values"] for point in points if "values" in point})
        for value in planted_values(4):
            panel.axhline(value, color=VERMILION, linewidth=0.8, linestyle="--")
        for point in points:
            if "rank" in point:
                place = max(point["step"], 1)  # the axis is logarithmic
                panel.axvline(place, color=GREY, linewidth=0.8, linestyle=":")
                panel.text(
                    place, 1.01, point["rank"], transform=panel.get_xaxis_transform(), fontsize=7, ha="center"
                )
        panel.set_xscale("symlog", linthresh=25)
        panel.set_xlim(left=0)
        styled(panel, x="gradient step", y="singular values of $A - W_0$")
        panel.set_title(case, fontsize=10, pad=14)
    figure.suptitle(
        "InRank, algorithms 1 and 2: sensing; dashed: planted values, dotted: growth to the rank above",
        fontsize=10,
    )
    return figure
