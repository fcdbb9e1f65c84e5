"""Figures 8 to 14 of InRank: spectra of cumulative updates of recurrent networks and of a Transformer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inrank_megatron.experiments.figure3 import summarised
from inrank_megatron.experiments.found import Found, Record, rounded
from inrank_megatron.reporting.plots import styled
from inrank_megatron.spectra.picture import draw_spectra
from inrank_megatron.theory.perceptron import Pictures, Trained, digits, train
from inrank_megatron.theory.sequences import ATTENTION, network, squares

WIDTH, STEPS, RECORDS = 64, 600, 20
MATRICES = {
    "hidden to hidden": r"weight_hh_l(\d+)$",
    "attention": r"layers\.(\d+)\.self_attn\.in_proj_weight$",
    "feed-forward": r"layers\.(\d+)\.linear1\.weight$",
}


@dataclass(frozen=True)
class Case:
    """A network and how it is trained, by Adam; ``figure`` is the paper's number."""

    figure: str
    kind: str
    layers: int
    rate: float = 1e-3
    batch_size: int = 64
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.layers} layers{self.note}"


CASES = [
    Case("8", "RNN", 2),
    Case("9", "GRU", 2),
    Case("10", "LSTM", 2),
    Case("11", ATTENTION, 2),
    Case("12", "GRU", 4),
    Case("13", "LSTM", 6),
    Case("14", "GRU", 4, rate=2.5e-4, note=", rate / 4"),
    Case("14", "GRU", 4, batch_size=256, note=", batch x 4"),
    Case("none", "RNN", 4),
    Case("none", ATTENTION, 6),
]


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Every case with three seeds; quick: the first four and figure 12, one seed, 60 steps."""
    found = Found([], [])
    pictures, steps = digits(), STEPS // 10 if quick else STEPS
    for case in CASES[:5] if quick else CASES:
        for seed in range(1 if quick else 3):
            notify(f"{case.name}, seed {seed}")
            study(found, case, pictures, steps=steps, seed=seed)
    for line in claims(found.rows):
        notify(line)
    return found


def study(found: Found, case: Case, pictures: Pictures, *, steps: int, seed: int) -> None:
    """Train one case: a row and, of the first seed, the points of each of its recorded matrices."""
    model = network(case.kind, layers=case.layers, width=WIDTH, seed=seed)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = train(
        model,
        pictures,
        optimizer="Adam",
        steps=steps,
        every=steps // RECORDS,
        seed=seed,
        batch_size=case.batch_size,
        rate=case.rate,
        match="|".join(MATRICES.values()),
    )
    for kind, pattern in MATRICES.items():
        for name, parameter in model.named_parameters():
            if place := re.search(pattern, name):
                about = {"case": case.name, "matrix": kind, "layer": int(place[1])}
                spectra = [row for row in trained.rows if row["layer"] == name]
                found.rows.append(
                    {"figure": case.figure, **about, "seed": seed, **_quality(trained)}
                    | summarised(spectra)
                    | {"squares_above_10_percent": _above_in_squares(parameter.detach() - first[name])}
                )
                if seed == 0:
                    found.curves.extend(
                        about | {"step": row["step"], "values": rounded(row["values"])} for row in spectra
                    )


def _quality(trained: Trained) -> Record:
    return {
        "loss": round(trained.loss, 5),
        "test_loss": round(trained.test_loss, 4),
        "accuracy": round(trained.accuracy, 4),
    }


def _above_in_squares(update: Tensor) -> float:
    """Singular values above 10 % of the largest, as in ``summarised``, the mean over the square parts."""
    spectra = [torch.linalg.svdvals(part.double()) for part in squares(update)]
    return fmean(int((values > 0.1 * values[0]).sum()) for values in spectra)


COMPARED = [
    ("F.1", ("GRU, 2 layers", "hidden to hidden"), ("RNN, 2 layers", "hidden to hidden"), 1),
    ("F.1", ("LSTM, 2 layers", "hidden to hidden"), ("RNN, 2 layers", "hidden to hidden"), 1),
    ("F.1", ("Transformer, 2 layers", "attention"), ("Transformer, 2 layers", "feed-forward"), 1),
    ("F.2", ("GRU, 4 layers", "hidden to hidden"), ("GRU, 2 layers", "hidden to hidden"), -1),
    ("F.2", ("LSTM, 6 layers", "hidden to hidden"), ("LSTM, 2 layers", "hidden to hidden"), -1),
    ("F.2", ("RNN, 4 layers", "hidden to hidden"), ("RNN, 2 layers", "hidden to hidden"), -1),
    ("F.2", ("Transformer, 6 layers", "attention"), ("Transformer, 2 layers", "attention"), -1),
    ("F.3", ("GRU, 4 layers, rate / 4", "hidden to hidden"), ("GRU, 4 layers", "hidden to hidden"), 1),
    ("F.3", ("GRU, 4 layers, batch x 4", "hidden to hidden"), ("GRU, 4 layers", "hidden to hidden"), 1),
]
"""The paper's claims: of the first matrices more (1) or fewer (-1) values rise than of the second."""
MEASURES = ("above_10_percent", "squares_above_10_percent", "test_loss")


def claims(rows: Sequence[Record]) -> list[str]:
    """A line for each comparison: the differences seed by seed, each the mean over a network's layers."""
    lines = []
    for section, (case, matrix), (other_case, other_matrix), sign in COMPARED:
        left, right = of_seeds(rows, case, matrix), of_seeds(rows, other_case, other_matrix)
        if not (left and right):
            continue
        parts = [
            f"{measure} {' '.join(f'{left[seed][measure] - right[seed][measure]:+.3g}' for seed in left)}"
            for measure in MEASURES
        ]
        expected = "more" if sign > 0 else "fewer"
        lines.append(
            f"{section}, expected {expected}: {case}, {matrix} against {other_case}, {other_matrix}: "
            + "; ".join(parts)
        )
    return lines


def of_seeds(rows: Sequence[Record], case: str, matrix: str) -> dict[int, dict[str, float]]:
    """By seed, the means of the ``MEASURES`` over the layers."""
    chosen = [row for row in rows if (row["case"], row["matrix"]) == (case, matrix)]
    return {
        seed: {name: fmean(row[name] for row in chosen if row["seed"] == seed) for name in MEASURES}
        for seed in dict.fromkeys(row["seed"] for row in chosen)
    }


def draw(curves: Sequence[Record]) -> Figure:
    """The first and the last layer of each network, one above the other; four networks in a line."""
    kinds = list(dict.fromkeys((point["case"], point["matrix"]) for point in curves))
    columns = min(len(kinds), 4)
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.4 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    for place, (case, matrix) in enumerate(kinds):
        points = [point for point in curves if (point["case"], point["matrix"]) == (case, matrix)]
        layers = sorted({point["layer"] for point in points})
        for below, layer in enumerate((layers[0], layers[-1])):
            panel = grid[2 * (place // columns) + below, place % columns]
            panel.set_visible(True)
            draw_spectra(panel, {p["step"]: p["values"] for p in points if p["layer"] == layer})
            kind = "" if matrix == "hidden to hidden" else f"\n{matrix}"
            styled(panel, x="optimizer step", y="singular values", title=f"{case}{kind}, layer {layer + 1}")
    figure.suptitle("InRank, figures 8 to 14: $W_t - W_0$, digits read row by row", fontsize=11)
    return figure
