"""Plots the rows of ``docs/evidence/data`` as SVGs of the pages: ``python docs/scripts/plots.py``."""

import csv
import hashlib
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

EVIDENCE = Path(__file__).parents[1] / "evidence"
MODELS = ("width 192", "12 layers", "width 128")
ARMS = {
    "dense": "dense",
    "warm start, budget": "warm start, budget 0.3",
    "InRank-Efficient, grown: the default": "InRank-Efficient (default)",
    "InRank-Efficient, output, budget": "InRank-Efficient, budget 0.3",
    "InRank": "InRank, no switch",
    "fixed rank, random, found rank": "fixed rank, InRank's size",
    "fixed rank, random, budget": "fixed rank, budget 0.3",
    "ReLoRA, budget": "ReLoRA, budget 0.3",
    "LoRA, budget": "LoRA, budget 0.3",
}
FIRST_TABLE = (
    "dense",
    "dense, half the MLP's width",
    "warm start, half",
    "InRank-Efficient, half, 48 columns",
    "fixed rank, half",
    "InRank-Efficient, half",
    "ReLoRA, half",
)
BUDGETS = {"equal steps": ("o", "white"), "equal FLOPs": ("o", "#2f6fb2")}


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a data file."""
    with (EVIDENCE / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def comparison() -> Figure:
    """Test perplexity of every method, one panel per model, seeds and their mean."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, model in zip(panels, MODELS, strict=True):
        for budget, (marker, fill) in BUDGETS.items():
            _methods(panel, model, budget, marker=marker, fill=fill)
        panel.set_title(model)
        panel.set_xlabel("test perplexity per token")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(ARMS)), ARMS.values())
    panels[0].invert_yaxis()
    panels[0].legend(loc="upper right")
    return figure


def _methods(panel: Axes, model: str, budget: str, *, marker: str, fill: str) -> None:
    found = [row for row in rows("comparison.csv") if (row["budget"], row["model"]) == (budget, model)]
    chosen = {row["arm"]: row for row in found}
    shift = -0.15 if budget == "equal steps" else 0.15
    label: str | None = budget
    for place, arm in enumerate(ARMS):
        if arm not in chosen:
            continue
        seeds = [float(chosen[arm][f"seed_{n}"]) for n in (1, 2, 3)]
        panel.plot(seeds, [place + shift] * 3, ".", color="#7b8794", markersize=4)
        mean = sum(seeds) / 3
        panel.plot(mean, place + shift, marker, color="#2f6fb2", markerfacecolor=fill, label=label)
        label = None
        if arm == "dense" and budget == "equal steps":
            panel.axvline(mean, color="#c2571a", linewidth=1, linestyle="--")


def learned_ranks() -> Figure:
    """Mean rank of text and its controls, three seeds each."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, steps in zip(panels, ("200", "600"), strict=True):
        for place, kind in enumerate(("noise", "text", "shuffled")):
            [row] = [
                row
                for row in rows("controls.csv")
                if (row["tokens"], row["steps"], row["factor_lr_multiplier"]) == (kind, steps, "1")
            ]
            for name, marker, shift in (("grown", "o", -0.1), ("reestimated", "x", 0.1)):
                values = [float(row[f"{name}_{n}"]) for n in (1, 2, 3)]
                label = name.replace("reest", "re-est") if place == 0 else None
                panel.plot(
                    values, [place + shift] * 3, marker, color="#2f6fb2", label=label, fillstyle="none"
                )
        panel.axvline(43.0, color="#c2571a", linewidth=1, linestyle="--")
        panel.text(42.5, 1.6, "untrained fixed point", rotation=90, ha="right", va="center", fontsize=8)
        panel.set_yticks(range(3), ("gradients replaced\nby noise", "text", "tokens shuffled\nin each batch"))
        panel.set_title(f"{steps} steps")
        panel.set_xlabel("mean rank of the MLP linears")
        panel.grid(axis="x", alpha=0.3)
    panels[1].legend(loc="upper center")
    return figure


def speed() -> Figure:
    """Operations and time over the dense model."""
    measured = rows("step_times.csv")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(measured):
        operations, time = float(row["operations_over_dense"]), float(row["time_over_dense"])
        label = ("operations", "time") if place == 0 else (None, None)
        panel.barh(place - 0.2, operations, 0.36, color="#d9dee4", label=label[0])
        panel.barh(place + 0.2, time, 0.36, color="#2f6fb2", label=label[1])
    panel.axvline(1.0, color="#c2571a", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(measured)), [row["case"] for row in measured])
    panel.invert_yaxis()
    panel.set_xlabel("over the dense model")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def when_to_use_it() -> Figure:
    """Validation loss of every model of the first table at its best rate, over steps and over operations, of
    the first seed.
    """
    runs: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for row in rows("when_to_use_it.csv"):
        if row["seed"] != "1" or row["arm"] not in FIRST_TABLE:
            continue
        runs.setdefault((row["arm"], row["optimizer"]), {}).setdefault(row["lr"], []).append(row)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (arm, optimizer), by_rate in runs.items():
        best = min(by_rate.values(), key=lambda points: float(points[-1]["valid_loss"]))
        losses = [float(point["valid_loss"]) for point in best]
        number, line = FIRST_TABLE.index(arm), "--" if optimizer == "AdamW" else "-"
        look = {"marker": "osv^Dd<"[number], "color": f"C{number}", "markersize": 4}
        for panel, name, unit in zip(panels, ("step", "flops"), (1, 1e12), strict=True):
            spent = [float(point[name]) / unit for point in best]
            label = None if panel is panels[0] else f"{arm}, {optimizer}"
            panel.plot(spent, losses, line, label=label, **look)
    panels[0].set(xlabel="step", ylabel="validation loss, nats per token")
    panels[1].set(xlabel="operations of training, TFLOP")
    figure.legend(loc="outside right upper", fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def scaling() -> Figure:
    """Predicted step time over GPUs, strong and weak scaling."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"strong": "strong: 512 sequences a step", "weak": "weak: 64 sequences a GPU and step"}
    for panel, (kind, title) in zip(panels, titles.items(), strict=True):
        found = [row for row in rows("scaling.csv") if row["scaling"] == kind]
        for method, colour in (("dense", "#c2571a"), ("InRank-Efficient", "#2f6fb2")):
            own = [row for row in found if row["method"] == method]
            gpus, seconds = ([float(row[name]) for row in own] for name in ("gpus", "step_seconds"))
            panel.plot(gpus, seconds, "o-", color=colour, label=f"{method}: whole step")
            compute = [float(row["compute"]) for row in own]
            panel.plot(gpus, compute, ":", color=colour, label=f"{method}: compute alone")
        panel.set_xscale("log", base=2)
        panel.set_xticks(gpus, [f"{number:g}" for number in gpus])
        panel.set(title=title, xlabel="GPUs", ylabel="predicted seconds a step")
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[1].legend(fontsize=8)
    return figure


def many_epochs() -> Figure:
    """Validation loss over the epochs of a small text, at the rate whose best point is the lowest."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    runs: dict[tuple[str, str, float], dict[str, list[tuple[float, float]]]] = {}
    for row in rows("many_epochs.csv"):
        if (row["text"], row["seed"]) != ("cpp-docs", "1"):
            continue
        point = (float(row["epochs"]), float(row["valid_loss"]))
        run = (row["optimizer"], row["arm"], float(row["dropout"]))
        runs.setdefault(run, {}).setdefault(row["lr"], []).append(point)
    for (optimizer, arm, dropout), by_rate in runs.items():
        points = min(by_rate.values(), key=lambda found: min(loss for _, loss in found))
        colour, marker = ("#c2571a", "o") if arm == "dense" else ("#2f6fb2", "s")
        line, label = ("--", f"{arm}, dropout {dropout:g}") if dropout else ("-", arm)
        epochs, losses = zip(*points, strict=True)
        panel = panels[int(optimizer != "AdamW")]
        panel.plot(epochs, losses, line, color=colour, marker=marker, markersize=3, label=label)
    for panel, title in zip(panels, ("AdamW", "Muon, with LoRA-Muon on factors"), strict=True):
        panel.set(xlabel="epoch", title=title, ylim=(3.5, 4.7))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("validation loss, nats per token")
    return figure


def trend() -> Figure:
    """Perplexity over that of dense training: over the tokens for each parameter of the dense model, and over
    the model's width.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    longer, wider = figure.subplots(1, 2, sharey=True)
    found = rows("trend.csv")
    dense = {(row["width"], row["tokens"]): row for row in found if row["arm"] == "dense"}
    shortest = min((row["tokens"] for row in found), key=int)
    lines: dict[str, list[tuple[int, int, float, float]]] = {}
    for row in found:
        base = dense[row["width"], row["tokens"]]
        ratio = float(row["valid_perplexity"]) / float(base["valid_perplexity"])
        width, tokens = int(row["width"]), int(row["tokens"])
        lines.setdefault(row["arm"], []).append((width, tokens, tokens / int(base["parameters"]), ratio))
    for (arm, points), marker in zip(lines.items(), "osv", strict=True):
        lengths = [(each, ratio) for width, _, each, ratio in points if width == 128]
        widths = [(width, ratio) for width, tokens, _, ratio in points if tokens == int(shortest)]
        longer.plot(*zip(*lengths, strict=True), marker=marker, label=arm)
        wider.plot(*zip(*widths, strict=True), marker=marker, label=arm)
    for panel, ticks in ((longer, (2, 4, 8, 16)), (wider, (128, 256))):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    longer.set(
        xlabel="tokens for each parameter of the dense model",
        ylabel="perplexity over dense",
        title="width 128",
    )
    wider.set(xlabel="width", title="2 million tokens")
    longer.legend()
    return figure


PLOTS = {
    "comparison.svg": (comparison, "comparison.csv"),
    "learned_ranks.svg": (learned_ranks, "controls.csv"),
    "scaling.svg": (scaling, "scaling.csv"),
    "speed.svg": (speed, "step_times.csv"),
    "when_to_use_it.svg": (when_to_use_it, "when_to_use_it.csv"),
    "many_epochs.svg": (many_epochs, "many_epochs.csv"),
    "trend.svg": (trend, "trend.csv"),
}


def main() -> None:
    """Write every plot, with the hash of its rows, by which a test finds a plot of older ones."""
    matplotlib.rcParams |= {"svg.hashsalt": "docs", "svg.fonttype": "none"}
    for name, (plot, data) in PLOTS.items():
        rows_hash = hashlib.sha256((EVIDENCE / "data" / data).read_bytes()).hexdigest()
        about = {"Date": None, "Creator": None, "Identifier": f"{data} {rows_hash}"}
        plot().savefig(EVIDENCE / name, metadata=about)


if __name__ == "__main__":
    main()
