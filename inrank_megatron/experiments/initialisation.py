"""Theorem 1 of InRank: gradient descent on wide linear networks from a small and from an ordinary start."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record
from inrank_megatron.experiments.glrl import MEASUREMENTS, SIZE, planted_values, watcher
from inrank_megatron.reporting.plots import VERMILION, styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.theory.deep_linear import descend, product, random_layers
from inrank_megatron.theory.recovery import sensing

RANK, SMALL = 3, 1e-4
COUNTED = 0.01  # of the largest singular value: the rank is the number of those above


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Matrix sensing, depths 2 to 4, three seeds; quick: depths 2 and 3, one seed."""
    found = Found([], [])
    for seed in range(1 if quick else 3):
        problem = sensing(SIZE, planted_values(RANK), measurements=MEASUREMENTS, seed=seed)
        for depth in (2, 3) if quick else (2, 3, 4):
            for start, scale in (("small", SMALL ** (1 / depth)), ("ordinary", 1.0)):
                notify(f"seed {seed}, depth {depth}, {start} start")
                curves: list[Record] = []
                layers, steps = descend(
                    problem,
                    random_layers(SIZE, depth, seed=seed, scale=scale),
                    rate=0.05,
                    steps=20_000,
                    watch=watcher(curves, depth=depth, start=start),
                )
                found.curves.extend(curves if seed == 0 else [])
                a = product(layers)
                values = np.linalg.svd(a, compute_uv=False)
                found.rows.append(
                    {
                        "depth": depth,
                        "start": start,
                        "seed": seed,
                        "planted_rank": RANK,
                        "found_rank": int((values > COUNTED * values[0]).sum()),
                        "loss": problem.cost(a),
                        "relative_error": problem.error(a),
                        "steps": steps,
                    }
                )
    return found


def draw(curves: Sequence[Record]) -> Figure:
    """Singular values of A over steps: depths from left to right, starts from above to below."""
    depths = sorted({point["depth"] for point in curves})
    figure = Figure(figsize=(3.6 * len(depths), 5.4), layout="constrained")
    panels = figure.subplots(2, len(depths), squeeze=False, sharey=True)
    for line, start in zip(panels, ("small", "ordinary"), strict=True):
        for panel, depth in zip(line, depths, strict=True):
            points = [point for point in curves if (point["depth"], point["start"]) == (depth, start)]
            draw_spectra(panel, {point["step"]: point["values"] for point in points})
            for value in planted_values(RANK):
                panel.axhline(value, color=VERMILION, linewidth=0.8, linestyle="--")
            styled(panel, x="gradient step", y="singular values of A", title=f"depth {depth}, {start} start")
    figure.suptitle("InRank, theorem 1: matrix sensing of rank 3 (dashed)", fontsize=10)
    return figure
