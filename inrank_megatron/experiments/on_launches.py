"""How ``compare`` is called: its runs are processes of their own."""

import argparse
import csv
import json
import sys
from functools import partial

from inrank_megatron.config.tool_options import path
from inrank_megatron.experiments.on_engine import add_multiplier
from inrank_megatron.experiments.printing import print_table


def add_flags(command: argparse.ArgumentParser) -> None:
    """Those of the study, and after ``--`` the launcher's."""
    command.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="folder for the run folders"
    )
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds [1 2 3]")
    rates = [2.5e-3, 5e-3, 1e-2, 2e-2]
    command.add_argument("--rates", type=float, nargs="+", default=rates, help=f"learning rates {rates}")
    command.add_argument(
        "--budget", type=float, default=0.3, help="parameter budget of the methods that have one [0.3]"
    )
    add_multiplier(command)
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


def run(options: argparse.Namespace) -> None:
    """The runs are processes of their own; this one only starts them and reads what they leave."""
    from inrank_megatron.experiments.arms import ARMS
    from inrank_megatron.experiments.compare import Study, curves, measure

    study = Study(
        output=options.output,
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
            print_table(f"{title}:", rows)
