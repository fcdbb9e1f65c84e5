"""The figures of a run, as Matplotlib figures without any global state.

Colours are Okabe and Ito's and, for depth, viridis: both can be distinguished with any colour vision.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from inrank_megatron.reporting.run import PHASES, Record, Run, depth, kind_of
from inrank_megatron.reporting.tables import magnitude

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#666666"
MOST_POINTS = 1000
SPLIT_LABELS = {"valid": "validation", "test": "test"}
PHASE_LABELS = {"dense": "dense", "phase_1": "phase 1\n$W_0 + UV$", "phase_2": "phase 2\n$U^*V^*$"}


def figures(run: Run) -> dict[str, Figure]:
    """Every figure that the run's records allow, by name."""
    makers: dict[str, tuple[Any, Callable[[Run], Figure]]] = {
        "loss": (run.train or run.evaluations, loss_figure),
        "ranks": (run.ranks, rank_figure),
        "spectrum": (checks(run), spectrum_figure),
        "cost": (_comparable(run), cost_figure),
        "throughput": (run.train, throughput_figure),
    }
    return {name: make(run) for name, (records, make) in makers.items() if records}


def loss_figure(run: Run) -> Figure:
    """Training and evaluation loss against steps; the right-hand axis reads the same curves as perplexity."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = styled(figure.subplots(), x="optimizer step", y="loss (nats per token)")
    steps, losses = binned(run.train, "loss")
    axes.plot(steps, losses, color=BLUE, linewidth=1.2, label="training")
    for split, colour, marker in (("valid", VERMILION, "o"), ("test", GREEN, "D")):
        records = [record for record in run.evaluations if record["split"] == split]
        if records:
            # Hollow, because the last validation and the test often lie on top of each other.
            shape: dict[str, Any] = {
                "marker": marker,
                "markersize": 5 if marker == "o" else 9,
                "markerfacecolor": "none",
            }
            axes.plot(
                _column(records, "step"),
                _column(records, "loss"),
                color=colour,
                label=SPLIT_LABELS[split],
                **shape,
            )
    unigram = run.summary.get("unigram_perplexity", {}).get("valid")
    if unigram:
        axes.axhline(math.log(unigram), color=GREY, linestyle=":", label="unigram model (validation)")
    _mark_switch(axes, run)
    axes.legend(frameon=False)
    perplexity_axis(axes)
    return figure


def perplexity_axis(axes: Axes) -> None:
    """On the right: the losses of ``axes``, which are all drawn, read as perplexities."""
    right = axes.secondary_yaxis("right", functions=(_exp, _log))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_locator(FixedLocator(_perplexity_ticks(*axes.get_ylim())))
    right.yaxis.set_major_formatter(FuncFormatter(plain))
    right.yaxis.set_minor_locator(NullLocator())
    right.spines["right"].set_visible(False)


def rank_figure(run: Run) -> Figure:
    """Rank over steps: one line per layer, a panel a kind of linear, colour by depth (InRank, figures
    5-7).
    """
    layers = run.ranks_by_layer()
    kinds = sorted({kind_of(layer) for layer in layers})
    deepest = max(map(depth, layers))
    colours = depth_colours(deepest)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        styled(axes, x="optimizer step", y="rank" if axes is panels[0] else "", title=kind)
        whole_numbers(axes, panels=len(kinds))
        for layer, records in layers.items():
            if kind_of(layer) == kind:
                steps, ranks = _column(records, "step"), _column(records, "rank")
                axes.step(steps, ranks, where="post", color=colours[depth(layer)], linewidth=1.6, marker=".")
        _mark_switch(axes, run)
    depth_bar(figure, panels, deepest)
    return figure


def depth_colours(deepest: int) -> np.ndarray:
    """A colour for each block from 0 to ``deepest``."""
    # The last fifth of viridis is too pale on white.
    return colormaps["viridis"](np.linspace(0, 0.82, max(deepest + 1, 2)))


def depth_bar(figure: Figure, panels: Sequence[Axes], deepest: int) -> None:
    """The legend of :func:`depth_colours`, to the right of the panels."""
    norm = BoundaryNorm(np.arange(deepest + 2) - 0.5, max(deepest + 1, 2))
    palette = ListedColormap(depth_colours(deepest))
    ticks = MaxNLocator(8, integer=True)
    bar = figure.colorbar(ScalarMappable(norm, palette), ax=panels, label="block", ticks=ticks)
    bar.ax.minorticks_off()


def spectrum_figure(run: Run) -> Figure:
    """Normalised singular values at the first and last check; solid: kept by the rank (InRank, figure 1)."""
    layers = checks(run)
    names = list(layers)
    blocks = sorted({depth(name) for name in names})
    shown = [name for name in names if depth(name) in (blocks[0], blocks[-1])]
    figure = Figure(figsize=(8, 1.75 * len(shown) + 0.7), layout="constrained")
    rows = figure.subplots(len(shown), 2, sharex="row", sharey="row", squeeze=False)
    for row, name in zip(rows, shown, strict=True):
        for axes, record, colour in zip(row, (layers[name][0], layers[name][-1]), (GREEN, BLUE), strict=True):
            styled(axes, title=f"block {depth(name)}, {kind_of(name)}: step {record['step']}")
            _spectrum(axes, record, colour=colour)
        row[0].set_ylim(bottom=0)  # of both, whose heights it fixes
    figure.supxlabel("index of the singular value", fontsize=10)
    figure.supylabel("share of the sum", fontsize=10)
    return figure


def cost_figure(run: Run) -> Figure:
    """Parameters and FLOPs per token of each phase next to the dense model."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    quantities = (("parameters", "parameters"), ("flops_per_token", "FLOPs per token, forward and backward"))
    for axes, (name, title) in zip(panels, quantities, strict=True):
        counted = costs(run, name)
        styled(axes, title=title)
        axes.grid(visible=False, axis="x")
        labels = [PHASE_LABELS[phase] for phase in counted]
        colours = [{"dense": GREY, "phase_1": GREEN, "phase_2": BLUE}[phase] for phase in counted]
        bars = axes.bar(labels, list(counted.values()), width=0.6, color=colours)
        shares = [f"{magnitude(cost)}\n{cost / counted['dense']:.0%}" for cost in counted.values()]
        axes.bar_label(bars, shares, fontsize=9, padding=2)
        axes.margins(x=0.15, y=0.25)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
    return figure


def throughput_figure(run: Run) -> Figure:
    """Tokens per second of the job, and TFLOP/s of one device."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    columns = (("tokens_per_second", "tokens/s"), ("tflops_per_second", "TFLOP/s per device"))
    for axes, (name, label) in zip(figure.subplots(1, 2), columns, strict=True):
        styled(axes, x="optimizer step", title=label)
        axes.plot(*binned(run.train, name), color=BLUE, linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        _mark_switch(axes, run)
    return figure


def styled(axes: Axes, *, x: str = "", y: str = "", title: str = "") -> Axes:
    """Labels and frame as in every figure of the project; the same axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return axes


def whole_numbers(axes: Axes, *, panels: int) -> None:
    """Ticks at whole numbers, one if there is no other; few along x where many ``panels`` share a line."""
    axes.xaxis.set_major_locator(MaxNLocator(max(2, 9 // panels), integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _mark_switch(axes: Axes, run: Run) -> None:
    if run.switch_step is not None:
        axes.axvline(run.switch_step, color=PURPLE, linestyle="--", linewidth=1.2)
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(run.switch_step, 1.01, "switch", color=PURPLE, fontsize=9, **place)
        axes.set_title(axes.get_title(), fontsize=10, pad=16)


def _spectrum(axes: Axes, record: Record, *, colour: str) -> None:
    values = np.array(_column([{"value": value} for value in record["singular_values"]], "value"))
    total = record.get("singular_value_sum") or np.nansum(values)
    shares = values / total if total > 0 else np.zeros_like(values)
    edges, rank = np.arange(len(shares) + 1) + 0.5, record["rank"]
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
    axes.stairs(shares[:rank], edges[: rank + 1], fill=True, color=colour, alpha=0.9)
    axes.stairs(shares, edges, color=colour, linewidth=1.2)
    explained = record.get("explained_ratio")
    note = f"rank {rank}" + ("" if explained is None else f"\nexplained {explained:.3f}")
    axes.text(0.97, 0.92, note, transform=axes.transAxes, ha="right", va="top", fontsize=9)


def checks(run: Run) -> dict[str, list[Record]]:
    """Per layer, the checks that recorded singular values."""
    layers = {
        layer: [record for record in records if record["event"] == "check" and record.get("singular_values")]
        for layer, records in run.ranks_by_layer().items()
    }
    return {layer: records for layer, records in layers.items() if records}


def _comparable(run: Run) -> bool:
    """Whether both costs are known for the dense model and for a phase to set next to it."""
    counted = [costs(run, name) for name in ("parameters", "flops_per_token")]
    return all("dense" in cost and len(cost) > 1 for cost in counted)


def costs(run: Run, name: str) -> dict[str, float]:
    """``parameters`` or ``flops_per_token`` of each phase that is known."""
    known = run.summary.get(name) or {}
    return {phase: known[phase] for phase in PHASES if known.get(phase) is not None}


def _column(records: list[Record], name: str) -> list[float]:
    """One field of many records; what is unknown, or was not finite, is NaN, which leaves a gap in a plot."""
    return [math.nan if record.get(name) is None else record[name] for record in records]


def binned(records: list[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; a long run is averaged down to ``MOST_POINTS`` so that its report stays small."""
    steps, values = np.array(_column(records, "step")), np.array(_column(records, name))
    bins = -(-len(steps) // MOST_POINTS)
    if bins <= 1:
        return steps, values
    edges = np.arange(0, len(steps), bins)
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def plain(value: float, _: int) -> str:
    return f"{value:,.10g}"


def _exp(loss: Any) -> Any:
    return np.exp(np.clip(loss, -50, 50))


def _log(perplexity: Any) -> Any:
    return np.log(np.clip(perplexity, 1e-20, None))


def _perplexity_ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 and tenfolds) whose logarithms lie between two losses; at most about ten."""
    low, high = max(low, -20.0), min(high, 20.0)
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= math.log(tick) <= high]
    return inside if len(inside) <= 10 else [tick for tick in inside if f"{tick:e}".startswith("1")]
