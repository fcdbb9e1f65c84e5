"""The figures of a page of several runs, each with its words and its points."""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from inrank_megatron.config.sizes import shown_size
from inrank_megatron.reporting.behind import thinned
from inrank_megatron.reporting.console import duration
from inrank_megatron.reporting.plots import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    VERMILION,
    binned,
    perplexity_axis,
    styled,
    whole_numbers,
)
from inrank_megatron.reporting.recorded import unigram_perplexity
from inrank_megatron.reporting.run import Run, flops_spent, kind_of
from inrank_megatron.reporting.tables import UNKNOWN, Table, magnitude, number, peak

Runs = Mapping[str, Run]
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#333333")
LINES = ("-", (0, (4, 1.5)))
ROWS = 8
"""Points of a run in the table behind a figure."""


class Shown(NamedTuple):
    """A figure; ``alt``: what it shows, in words; ``table``: its points."""

    title: str
    caption: str
    figure: Figure
    alt: str
    table: Table


def several_figures(runs: Runs) -> list[Shown]:
    """Those that the records allow."""
    shown = [_loss(runs)]
    if any(run.ranks for run in runs.values()):
        shown.append(_ranks(runs))
    return [*shown, _costs(runs)]


def line_of(place: int) -> dict[str, Any]:
    """Colour and dashes of the run at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def _name_runs(figure: Figure, runs: Runs, names: list[str]) -> None:
    """A legend above the panels, where it covers nothing."""
    lines = [Line2D([], [], **line_of(list(runs).index(name)), linewidth=1.6) for name in names]
    figure.legend(lines, names, loc="outside upper center", ncols=6, frameon=False, handlelength=2.5)


def _loss(runs: Runs) -> Shown:
    by_tokens = _batches_differ(runs)
    over = "tokens" if by_tokens else "optimizer steps"
    panels: list[tuple[str, Callable[[Run], list[float]]]] = [(over, _tokens if by_tokens else _steps)]
    known = [name for name, run in runs.items() if flops_spent(run)]
    if known:
        panels.append(("FLOPs of the training, forward and backward", flops_spent))
    figure = Figure(figsize=(8, 3.9 * len(panels)), layout="constrained")
    for axes, (label, place) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        _draw_losses(styled(axes, x=label, y="loss (nats per token)"), runs, place)
    _name_runs(figure, runs, list(runs))
    missing = [name for name in runs if name not in known]
    said = [f"FLOPs are not known of {', '.join(missing)}."] if missing else []
    ends = [f"{name} ends at {_last_losses(run)}." for name, run in runs.items()]
    return Shown(
        "Loss and perplexity",
        " ".join(
            [
                f"Lines: training loss. Circles: validation. Above over {over}, below over the operations "
                "that were spent. Dotted: a unigram model, where all runs have the same.",
                *said,
            ]
        ),
        figure,
        f"Training and validation loss of each run over {over} and over FLOPs. {' '.join(ends)}",
        _loss_table(runs),
    )


def _draw_losses(axes: Axes, runs: Runs, place: Callable[[Run], list[float]]) -> None:
    for at, (name, run) in enumerate(runs.items()):
        if not (places := place(run)):
            continue
        points = [{"step": x, "loss": r.get("loss")} for x, r in zip(places, run.train, strict=True)]
        axes.plot(*binned(points, "loss"), **line_of(at), linewidth=0.9, alpha=0.75, label=name)
        valid = [e for e in run.evaluations if e["split"] == "valid" and e.get("loss") is not None]
        where = np.interp([e["step"] for e in valid], _steps(run), places)
        axes.plot(where, [e["loss"] for e in valid], **line_of(at), marker="o", markersize=5)
    unigrams = {unigram_perplexity(run) for run in runs.values()}
    if len(unigrams) == 1 and (unigram := unigrams.pop()):
        axes.axhline(math.log(unigram), color=GREY, linestyle=":")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
    perplexity_axis(axes)


def _steps(run: Run) -> list[float]:
    return [record["step"] for record in run.train]


def _tokens(run: Run) -> list[float]:
    known = [record.get("tokens") for record in run.train]
    return [] if None in known else known  # type: ignore[return-value]


def _batches_differ(runs: Runs) -> bool:
    """Whether a step is not the same number of tokens in all runs, and all know their tokens."""
    if not all(_tokens(run) for run in runs.values()):
        return False
    return len({_tokens(run)[-1] / max(1, run.train[-1]["step"]) for run in runs.values()}) > 1


def _last_losses(run: Run) -> str:
    valid = run.last_evaluation("valid")
    behind = f", validation loss {number(valid.get('loss'))} at step {valid['step']:,}" if valid else ""
    return f"training loss {number(run.train[-1].get('loss'))} at step {run.train[-1]['step']:,}{behind}"


def _loss_table(runs: Runs) -> Table:
    rows = []
    for name, run in runs.items():
        spent = dict(zip(_steps(run), flops_spent(run), strict=False))
        validated = {e["step"]: e.get("loss") for e in run.evaluations if e["split"] == "valid"}
        for record in thinned(run.train, most=ROWS):
            step = record["step"]
            values = (record.get("tokens"), spent.get(step), record.get("loss"), validated.get(step))
            rows.append([name, f"{step:,}", *map(number, values)])
    return Table("", ["run", "step", "tokens", "FLOPs", "training loss", "validation loss"], rows)


def _ranks(runs: Runs) -> Shown:
    kinds = sorted({kind_of(layer) for run in runs.values() for layer in run.ranks_by_layer()})
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    rows, ends = [], []
    for axes, kind in zip(panels, kinds, strict=True):
        styled(axes, x="optimizer step", y="rank" if axes is panels[0] else "", title=kind)
        whole_numbers(axes, panels=len(panels))
        for at, (name, run) in enumerate(runs.items()):
            points = list(_rank_course(run, kind))
            if not points:
                continue
            steps, means, least, most = zip(*points, strict=True)
            axes.step(steps, means, where="post", **line_of(at), linewidth=1.6, label=name)
            axes.fill_between(steps, least, most, step="post", color=line_of(at)["color"], alpha=0.12)
            rows += [_rank_row(name, kind, point) for point in thinned(points, most=ROWS)]
            ends.append(f"{name} {kind} {means[-1]:.1f}")
    _name_runs(figure, runs, [name for name, run in runs.items() if run.ranks])
    return Shown(
        "Ranks",
        "Mean rank of each kind of linear over all blocks; shaded: from the smallest to the largest.",
        figure,
        f"Mean rank over optimizer steps, a panel for each kind of linear. At the end: {', '.join(ends)}.",
        Table("", ["run", "linear", "step", "mean rank", "smallest", "largest"], rows),
    )


def _rank_course(run: Run, kind: str) -> Iterator[tuple[int, float, int, int]]:
    """(step, mean, smallest, largest) after each change or check of a kind of linear, and at the end."""
    layers = {name: records for name, records in run.ranks_by_layer().items() if kind_of(name) == kind}
    now: dict[str, int] = {}
    steps = sorted({record["step"] for records in layers.values() for record in records})
    changes = {(name, record["step"]): record["rank"] for name in layers for record in layers[name]}
    for step in [*steps, *([run.last_step] if steps and run.last_step > steps[-1] else [])]:
        now |= {name: changes[name, step] for name in layers if (name, step) in changes}
        yield step, fmean(now.values()), min(now.values()), max(now.values())


def _rank_row(name: str, kind: str, point: tuple[int, float, int, int]) -> list[str]:
    step, mean, least, most = point
    return [name, kind, f"{step:,}", f"{mean:.1f}", str(least), str(most)]


QUANTITIES: tuple[tuple[str, Callable[[Run], float | None], Callable[[float], str]], ...] = (
    ("parameters at the end", lambda run: run.last_cost("parameters"), magnitude),
    ("FLOPs of the training", lambda run: max(flops_spent(run), default=None), magnitude),
    ("peak memory of a process", peak, lambda value: shown_size(int(value))),
    ("time of the training", lambda run: run.elapsed_seconds, duration),
)


def _costs(runs: Runs) -> Shown:
    figure = Figure(figsize=(8, 2 * (1.1 + 0.32 * len(runs))), layout="constrained")
    values = {title: [value(run) for run in runs.values()] for title, value, _ in QUANTITIES}
    colours = [line_of(at)["color"] for at in range(len(runs))]
    for axes, (title, _, shown) in zip(figure.subplots(2, 2).flat, QUANTITIES, strict=True):
        styled(axes, title=title).grid(visible=False, axis="y")
        bars = axes.barh(list(runs), [value or 0 for value in values[title]], color=colours)
        axes.bar_label(bars, [_label(v, shown) for v in values[title]], fontsize=9, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_xticks([])
    rows = [
        [name, *(_label(values[title][at], shown) for title, _, shown in QUANTITIES)]
        for at, name in enumerate(runs)
    ]
    titles = [title for title, _, _ in QUANTITIES]
    said = [
        f"{name}: {', '.join(f'{title} {value}' for title, value in zip(titles, cells, strict=True))}"
        for name, *cells in rows
    ]
    return Shown(
        "Costs",
        "Parameters and FLOPs are counted, memory and time are measured: memory allocated on the GPU, or "
        "without one all that the process takes, libraries included; of the process that took most.",
        figure,
        f"What each run cost, as bars. {'; '.join(said)}.",
        Table("", ["run", *titles], rows),
    )


def _label(value: float | None, shown: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else shown(value)
