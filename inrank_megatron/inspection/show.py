"""An inspection as a table, as JSON and as a figure."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from inrank_megatron.errors import UserError
from inrank_megatron.inspection.layers import Inspection, LayerRow
from inrank_megatron.reporting.files import is_there, write_atomically
from inrank_megatron.reporting.page import png
from inrank_megatron.reporting.plots import BLUE, GREY, VERMILION
from inrank_megatron.reporting.run import depth, kind_of

PNG = b"\x89PNG"  # what such a file begins with
WIDTH = 120  # where no terminal has one
MATRICES = {"update": "U V - U0 V0", "product": "U V", "weight": "W"}
NOTE = (
    "ratio: of the spectrum, explained by the rank, by the criterion {criterion}\n"
    "settings: {settings}\n"
    "params, FLOPs: against the dense linear\n"
)
FACTORISED = (
    "untrained: the rank at which the criterion of the authors' released code comes to a rest on "
    "factors of this shape, buffer and threshold, with no data at all"
)
DENSE = "rank: the smallest whose ratio reaches {threshold}; the linears are dense and have no other"


def to_json(found: Inspection) -> str:
    """Everything, every singular value included."""
    return json.dumps(asdict(found) | {"folder": str(found.folder)}, indent=1)


def print_tables(found: Inspection, *, leading: int) -> None:
    """One row per layer with its ``leading`` singular values, then the whole model against the dense one."""
    console = wide_console()
    kinds = " or ".join(sorted({MATRICES[row.spectrum_of] for row in found.layers}))
    headline = f"{found.folder}: {found.method}, step {found.step}, spectra of {kinds}"
    console.print(headline, highlight=False, soft_wrap=True)
    console.print(_layer_table(found.layers, leading))
    console.print(_model_table(found))
    console.print(_note(found), highlight=False)


def wide_console() -> Console:
    """Of the terminal's width, or of ``WIDTH`` where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _note(found: Inspection) -> str:
    settings = (
        "the run's own"
        if found.own_settings
        else "--model-config's or defaults; an export keeps no run's settings"
    )
    last = DENSE if _is_dense(found) else FACTORISED
    return (NOTE + last).format(criterion=found.criterion, settings=settings, threshold=found.threshold)


def _is_dense(found: Inspection) -> bool:
    return all(row.untrained_rank is None for row in found.layers)


def table_of_layers(heads: Sequence[str]) -> Table:
    """Without rows: names on the left, numbers right-aligned, singular values in the last column."""
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, head in zip(table.columns, heads, strict=True):
        column.no_wrap, column.justify, column.min_width = True, "right", len(head)
    table.columns[0].justify = table.columns[-1].justify = "left"
    return table


def _layer_table(rows: list[LayerRow], leading: int) -> Table:
    heads = ("layer", "rank", "untrained", "columns", "ratio", "params", "FLOPs", "spectrum")
    table = table_of_layers(heads)
    for row in rows:
        table.add_row(
            f"{depth(row.layer)} {kind_of(row.layer)}",
            str(row.rank),
            "-" if row.untrained_rank is None else f"{row.untrained_rank:.0f}",
            str(row.columns),
            f"{row.explained_ratio:.3f}",
            _share(row.parameters + row.frozen_parameters, row.dense_parameters),
            _share(row.flops_per_token, row.dense_flops_per_token),
            " ".join(f"{value:.3g}" for value in row.singular_values[:leading]),
        )
    return table


def _model_table(found: Inspection) -> Table:
    table = Table("complete model", "this", "dense", "share", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, own, dense in (
        ("parameters", found.parameters, found.dense_parameters),
        ("FLOPs per token, forward and backward", found.flops_per_token, found.dense_flops_per_token),
    ):
        table.add_row(name, f"{own:,}", f"{dense:,}", _share(own, dense))
    return table


def _share(own: int, dense: int) -> str:
    return f"{own / dense:.0%}"


def check_png(path: Path) -> None:
    """Before weights are read: what is there is replaced only if it is a picture.

    Raises:
        UserError: it is something else, or there is no folder for it.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file as --png")
    if is_there(path):
        with path.open("rb") as file:
            if file.read(len(PNG)) not in (PNG, b""):
                raise UserError(f"{path}: exists and is no PNG file; give another --png")
    elif not path.absolute().parent.is_dir():
        raise UserError(f"{path}: its folder does not exist; make it or give another --png")


def write_figure(figure: Figure, path: Path) -> None:
    """A PNG file, in place of one that is there.

    Raises:
        UserError: the file cannot be written.
    """
    content = png(figure)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --png") from None


def inspection_figure(found: Inspection) -> Figure:
    """Ranks by depth, of factors next to the untrained fixed point, and spectra, one column per kind of
    linear.
    """
    kinds: dict[str, list[LayerRow]] = {}
    for row in found.layers:
        kinds.setdefault(kind_of(row.layer), []).append(row)
    figure = Figure(figsize=(4 * len(kinds), 6), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
    for (above, below), (kind, rows) in zip(panels.T, kinds.items(), strict=True):
        blocks = [depth(row.layer) for row in rows]
        above.bar(blocks, [row.rank for row in rows], color=BLUE, label="rank")
        if not _is_dense(found):
            untrained = [row.untrained_rank for row in rows]
            above.plot(blocks, untrained, color=VERMILION, marker="_", label="untrained")
        above.set(title=kind, xlabel="block")
        for row in rows:
            values = np.array(row.singular_values)
            below.plot(np.arange(1, len(values) + 1), values, color=GREY, linewidth=0.8)
            below.plot(row.rank, values[row.rank - 1], color=BLUE, marker="o", markersize=4)
        below.set(xlabel="index of the singular value")
        for axes in (above, below):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0][0].set_ylabel("rank")
    panels[1][0].set_ylabel("singular value (dot: at the rank)")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"{found.method}, step {found.step}")
    return figure
