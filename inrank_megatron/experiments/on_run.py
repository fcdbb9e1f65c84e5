"""How a figure of a run is called, ``reproduce.py figure1 RUN``: from the records of its folder alone."""

import argparse
import json
from pathlib import Path

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.printing import add_output_flags, show
from inrank_megatron.reporting.files import write_atomically
from inrank_megatron.reporting.page import png
from inrank_megatron.reporting.plots import checks, rank_figure, spectrum_figure
from inrank_megatron.reporting.run import Run, depth, kind_of, read_run

MAKERS = {"figure1": spectrum_figure, "figures5to7": rank_figure}


def add_flags(command: argparse.ArgumentParser) -> None:
    """The run and where its figure goes."""
    command.add_argument("run_folder", type=Path, metavar="RUN", help="run folder with a ranks.jsonl")
    add_output_flags(command, files="NAME.jsonl (rows) and NAME.png")


def run(options: argparse.Namespace) -> None:
    """Draw the figure as the run's report does, write it and its rows, print the rows.

    Raises:
        UserError: it is no run folder, its checks recorded no spectra, or the output cannot be written.
    """
    run = read_run(options.run_folder)
    if not checks(run):
        raise UserError(
            f"{options.run_folder}: no rank check with a spectrum is in its ranks.jsonl; name a run of a "
            "method whose ranks grow, after its first check"
        )
    rows = _rows(run)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output / f"{options.what}.png", png(MAKERS[options.what](run)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(options.output / f"{options.what}.jsonl", lines.encode())
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror}; give another folder") from error
    show(options, rows)


def _rows(run: Run) -> list[dict]:
    """One for each layer and check."""
    return [
        {
            "step": record["step"],
            "block": depth(layer),
            "linear": kind_of(layer),
            "rank": record["rank"],
            "explained_ratio": record.get("explained_ratio"),
        }
        for layer, records in checks(run).items()
        for record in records
    ]
