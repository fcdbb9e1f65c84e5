"""What ``tools/inspect_ranks.py`` prints."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from inrank_megatron.inspection import show, show_updates
from inrank_megatron.inspection.layers import inspect
from inrank_megatron.inspection.updates import compare
from inrank_megatron.interop.core.options import Options
from inrank_megatron.reporting.console import unless_nobody_reads
from inrank_megatron.reporting.untrained import PAPER_THRESHOLDS, PAPER_WIDTHS, untrained_table


def print_model(path: Path, options: Options, *, leading: int, as_json: bool, png: Path | None) -> None:
    """Ranks of a model in any known format; what else is to be said goes to stderr."""
    if png:
        show.check_png(png)
    found = inspect(path, options)
    _say(found.notes)
    if png:
        show.write_figure(show.inspection_figure(found), png)
    with unless_nobody_reads():
        if as_json:
            print(show.to_json(found))
        else:
            show.print_tables(found, leading=leading)


def print_comparison(
    a: Path, b: Path, options: Options, *, leading: int, as_json: bool, png: Path | None
) -> None:
    """The cumulative update from model ``a`` to model ``b``; what else is to be said goes to stderr."""
    if png:
        show.check_png(png)
    found = compare(a, b, options)
    _say(found.notes)
    if png:
        show.write_figure(show_updates.update_figure(found), png)
    with unless_nobody_reads():
        if as_json:
            print(show_updates.to_json(found))
        else:
            show_updates.print_updates(found, leading=leading)


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


def print_untrained(
    widths: Sequence[int] | None, thresholds: Sequence[float] | None, *, as_json: bool
) -> None:
    """Ranks of untrained factors; None: the widths and thresholds of the paper's table 3."""
    rows = untrained_table(widths or PAPER_WIDTHS, thresholds or PAPER_THRESHOLDS)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0], title="untrained factors, criterion released")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
