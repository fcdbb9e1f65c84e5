"""How an experiment on one of the papers' systems is called: rows, curves and a picture.

Its module is ``inrank_megatron.experiments.NAME`` with ``measure(quick, notify)`` and ``draw(curves)``.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from matplotlib.figure import Figure

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.printing import add_output_flags, show


def add_flags(command: argparse.ArgumentParser) -> None:
    """The flags of all of them."""
    command.add_argument("--quick", action="store_true", help="a smaller version")
    add_output_flags(command, files="NAME.jsonl (rows), NAME_curves.jsonl (points) and NAME.png")


def run(options: argparse.Namespace) -> None:
    """Measure in this process, write the files, print the rows.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror}; give another folder") from error
    module = import_module(f"inrank_megatron.experiments.{options.what}")
    found = module.measure(quick=options.quick, notify=partial(print, file=sys.stderr, flush=True))
    rows = options.output / f"{options.what}.jsonl"
    _write(rows, found.rows)
    _write(options.output / f"{options.what}_curves.jsonl", found.curves)
    save(module.draw(found.curves), options.output / f"{options.what}.png", rows=rows)
    show(options, found.rows)


def save(figure: Figure, path: Path, *, rows: Path) -> None:
    """As PNG that says which file of rows is of the same run: its SHA-256, as ``Source``."""
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    figure.savefig(path, dpi=150, metadata={"Source": digest})


def _write(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
