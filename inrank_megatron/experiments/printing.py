"""What experiments print and where they write: rows as tables, or as JSON."""

import argparse
import json
from pathlib import Path

from inrank_megatron.config.tool_options import path


def add_output_flags(command: argparse.ArgumentParser, *, files: str) -> None:
    """``--json``, and ``--output`` for these files."""
    command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    command.add_argument(
        "--output",
        type=path,
        default=Path("reproduced"),
        metavar="DIR",
        help=f"folder for {files} [reproduced]",
    )


def show(options: argparse.Namespace, rows: list[dict]) -> None:
    """Print the rows as ``--json`` asks."""
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(options.title, rows)


def print_table(title: str, rows: list[dict]) -> None:
    """Markdown, so that a table can go into a document as it is printed."""
    heads = [head.replace("_", " ") for head in rows[0]]
    print(f"{title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(_text(value) for value in row.values())} |")


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
