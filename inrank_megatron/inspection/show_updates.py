"""A comparison of two models as a table, as JSON and as a figure."""

import json
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from inrank_megatron.inspection.show import table_of_layers, wide_console
from inrank_megatron.inspection.updates import EXACT_UP_TO, LEADING, Comparison, UpdateRow
from inrank_megatron.reporting.plots import BLUE, depth_bar, depth_colours, styled
from inrank_megatron.reporting.run import depth, kind_of

NOTE = (
    "rank: the smallest whose explained ratio of the spectrum of B - A reaches {threshold}, by the criterion "
    "update\nnorm: Frobenius norm of B - A, and relative to that of A"
)
RANDOMISED = (
    f"beyond {EXACT_UP_TO} x {EXACT_UP_TO} only the {LEADING} leading values are computed, by a randomised "
    "method; a rank that does not follow from them is -"
)


def to_json(found: Comparison) -> str:
    """Everything, every computed singular value included."""
    return json.dumps(asdict(found), indent=1, default=str)


def print_updates(found: Comparison, *, leading: int) -> None:
    """One row per linear with its ``leading`` singular values."""
    console = wide_console()
    for name, side in (("A", found.a), ("B", found.b)):
        step = f", step {side.step}" if side.step else ""
        console.print(f"{name}: {side.folder} ({side.format}{step})", highlight=False, soft_wrap=True)
    console.print(_table(found.layers, leading))
    whole = f"norm of B - A relative to that of A, all linears together: {_known(found.relative_norm)}\n"
    notes = [RANDOMISED] if any(not row.exact for row in found.layers) else []
    console.print(
        "\n".join([whole + NOTE.format(threshold=found.threshold), *notes]), highlight=False, soft_wrap=True
    )


def _table(rows: list[UpdateRow], leading: int) -> Table:
    heads = ("layer", "O x I", "rank", "norm", "relative", "singular values of B - A")
    table = table_of_layers(heads)
    for row in rows:
        table.add_row(
            f"{depth(row.layer)} {kind_of(row.layer)}",
            f"{row.shape[0]} x {row.shape[1]}",
            "-" if row.rank is None else str(row.rank),
            f"{row.norm:.3g}",
            _known(row.relative_norm),
            " ".join(f"{value:.3g}" for value in row.singular_values[:leading]),
        )
    return table


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def update_figure(found: Comparison) -> Figure:
    """Ranks by depth above, spectra below, coloured by depth; one column per kind of linear."""
    kinds: dict[str, list[UpdateRow]] = {}
    for row in found.layers:
        kinds.setdefault(kind_of(row.layer), []).append(row)
    deepest = max(depth(row.layer) for row in found.layers)
    colours = depth_colours(deepest)
    figure = Figure(figsize=(4 * len(kinds), 6), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
    for (above, below), (kind, rows) in zip(panels.T, kinds.items(), strict=True):
        ranks = {depth(row.layer): row.rank for row in rows if row.rank is not None}
        above.bar(list(ranks), list(ranks.values()), color=BLUE)
        for row in rows:
            places = np.arange(1, len(row.singular_values) + 1)
            below.plot(places, row.singular_values, color=colours[depth(row.layer)], linewidth=1.2)
        styled(above, x="block", title=kind).xaxis.set_major_locator(MaxNLocator(integer=True))
        styled(below, x="index of the singular value")
    panels[0][0].set_ylabel(f"rank at ratio {found.threshold:g}")
    panels[1][0].set_ylabel("singular value of B - A")
    depth_bar(figure, panels[1], deepest)
    figure.suptitle(f"A: {found.a.folder.name}, B: {found.b.folder.name}")
    return figure
