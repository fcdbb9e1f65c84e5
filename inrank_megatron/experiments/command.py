"""Run the experiments behind the evidence again: one subcommand for each claim."""

import argparse
import csv
import json
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks

NOTES = {
    "teacher": "does InRank find the rank of a linear teacher?",
    "controls": "do learned ranks come from the data, or from settings?",
}
COMPARE = "which method learns most, at equal steps and at equal operations?"


def main(argv: list[str]) -> None:
    """Run one experiment on one process and print its rows. Raises UserError for what a user can correct."""
    complete()
    options = _parse(argv)
    refuse_ranks("reproduce.py")
    if options.what == "compare":
        return _compare(options)
    # Imported here: Megatron-Core and DeepSpeed take seconds, --help and mistakes should not.
    from inrank_megatron.distributed.platform import backend, prepare_process

    prepare_process()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from inrank_megatron.distributed.process_groups import initialise, shutdown

    parallel = initialise(backend=backend(), tensor_model_parallel_size=1)
    module = import_module(f"inrank_megatron.experiments.{options.what}")
    rows = module.measure(
        parallel,
        options.seeds,
        only=options.only,
        steps=options.steps,
        multiplier=options.factor_lr_multiplier,
        notify=partial(print, file=sys.stderr),
    )
    shutdown()
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(f"{options.what}: {NOTES[options.what]}", rows)


def _compare(options: argparse.Namespace) -> None:
    """The runs are processes of their own; this one only starts them and reads what they leave."""
    from inrank_megatron.experiments.arms import ARMS
    from inrank_megatron.experiments.compare import Study, curves, measure

    study = Study(
        output=Path(options.output),
        flags=tuple(options.flags),
        rates=tuple(options.rates),
        seeds=tuple(options.seeds),
        budget=options.budget,
        multiplier=options.factor_lr_multiplier,
        jobs=options.jobs,
        notify=partial(print, file=sys.stderr, flush=True),
    )
    tables = measure(study, options.only or list(ARMS), equal_flops=options.equal_flops)
    if options.curves and (points := curves(study)):
        with open(options.curves, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(points[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(points)
    if options.json:
        print(json.dumps(tables, indent=1))
        return
    for title, rows in tables.items():
        if rows:
            _print_table(f"{title}:", rows)


def _print_table(title: str, rows: list[dict]) -> None:
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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, note in NOTES.items():
        command = commands.add_parser(name, help=note, description=note, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
        command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds [1 2 3]")
        command.add_argument(
            "--steps", type=int, help="steps of each training, at least up to the first rank check"
        )
        command.add_argument("--only", nargs="+", metavar="NAME", help="names of the variants to run [all]")
        _add_multiplier(command)
    _add_compare(commands)
    return parser.parse_args(argv)


def _add_multiplier(command: argparse.ArgumentParser) -> None:
    note = "learning rate of the factors, as a multiple of that of all other parameters [1]"
    command.add_argument("--factor-lr-multiplier", type=float, default=1.0, metavar="X", help=note)


def _add_compare(commands) -> None:
    command = commands.add_parser("compare", help=COMPARE, description=COMPARE, allow_abbrev=False)
    command.add_argument("--output", required=True, metavar="DIR", help="folder for the run folders")
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds [1 2 3]")
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    command.add_argument("--rates", type=float, nargs="+", default=rates, help=f"learning rates {rates}")
    command.add_argument(
        "--budget", type=float, default=0.3, help="parameter budget of the methods that have one [0.3]"
    )
    _add_multiplier(command)
    command.add_argument("--only", nargs="+", metavar="ARM", help="names of the methods to run [all]")
    command.add_argument(
        "--equal-flops",
        action="store_true",
        help="also train for as many steps as have the FLOPs of the dense run",
    )
    command.add_argument(
        "--curves",
        metavar="FILE.csv",
        help="write the validation losses of all finished runs",
    )
    command.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; 0: only print the results that exist [1]"
    )
    command.add_argument("flags", nargs="+", help="flags of the launcher for every run, after --")
