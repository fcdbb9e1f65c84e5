"""The command line of the experiments: one subcommand for each claim that is tested."""

import argparse
import json
import sys
import warnings
from functools import partial
from importlib import import_module

NOTES = {
    "teacher": "does InRank find the rank of a linear teacher?",
    "controls": "do learned ranks come from the data, or from settings?",
}


def main(argv: list[str]) -> None:
    """Run one experiment on one process and print its rows. Raises UserError for what a user can mend."""
    options = _parse(argv)
    # Imported here: Megatron-Core and DeepSpeed take seconds, --help and mistakes should not.
    from inrank_megatron.platform import backend, prepare_process

    prepare_process()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from inrank_megatron.parallel import initialise, shutdown

    parallel = initialise(backend=backend(), tensor_model_parallel_size=1)
    module = import_module(f"inrank_megatron.experiments.{options.what}")
    rows = module.measure(
        parallel, options.seeds, only=options.only, steps=options.steps, tell=partial(print, file=sys.stderr)
    )
    shutdown()
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(f"{options.what}: {NOTES[options.what]}", rows)


def _print_table(title: str, rows: list[dict]) -> None:
    """Markdown, so that a table can stand in a document as it is printed."""
    heads = [head.replace("_", " ") for head in rows[0]]
    print(f"{title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(_text(value) for value in row.values())} |")


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, note in NOTES.items():
        command = commands.add_parser(name, help=note, description=note, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
        command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds [1 2 3]")
        command.add_argument("--steps", type=int, help="steps of each training, at least one check's")
        command.add_argument("--only", nargs="+", metavar="NAME", help="these rows' variants, by name [all]")
    return parser.parse_args(argv)
