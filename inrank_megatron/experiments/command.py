"""Run an experiment of docs/evidence again; rows go to standard output, progress to standard error."""

import argparse

from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.experiments.registry import EXPERIMENTS


def main(argv: list[str]) -> None:
    """Run one experiment on one process and print its rows. Raises UserError for what a user can correct."""
    complete()
    options = _parse(argv)
    refuse_ranks("reproduce.py")
    options.run(options)


class _List(argparse.Action):
    """Prints the table of experiments, as ``--help`` its page, and ends."""

    def __call__(self, parser, *_):
        width = max(map(len, EXPERIMENTS))
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:{width}}  {experiment.note} ({experiment.source}; {experiment.cost})")
        parser.exit()


def _parse(argv: list[str]) -> argparse.Namespace:
    """The options of an experiment, with its function as ``run`` and a ``title`` for its rows."""
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--list", action=_List, nargs=0, help="list the experiments, with source and cost")
    commands = parser.add_subparsers(dest="what", required=True)
    for name, experiment in EXPERIMENTS.items():
        note = experiment.note
        command = commands.add_parser(name, help=note, description=note, allow_abbrev=False)
        add_flags, run = experiment.how
        add_flags(command)
        command.set_defaults(run=run, title=f"{name}: {note}")
    return parser.parse_args(argv)
