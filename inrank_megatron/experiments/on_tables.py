"""How ``reproduce.py table1 --collect RUNS`` is called: from the records of run folders alone."""

import argparse
import json
import sys
from pathlib import Path

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.printing import print_table
from inrank_megatron.reporting.run import Run, read_run


def add_flags(command: argparse.ArgumentParser) -> None:
    """Where the runs are."""
    command.add_argument(
        "--collect",
        type=Path,
        metavar="RUNS",
        help="a run folder, or a folder of them: finished runs fill the columns of measured values",
    )
    command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")


def run(options: argparse.Namespace) -> None:
    """Print a row for each run of the tables; remarks on folders that fill none go to standard error.

    Raises:
        UserError: there is no run folder, or none that can be read.
    """
    # Imported here: --help needs no planner.
    from inrank_megatron.experiments.paper_runs import rows

    runs, unread = _runs(options.collect) if options.collect else ([], [])
    found, remarks = rows(runs)
    for remark in unread + remarks:
        print(remark, file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(options.title, found)


def _runs(given: Path) -> tuple[list[Run], list[str]]:
    """Of the run folders, and a remark on each that is damaged."""
    runs, remarks = [], []
    for folder in _folders(given):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            if folder == given:
                raise
            remarks.append(f"{error} (left out)")
    return runs, remarks


def _folders(given: Path) -> list[Path]:
    folders = [given] if (given / "config.yaml").is_file() else sorted(given.glob("*/"))
    folders = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if not folders:
        raise UserError(
            f"--collect {given}: no run folder, and none in it; name what --save was given, or its parent"
        )
    return folders
