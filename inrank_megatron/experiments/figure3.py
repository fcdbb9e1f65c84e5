"""Figure 3 of InRank: spectra of cumulative updates of a perceptron under three initialisations."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

from inrank_megatron.experiments.found import Found, Record, rounded
from inrank_megatron.reporting.plots import styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.spectra.recorder import Row
from inrank_megatron.theory.perceptron import INITIALISATIONS, Pictures, digits, perceptron, train

HIDDEN, STEPS, RECORDS = 128, 1000, 25
CASES = [
    {"initialisation": name, "optimizer": "SGD", "labels": labels}
    for name, labels in (*((name, "true") for name in INITIALISATIONS), ("Kaiming", "shuffled"))
]


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Three initialisations, and Kaiming's with shuffled labels; three seeds. Quick: one, 200 steps."""
    return study(CASES, digits(), quick=quick, notify=notify)


def study(
    cases: Iterable[dict[str, str]], pictures: Pictures, *, quick: bool, notify: Callable[[str], None]
) -> Found:
    """Train each case; rows for each layer and seed, points of the first seed."""
    found, steps = Found([], []), STEPS // 5 if quick else STEPS
    for case in cases:
        for seed in range(1 if quick else 3):
            notify(f"{', '.join(case.values())}, seed {seed}")
            pixels, classes = pictures.inputs.shape[1], int(pictures.labels.max()) + 1
            model = perceptron(pixels, HIDDEN, classes, initialisation=case["initialisation"], seed=seed)
            trained = train(
                model,
                pictures if case["labels"] == "true" else _shuffled(pictures, seed),
                optimizer=case["optimizer"],
                steps=steps,
                every=steps // RECORDS,
                seed=seed,
            )
            for layer in ("0.weight", "2.weight"):
                spectra = [row for row in trained.rows if row["layer"] == layer]
                about = {**case, "layer": layer, "seed": seed, "accuracy": round(trained.accuracy, 4)}
                found.rows.append(about | summarised(spectra))
                if seed == 0:
                    found.curves.extend(case | row | {"values": rounded(row["values"])} for row in spectra)
    return found


def _shuffled(pictures: Pictures, seed: int) -> Pictures:
    order = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(seed))
    return replace(pictures, labels=pictures.labels[order])


def summarised(spectra: Sequence[Row]) -> Record:
    """How low-rank the update ends, and whether its directions come one after the other.

    ``values``: number of singular values. ``above_10_percent``: of these, those above 10 % of the largest at
    the end. ``energy_of_10``: sum of squares of the ten largest over that of all. ``order``: for the values
    above 10 %, Spearman's correlation of the index of a value with the step at which it first reaches half of
    its last value; 1: one after the other, the largest first.
    """
    values = np.array([row["values"] for row in spectra])
    last = values[-1]
    count = int((last > 0.1 * last[0]).sum())
    half = [int((values[:, place] >= last[place] / 2).argmax()) for place in range(count)]
    return {
        "values": len(last),
        "above_10_percent": count,
        "energy_of_10": float(np.square(last[:10]).sum() / np.square(last).sum()),
        "order": _rank_correlation(half),
    }


def _rank_correlation(steps: Sequence[int]) -> float | None:
    """Spearman's, of the list with its indices; equal values share their mean rank. None if all are equal."""
    if len(set(steps)) < 2:
        return None
    ranks = [sum(other < one for other in steps) + (steps.count(one) - 1) / 2 for one in steps]
    return float(np.corrcoef(np.arange(len(steps)), ranks)[0, 1])


def draw(curves: Sequence[Record]) -> Figure:
    """Figure 3."""
    return panels(curves, lambda p: f"{p['initialisation']}, labels {p['labels']}", title="InRank, figure 3")


def panels(curves: Sequence[Record], name: Callable[[Record], str], *, title: str) -> Figure:
    """A column for each case, a line for each layer; singular values over steps."""
    names = list(dict.fromkeys(map(name, curves)))
    figure = Figure(figsize=(3.2 * len(names), 5), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    for line, (layer, label) in zip(grid, (("0.weight", "first"), ("2.weight", "second")), strict=True):
        for panel, case in zip(line, names, strict=True):
            points = [point for point in curves if point["layer"] == layer and name(point) == case]
            draw_spectra(panel, {point["step"]: point["values"] for point in points})
            styled(panel, x="optimizer step", y=f"singular values, {label} layer", title=case)
    figure.suptitle(f"{title}: $W_t - W_0$ of a two-layer perceptron", fontsize=10)
    return figure
