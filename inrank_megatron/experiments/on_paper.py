"""How an experiment on one of the papers' systems is called: rows, curves and a picture.

Its module is ``inrank_megatron.experiments.NAME`` with ``measure(quick, notify)`` and ``draw(curves)``.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.printing import print_table


def add_flags(command: argparse.ArgumentParser) -> None:
    """The flags of all of them."""
    command.add_argument("--quick", action="store_true", help="a smaller version, below a minute")
    command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("reproduced"),
        metavar="DIR",
        help="folder for NAME.jsonl (rows), NAME_curves.jsonl (points) and NAME.png [reproduced]",
    )


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
    _write(options.output / f"{options.what}.jsonl", found.rows)
    _write(options.output / f"{options.what}_curves.jsonl", found.curves)
    module.draw(found.curves).savefig(options.output / f"{options.what}.png", dpi=150)
    if options.json:
        print(json.dumps(found.rows, indent=1))
    else:
        print_table(options.title, found.rows)


def _write(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
