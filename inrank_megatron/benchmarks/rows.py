"""What a benchmark hands over: rows, as a table for people or as JSON for programs."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date

import torch
from rich.console import Console
from rich.table import Table

from inrank_megatron.distributed.platform import device_name

WIDTH = 150


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        case: what was measured, e.g. ``phase-2 large n=4 T=1024``.
        quantity: of which figure, with its unit; a figure that is not a measurement says so here.
        measured: the figure itself.
        limit: what arithmetic allows or a target asks for; the gap is ``measured / limit``.
        ratio_vs_dense: the figure over that of the dense layer.
        ratio_vs_reference: the figure over that of the plain way of doing the same. None: no meaning here.
    """

    case: str
    quantity: str
    measured: float
    limit: float | None = None
    ratio_vs_dense: float | None = None
    ratio_vs_reference: float | None = None


def to_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON array of objects with the fields of :class:`Row`."""
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False)


def machine() -> str:
    """Device, cores, threads, version of torch and date, in one line."""
    device = device_name()
    if device == "cpu":
        device = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{device}, {cores} cores, {threads} threads, torch {torch.__version__}, {date.today()}"


def print_table(title: str, note: str, rows: Iterable[Row]) -> None:
    """The rows with the machine above and what the columns mean below."""
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for name in ("case", "quantity"):
        table.add_column(name)
    for name in ("measured", "limit", "gap", "over dense", "over reference"):
        table.add_column(name, justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row.case):
            table.add_section()
        gap = row.measured / row.limit if row.limit else None
        ratios = (gap, row.ratio_vs_dense, row.ratio_vs_reference)
        table.add_row(
            row.case if row.case != previous else "",
            row.quantity,
            *(_number(value) for value in (row.measured, row.limit)),
            *("" if ratio is None else f"{ratio:.4g}" for ratio in ratios),
        )
        previous = row.case
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(machine(), highlight=False)
    console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if float(value).is_integer() or abs(value) >= 1e5:
        return f"{round(value):,}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
