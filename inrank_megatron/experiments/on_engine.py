"""How ``teacher`` and ``controls`` are called: trainings of the engine in this process."""

import argparse
import sys
import warnings
from functools import partial
from importlib import import_module

from inrank_megatron.experiments.printing import show


def add_flags(command: argparse.ArgumentParser) -> None:
    """The flags of both."""
    command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds [1 2 3]")
    command.add_argument(
        "--steps", type=int, help="steps of each training, at least up to the first rank check"
    )
    command.add_argument("--only", nargs="+", metavar="NAME", help="names of the variants to run [all]")
    add_multiplier(command)


def add_multiplier(command: argparse.ArgumentParser) -> None:
    """That of the factors' learning rate."""
    note = "learning rate of the factors, as a multiple of that of all other parameters [1]"
    command.add_argument("--factor-lr-multiplier", type=float, default=1.0, metavar="X", help=note)


def run(options: argparse.Namespace) -> None:
    """Run on one process and print the rows."""
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
    show(options, rows)
